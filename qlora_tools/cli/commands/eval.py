"""``qlt eval``."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_tools.cli.options import Shared, examples, shared

EPILOG = examples(
    "qlt eval base/ tuned/", "qlt eval exports/tuned-int8 --against tuned/ --text heldout.txt", "qlt eval checkpoints/base-nf4 --against base/ --tokens 4096"
)


@click.command("eval", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True)
@click.option("--against", metavar="MODEL", help="The reference for KL divergence and top-1 agreement.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to judge on. Default: the held-out part of Python's own language reference.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=16_384, show_default=True, help="Tokens to score at most.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens per window; windows do not overlap.")
@shared
def command(common: Shared, models: tuple[str, ...], against: str | None, text: Path | None, tokens: int, context: int) -> None:
    """Measure perplexity of MODELS (checkpoints, exports, hub ids), and how far they are from a reference."""
    from qlora_tools import api

    screen = common.screen
    if common.dry_run:
        screen.result({"models": list(models), "against": against}, f"would judge {', '.join(models)}{f' against {against}' if against else ''}")
        return
    result = api.evaluate(models=models, against=against, text=text, tokens=tokens, context=context, device=common.device, progress=screen.progress)
    columns = ["model", "perplexity", "95 %"] + (["KL mean", "95 %", "KL p99", "top-1"] if against else [])
    screen.table("", columns, [_row(judged, bool(against)) for judged in result.models])
    screen.say(f"{result.corpus} ({result.corpus_sha256[:12]}), {result.n_tokens} tokens, {result.method}")
    screen.result(result)
    if common.output:
        import json

        from qlora_tools.cli.main import as_plain

        common.output.write_text(json.dumps(as_plain(result), indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
