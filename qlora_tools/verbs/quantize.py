"""``qlt quantize``: a checkpoint in NF4 (double-quantized) or int8 that stock transformers loads; with calibration, one that loses less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.folder import check_output
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int4 import Int4
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.quant.search import POSITIVE
from qlora_tools.stages.quantize import plan_quantize, quantized_names
from qlora_tools.verbs.calibrate import is_statistics, statistics_for, windows_for
from qlora_tools.verbs.opening import folder_name, given_paths, open_model, resolve_device, side_paths
from qlora_tools.verbs.quantize_run import Job, KlResult, LayerResult, QuantizeResult

__all__ = ["CONTEXT", "SCHEMES", "TOKENS", "KlResult", "LayerResult", "QuantizeResult", "codec_for", "quantize"]

SCHEMES = ("nf4", "int8")
TOKENS, CONTEXT = 32_768, 512


def codec_for(scheme: str, *, block_size: int = 64, double_quant: bool = True, search: str | None = None) -> Codec:
    """The codec that stores ``scheme``.

    Raises:
        UsageError: no such scheme, or a scale search for another than NF4.
    """
    if scheme == "nf4":
        return NF4(block_size=block_size, double_quant=double_quant, search=search)
    if search is not None:
        raise UsageError(f"--search is for nf4, not {scheme}", hint="int8's rows are fitted with --calib")
    if scheme == "int8":
        return Int8()
    raise UsageError(f"no scheme is called {scheme!r}", hint=f"choose one of {', '.join(SCHEMES)}")


def base_codec(base_format: str | None, *, block_size: int | None = None, double_quant: bool = True) -> Codec | None:
    """How a base of this format is held: ``nf4``, ``int8``, ``int4`` (an export's blocks); ``None`` for ``bf16`` or ``None``, as it is."""
    if base_format in (None, "bf16"):
        return None
    return Int4() if base_format == "int4" else codec_for(str(base_format), block_size=block_size or 64, double_quant=double_quant)


def quantize(
    *,
    model: str | Path,
    scheme: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    search: str | None = None,
    as_16bit: bool = False,
    calib: str | Path | None = None,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    seed: int = 0,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize every linear of ``model`` except head and embeddings; see :func:`codec_for` for ``scheme``.

    ``search``: NF4's scales by least squared error, ``positive`` or ``signed``. ``as_16bit``: write what the codes mean in the model's own dtype; with
    ``positive`` scales stock bitsandbytes finds the same codes in it. ``calib``: a text file, a file of statistics, ``self`` or ``builtin``;
    ``tokens`` of it in windows of ``context`` are read. ``max_bytes`` (of all tensors) and ``max_kl`` (nats per token): mixed precision, the layers
    that gain most per byte stay in 16 bits; both need a text.

    Raises:
        IncompatibleError: the model is quantized already. UsageError: options that do not go together, or too few bytes. And what reading and
        writing raise.
    """
    codec = codec_for(scheme, block_size=block_size, double_quant=double_quant, search=search)
    mixed = max_bytes is not None or max_kl is not None
    if as_16bit and (search != POSITIVE or calib is not None):
        raise UsageError(
            "--as-16bit is for weights whose codes are found again, those of --search positive without --calib",
            hint="leave it out to store the codes themselves",
        )
    if mixed and (calib is None or is_statistics(calib)):
        raise UsageError("--max-bytes and --max-kl measure on text", hint="give --calib a text file, `self` or `builtin`")
    source = open_model(model, progress)
    if source.quantized:
        held = sorted({item.codec.name for item in source.quantized.values()})
        raise IncompatibleError(f"{model} is quantized already ({', '.join(held)})", hint="quantize the 16-bit model that it came from")
    dest = output or Path("checkpoints") / slug(f"{folder_name(source.folder)}-{scheme}{'-16bit' if as_16bit else ''}")
    check_output(dest, force=force, inputs=[source.folder, *given_paths(calib)])
    side_paths(source.folder)
    if not quantized_names(source, source.family, codec):
        raise IncompatibleError(f"{model} holds no linear layer to quantize", hint="run `qlt inspect` on it")
    settings = {
        "verb": "quantize",
        "scheme": scheme,
        "search": search,
        "as_16bit": as_16bit or None,
        "calib": _calib_name(calib),
        "max_bytes": max_bytes,
        "max_kl": max_kl,
    }
    settings |= {"block_size": block_size if scheme == "nf4" else None, "double_quant": double_quant if scheme == "nf4" else None}
    place = resolve_device(device)
    if isinstance(codec, Int8) and calib is None:  # its codes are made on the CPU in any case, and beside a GPU by one core
        place = "cpu"
    job = Job(source, codec, dest, force, place, settings, progress, as_16bit=as_16bit)
    if dry_run:
        if calib is not None and is_statistics(calib):
            with Statistics(Path(calib)) as statistics:
                statistics.check(source)
        return job.result(plan_quantize(source, source.family, codec, decoded=as_16bit), dry_run=True)
    if calib is None:
        return job.write(plan_quantize(source, source.family, codec, decoded=as_16bit))
    with _calibrated(job, calib, tokens, context, seed):
        return job.write_mixed(max_bytes, max_kl) if mixed else job.write_calibrated()


def _calib_name(calib: str | Path | None) -> str | None:
    """What a manifest says: no path of this machine."""
    return None if calib is None else Path(calib).name


@contextmanager
def _calibrated(job: Job, calib: str | Path, tokens: int, context: int, seed: int) -> Iterator[None]:
    """Give ``job`` its statistics and, where there is text and memory, the judge of the whole model."""
    with ExitStack() as stack:
        made: dict[str, Any] = {"seed": seed, "device": job.device, "progress": job.progress}
        windows = None if is_statistics(calib) else windows_for(job.source, calib, tokens=tokens, context=context, **made)
        job.statistics = stack.enter_context(statistics_for(job.source, calib, beside=job.dest, windows=windows, **made))
        if windows is None:
            job.progress.note("the statistics come without their text: layers are compared one by one, the whole model is not")
        else:
            from qlora_tools.verbs.quantize_judge import WholeModel  # brings transformers with it

            try:
                job.judge = WholeModel(job.source, windows.held_out_NL, device=job.device, progress=job.progress)
            except UnsupportedError as error:
                job.progress.note(f"{error}; layers are compared one by one, the whole model is not")
        yield
