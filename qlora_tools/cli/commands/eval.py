"""``qlt eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import Shared, examples, reporting
from qlora_tools.errors import UsageError

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.quality.intervals import Interval
    from qlora_tools.verbs.evaluate import EvalResult, Judged
    from qlora_tools.verbs.evaluate_outputs import OutputsResult
    from qlora_tools.verbs.syntax import JudgedSyntax

#: Of models that look once: heading, figure, how it is written.
_OUTPUT_COLUMNS = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("difference", "accuracy_difference", "{:+.2%}"),
    ("cosine", "cosine_mean", "{:.5f}"),
    ("relative error", "relative_error", "{:.5f}"),
    ("KL mean", "kl_mean", "{:.5f}"),
    ("top-1", "top1_agreement", "{:.2%}"),
)
_METRICS = {"kl": "KL", "error": "relative error"}

EPILOG = examples(
    "qlt eval base/ tuned/",
    "qlt eval exports/tuned-int8 --against tuned/ --text heldout.txt",
    "qlt eval checkpoints/base-nf4 --against base/ --tokens 4096",
    "qlt eval checkpoints/merged-nf4 --against merged-16bit/ --against 'base-nf4 + adapters/tuned-r8'",
    "qlt eval exports/bert-int8 --against bert/ --labels reviews.jsonl",
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
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="The reference of KL divergence and top-1 agreement; repeat for several, 'BASE + ADAPTER' leaves an adapter unmerged. With --task: of the difference.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to judge on. Default: the held-out part of Python's own language reference. With --task: prompts, jsonl {prompt} or a .py file.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    help="Right answers for a classifier: a file of {text, label} lines, or a folder with images in folders of their classes.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=16_384, show_default=True, help="Tokens to score at most.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens per window; windows do not overlap.")
@click.option("--task", type=click.Choice(["python-syntax"]), help="Judge by what is written: the share of continued Python functions that parse.")
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="Functions to continue, with --task.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens per continuation at most, with --task.")
@reporting
def command(
    common: Shared,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    against: tuple[str, ...],
    text: Path | None,
    labels: Path | None,
    tokens: int,
    context: int,
    task: str | None,
    prompts: int,
    new_tokens: int,
) -> None:
    """Measure perplexity of MODELS (checkpoints, exports, hub ids), and how far they are from a reference; or how often they write Python.

    Models that do not write (encoders, classifiers of text or images, denoising networks) are measured by their outputs: cosine, relative error, the
    divergence and agreement of their classes, and with --labels how often they are right.
    """
    screen = common.screen
    if task and (labels or len(against) > 1):
        raise UsageError("--task takes no --labels, and one --against", hint="leave the others out, or run once for each")
    if common.dry_run:
        judged = ", ".join([*models, *(f"{models[0]} + {adapter}" for adapter in adapters)])
        record = {"models": list(models), "adapters": list(adapters), "against": list(against), "labels": labels and str(labels), "task": task or "perplexity"}
        said = f" against {' and '.join(against)}" if against else ""
        screen.result(record, f"would judge {judged}{said}{f' by {task}' if task else ''}{f' on {labels}' if labels else ''}")
        return
    arguments = {"models": models, "adapters": adapters, "text": text, "device": common.device, "progress": screen.progress}
    if task:
        result = _syntax(screen, {**arguments, "against": against[0] if against else None, "prompts": prompts, "new_tokens": new_tokens})
    else:
        result = _evaluate(screen, {**arguments, "against": against, "labels": labels, "tokens": tokens, "context": context})
    screen.result(result)
    common.report(result)


def _evaluate(screen: Screen, arguments: dict[str, Any]) -> Any:
    from qlora_tools import api

    result = api.evaluate(**arguments)
    if isinstance(result, api.OutputsResult):
        _show_outputs(screen, result)
        return result
    against = len(result.references)
    columns = ["model", *(["against"] if against > 1 else []), "perplexity", "95 %"] + (["KL mean", "95 %", "KL p99", "top-1"] if against else [])
    screen.table("", columns, [row for judged in result.models for row in _rows(judged, result)])
    screen.say(f"{result.corpus} ({result.corpus_sha256[:12]}), {result.n_tokens} tokens, {result.method}")
    return result


def _show_outputs(screen: Screen, result: OutputsResult) -> None:
    """Models that look once: a row for each and each of its references."""
    rows = [
        (judged, name, figures)
        for judged in result.models
        for name, figures in [(result.reference, judged.figures), *((name, found) for name, found in judged.further.items())]
    ]
    shown = [column for column in _OUTPUT_COLUMNS if any(column[1] in figures for _, _, figures in rows)]
    columns = ["model", *(["against"] if len(result.references) > 1 else []), *(title for heading, _, _ in shown for title in (heading, "95 %"))]
    table = []
    for judged, name, figures in rows:
        cells = [judged.name, *([str(name)] if len(result.references) > 1 else [])]
        for _, figure, form in shown:
            bounds = figures["ci95"].get(figure)
            cells += [form.format(figures[figure]) if figure in figures else "", f"{form.format(bounds[0])} - {form.format(bounds[1])}" if bounds else ""]
        table.append(cells)
    screen.table("", columns, table)
    screen.say(f"{result.corpus}{f' ({result.corpus_sha256[:12]})' if result.corpus_sha256 else ''}, {result.n_inputs} inputs, {result.method}")
    for judged in result.models:
        if judged.verdict is not None:
            screen.say(f"{judged.name}: {'a tie with' if judged.verdict == 'tie' else f'{judged.verdict} than'} {result.reference} in accuracy")
    for pair in result.comparisons:
        tie = pair["verdict"] in ("tie", "unknown")
        screen.say(f"{pair['a']} and {pair['b']} {'cannot be told apart' if tie else 'differ'} in {_METRICS.get(pair['metric'], pair['metric'])}")


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


def _rows(judged: Judged, result: EvalResult) -> list[list[str]]:
    """One row, or one for each of several references."""
    perplexity = [f"{judged.perplexity:.3f}", f"{judged.ci95[0]:.3f} - {judged.ci95[1]:.3f}" if judged.ci95 else ""]
    if not result.references:
        return [[judged.name, *perplexity]]
    several = len(result.references) > 1
    found = {str(result.reference): judged.figures, **judged.further}
    return [[judged.name, *([name] if several else []), *perplexity, *_divergence(figures)] for name, figures in found.items()]


def _divergence(figures: Mapping[str, Any]) -> list[str]:
    interval = figures["ci95"]["kl_mean"]
    return [
        f"{figures['kl_mean']:.5f}",
        f"{interval[0]:.5f} - {interval[1]:.5f}" if interval else "",
        f"{figures['kl_p99']:.4f}",
        f"{100 * figures['top1_agreement']:.2f} %",
    ]
