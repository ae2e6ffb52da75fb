"""``qlt estimate``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import megabytes

EPILOG = examples(
    "qlt estimate base/",
    "qlt estimate llama-65b.json --rank 64 --length 512 --train-batch 4",
    "qlt estimate org/name --prompt 4096 --new 512 --batch 8 --json",
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
@shared
def command(common: Shared, model: str, **choices: int) -> None:
    """Say what MODEL would take in every setting: files, memory to run and to train. MODEL is a config.json, a folder or a hub id; no weight is read."""
    from qlora_tools import api

    device = "cuda" if common.device == "auto" else common.device
    found = api.estimate(model=model, config=api.EstimateConfig(**choices), device=device, progress=common.screen.progress)
    screen, config = common.screen, found.config
    screen.say(f"{found.model}: {found.parameters / 1e9:.2f} B parameters")
    rows = [
        (row.setting, *map(megabytes, (row.file_bytes, row.weights_bytes, row.cache_bytes, row.running_bytes, row.training_bytes, row.plain_training_bytes)))
        for row in found.in_memory
    ]
    screen.table("transformers", ["base", "file", "weights", "cache", "running, peak", "LoRA training, peak", "without checkpointing"], rows)
    graphs = [(row.setting, row.device, megabytes(row.file_bytes), megabytes(row.cache_bytes)) for row in found.graphs]
    if graphs:
        screen.table("ONNX graphs", ["scheme", "device", "file", "cache"], graphs, left=2)
    elif found.no_graph:
        screen.remark(f"note: no graph sizes: {found.no_graph}")
    screen.say(
        f"running: {config.batch} x ({config.prompt} + {config.new}) tokens; training: rank {config.rank}, {config.train_batch} x {config.length} tokens, "
        f"{'the allocator on CUDA, without the context' if found.device == 'cuda' else 'resident set of the process'}"
    )
    screen.result(found)
