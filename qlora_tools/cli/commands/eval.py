"""``qlt eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import Shared, examples, shared

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.quality.intervals import Interval
    from qlora_tools.verbs.syntax import JudgedSyntax

EPILOG = examples(
    "qlt eval base/ tuned/",
    "qlt eval exports/tuned-int8 --against tuned/ --text heldout.txt",
    "qlt eval checkpoints/base-nf4 --against base/ --tokens 4096",
    "qlt eval base/ tuned/ --adapter adapters/tuned-r8 --task python-syntax",
)


@click.command("eval", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="Adapter to judge on the first of MODELS, as one more row: a PEFT folder, or the name of one that an export keeps; repeat for several.",
)
@click.option("--against", metavar="MODEL", help="The reference: of KL divergence and top-1 agreement, or of the difference in shares.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to judge on. Default: the held-out part of Python's own language reference. With --task: prompts, jsonl {prompt} or a .py file.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=16_384, show_default=True, help="Tokens to score at most.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens per window; windows do not overlap.")
@click.option("--task", type=click.Choice(["python-syntax"]), help="Judge by what is written: the share of continued Python functions that parse.")
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="Functions to continue, with --task.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens per continuation at most, with --task.")
@shared
def command(
    common: Shared,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    against: str | None,
    text: Path | None,
    tokens: int,
    context: int,
    task: str | None,
    prompts: int,
    new_tokens: int,
) -> None:
    """Measure perplexity of MODELS (checkpoints, exports, hub ids), and how far they are from a reference; or how often they write Python."""
    screen = common.screen
    if common.dry_run:
        judged = ", ".join([*models, *(f"{models[0]} + {adapter}" for adapter in adapters)])
        record = {"models": list(models), "adapters": list(adapters), "against": against, "task": task or "perplexity"}
        screen.result(record, f"would judge {judged}{f' against {against}' if against else ''}{f' by {task}' if task else ''}")
        return
    arguments = {"models": models, "adapters": adapters, "against": against, "text": text, "device": common.device, "progress": screen.progress}
    if task:
        result = _syntax(screen, {**arguments, "prompts": prompts, "new_tokens": new_tokens})
    else:
        result = _perplexity(screen, {**arguments, "tokens": tokens, "context": context})
    screen.result(result)
    if common.output:
        from qlora_tools.cli.main import as_plain

        common.output.write_text(json.dumps(as_plain(result), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _perplexity(screen: Screen, arguments: dict[str, Any]) -> Any:
    from qlora_tools import api

    result, against = api.evaluate(**arguments), bool(arguments["against"])
    columns = ["model", "perplexity", "95 %"] + (["KL mean", "95 %", "KL p99", "top-1"] if against else [])
    screen.table("", columns, [_row(judged, against) for judged in result.models])
    screen.say(f"{result.corpus} ({result.corpus_sha256[:12]}), {result.n_tokens} tokens, {result.method}")
    return result


def _syntax(screen: Screen, arguments: dict[str, Any]) -> Any:
    from qlora_tools import api

    result = api.evaluate_syntax(**arguments)
    compared = len(result.models) > 1
    columns = ["model", "parses", "95 %", "cut, right so far", "broken", "empty"] + (["difference", "95 %", "McNemar p"] if compared else [])
    screen.table("", columns, [_syntax_row(judged, compared) for judged in result.models])
    against = f", differences from {result.reference}" if compared else ""
    skipped = f" ({result.skipped} too long for a model's context were passed over)" if result.skipped else ""
    screen.say(
        f"{result.n_prompts} prompts: {result.prompts} ({result.prompts_sha256[:12]}){skipped}, greedy, at most {result.new_tokens} new tokens{against}; nothing is run"
    )
    return result


def _syntax_row(judged: JudgedSyntax, compared: bool) -> list[str]:
    share, counts = judged.result.share, judged.result.counts
    cells = [judged.name, f"{100 * share.value:.1f} %", _percent(share), *(str(counts[outcome]) for outcome in ("open", "broken", "empty"))]
    if compared and judged.against is None:
        cells += ["", "", ""]
    elif judged.against is not None:
        cells += [f"{100 * judged.against.difference.value:+.1f} points", _percent(judged.against.difference), f"{judged.against.p_value:.3g}"]
    return cells


def _percent(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} - {100 * interval.high:.1f}" if interval.low is not None and interval.high is not None else ""


def _row(judged: object, referenced: bool) -> list[str]:
    from qlora_tools.verbs.evaluate import Judged

    assert isinstance(judged, Judged)
    cells = [judged.name, f"{judged.perplexity:.3f}", f"{judged.ci95[0]:.3f} - {judged.ci95[1]:.3f}" if judged.ci95 else ""]
    if referenced:
        interval = judged.figures["ci95"]["kl_mean"]
        cells += [
            f"{judged.figures['kl_mean']:.5f}",
            f"{interval[0]:.5f} - {interval[1]:.5f}" if interval else "",
            f"{judged.figures['kl_p99']:.4f}",
            f"{100 * judged.figures['top1_agreement']:.2f} %",
        ]
    return cells
