"""``qlt verify``: a finished export held against its checkpoint once more, from what lies in the two folders alone.

Four questions, each answered by name. Are the files those that were sealed? Is every stored weight what this checkpoint encodes to, adapters
included? Is the graph the one that is drawn for it? Does it compute the same, over a prompt and single steps? The manifest says how the export was made;
the checkpoint and the adapters are given again, and what the manifest knows of them helps to say what is wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Plan, Source
from qlora_tools.engine.run import run
from qlora_tools.errors import CheckFailed, MissingError, UsageError
from qlora_tools.export.comparison import Compared, Decode, comparing
from qlora_tools.export.decoder.export import DecoderExport
from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.decoder.weights import MODEL, STATISTICS
from qlora_tools.export.external import place
from qlora_tools.export.schemes import target_for
from qlora_tools.manifest import FILE_NAME, Manifest, read_manifest, sha256_file
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.doctor import Check
from qlora_tools.verbs.export import Request, plan_graph
from qlora_tools.verbs.exporting import Drawn, Given, open_drawn
from qlora_tools.verbs.merging import adapter_folder
from qlora_tools.verbs.opening import folder_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qlora_tools.export.decoder.parity import Parity
    from qlora_tools.export.traced.parity import TracedParity
    from qlora_tools.verbs.export_traced import Traced

_GRAPH_FILE = "model.onnx"
_MAX_WINDOWS = 16


@dataclass(frozen=True)
class VerifyResult:
    """``weights``: checkpoint tensors compared with the data file; ``differing``: those that are not in it as they should be. ``parity`` is ``None``
    where nothing could be run, or the graph was too far off; ``checks`` has the words."""

    export: Path
    against: str
    scheme: str
    checks: tuple[Check, ...]
    weights: int
    differing: tuple[str, ...]
    parity: Parity | TracedParity | None

    @property
    def passed(self) -> bool:
        return all(check.status != "fail" for check in self.checks)


def verify(
    *,
    export: Path,
    against: str | Path,
    adapters: Given = (),
    target: str | None = None,
    calib: str | Path | None = None,
    text: Path | None = None,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Hold the folder ``export`` against the checkpoint ``against`` with ``adapters``, which are told apart (merged, kept, fixed) by the manifest.

    ``calib``: the statistics or the text that the export was calibrated with; without it, calibrated weights are held to a distance instead of bit for bit.
    ``text``: UTF-8 text to run, through the whole model; without it, random tokens through its first layers where it is large.

    Raises:
        MissingError: no export of ours there. UsageError: the folder holds something else. What opening the checkpoint and its adapters raises. A failed
        check is no exception: see ``checks``.
    """
    manifest = manifest_of(export)
    roles = tell_apart(manifest, adapters)
    alone = not (roles.merge or roles.keep or roles.fixed)
    drawn = open_drawn(
        against if alone else None, None if alone else against, roles.merge, roles.keep, roles.fixed, target, "branch" in manifest.inputs, progress
    )
    checks = [check_files(export, manifest, progress), check_inputs(manifest, drawn, roles)]
    damaged = checks[0].status == "fail"  # then a single bit is worth a name
    with _statistics(drawn, calib, progress) as statistics:
        planned = plan_graph(drawn, request_of(manifest), statistics, progress)
        compared, wrong = list[Compared](), list[Compared]()
        parity: Parity | TracedParity | None = None
        plans = _data_plans(planned)
        fits, size = _fits(plans, export)
        checks += size
        if fits and all((export / name).is_file() for name in manifest.files if name.endswith(".onnx")):
            blind = "calibration" in manifest.report and statistics is None
            compared = compare_weights(planned, drawn.source, statistics, export, blind=blind, progress=progress)
            wrong = [item for item in compared if not item.equal or (damaged and item.differing)]
            checks += check_weights(compared, wrong, roles.missing)
            checks += check_graph(planned, export)
            parity, more = check_computation(planned, drawn, export, text, progress)
            checks += more
    differing = tuple(item.label for item in wrong)
    return VerifyResult(export, str(against), str(manifest.command.get("scheme")), tuple(checks), len(compared), differing, parity)


def manifest_of(folder: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        MissingError, UsageError: none, or one of something else.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise MissingError(f"{folder} holds no {FILE_NAME}: it is not a whole export of qlt", hint="make one with `qlt export`")
    if manifest.kind != "export":
        raise UsageError(f"{folder} holds a {manifest.kind}, not an export", hint="`qlt eval --against` compares checkpoints")
    return manifest


def request_of(manifest: Manifest) -> Request:
    """What kind of graph the manifest says was asked for."""
    command = manifest.command
    scheme, provider = str(command["scheme"]), str(command.get("device", "cpu"))
    target = target_for(scheme, provider, compute=command.get("compute"), standard=bool(command.get("standard", False)))
    return Request(scheme, target, command.get("task"))


@dataclass(frozen=True)
class Roles:
    """The given adapters as the manifest knows them. ``missing``: those it names that were not given; ``strange``: given ones that it does not name."""

    merge: Given
    keep: Given
    fixed: Given
    missing: tuple[str, ...]
    strange: tuple[str, ...]


def tell_apart(manifest: Manifest, adapters: Given) -> Roles:
    """Match adapters with the manifest's by the hash of their weights. What it does not name is taken as merged."""
    known = {name: entry for name, entry in manifest.inputs.items() if name.startswith("adapter")}
    merged, kept = int(manifest.command.get("merged", 0)), len(manifest.command.get("kept", ()))
    given = [(sha256_file(adapter_folder(path) / "adapter_model.safetensors"), path, weight) for path, weight in adapters]
    sorted_out: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    missing = []
    for position, entry in enumerate(known.values()):
        found = next((item for item in given if item[0] == entry.get("sha256")), None)
        if found is None:
            missing.append(f"`{entry.get('name')}`{' (kept)' if merged <= position < merged + kept else ''}")
            continue
        given.remove(found)
        sorted_out[0 if position < merged else 1 if position < merged + kept else 2].append(found[1:])
    strange = tuple(folder_name(Path(path)) for _, path, _ in given)
    sorted_out[0].extend(item[1:] for item in given)
    return Roles(*sorted_out, tuple(missing), strange)


def check_files(folder: Path, manifest: Manifest, progress: Progress) -> Check:
    """Every sealed file is there with the bytes it had."""
    wrong = []
    with progress.task("files", len(manifest.files), "files") as task:
        for name, sealed in manifest.files.items():
            path = folder / name
            if not path.is_file():
                wrong.append(f"`{name}` is missing")
            elif path.stat().st_size != sealed["bytes"]:
                wrong.append(f"`{name}` has {path.stat().st_size} bytes, sealed were {sealed['bytes']}")
            elif sha256_file(path) != sealed["sha256"]:
                wrong.append(f"`{name}` holds other bytes than were sealed")
            task.advance(1, name)
    if wrong:
        return Check("files", "fail", "; ".join(wrong), "the folder was changed after it was made: export again, or copy it again")
    return Check("files", "ok", f"{len(manifest.files)} files as they were sealed")


def check_inputs(manifest: Manifest, drawn: Drawn, roles: Roles) -> Check:
    """What the manifest was made of beside what was given. Never a failure by itself: a merged checkpoint stands for its base and adapter as well."""
    role = next((name for name in ("model", "base") if name in manifest.inputs), None)
    recorded = manifest.inputs[role] if role else {}
    given = next(drawn.inputs[name] for name in ("model", "base") if name in drawn.inputs)
    notes = []
    if recorded.get("headers_sha256") != given.get("headers_sha256"):
        notes.append(f"the export was made of `{recorded.get('name')}`, whose tensors have other names, shapes or dtypes than those of `{given['name']}`")
    elif recorded.get("name") != given.get("name"):
        notes.append(f"the export was made of `{recorded.get('name')}`, given was `{given['name']}`")
    notes += [f"adapter {name} is part of the export and was not given" for name in roles.missing]
    notes += [f"adapter `{name}` was given and is not part of the export" for name in roles.strange]
    if notes:
        return Check("inputs", "warn", "; ".join(notes), "give the checkpoint and the adapters that it was made of, with their weights")
    return Check("inputs", "ok", ", ".join(f"{name} `{entry.get('name')}`" for name, entry in drawn.inputs.items()))


def _statistics(drawn: Drawn, calib: str | Path | None, progress: Progress) -> Any:
    if calib is None:
        return nullcontext()
    from qlora_tools.verbs.calibrate import statistics_for

    return statistics_for(drawn.checkpoint, calib, beside=None, progress=progress)


def _data_plans(planned: DecoderExport | Traced) -> dict[str, Plan]:
    """Data file -> the plan that fills it."""
    return {DATA_FILE: planned.plan} if isinstance(planned, DecoderExport) or not hasattr(planned, "plans") else dict(planned.plans)


def _fits(plans: Mapping[str, Plan], folder: Path) -> tuple[bool, list[Check]]:
    """Whether the data files have the sizes that this checkpoint's export has: without that no tensor can be found in them."""
    wrong = []
    for name, plan in plans.items():
        path, wanted = folder / name, place(plan.outputs)[1]
        if not path.is_file():
            return False, []  # said by the check of files
        if path.stat().st_size != wanted:
            wrong.append(f"{name} has {path.stat().st_size} bytes, this checkpoint exported so has {wanted}")
    if wrong:
        return False, [Check("weights", "fail", "; ".join(wrong), "the export is of another model, or incomplete")]
    return True, []


def compare_weights(
    planned: DecoderExport | Traced, source: Source, statistics: Statistics | None, folder: Path, *, blind: bool, progress: Progress
) -> list[Compared]:
    """Every unit of the plan against the data file. ``blind``: codes were chosen by calibration, and its statistics are not at hand."""
    sources: dict[str, Source] = {MODEL: source} | ({STATISTICS: statistics} if statistics is not None else {})
    decoders = _decoders(planned) if blind and isinstance(planned, DecoderExport) else None
    found: list[Compared] = []
    for name, plan in _data_plans(planned).items():
        found += run(comparing(plan, folder / name, decoders), sources, title="compare weights", progress=progress)
    return found


def _decoders(planned: DecoderExport) -> dict[str, Decode]:
    """Stored part -> what decodes the parts of its matrix; biases are plain."""
    found: dict[str, Decode] = {}
    for matrix in planned.layout.matrices():

        def decode(parts: Mapping[str, Any], matrix: Any = matrix) -> Any:
            return matrix.format.decode(matrix.name, parts, matrix.columns, looked_up=False)

        found |= {spec.name: decode for spec in matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns)}
    return found


def check_weights(compared: Sequence[Compared], wrong: Sequence[Compared], missing: Sequence[str]) -> Iterator[Check]:
    """All as they should be, or which not. ``missing``: adapters that the export has and that were not given."""
    held = [item for item in compared if item.by_distance]
    if wrong:
        worst = max(wrong, key=lambda item: item.differing / max(item.elements, 1))
        share = worst.differing / max(worst.elements, 1)
        found = f"{len(wrong)} of {len(compared)} tensors are not what this checkpoint encodes to: {shortened([item.label for item in wrong])}"
        hint = "another checkpoint or adapter, an adapter forgotten, another --target, or damaged bytes: see the checks of files and inputs"
        yield Check("weights", "fail", f"{found} (at most {share:.1%} of a tensor's values differ)", hint)
        return
    if held and missing:
        yield Check("weights", "fail", f"calibrated weights cannot be told from those without {', '.join(missing)}", "give the adapter, or --calib")
        return
    equal = f"{len(compared) - len(held)} tensors are what this checkpoint encodes to"
    yield Check("weights", "ok", equal + (f", {len(held)} calibrated ones are as near to it as they should be" if held else ""))


def check_graph(planned: DecoderExport | Traced, folder: Path) -> Iterator[Check]:
    """The graph file is the one that this version draws. Another is no failure: another version may have drawn it."""
    if not isinstance(planned, DecoderExport):
        return
    import onnx_ir as ir

    from qlora_tools.export.decoder.graph import build_graph

    specs = {spec.name: spec for spec in planned.plan.outputs}
    model = build_graph(planned.decoder, planned.layout, specs, place(planned.plan.outputs)[0], planned.target, planned.branches.inputs)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, _GRAPH_FILE)
        ir.save(model, path)
        same = path.read_bytes() == (folder / _GRAPH_FILE).read_bytes()
    if same:
        yield Check("graph", "ok", "is the one drawn for this checkpoint, byte for byte")
    else:
        yield Check("graph", "warn", "is not the one that this version draws for this checkpoint and these adapters", "check the manifest's versions")


def check_computation(
    planned: DecoderExport | Traced, drawn: Drawn, folder: Path, text: Path | None, progress: Progress
) -> tuple[Parity | TracedParity | None, list[Check]]:
    """The parity checks of an export, with the weights that the file carries, and once more with every kept adapter."""
    try:
        if not isinstance(planned, DecoderExport):
            traced = _check_traced(planned, drawn.source, folder, progress)
            return traced, [Check("computation", "ok", traced.summary)]
        from qlora_tools.export.decoder.parity import check_parity

        ids_BT = None if text is None else _windows(folder, text)
        names: list[str | None] = [None, *planned.branches.kept]
        found = [check_parity(planned, drawn.source, drawn.config, folder, adapter=name, ids_BT=ids_BT, from_file=True, progress=progress) for name in names]
    except CheckFailed as error:
        return None, [Check("computation", "fail", str(error))]
    labels = [f"computation with {name}" if name else "computation" for name in names]
    return found[0], [Check(label, "ok", parity.summary) for label, parity in zip(labels, found, strict=True)]


def _check_traced(planned: Traced, source: Source, folder: Path, progress: Progress) -> TracedParity:
    from qlora_tools.export.traced.halves import HalvesExport, check_halves
    from qlora_tools.export.traced.parity import check_traced

    if isinstance(planned, HalvesExport):
        halves: TracedParity = check_halves(planned, source, folder, progress=progress)
        return halves
    return check_traced(planned, source, folder, progress=progress)


def _windows(folder: Path, text: Path) -> NDArray[Any]:
    """Token ids [B, T] of the text's beginning, in windows as long as the parity check runs.

    Raises:
        UsageError: the text is too short for one.
    """
    import numpy as np

    from qlora_tools.export.decoder.parity import PROMPT, STEPS
    from qlora_tools.live.tokenizer import open_tokenizer, read_utf8

    length = PROMPT + STEPS
    ids = open_tokenizer(folder)(read_utf8(text), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // length, _MAX_WINDOWS)
    if not count:
        raise UsageError(f"{text} has {len(ids)} tokens, the check needs {length}", hint="give a longer text")
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)
