"""``qlt estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import Shared, Size, examples, reporting
from qlora_tools.cli.words import megabytes

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.verbs.estimate import EstimateResult

EPILOG = examples(
    "qlt estimate base/",
    "qlt estimate llama-65b.json --rank 64 --length 512 --train-batch 4",
    "qlt estimate org/name --prompt 4096 --new 512 --batch 8 --json",
    "qlt estimate org/name --fits 24GB",
    "qlt estimate base/ --device cpu",
)
_COUNT = click.IntRange(min=1)


@click.command("estimate", epilog=EPILOG)
@click.argument("model")
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="Sequences written at once.")
@click.option("--prompt", type=_COUNT, default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--new", type=_COUNT, default=128, show_default=True, help="Tokens written behind it.")
@click.option("--rank", type=_COUNT, default=16, show_default=True, help="Of the LoRA that is trained, on all linears.")
@click.option("--train-batch", type=_COUNT, default=1, show_default=True, help="Rows of a training step.")
@click.option("--length", type=_COUNT, default=512, show_default=True, help="Tokens of each row.")
@click.option(
    "--fits",
    type=Size(needs_unit=True),
    metavar="SIZE",
    help="Memory to fill, like 24GB: says which settings run in it, with the largest batch and context of each.",
)
@reporting
def command(common: Shared, model: str, fits: int | None, **choices: int) -> None:
    """Say what MODEL would take in every setting: files, memory to run and to train. MODEL is a config.json, a folder or a hub id; no weight is read.

    On CUDA, whatever is here, unless --device cpu is given.
    """
    from qlora_tools import api

    device = "cuda" if common.device == "auto" else common.device
    found = api.estimate(model=model, config=api.EstimateConfig(**choices), device=device, fits=fits, progress=common.screen.progress)
    screen = common.screen
    screen.say(f"{found.model}: {found.parameters / 1e9:.2f} B parameters")
    screen.table("transformers", ["base", "file", "weights", "cache", "running, peak", "LoRA training, peak", "without checkpointing"], _bases(found))
    if found.graphs:
        screen.table("ONNX graphs", ["scheme", "device", "file", "cache", "running, peak", "rests on"], _graphs(found), left=2)
    elif found.no_graph:
        screen.remark(f"note: no graphs: {found.no_graph}")
    if found.published:
        rows = [(row.about, megabytes(row.nbytes), _ours(found, row.setting, row.column), row.source) for row in found.published]
        screen.table(f"published about {found.published[0].model}, by others", ["what", "published", "ours here", "source"], rows)
        for remark in dict.fromkeys(row.remark for row in found.published if row.remark):
            screen.remark(f"note: {remark}")
    _say_fits(screen, found)
    config = found.config
    screen.say(
        f"running: {config.batch} x ({config.prompt} + {config.new}) tokens; training: rank {config.rank}, {config.train_batch} x {config.length} tokens, "
        f"{'the allocator on CUDA, without the context; not measured on a GPU' if found.device.startswith('cuda') else 'resident set of the process'}"
    )
    screen.result(found)
    common.report(found)


def _bases(found: EstimateResult) -> list[tuple[str, ...]]:
    return [
        (row.setting, *map(megabytes, (row.file_bytes, row.weights_bytes, row.cache_bytes, row.running_bytes, row.training_bytes, row.plain_training_bytes)))
        for row in found.in_memory
    ]


def _graphs(found: EstimateResult) -> list[tuple[str, ...]]:
    return [
        (
            row.setting,
            row.device,
            megabytes(row.file_bytes),
            megabytes(row.cache_bytes),
            "n/a" if row.peak_bytes is None else megabytes(row.peak_bytes),
            row.basis,
        )
        for row in found.graphs
    ]


def _ours(found: EstimateResult, setting: str | None, column: str | None) -> str:
    """Our figure beside a published one, where there is one of the same thing."""
    row = next((row for row in found.in_memory if row.setting == setting), None)
    return (
        "" if row is None or column is None else megabytes({"weights": row.weights_bytes, "running": row.running_bytes, "training": row.training_bytes}[column])
    )


def _say_fits(screen: Screen, found: EstimateResult) -> None:
    if found.limit_bytes is None:
        return
    rows = [
        (
            row.setting,
            row.kind,
            megabytes(row.file_bytes),
            megabytes(row.peak_bytes),
            str(row.batch or "none"),
            str(row.context or "none"),
        )
        for row in found.fits
    ]
    title = f"running within {megabytes(found.limit_bytes)}"
    lengths = f"{found.config.prompt} + {found.config.new}"
    screen.table(title, ["setting", "by", "file", "peak, batch 1", f"most sequences of {lengths}", "longest context, batch 1"], rows, left=2)
    if not any(row.batch for row in found.fits):
        screen.remark(f"note: nothing runs within {megabytes(found.limit_bytes)}, not even one sequence of {lengths} tokens")
