"""``qlt adapters``: list the adapters kept beside a base, add them up, cut them to a lower rank, compare them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tools.adapters.combine import LayerAgreement, Row, compared, kinds_of, resized, size_of, sum_of
from qlora_tools.adapters.merged import base_fingerprint
from qlora_tools.adapters.peft_config import parse_config
from qlora_tools.adapters.peft_keys import LORA, parse_key
from qlora_tools.adapters.portable import Portable
from qlora_tools.adapters.portable_peft import normalised
from qlora_tools.adapters.recognise import open_stored, recognise
from qlora_tools.adapters.stored import StoredAdapter
from qlora_tools.checkpoint.folder import check_output
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import IncompatibleError, MissingError, QltError, UnsupportedError, UsageError
from qlora_tools.lowrank.algebra import CutError
from qlora_tools.manifest import read_manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.adapter_files import Loaded, adapter_path, fit, load, one_component, save_peft, source_name
from qlora_tools.verbs.opening import open_model

#: What is no low-rank change of a weight.
_NOT_COMPARED = ("DoRA", "bias", "whole tensors", "token rows")
_LISTED_SUFFIXES = (".safetensors", ".gguf", ".onnx_adapter")


@dataclass(frozen=True)
class KeptAdapter:
    """One adapter found in a folder. ``fits_base``: whether the base given is the one it was made for, ``None`` where that is not
    known. ``problem``: why it cannot be read, ``None`` where it can."""

    path: Path
    format: str | None
    ranks: tuple[int, int] | None
    scales: tuple[float, float] | None
    targets: tuple[str, ...]
    stored_bytes: int
    base_name: str | None
    fits_base: bool | None
    made_by: str
    problem: str | None = None


@dataclass(frozen=True)
class SumResult:
    """What was (or would be) written. ``total``: the whole change, and what cutting it to the rank asked for costs."""

    output: Path
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    dry_run: bool
    rows: tuple[Row, ...]
    total: CutError
    adapter_bytes: int
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ResizeResult:
    """What was (or would be) written. ``dropped``: modules that keep nothing under the rule given."""

    output: Path
    adapter: Path
    dry_run: bool
    rows: tuple[Row, ...]
    dropped: tuple[str, ...]
    total: CutError
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass(frozen=True)
class ComparedLayer:
    """One module that both adapters change; see :class:`~qlora_tools.lowrank.algebra.Agreement`."""

    module: str
    norms: tuple[float, float]
    cosine: float
    ratio: float
    output_overlap: float
    input_overlap: float
    smallest_angle: float


@dataclass(frozen=True)
class ComparedAdapters:
    """``cosine`` and ``ratio`` are of the whole changes; a module that one adapter leaves alone counts as zero there."""

    first: Path
    second: Path
    cosine: float
    ratio: float
    layers: tuple[ComparedLayer, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    notes: tuple[str, ...] = ()


def list_adapters(*, folder: Path = Path("adapters"), base: str | Path | None = None, progress: Progress = SILENT) -> tuple[KeptAdapter, ...]:
    """The adapters in ``folder`` (or the one it is), by name, from headers. With ``base``, whether each was made for it.

    Raises:
        MissingError: no such folder.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder} is not a folder", hint="give the folder that holds your adapters, each in a folder of its own")
    checkpoint = open_model(base, progress) if base is not None else None
    itself = [folder] if (folder / "adapter_config.json").is_file() else []
    entries = itself or sorted(path for path in folder.iterdir() if not path.name.startswith(".") and (path.is_dir() or path.suffix in _LISTED_SUFFIXES))
    found = (_kept(path, checkpoint) for path in entries)
    return tuple(item for item in found if item is not None)


def _kept(path: Path, base: LogicalCheckpoint | None) -> KeptAdapter | None:
    """What the headers of one entry tell; ``None`` for a folder without an adapter."""
    try:
        stored = open_stored(path)
        name = _format_of(stored)
        if name is None:
            return None
        ranks, scales, base_name = _numbers(stored, name)
        made_by, fits = _origin(stored, base)
    except (MissingError, UsageError):
        return None
    except QltError as error:
        return KeptAdapter(path, None, None, None, (), 0, None, None, "", str(error))
    leaves = sorted({parse_key(key).path.rpartition(".")[2] for key in stored.specs if parse_key(key).kind == LORA})
    return KeptAdapter(path, name, ranks, scales, tuple(leaves), stored.path.stat().st_size, base_name, fits, made_by)


def _format_of(stored: StoredAdapter) -> str | None:
    try:
        return recognise(stored)
    except UnsupportedError:
        return None


def _numbers(stored: StoredAdapter, name: str) -> tuple[tuple[int, int] | None, tuple[float, float] | None, str | None]:
    """Ranks, scales and base name of a PEFT adapter; nothing of others, whose factors would have to be read."""
    if name != "peft" or stored.config is None:
        return None, None, None
    content, _ = normalised({**stored.config, "init_lora_weights": True})
    config = parse_config(content, str(stored.path.parent))
    modules = sorted({key.path for key in map(parse_key, stored.specs) if key.kind == LORA})
    ranks, scales = [config.rank_of(module) for module in modules], [config.scale_of(module) for module in modules]
    return ((min(ranks), max(ranks)), (min(scales), max(scales)), config.base_model) if modules else (None, None, config.base_model)


def _origin(stored: StoredAdapter, base: LogicalCheckpoint | None) -> tuple[str, bool | None]:
    """Who made it, and whether the first base tensor it knows is that of ``base``."""
    manifest = read_manifest(stored.path.parent)
    if manifest is None:
        version = (stored.config or {}).get("peft_version")
        return (f"peft {version}" if isinstance(version, str) else ""), None
    made_by = f"qlt {manifest.command.get('verb', '')}".strip()
    known = sorted(manifest.base_tensors)
    if base is None or not known:
        return made_by, None
    found = base_fingerprint(base)(known[0]) if known[0] in base.specs else ""
    return made_by, None if found is None else found == manifest.base_tensors[known[0]]


def sum_adapters(
    *,
    adapters: Sequence[tuple[str | Path, float]],
    rank: int | None = None,
    base: str | Path | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> SumResult:
    """The weighted sum of adapters of one base as one adapter: exact with the ranks added up, or the best of ``rank``.

    Never makes a dense matrix. ``base``: check all against it. ``device`` is not used: factors are small.

    Raises:
        UsageError: nothing to add, rank below 1. IncompatibleError: adapters of different bases or shapes, whole tensors that
        differ. UnsupportedError: DoRA.
    """
    began = time.perf_counter()
    if not adapters:
        raise UsageError("no adapter to add", hint="name at least one, with a weight if wanted: a b=0.5")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} keeps nothing", hint="give a rank of at least 1")
    wrong = [str(name) for name, weight in adapters if not math.isfinite(weight)]
    if wrong:
        raise UsageError(f"the weight of {wrong[0]} is not a finite number")
    paths = [adapter_path(name) for name, _ in adapters]
    dest = output or Path("adapters") / slug("+".join(source_name(path) for path in paths).replace("+", "-plus-") + (f"-r{rank}" if rank else ""))
    checkpoint = open_model(base, progress) if base is not None else None
    inputs = [*paths, *([checkpoint.folder] if checkpoint else [])]
    check_output(dest, force=force, inputs=inputs)
    loaded = [one_component(load(path, base=checkpoint, progress=progress), None) for path in paths]
    hashes = _common_base(paths, loaded)
    terms = [(str(path), item.portable, weight) for path, item, (_, weight) in zip(paths, loaded, adapters, strict=True)]
    portable, rows = sum_of(terms, rank, progress=progress)
    if checkpoint is not None:
        fit(portable, checkpoint, "the sum")
    total = _total(rows)
    command = {"verb": "adapters sum", "weights": [weight for _, weight in adapters], "rank": rank}
    if not dry_run:
        _save(portable, dest, loaded, command, hashes, inputs, checkpoint, {"total": asdict(total)}, force)
    return SumResult(
        dest, tuple(paths), tuple(weight for _, weight in adapters), dry_run, tuple(rows), total, portable.nbytes, portable.notes, time.perf_counter() - began
    )


def resize_adapter(
    *,
    adapter: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ResizeResult:
    """The best adapter of lower rank, by the exact SVD of the factors' core; exactly one of the three rules decides the ranks.

    ``device`` is not used: factors are small.

    Raises:
        UsageError: not one rule, or a value out of range, or nothing would be left. UnsupportedError: DoRA.
    """
    began = time.perf_counter()
    path = adapter_path(adapter)
    setting = f"r{rank}" if rank else f"energy{energy:g}" if energy else f"{max_bytes}B"
    dest = output or Path("adapters") / slug(f"{source_name(path)}-{setting}")
    check_output(dest, force=force, inputs=[path])
    loaded = one_component(load(path, progress=progress), None)
    portable, rows, dropped = resized(str(path), loaded.portable, rank=rank, energy=energy, max_bytes=max_bytes, progress=progress)
    lost = {module: CutError(size_of(loaded.portable.layers[module]), 0, 1.0, 1.0) for module in dropped}
    total = _total([*rows, *(Row(module, loaded.portable.layers[module].rank, cut) for module, cut in lost.items())])
    command = {"verb": "adapters resize", "rank": rank, "energy": energy, "max_bytes": max_bytes}
    if not dry_run:
        hashes = dict(loaded.base_tensors or {})
        _save(portable, dest, [loaded], command, hashes, [path], None, {"total": asdict(total), "rows": [asdict(row) for row in rows]}, force)
    return ResizeResult(dest, path, dry_run, tuple(rows), tuple(dropped), total, loaded.portable.nbytes, portable.nbytes, time.perf_counter() - began)


def compare_adapters(*, first: str | Path, second: str | Path, progress: Progress = SILENT) -> ComparedAdapters:
    """How the changes of two adapters relate, layer by layer, from their factors.

    Raises:
        IncompatibleError: they belong to different bases.
    """
    paths = [adapter_path(first), adapter_path(second)]
    loaded = [one_component(load(path, progress=progress), None) for path in paths]
    _common_base(paths, loaded)
    found = compared(loaded[0].portable, loaded[1].portable, progress=progress)
    held = [(path, [kind for kind in kinds_of(item.portable) if kind in _NOT_COMPARED]) for path, item in zip(paths, loaded, strict=True)]
    notes = tuple(f"{path} also holds {', '.join(kinds)}: only the factors are compared" for path, kinds in held if kinds)
    return ComparedAdapters(paths[0], paths[1], found.cosine, found.ratio, tuple(map(_row, found.rows)), found.only_first, found.only_second, notes)


def _row(row: LayerAgreement) -> ComparedLayer:
    found = row.agreement
    return ComparedLayer(row.module, found.norms, found.cosine, found.ratio, found.output_overlap, found.input_overlap, found.smallest_angle)


def _total(rows: Sequence[Row]) -> CutError:
    """One error over all layers: energies added."""
    energy = sum(row.cut.norm**2 for row in rows)
    if energy == 0.0:
        return CutError(0.0, max((row.cut.rank for row in rows), default=0), 0.0, 0.0)
    optimum = math.sqrt(sum((row.cut.norm * row.cut.optimum) ** 2 for row in rows) / energy)
    error = math.sqrt(sum((row.cut.norm * row.cut.error) ** 2 for row in rows) / energy)
    return CutError(math.sqrt(energy), max(row.cut.rank for row in rows), optimum, error)


def _common_base(paths: Sequence[Path], loaded: Sequence[Loaded]) -> dict[str, str]:
    """The hashes of base tensors that all adapters agree on. Raises IncompatibleError where two were made for different bases."""
    known: dict[str, tuple[Path, str]] = {}
    for path, item in zip(paths, loaded, strict=True):
        for name, digest in (item.base_tensors or {}).items():
            if name in known and known[name][1] != digest:
                raise IncompatibleError(
                    f"{known[name][0]} and {path} were made for different bases: `{name}` has sha256 {known[name][1][:12]} and {digest[:12]}",
                    hint="only adapters of one base can be put together",
                )
            known[name] = (path, digest)
    return {name: digest for name, (_, digest) in known.items()}


def _save(
    portable: Portable,
    dest: Path,
    loaded: Sequence[Loaded],
    command: dict[str, Any],
    hashes: dict[str, str],
    inputs: list[Path],
    base: LogicalCheckpoint | None,
    report: dict[str, Any],
    force: bool,
) -> None:
    save_peft(
        portable,
        dest,
        command=command,
        inputs={f"adapter{number or ''}": item.described() for number, item in enumerate(loaded)},
        sources=inputs,
        base=base,
        base_tensors=hashes,
        task_type=next((item.task_type for item in loaded if item.task_type), None),
        report=report,
        force=force,
    )
