"""``qlt export``: a checkpoint, or a base with adapters merged in or kept beside it, as an ONNX graph that has passed a parity check.

A model of a family whose graph is drawn here gets that graph; any other is traced. What cannot be drawn with adapters beside it is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.decoder.branches import Branches, Factors
from qlora_tools.export.decoder.export import DecoderExport, plan_export, write_graph
from qlora_tools.export.decoder.genai import check_genai_config, write_genai_config
from qlora_tools.export.onnx_adapter import file_of
from qlora_tools.export.schemes import FLOATS, NAMES, Scheme, scheme_of, target_for
from qlora_tools.export.target import COMPUTE, Target
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.calibrate import BUILTIN, SELF
from qlora_tools.verbs.exporting import Drawn, Given, open_drawn
from qlora_tools.verbs.opening import config_json, copy_side_files, given_paths, resolve_device, side_paths
from qlora_tools.verbs.origins import describe_calibration

if TYPE_CHECKING:
    from qlora_tools.export.calibrated import Gain
    from qlora_tools.export.decoder.parity import Parity
    from qlora_tools.export.traced.parity import TracedParity
    from qlora_tools.verbs.export_traced import Traced

SCHEMES = NAMES
_DTYPES = {"fp16": "F16", "bf16": "BF16"}
TEXT = "text-generation"


@dataclass(frozen=True)
class ExportedAdapter:
    """One adapter that can be chosen at run time: its file, the ranks that its packed factors have, and how the graph computes with it."""

    name: str
    file: str
    ranks: tuple[int, int]
    adapter_bytes: int
    parity: Parity | TracedParity | None


@dataclass(frozen=True)
class ExportResult:
    """What was (or would be) written. ``parity`` is ``None`` in a dry run or with ``verify=False``, ``calibration`` without ``calib``. ``task``: what a
    traced graph computes, ``None`` for a drawn one. ``branches``: matrices with a stored 16-bit branch; ``residual``: the one that was found by itself."""

    output: Path
    scheme: str
    carried: str
    note: str | None
    device: str
    compute: str
    standard: bool
    task: str | None
    dry_run: bool
    file_bytes: int
    parity: Parity | TracedParity | None
    calibration: Gain | None
    adapters: tuple[ExportedAdapter, ...]
    branches: int
    residual: Path | None
    seconds: float


@dataclass(frozen=True)
class Request:
    """What kind of graph was asked for: ``task`` ``None`` is what the architecture is for, ``head_bits`` ``None`` the scheme's own."""

    scheme: str
    target: Target
    task: str | None
    head_bits: int | None = None

    @property
    def chosen(self) -> Scheme:
        return scheme_of(self.scheme, self.target, self.head_bits)


def export(
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Given = (),
    keep: Given = (),
    branch: Given = (),
    residual: bool = True,
    target: str | None = None,
    scheme: str | None = None,
    dtype: str | None = None,
    standard: bool = False,
    task: str | None = None,
    calib: str | Path | None = None,
    head_bits: int | None = None,
    verify: bool = True,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export ``model``, or ``base`` with ``adapters`` merged in on the way, as ``scheme`` (``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``, ``nf4``).

    ``keep``: adapters that become inputs of the graph, chosen at run time by the name of their folder; without one the graph computes the base.
    ``branch``: adapters stored beside the weights in 16 bits, always on. ``residual=False`` leaves out the branch that a merge left beside the checkpoint.
    ``device``, ``dtype`` (``fp16``, ``bf16``: of a CUDA graph with quantized weights) and ``standard`` (plain ONNX operators) say what the graph is for.
    ``task``: of a traced model. ``calib``: a text, a file of ``qlt calibrate``, ``self`` or ``builtin``; weights are then rounded for what the layers
    read there. With adapters the statistics are the base's. A dry run takes none. ``head_bits=8``: of an int4 graph, see ``export/schemes.py``.

    Raises:
        UsageError: both or neither of ``model`` and ``base``; ``calib`` for floats. UnsupportedError: a model without a graph, or an adapter that no
        graph can keep. CheckFailed: the exported graph does not compute what the checkpoint computes; nothing is left behind.
    """
    began = time.perf_counter()
    drawn = open_drawn(model, base, adapters, keep, branch, target, residual, progress)
    asked = replace(_request(scheme, dtype, device, standard, task), head_bits=head_bits)
    dest = output or Path("exports") / slug(f"{drawn.name.replace('+', '-')}-{asked.scheme}")
    inputs = [*drawn.folders, *given_paths(calib)]
    check_output(dest, force=force, inputs=inputs)
    side_paths(drawn.side_files)
    if calib is not None and asked.chosen.carried in FLOATS:
        raise UsageError(f"{asked.scheme} weights are not rounded, so there is nothing to calibrate", hint="leave --calib out, or export with --int4 or --int8")
    if drawn.merged is not None:
        drawn.merged.check_asked(calib=calib)
    planned = plan_graph(drawn, asked, None, progress)
    if isinstance(planned, DecoderExport):
        check_genai_config(planned, drawn.config, drawn.side_files)
    if calib is not None and not isinstance(planned, DecoderExport):
        from qlora_tools.verbs.export_traced import check_calibration

        check_calibration(planned)
    made = _Made()
    if not dry_run:
        with _statistics(drawn.checkpoint, calib, dest, progress) as statistics:
            if statistics is not None:
                planned = plan_graph(drawn, asked, statistics, progress)
            with output_folder(dest, force=force, inputs=inputs) as folder:
                made = _write(planned, drawn, folder, verify, progress)
                seal(folder, _manifest(planned, drawn, asked, made, (calib, statistics), dest))
    return _result(planned, drawn, asked, made, dest, dry_run, time.perf_counter() - began)


@dataclass(frozen=True)
class _Made:
    """What writing and checking an export found."""

    parity: Parity | TracedParity | None = None
    calibration: Gain | None = None
    with_adapter: Mapping[str, Parity | TracedParity] = field(default_factory=dict)
    adapter_bytes: Mapping[str, int] = field(default_factory=dict)


def _request(scheme: str | None, dtype: str | None, device: str, standard: bool, task: str | None) -> Request:
    """``auto`` is CUDA where it is at hand and computes in the scheme's floats, the CPU elsewhere."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}", hint=f"choose {' or '.join(_DTYPES)}")
    compute = None if dtype is None else _DTYPES[dtype]
    provider = device
    if device == "auto":
        provider = resolve_device(device)
        if compute is not None or FLOATS.get(scheme or "") in ("F16", "BF16"):
            provider = "cuda"
        elif FLOATS.get(scheme or "") == "F32":
            provider = "cpu"
    if scheme is None:
        scheme = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[compute or COMPUTE[provider][0]]
    return Request(scheme, target_for(scheme, provider, compute=compute, standard=standard), task)


def plan_graph(drawn: Drawn, asked: Request, statistics: Statistics | None, progress: Progress) -> DecoderExport | Traced:
    """The family's own graph where there is one, else a traced one."""
    refused: UnsupportedError | None = None
    if asked.task in (None, TEXT):
        try:
            return plan_export(drawn.source, drawn.config, asked.chosen, asked.target, statistics, drawn.beside)
        except UnsupportedError as error:
            if (drawn.beside.kept or drawn.beside.fixed) and _has_graph(drawn, asked):
                raise  # it is the adapter that has no place: a graph without a past would be no way out
            refused = error
    from qlora_tools.verbs.export_traced import plan_any

    if refused is not None:
        progress.note(f"this model is traced, for lack of a graph of its own: {refused}{f' ({refused.hint})' if refused.hint else ''}")
    return plan_any(drawn.source, drawn.config, asked.chosen, asked.target, asked.task, drawn.beside, statistics, progress)


def _has_graph(drawn: Drawn, asked: Request) -> bool:
    """Whether the model alone has a graph of its family's own."""
    try:
        plan_export(drawn.source, drawn.config, asked.chosen, asked.target)
    except UnsupportedError:
        return False
    return True


@contextmanager
def _statistics(checkpoint: LogicalCheckpoint, calib: str | Path | None, dest: Path, progress: Progress) -> Iterator[Statistics | None]:
    """The statistics that ``calib`` names, taken now if need be; none without it."""
    if calib is None:
        yield None
        return
    from qlora_tools.verbs.calibrate import statistics_for  # brings transformers with it

    with statistics_for(checkpoint, calib, beside=dest, progress=progress) as statistics:
        yield statistics


def _write(planned: DecoderExport | Traced, drawn: Drawn, folder: Path, verify: bool, progress: Progress) -> _Made:
    """The graph and all that lies beside it; with ``verify``, checked. Only the check needs ONNX Runtime, which is slow to load."""
    (folder / "config.json").write_bytes(config_json(drawn.config))
    copy_side_files(drawn.side_files, folder)
    if isinstance(planned, DecoderExport):
        return _write_decoder(planned, drawn, folder, verify, progress)
    from qlora_tools.verbs.export_traced import write_any

    gain, found = write_any(planned, drawn.source, folder, verify, progress)
    sizes = {name: file_of(folder, name).stat().st_size for name in branches_of(planned).kept}
    return _Made(found.get(None), gain, {name: parity for name, parity in found.items() if name is not None}, sizes)


def _write_decoder(planned: DecoderExport, drawn: Drawn, folder: Path, verify: bool, progress: Progress) -> _Made:
    gain = write_graph(planned, drawn.source, folder, progress)
    write_genai_config(planned, drawn.config, folder)
    sizes = {name: file_of(folder, name).stat().st_size for name in planned.branches.kept}
    if not verify:
        return _Made(None, gain, {}, sizes)
    from qlora_tools.export.decoder.parity import check_parity

    alone, *others = (check_parity(planned, drawn.source, drawn.config, folder, adapter=name, progress=progress) for name in (None, *sizes))
    return _Made(alone, gain, dict(zip(sizes, others, strict=True)), sizes)


def _manifest(
    planned: DecoderExport | Traced, drawn: Drawn, asked: Request, made: _Made, calibration: tuple[str | Path | None, Statistics | None], dest: Path
) -> Manifest:
    """Everything that :func:`~qlora_tools.verbs.verify.verify` needs to draw the same export again."""
    command: dict[str, Any] = {"verb": "export", "scheme": asked.scheme, "carried": planned.scheme.carried, "device": asked.target.provider}
    command |= {"compute": asked.target.compute, "standard": asked.target.standard, "target": drawn.target, "simulated": drawn.simulated}
    command |= {"head_bits": asked.head_bits} if asked.head_bits is not None else {}
    command |= {"adapters": {role: {"use": part.use, "weight": part.weight} for role, part in zip(drawn.roles, drawn.adapters, strict=True)}}
    inputs, (calib, statistics) = drawn.inputs(dest), calibration
    if calib is not None and str(calib) in (SELF, BUILTIN):
        command |= {"calib": str(calib)}
    elif calib is not None:
        inputs["calibration"] = describe_calibration(Path(calib), dest)
    report: dict[str, Any] = {"parity": asdict(made.parity) if made.parity else None, **(drawn.merged.report if drawn.merged else {})}
    command |= {"kept": sorted(branches_of(planned).kept)}
    report |= {"adapters": {name: {"parity": asdict(found)} for name, found in made.with_adapter.items()}} if made.with_adapter else {}
    if not isinstance(planned, DecoderExport):
        command |= {"task": planned.task}
    if statistics is not None and made.calibration is not None:
        origin = statistics.origin
        report["calibration"] = {**asdict(made.calibration), "text": origin.text, "text_sha256": origin.text_sha256, "tokens": origin.tokens}
    return Manifest("export", command, inputs=inputs, report=report)


def _result(planned: DecoderExport | Traced, drawn: Drawn, asked: Request, made: _Made, dest: Path, dry_run: bool, seconds: float) -> ExportResult:
    branches = branches_of(planned)
    return ExportResult(
        output=dest,
        scheme=asked.scheme,
        carried=planned.scheme.carried,
        note=planned.note,
        device=asked.target.provider,
        compute=asked.target.compute,
        standard=asked.target.standard,
        task=None if isinstance(planned, DecoderExport) else planned.task,
        dry_run=dry_run,
        file_bytes=planned.file_bytes,
        parity=made.parity,
        calibration=made.calibration,
        adapters=tuple(_adapter(name, factors, made) for name, factors in branches.kept.items()),
        branches=len(branches.fixed),
        residual=drawn.branch,
        seconds=seconds,
    )


def branches_of(planned: DecoderExport | Traced) -> Branches:
    """What stands beside the weights; a model of several graphs has nothing there."""
    found: Branches = getattr(planned, "branches", Branches())
    return found


def _adapter(name: str, factors: Mapping[str, Factors], made: _Made) -> ExportedAdapter:
    ranks = [pair.rank for pair in factors.values()]
    return ExportedAdapter(name, file_of(Path(), name).name, (min(ranks), max(ranks)), made.adapter_bytes.get(name, 0), made.with_adapter.get(name))
