"""``qlt export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import Shared, adapters_option, examples, shared, weighted
from qlora_tools.cli.words import megabytes

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.verbs.export import ExportResult

EPILOG = examples(
    "qlt export --merge --int8                 # base and adapter of the step before",
    "qlt export base/ --int4 -o exports/base-int4",
    "qlt export base/ --int4 --calib text.txt   # codes chosen for what the layers read",
    "qlt export base/ --int4 --adapters style,code   # one graph, adapters chosen at run time: qlt generate --adapter code",
    "qlt export base/ --int4 --branch tuned-r16      # 4-bit weights, the adapter in 16 bits beside them",
    "qlt export base/ --int4 --device cuda --dtype bf16",
    "qlt export --base base/ --adapter x --adapter y=0.5 --merge --fp32",
)


@click.command("export", epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--base", metavar="MODEL", help="The model to merge adapters into: folder or hub id. Default with --merge: the last one used.")
@adapters_option
@click.option("--merge", is_flag=True, help="Merge the adapters into the weights on the way. Picks up the last base and adapter if none is given.")
@click.option(
    "--adapters", "keep", multiple=True, metavar="DIR[=WEIGHT],...", help="Keep these adapters apart: inputs of the graph, chosen at run time by name."
)
@click.option("--branch", multiple=True, metavar="DIR[=WEIGHT]", help="Store this adapter in 16 bits beside the weights, always on; repeat for several.")
@click.option(
    "--residual/--no-residual", default=True, show_default=True, help="Take along the branch that `qlt merge --method residual` left beside the checkpoint."
)
@click.option("--target", type=click.Choice(["original", "trained"]), help="As in qlt merge.")
@click.option("--fp32", "scheme", flag_value="fp32", help="Full precision (default on the CPU).")
@click.option("--fp16", "scheme", flag_value="fp16", help="16-bit floats, for CUDA (default there).")
@click.option("--bf16", "scheme", flag_value="bf16", help="The other 16-bit floats, for CUDA.")
@click.option("--int8", "scheme", flag_value="int8", help="8-bit weights and the fastest int8 kernel for each layer.")
@click.option("--w8a8", "scheme", flag_value="w8a8", help="int8 with 8-bit activations, CPU only: the fastest prompts, less exact.")
@click.option("--int4", "scheme", flag_value="int4", help="4-bit weights in blocks of 32.")
@click.option("--nf4", "scheme", flag_value="nf4", help="On the CPU carried as int8: NF4 has no fast kernel there.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), help="What a CUDA graph with quantized weights computes in. Default: fp16.")
@click.option("--standard", is_flag=True, help="Plain ONNX operators only, for other runtimes.")
@click.option("--task", metavar="NAME", help="What a traced model is for, in Optimum's words. Default: what its architecture says.")
@click.option(
    "--calib",
    metavar="TEXT|STATS|self|builtin",
    help="Round weights for what the layers read: a text, a file of `qlt calibrate`, the model's own text, or the built-in one. With adapters: the base's.",
)
@click.option("--head-bits", type=click.Choice([4, 8]), metavar="4|8", help="Bits of an int4 head, and of an embedding tied to it. [4]")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare prefill and decode with the checkpoint in ONNX Runtime.")
@shared
def command(
    common: Shared,
    model: str | None,
    base: str | None,
    adapters: tuple[str, ...],
    merge: bool,
    keep: tuple[str, ...],
    branch: tuple[str, ...],
    **choices: Any,
) -> None:
    """Export an ONNX graph of MODEL, or of a base with adapters merged in or kept beside it. Runs in ONNX Runtime and onnxruntime-genai."""
    from qlora_tools import api

    chosen = weighted(adapters)
    if merge or chosen:
        if model is not None and base is None:
            model, base = None, model
        base, chosen = common.base_and_adapters(base, chosen)
    elif model is None and base is None:
        model = str(common.session.pick("base" if keep or branch else "model", "MODEL"))
        common.screen.remark(f"using model {model}")
    kept = weighted(tuple(path for word in keep for path in word.split(",")))
    result = api.export(model=model, base=base, adapters=chosen, keep=kept, branch=weighted(branch), **choices, **common.arguments)
    _tell(common.screen, result)
    if not result.dry_run:
        made = {
            "path": common.session.relative(result.output),
            "scheme": result.scheme,
            "model": model,
            "base": base,
            "adapters": [list(pair) for pair in chosen],
            "target": choices["target"],
        }
        common.session.add_export(made)
    common.screen.result(result, common.written(result.output, result.seconds))


def _tell(screen: Screen, result: ExportResult) -> None:
    """The result in words."""
    if result.note:
        screen.remark(f"note: {result.note}")
    traced = f", traced for {result.task}" if result.task else ""
    screen.say(f"{result.scheme} graph for {result.device}{traced}, weights {megabytes(result.file_bytes)}")
    if result.residual is not None:
        screen.say(f"with the branch {result.residual.name} that the merge left beside the checkpoint")
    if result.branches:
        screen.say(f"16-bit branches beside {result.branches} of its matrices")
    if result.calibration is not None:
        screen.say(f"calibrated: output error of {result.calibration.weights} weights {result.calibration.share:.1%} of plain rounding's, on held-out text")
    if result.parity is not None:
        screen.say(f"parity: {result.parity.summary}")
    elif not result.dry_run:
        screen.remark("note: not verified (--no-verify)")
    for adapter in result.adapters:
        low, high = adapter.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        screen.say(f"adapter {adapter.name}: {ranks} per stored matrix" + (f", parity: {adapter.parity.summary}" if adapter.parity else ""))
