"""``qlt merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import HeadedCommand, Shared, adapters_option, examples, headed, shared, weighted
from qlora_tools.cli.words import megabytes, percent, plural

if TYPE_CHECKING:
    from qlora_tools.verbs.merge import MergeResult, TensorRetention

EPILOG = examples(
    "qlt merge --base base/ --adapter adapters/tuned-r16",
    "qlt merge --base base/ --adapter x --adapter y=0.5 -o both/",
    "qlt merge --nf4                      # base and adapter of the step before, requantized",
    "qlt merge --base base-nf4/ --adapter x --nf4 --text heldout.txt",
    "qlt merge --base base/ --adapter x --nf4 --heal --teacher tuned/ --heal-text text.txt",
)
_rounding, _healing = headed("Rounding"), headed("Healing")


@click.command("merge", epilog=EPILOG, cls=HeadedCommand)
@click.option("--base", metavar="MODEL", help="The model to merge into: folder or hub id. Default: the last one used.")
@adapters_option
@click.option("--nf4", "scheme", flag_value="nf4", help="Store the result in NF4 with double quantization.")
@click.option("--int8", "scheme", flag_value="int8", help="Store the result in int8.")
@_rounding(
    "--method",
    type=click.Choice(["auto", "requant", "keep-grid", "residual"]),
    default="auto",
    show_default=True,
    help="requant: fresh scales, from the 16-bit weights. keep-grid: the scales of a base that is quantized. residual: what is lost as a small adapter "
    "beside the result. auto: what the base allows.",
)
@_rounding(
    "--target",
    type=click.Choice(["original", "trained"]),
    help="original: W + BA. trained: Q(W) + BA, what an adapter on a quantized base was. Default: as the base and the adapters are.",
)
@_rounding("--calib", metavar="TEXT", help="Weigh inputs by this text, or by a file of `qlt calibrate`; also: self, builtin.")
@_rounding("--branch-rank", type=click.IntRange(1), default=8, show_default=True, help="Rank of the adapter that --method residual leaves.")
@_rounding("--text", metavar="FILE", help="Measure the gain kept end to end on this text.")
@_rounding("--anyway", is_flag=True, help="Store also what would lose most of the adapter, or count a correction twice.")
@_healing("--heal", "heal", type=click.IntRange(1), metavar="STEPS", is_flag=False, flag_value=60, help="Train A and B through the rounding first. [60]")
@_healing("--teacher", metavar="MODEL", help="What healing learns from: the original fine-tune. Default: base and adapter, unmerged.")
@_healing("--heal-text", metavar="TEXT", help="The text that healing runs over; also: self, builtin. Default: self.")
@shared
def command(
    common: Shared,
    base: str | None,
    adapters: tuple[str, ...],
    scheme: str | None,
    method: str,
    target: str | None,
    calib: str | None,
    branch_rank: int,
    text: str | None,
    anyway: bool,
    heal: int | None,
    teacher: str | None,
    heal_text: str | None,
) -> None:
    """Merge adapters into a checkpoint, dense or quantized, and print how much of the adapter survives."""
    from qlora_tools import api

    base, chosen = common.base_and_adapters(base, weighted(adapters))
    if heal is None and (teacher or heal_text):
        raise click.UsageError("--teacher and --heal-text are about --heal")
    healing = api.HealConfig(steps=heal, teacher=teacher, text=heal_text or "self") if heal else None
    config = api.MergeConfig(method=method, target=target, calib=calib, text=Path(text) if text else None, branch_rank=branch_rank, anyway=anyway, heal=healing)
    result = api.merge(base=base, adapters=chosen, scheme=scheme, config=config, **common.arguments)
    _say(common, result)
    if not result.dry_run:
        common.session.remember(model=str(result.output))
    common.screen.result(result, common.written(result.output, result.seconds))


def _by_kind(tensors: tuple[TensorRetention, ...]) -> list[str]:
    """A line per kind of layer: the share that survives, from the least to the most, and the layer that keeps least."""
    kinds: dict[str, list[TensorRetention]] = {}
    for row in tensors:
        kinds.setdefault(".".join(row.name.split(".")[-2:]), []).append(row)
    lines = []
    for kind, rows in sorted(kinds.items()):
        least, most = min(rows, key=lambda row: row.retention), max(rows, key=lambda row: row.retention)
        zone = "" if least.dead_zone is None else f", {least.dead_zone:.2f} of half a step"
        lines.append(
            f"  {kind}: {percent(least.retention)} to {percent(most.retention)} (least {least.name}{zone})"
            if len(rows) > 1
            else f"  {least.name}: {percent(least.retention)}{zone}"
        )
    return lines


def _bounds(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95 %: {percent(interval[0])} to {percent(interval[1])})"


def _say(common: Shared, result: MergeResult) -> None:
    """The result in words."""
    screen = common.screen
    way = f" by {result.method}" if result.method else ""
    screen.say(f"{plural(result.changed_tensors, 'tensor')} changed, merged onto the {result.target} weights{way}, {megabytes(result.stored_bytes)}")
    if (kept := result.retention) is not None:
        zone = "" if kept.dead_zone is None else f", {kept.dead_zone:.2f} of half a step of the grid"
        screen.say(f"size of the change ||D|| / ||W||: {'all of it' if kept.delta_ratio is None else percent(kept.delta_ratio)}{zone}")
        screen.say(f"share of it that survives storing: {percent(kept.retention)} (noise added: {kept.noise:.2f} ||D||)")
        for line in _by_kind(result.tensors):
            screen.say(line)
        if kept.output_retention is not None:
            screen.say(f"of what it does to outputs: {percent(kept.output_retention)} (noise added: {kept.output_noise:.2f})")
    if result.healed is not None:
        screen.say(f"healed in {result.healed.best_step} steps: KL to the teacher {result.healed.start_kl:.4f} -> {result.healed.end_kl:.4f}")
    if result.branch is not None:
        screen.say(f"what was lost, as an adapter: {common.session.relative(result.branch)}")
    if (gain := result.gain) is not None:
        screen.say(f"perplexity of base, unmerged, merged: {gain.ppl_base:.2f}, {gain.ppl_unmerged:.2f}, {gain.ppl_merged:.2f}")
        screen.say(f"gain kept end to end: {percent(gain.kept) if gain.kept is not None else 'the adapter gains nothing on this text'}{_bounds(gain.ci95)}")
        if gain.with_branch is not None:
            screen.say(f"with the adapter beside it: {percent(gain.with_branch)}")
    if result.untied:
        screen.remark(f"note: {', '.join(result.untied)} is no longer tied; config.json says so")
    if result.erased:
        screen.remark("warning: most of the adapter is rounded away on this grid")
        screen.remark("hint: give the 16-bit model as --base, leave out --method requant, or keep the adapter beside the base")
