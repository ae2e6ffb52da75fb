"""``qlt export``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, adapters_option, examples, shared, weighted
from qlora_tools.cli.words import megabytes

EPILOG = examples(
    "qlt export --merge --int8                 # base and adapter of the step before",
    "qlt export base/ --int4 -o exports/base-int4",
    "qlt export base/ --int4 --calib text.txt   # codes chosen for what the layers read",
    "qlt export --base base/ --adapter x --adapter y=0.5 --merge --fp32",
)


@click.command("export", epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--base", metavar="MODEL", help="The model to merge adapters into: folder or hub id. Default with --merge: the last one used.")
@adapters_option
@click.option("--merge", is_flag=True, help="Merge the adapters into the weights on the way. Picks up the last base and adapter if none is given.")
@click.option("--target", type=click.Choice(["original", "trained"]), help="As in qlt merge.")
@click.option("--fp32", "scheme", flag_value="fp32", help="Full precision (default).")
@click.option("--int8", "scheme", flag_value="int8", help="8-bit weights and the fastest int8 kernel for each layer.")
@click.option("--int4", "scheme", flag_value="int4", help="4-bit weights in blocks of 32.")
@click.option("--nf4", "scheme", flag_value="nf4", help="On the CPU carried as int8: NF4 has no fast kernel there.")
@click.option(
    "--calib",
    metavar="TEXT|STATS|self|builtin",
    help="Round weights for what the layers read: a text, a file of `qlt calibrate`, the model's own text, or the built-in one. With adapters: the base's.",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare prefill and decode with the checkpoint in ONNX Runtime.")
@shared
def command(
    common: Shared,
    model: str | None,
    base: str | None,
    adapters: tuple[str, ...],
    merge: bool,
    target: str | None,
    scheme: str | None,
    calib: str | None,
    verify: bool,
) -> None:
    """Export an ONNX graph of MODEL, or of a base with adapters merged in. Runs in ONNX Runtime and onnxruntime-genai."""
    from qlora_tools import api

    chosen = weighted(adapters)
    if merge or chosen:
        if model is not None and base is None:
            model, base = None, model
        base, chosen = common.base_and_adapters(base, chosen)
    elif model is None and base is None:
        model = str(common.session.pick("model", "MODEL"))
        common.screen.remark(f"using model {model}")
    result = api.export(
        model=model,
        base=base,
        adapters=chosen,
        target=target,
        scheme=scheme or "fp32",
        calib=calib,
        verify=verify,
        **common.arguments,
    )
    screen = common.screen
    if result.note:
        screen.remark(f"note: {result.note}")
    screen.say(f"{result.scheme} graph for {result.device}, weights {megabytes(result.file_bytes)}")
    if result.calibration is not None:
        screen.say(f"calibrated: output error of {result.calibration.weights} weights {result.calibration.share:.1%} of plain rounding's, on held-out text")
    if result.parity is not None:
        screen.say(f"parity: {result.parity.summary}")
    elif not result.dry_run:
        screen.remark("note: not verified (--no-verify)")
    if not result.dry_run:
        made = {
            "path": common.session.relative(result.output),
            "scheme": result.scheme,
            "model": model,
            "base": base,
            "adapters": [list(pair) for pair in chosen],
            "target": target,
        }
        common.session.add_export(made)
    screen.result(result, common.written(result.output, result.seconds))
