"""``qlt verify``: a finished export held against its checkpoint once more, from what lies in the two folders alone.

Five questions, each answered by name. Are the files those that were sealed? Are the inputs what they were? Is every stored weight what this checkpoint
encodes to, adapters included? Is the graph the one that is drawn for it? Does it compute the same, over a prompt and single steps? The manifest says how
the export was made and of what (:mod:`qlora_tools.verbs.recall`); inputs that are elsewhere by now, or others, can be given.
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
from qlora_tools.errors import CheckFailed, CorruptError, IncompatibleError, MissingError, UsageError
from qlora_tools.export.calibrated import STATISTICS
from qlora_tools.export.comparison import Compared, Decode, comparing
from qlora_tools.export.decoder.export import MODEL_FILE, DecoderExport, drawn_graph
from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.decoder.weights import MODEL
from qlora_tools.export.external import place
from qlora_tools.export.schemes import target_for
from qlora_tools.manifest import FILE_NAME, Manifest, read_manifest, sha256_file
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.doctor import Check
from qlora_tools.verbs.export import Request, plan_graph
from qlora_tools.verbs.exporting import FIXED, KEPT, MERGED, Drawn, Given, open_drawn
from qlora_tools.verbs.recall import Recalled, check_inputs, recall

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qlora_tools.export.decoder.parity import Parity
    from qlora_tools.export.formats.format import WeightFormat
    from qlora_tools.export.traced.parity import TracedParity
    from qlora_tools.verbs.export_traced import Traced

_MAX_WINDOWS = 16


@dataclass(frozen=True)
class VerifyResult:
    """``against``, ``adapters``: what it was held against, as given or as found. ``weights``: checkpoint tensors compared with the data file; ``differing``:
    those that are not in it as they should be. ``parity`` is ``None`` where nothing could be run, or the graph was too far off; ``checks`` has the words."""

    export: Path
    against: str
    adapters: tuple[str, ...]
    scheme: str
    dry_run: bool
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
    against: str | Path | None = None,
    adapters: Given = (),
    target: str | None = None,
    calib: str | Path | None = None,
    text: Path | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Hold the folder ``export`` against what its manifest says it was made of, or against the checkpoint ``against``.

    ``adapters``: others than the manifest's, or the same from another place; they are told apart (merged, kept, fixed) by their hashes. With another checkpoint
    than the manifest's only what is given counts. ``target``: default, the manifest's. ``calib``: the statistics or the text that the export was calibrated
    with, where its statistics are not found; without, calibrated weights are held to a distance instead of bit for bit. ``text``: UTF-8 text to run,
    through the whole model; without it, random tokens through its first layers where it is large. A dry run finds the inputs and reads no more.

    Raises:
        MissingError: no export of ours there, or inputs that are not where they were; of the hub nothing is downloaded for a manifest's word. UsageError: the
        folder holds something else. CorruptError: its manifest is not as an export writes it. What opening the checkpoint and its adapters raises. A failed
        check is no exception: see ``checks``.
    """
    manifest = manifest_of(export)
    found = recall(manifest, export, against, adapters, progress)
    named = str(found.checkpoint), tuple(str(path) for path, _ in found.adapters)
    scheme = str(manifest.command.get("scheme"))
    if dry_run:
        return VerifyResult(export, *named, scheme, True, (), 0, (), None)
    checks = [check_files(export, manifest, progress), check_inputs(manifest, found)]
    damaged = checks[0].status == "fail"  # then a single bit is worth a name
    try:
        drawn = draw_again(manifest, found, target, progress)
    except IncompatibleError as error:
        if not found.changed:
            raise
        checks += [Check("weights", "fail", str(error), error.hint)]
        return VerifyResult(export, *named, scheme, False, tuple(checks), 0, (), None)
    with _statistics(drawn, calib or found.statistics, progress) as statistics:
        planned = plan_graph(drawn, request_of(manifest), statistics, progress)
        compared, wrong = list[Compared](), list[Compared]()
        parity: Parity | TracedParity | None = None
        plans = _data_plans(planned)
        fits, size = _fits(plans, export)
        checks += size
        if fits and all((export / name).is_file() for name in _graphs(planned, manifest)):
            blind = "calibration" in manifest.report and statistics is None
            compared = compare_weights(planned, drawn.source, statistics, export, blind=blind, progress=progress)
            wrong = [item for item in compared if not item.equal or (damaged and item.differing)]
            checks += check_weights(compared, wrong, found.missing)
            checks += check_graph(planned, export)
            parity, more = check_computation(planned, drawn, export, text, progress)
            checks += more
    differing = tuple(item.label for item in wrong)
    return VerifyResult(export, *named, scheme, False, tuple(checks), len(compared), differing, parity)


def manifest_of(folder: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        MissingError, UsageError: none, or one of something else. CorruptError: it does not say how the export was made.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise MissingError(f"{folder} holds no {FILE_NAME}: it is not a whole export of qlt", hint="make one with `qlt export`")
    if manifest.kind != "export":
        raise UsageError(f"{folder} holds a {manifest.kind}, not an export", hint="`qlt eval --against` compares checkpoints")
    if manifest.command.get("scheme") is None:
        raise CorruptError(f"{folder / FILE_NAME}: `command.scheme` is missing, expected the scheme of the export", hint="export it again")
    return manifest


def request_of(manifest: Manifest) -> Request:
    """What kind of graph the manifest says was asked for."""
    command = manifest.command
    scheme, provider = str(command["scheme"]), str(command.get("device", "cpu"))
    target = target_for(scheme, provider, compute=command.get("compute"), standard=bool(command.get("standard", False)))
    return Request(scheme, target, command.get("task"), command.get("head_bits"))


def draw_again(manifest: Manifest, found: Recalled, target: str | None, progress: Progress) -> Drawn:
    """The same inputs in the same parts. Which target merging had is the manifest's to say while the checkpoint is its own."""
    lists: list[Given] = [found.of(use) for use in (MERGED, KEPT, FIXED)]
    alone = not any(lists)
    target = target or (manifest.command.get("target") if found.original else None)
    model, base = (found.checkpoint, None) if alone else (None, found.checkpoint)
    return open_drawn(model, base, lists[0], lists[1], lists[2], target, "branch" in manifest.inputs, progress)


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
    if not any(name.endswith(".onnx") for name in manifest.files):
        wrong.append("no graph was sealed")
    if wrong:
        return Check("files", "fail", "; ".join(wrong), "the folder was changed after it was made: export again, or copy it again")
    return Check("files", "ok", f"{len(manifest.files)} files as they were sealed")


def _statistics(drawn: Drawn, calib: str | Path | None, progress: Progress) -> Any:
    if calib is None:
        return nullcontext()
    from qlora_tools.verbs.calibrate import statistics_for

    return statistics_for(drawn.checkpoint, calib, beside=None, progress=progress)


def _data_plans(planned: DecoderExport | Traced) -> dict[str, Plan]:
    """Data file -> the plan that fills it."""
    return {DATA_FILE: planned.plan} if isinstance(planned, DecoderExport) or not hasattr(planned, "plans") else dict(planned.plans)


def _graphs(planned: DecoderExport | Traced, manifest: Manifest) -> list[str]:
    """Graph files: a decoder's has one name, others those that were sealed."""
    return [MODEL_FILE] if isinstance(planned, DecoderExport) else [name for name in manifest.files if name.endswith(".onnx")]


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
    decoders = _decoders(planned) if blind else None
    found: list[Compared] = []
    for name, plan in _data_plans(planned).items():
        found += run(comparing(plan, folder / name, decoders), sources, title="compare weights", progress=progress)
    return found


def _decoders(planned: DecoderExport | Traced) -> dict[str, Decode]:
    """Stored part -> what decodes the parts of its matrix; biases are plain."""
    found: dict[str, Decode] = {}
    for name, form, rows, columns in _formed(planned):

        def decode(parts: Mapping[str, Any], name: str = name, form: WeightFormat = form, columns: int = columns) -> Any:
            return form.decode(name, parts, columns, looked_up=False)

        found |= {spec.name: decode for spec in form.parts(name, rows, columns)}
    return found


def _formed(planned: DecoderExport | Traced) -> Iterator[tuple[str, WeightFormat, int, int]]:
    """(name, format, rows, columns) of every stored matrix."""
    if isinstance(planned, DecoderExport):
        yield from ((matrix.name, matrix.format, matrix.total_rows, matrix.columns) for matrix in planned.layout.matrices())
    elif hasattr(planned, "weights"):
        for weight in dict.fromkeys(planned.weights.values()):
            if weight.form is not None:
                yield weight.name, weight.form, weight.rows, weight.columns


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

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, MODEL_FILE)
        ir.save(drawn_graph(planned), path)
        same = path.read_bytes() == (folder / MODEL_FILE).read_bytes()
    if same:
        yield Check("graph", "ok", "is the one drawn for this checkpoint, byte for byte")
    else:
        yield Check("graph", "warn", "is not the one that this version draws for this checkpoint and these adapters", "check the manifest's versions")


def check_computation(
    planned: DecoderExport | Traced, drawn: Drawn, folder: Path, text: Path | None, progress: Progress
) -> tuple[Parity | TracedParity | None, list[Check]]:
    """The parity checks of an export, with the weights that the file carries, and once more with every kept adapter."""
    try:
        found = dict(_parities(planned, drawn, folder, text, progress))
    except CheckFailed as error:
        return None, [Check("computation", "fail", str(error))]
    return found[None], [Check(f"computation with {name}" if name else "computation", "ok", parity.summary) for name, parity in found.items()]


def _parities(
    planned: DecoderExport | Traced, drawn: Drawn, folder: Path, text: Path | None, progress: Progress
) -> Iterator[tuple[str | None, Parity | TracedParity]]:
    """What was found alone (``None``), and with each kept adapter."""
    if not isinstance(planned, DecoderExport):
        from qlora_tools.verbs.export_traced import check_any

        yield from check_any(planned, drawn.source, folder, progress, from_file=True).items()
        return
    from qlora_tools.export.decoder.parity import check_parity

    ids_BT = None if text is None else _windows(folder, text)
    for name in (None, *planned.branches.kept):
        yield name, check_parity(planned, drawn.source, drawn.config, folder, adapter=name, ids_BT=ids_BT, from_file=True, progress=progress)


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
