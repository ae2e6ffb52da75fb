"""``qlt generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import HeadedCommand, Shared, examples, headed, reporting
from qlora_tools.cli.words import plural, printable
from qlora_tools.errors import MissingError, UsageError

if TYPE_CHECKING:
    from qlora_tools.verbs.generate import Answer, GenerateResult

EPILOG = examples(
    'qlt generate "def fibonacci(n):"           # the last export of this folder',
    'qlt generate exports/tuned-int8 "Once upon a time" --new 200 --temperature 0.8 --top-p 0.95',
    'qlt generate exports/base-int4 --adapter poems --adapter code "Write about rain" --chat',
    "cat question.txt | qlt generate exports/tuned-int8 - --sample --seed 7",
)

#: A name that is longer is no folder, and asking the file system for it is an error.
_LONGEST_PATH = 200
_text = headed("Text")
_choice = headed("Choice of tokens (default: the likeliest each time)")


@click.command("generate", cls=HeadedCommand, epilog=EPILOG)
@click.argument("words", nargs=-1, metavar="[EXPORT] PROMPT")
@_text("--file", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the prompt from a UTF-8 file.")
@_text("--adapter", "adapters", multiple=True, metavar="NAME|FILE", help="Adapter of the export, or an .onnx_adapter file; repeat to hear one after the other.")
@_text("--new", type=click.IntRange(min=1), default=128, show_default=True, help="New tokens at most.")
@_text("--stop", multiple=True, metavar="TEXT", help="End before this text; repeat for several. The model's own end always counts.")
@_text("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@_text("--system", metavar="TEXT", help="System text of the chat.")
@_choice("--sample", is_flag=True, help="Draw tokens, by the model's own settings where it has some.")
@_choice("--temperature", type=click.FloatRange(min=0), help="Draw tokens; below 1 the likely ones more often, 0: the likeliest.")
@_choice("--top-k", type=click.IntRange(min=0), help="Draw among the K likeliest; 0: among all.")
@_choice("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), help="Draw among the fewest that hold this share of probability.")
@_choice("--min-p", type=click.FloatRange(min=0, max=1), help="Draw among those at least this share as likely as the likeliest.")
@_choice("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: words of the text so far become less likely.")
@_choice("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed draws the same text.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads. Default: all cores.")
@reporting
def command(common: Shared, words: tuple[str, ...], file: Path | None, new: int, **options: Any) -> None:
    """Let EXPORT (default: the last one) continue PROMPT; `-` reads it from standard input. The text appears as it is written."""
    export, prompt = _sources(common, words, file)
    from qlora_tools import api

    voice = _Voice(common, several=len(options["adapters"]) > 1)
    result = api.generate(model=export, prompt=prompt, new_tokens=new, device=common.device, dry_run=common.dry_run, listener=voice.hear, **options)
    if common.dry_run:
        common.screen.result(result, f"dry run: would continue {plural(result.prompt_tokens, 'token')} with {export} on {result.device}")
        return
    voice.end()
    for answer in result.answers:
        common.screen.remark(_figures(result, answer))
    if common.screen.as_json:
        common.screen.result(result)
    common.report(result)


class _Voice:
    """Standard output while text comes; headings only where several adapters speak."""

    def __init__(self, common: Shared, several: bool) -> None:
        self._silent = common.screen.as_json
        self._several, self._speaker, self._spoken = several, object(), False

    def hear(self, adapter: str | None, piece: str) -> None:
        if self._silent:
            return
        if self._several and adapter != self._speaker:
            click.echo("\n" * 2 * self._spoken + f"== {adapter} ==")
        self._speaker, self._spoken = adapter, True
        click.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
        sys.stdout.flush()

    def end(self) -> None:
        if not self._silent:
            click.echo()


def _sources(common: Shared, words: tuple[str, ...], file: Path | None) -> tuple[str, str]:
    """The export and the prompt.

    Raises:
        UsageError: no prompt, two prompts, or no export given and none remembered.
    """
    most = 1 if file else 2
    if len(words) > most:
        raise UsageError(f"{len(words)} words, at most {most} are taken", hint="put the prompt into quotes" if not file else "give the prompt once")
    if file:
        from qlora_tools.live.tokenizer import read_utf8

        prompt: str | None = read_utf8(file)
    else:
        words, prompt = words[:-1], words[-1] if words else None
    if prompt is None or (not words and not file and len(prompt) < _LONGEST_PATH and (Path(prompt) / "model.onnx").is_file()):
        raise UsageError("no prompt given", hint='qlt generate EXPORT "text", --file FILE, or - for standard input')
    if prompt == "-" and not file:
        prompt = _stdin()
    if words:
        return words[0], prompt
    export = str(common.session.pick("exports", "EXPORT")[-1]["path"])
    common.screen.remark(f"using {export}")
    return export, prompt


def _stdin() -> str:
    content: bytes = sys.stdin.buffer.read()
    if not content:
        raise MissingError("standard input is empty", hint="pipe the prompt in")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error


def _figures(result: GenerateResult, answer: Answer) -> str:
    ended = {"stop": "the model ended it", "stop text": "a stop text ended it", "length": "cut at --new", "context": "cut at the model's context"}[
        answer.finish
    ]
    speed = f", then {answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else ""
    who = f"{answer.adapter}: " if answer.adapter else ""
    return (
        f"{who}{plural(len(answer.tokens), 'token')} after {plural(result.prompt_tokens, 'token')} of prompt, {ended}; "
        f"loaded in {result.load_s:.1f} s, first token after {answer.first_token_s:.2f} s{speed}"
    )
