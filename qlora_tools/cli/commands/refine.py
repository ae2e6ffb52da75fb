"""``qlt refine``."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import HeadedCommand, Shared, examples, headed, shared
from qlora_tools.cli.words import duration, megabytes
from qlora_tools.errors import UsageError
from qlora_tools.training.distill_config import RefineConfig

if TYPE_CHECKING:
    from qlora_tools.verbs.refine import RefineReport

EPILOG = examples(
    "qlt refine                           # base, tuned model and adapter of the step before",
    "qlt refine adapters/tuned-r16 --base base/ --teacher tuned/ --nf4",
    "qlt refine adapters/tuned-r16 --base base/ --teacher tuned/ --int8 --text domain.txt --steps 200",
    "qlt refine --by-block --text domain.txt",
    "qlt refine --resume -o adapters/tuned-r16-refined-nf4",
)
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RefineConfig)}
_models, _text, _steps = headed("Models"), headed("Text"), headed("Optimization")


@click.command("refine", cls=HeadedCommand, epilog=EPILOG)
@click.argument("adapter", required=False, metavar="[ADAPTER]")
@_models("--base", metavar="MODEL", help="The model that the adapter is for: folder or hub id.")
@_models("--teacher", metavar="MODEL", help="The tuned model that base and adapter are to predict like.")
@_models("--nf4", "base_format", flag_value="nf4", default=True, help="The adapter will live on a base in NF4 (default).")
@_models("--int8", "base_format", flag_value="int8", help="... in int8.")
@_models("--int4", "base_format", flag_value="int4", help="... in the int4 blocks of an ONNX export.")
@_models("--bf16", "base_format", flag_value="bf16", help="... unquantized.")
@_models("--block-size", type=click.IntRange(16), metavar="N", help="Weights per NF4 block. [64]")
@_models("--double-quant/--no-double-quant", default=True, show_default=True, help="NF4 block scales in 8 bits.")
@_text(
    "--text",
    default=_DEFAULTS["text"],
    show_default=True,
    metavar="FILE|self|builtin",
    help="What to learn on. self: text that the teacher writes. builtin: a text of many domains.",
)
@_text("--windows", type=int, default=_DEFAULTS["windows"], show_default=True, metavar="N", help="Pieces of self-written text.")
@_text("--length", type=int, default=_DEFAULTS["length"], show_default=True, metavar="N", help="Tokens of a piece.")
@_steps("--steps", type=int, default=_DEFAULTS["steps"], show_default=True, metavar="N", help="Optimizer steps; of each block with --by-block.")
@_steps("--by-block", is_flag=True, help="For models that fit in memory only block by block: each block after the teacher's. Needs --text.")
@_steps("--batch", type=int, default=_DEFAULTS["batch"], show_default=True, metavar="N", help="Pieces of text per step.")
@_steps("--lr", type=float, default=_DEFAULTS["lr"], show_default=True, metavar="X", help="Highest learning rate.")
@_steps("--temperature", type=float, default=_DEFAULTS["temperature"], show_default=True, metavar="X", help="Softening of both models' predictions.")
@_steps("--patience", type=int, default=_DEFAULTS["patience"], show_default=True, metavar="N", help="Stop after this many evaluations without a better one.")
@_steps("--eval-every", type=int, metavar="N", help="Steps between evaluations. Default: four a run.")
@_steps("--compute", type=click.Choice(["auto", "bf16", "fp32"]), default=_DEFAULTS["compute"], show_default=True, help="Dtype of the computation.")
@_steps("--seed", type=int, default=_DEFAULTS["seed"], show_default=True, metavar="N", help="Seed of text and order.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run of -o. It says itself what it was started with.")
@shared
def command(common: Shared, adapter: str | None, base: str | None, teacher: str | None, resume: bool, **choices: Any) -> None:
    """Improve an adapter for the base that it will live on: a few dozen steps after the tuned model's own predictions. No labels."""
    from qlora_tools import api

    config = None if resume else RefineConfig(**choices)
    if not resume:
        base, adapter, teacher = _picked(common, base, adapter, teacher)
    result = api.refine(adapter=adapter, base=base, teacher=teacher, config=config, resume=resume, **common.arguments)
    screen = common.screen
    if result.report is None:
        screen.say(f"{result.trainable_parameters:,} numbers to train, about {megabytes(result.estimate_bytes)} of memory")
    else:
        folder = common.session.relative(result.output)
        common.session.remember(base=base, tuned=teacher, adapters=[[folder, 1.0]], exports=None)
        screen.card("kept as it was" if result.report.kept_start else "refined", _closing(result.report, folder))
    screen.result(result, common.written(result.output, result.seconds))


def _picked(common: Shared, base: str | None, adapter: str | None, teacher: str | None) -> tuple[str, str, str]:
    """What is given, or the pair and the adapter of the step before."""
    base, adapters = common.base_and_adapters(base, [(adapter, 1.0)] if adapter else [])
    if len(adapters) > 1 or adapters[0][1] != 1.0:
        raise UsageError("the last step left several adapters, or a weighted one", hint="name the one to refine")
    if teacher is None:
        teacher = str(common.session.pick("tuned", "--teacher"))
        common.screen.remark(f"using teacher {teacher}")
    return base, adapters[0][0], teacher


def _gap(report: RefineReport) -> str:
    """How far the last block is from the teacher's."""
    last, kept = report.blocks[-1], sum(block.kept_start for block in report.blocks)
    stayed = f"; {kept} of {len(report.blocks)} learnt nothing that helped" if kept else ""
    return f"{last.start:.3%} -> {last.after:.3%} off after the last{stayed}"


def _closing(report: RefineReport, folder: str) -> list[tuple[str, str]]:
    change = f"{report.start_kl:.5f} -> {report.end_kl:.5f}" if not report.kept_start else f"{report.start_kl:.5f}; no step made it better"
    blocks = [("block outputs", _gap(report))] if report.blocks else []
    return [
        ("KL to the teacher", change),
        *blocks,
        ("text", f"{report.text}, {report.tokens:,} tokens in {duration(report.seconds)}"),
        ("steps", f"{report.steps}, the best at {report.best_step}{' (stopped early)' if report.stopped == 'early' else ''}"),
        ("peak memory", f"{megabytes(report.peak_bytes)}, {megabytes(report.estimate_bytes)} estimated"),
        ("adapter", folder),
    ]
