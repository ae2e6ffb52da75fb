"""What a benchmark will do before it does it: which models run in which settings, what has to be made for that, and against what quality is judged."""

from __future__ import annotations

import itertools
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.bench.record import UNTUNED, Case, Setting, Workload
from qlora_tools.bench.rows import weight_file_bytes
from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.errors import UsageError
from qlora_tools.manifest import Manifest, read_manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.bench_names import short_labels, subject_names
from qlora_tools.verbs.bench_settings import DEFAULT, Planned, Subject, check_names
from qlora_tools.verbs.engines import ONNX_FORWARD, TORCH_FORWARD, engine_of, positions_of
from qlora_tools.verbs.exporting import Given
from qlora_tools.verbs.opening import folder_name, is_export, resolve_device
from qlora_tools.verbs.origins import found_again


@dataclass(frozen=True)
class Step:
    """One setting of a plan, for readers. ``action``: ``found``, ``make``, ``replace``, ``as it is``, or ``unavailable`` with a ``reason``. ``measured``:
    false for a model that only judges. ``bytes``: of the weights, where known. ``export``: the command that makes it, where one does."""

    setting: str
    name: str
    action: str
    bytes: int | None
    export: str | None
    measured: bool
    reason: str | None


@dataclass(frozen=True)
class BenchPlan:
    """``processes``: how many will be started for times alone. ``new_bytes``: what everything that has to be made will take on the disk."""

    steps: tuple[Step, ...]
    cases: tuple[Case, ...]
    rounds: int
    processes: int
    new_bytes: int


@dataclass(frozen=True)
class Exported:
    """The export of a checkpoint in one setting, found or made. ``model``: the checkpoint, or the base, as it was given."""

    model: str
    scheme: str
    folder: Path


@dataclass(frozen=True, eq=False)
class LineUp:
    """Everything that is measured, in order, and who judges. ``untuned``: the id of the model before fine-tuning. ``skipped``: arguments that are no models."""

    planned: tuple[Planned, ...]
    reference: Planned | None
    untuned: str | None
    skipped: tuple[str, ...]

    @property
    def everything(self) -> tuple[Planned, ...]:
        """What is measured, and the reference where it is not among it."""
        if self.reference is None or self.reference.setting.id in {found.setting.id for found in self.planned}:
            return self.planned
        return (*self.planned, self.reference)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Everything that is read, or will lie there to be read: models, adapters and the folders of their exports."""
        run = [Path(found.setting.path) for found in self.everything if found.setting.path]
        subjects = [found.subject for found in self.everything if found.subject is not None]
        return tuple(dict.fromkeys((*run, *(folder for subject in subjects for folder in subject.drawn.folders))))

    @property
    def exports(self) -> tuple[Exported, ...]:
        """Of the given checkpoints, as far as they are there; who judges comes first."""
        made: dict[Path, Exported] = {}
        for found in (*([self.reference] if self.reference is not None else []), *self.planned):
            scheme = found.setting.scheme
            if found.subject is not None and found.folder is not None and scheme is not None and found.setting.unavailable is None:
                made.setdefault(found.folder, Exported(str(found.subject.model), scheme, found.folder))
        return tuple(made.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Which exports, once they are made, carry their weights otherwise than their scheme is called; what they share with another is no accident then."""
        made = {found.setting.id: Path(found.setting.path) for found in self.planned if found.setting.path and found.setting.unavailable is None}
        commands = {name: manifest.command for name, folder in made.items() if (manifest := read_manifest(folder)) is not None}
        stored = {name: (command.get("scheme"), command.get("carried")) for name, command in commands.items() if command.get("carried")}
        return tuple(
            f"{name} carries its weights as {carried}: what it was made for has no fast form of {scheme}."
            for name, (scheme, carried) in stored.items()
            if carried != scheme
        )

    def described(self, workload: Workload, rounds: int) -> BenchPlan:
        """The plan for readers."""
        measured = {found.setting.id for found in self.planned}
        steps = tuple(_step(found, found.setting.id in measured) for found in self.everything)
        folders = {found.folder: found.bytes or 0 for found in self.everything if found.action in ("make", "replace")}
        running = sum(found.setting.unavailable is None for found in self.planned)
        return BenchPlan(steps, workload.cases, rounds, running * len(workload.cases) * rounds, sum(folders.values()))

    def made(self) -> LineUp:
        """The same with everything in its place, as far as it could be made. The checkpoint itself judges where its fp32 export could not be."""
        done = {found.setting.id: found.made() for found in self.everything}
        reference = done[self.reference.setting.id] if self.reference is not None else None
        if reference is not None and reference.setting.unavailable is not None and reference.subject is not None:
            found = reference.subject.fallback()
            reference = done.get(found.setting.id) or found.made()
        return replace(self, planned=tuple(done[found.setting.id] for found in self.planned), reference=reference)


def sweep(*, prompt: Sequence[int], new: Sequence[int], batch: Sequence[int]) -> tuple[Case, ...]:
    """Every combination of tokens in, tokens out and sequences once, batches outermost."""
    return tuple(dict.fromkeys(Case(tokens, out, sequences) for sequences, tokens, out in itertools.product(batch, prompt, new)))


def line_up(
    models: Sequence[str | Path],
    *,
    adapters: Given = (),
    settings: Sequence[str] | None = None,
    reference: str | Path | None = None,
    untuned: str | Path | None = None,
    device: str = "auto",
    judged: bool = True,
    progress: Progress = SILENT,
) -> LineUp:
    """Open every model and decide what each setting takes, from headers alone.

    Raises:
        UsageError: nothing to measure, unknown settings, settings for exports alone, adapters without their one base. MissingError: no such model.
    """
    if not models:
        raise UsageError("nothing to measure", hint="give exports, or a checkpoint with --settings int8,int4")
    folders, skipped = _folders(models)
    place = _device(device, folders)
    names = check_names(settings or (DEFAULT,), place) if settings or adapters else ()
    checkpoints = {name: folder for name, folder in folders if not is_export(folder)}
    if names and not checkpoints:
        raise UsageError(
            "settings are made of a checkpoint, and these are exports, which are measured as they are", hint="give the model, or leave out --settings"
        )
    if adapters and len(checkpoints) != 1:
        raise UsageError(f"adapters are put on one base, and {len(checkpoints)} checkpoints were given", hint="give the base alone")
    subjects = _subjects(checkpoints, adapters, place, progress) if names else []
    as_they_are = [folder for name, folder in folders if is_export(folder) or not names]
    planned = [*as_is(as_they_are, place), *(found for subject in subjects for found in subject.plan(names))]
    before = subjects[0].untuned() if adapters else None
    unique = _labelled(_once([*planned, *([before] if before is not None else [])]), alone=len(subjects) == 1 and not as_they_are)
    judge = _judge(reference, unique, subjects, place) if judged else None
    return LineUp(tuple(unique), judge, _untuned(untuned, before, unique), skipped)


def _subjects(checkpoints: Mapping[str | Path, Path], adapters: Given, device: str, progress: Progress) -> list[Subject]:
    """One subject for each model, each with a name of its own: exports lie in folders of these names."""
    names = subject_names([slug(folder_name(folder)) for folder in checkpoints.values()], list(checkpoints.values()))
    called = [None] if adapters else names  # one base then, named with its adapters
    return [Subject(model, adapters, device, called=name, progress=progress) for model, name in zip(checkpoints, called, strict=True)]


def check_room(found: LineUp, workload: Workload) -> None:
    """Refuse cases longer than what the models have positions for.

    Raises:
        UsageError: names the first such case and the model.
    """
    for planned in found.planned:
        place = planned.subject.checkpoint if planned.subject is not None else planned.setting.path
        room = positions_of(Path(place)) if place is not None else None
        looks = planned.setting.engine in (ONNX_FORWARD, TORCH_FORWARD)
        for case in workload.cases:
            longest = case.prompt_tokens if looks else case.longest
            if room is not None and longest > room:
                raise UsageError(
                    f"{place} has {room} positions, {longest} tokens were asked for" + ("" if looks else f" ({case.prompt_tokens} + {case.new_tokens})"),
                    hint="lower --prompt" if looks else "lower --prompt or --new",
                )


def _folders(models: Sequence[str | Path]) -> tuple[list[tuple[str | Path, Path]], tuple[str, ...]]:
    """Arguments with their folders, once each. Among several, plain files are what a glob picked up beside the models."""
    found: dict[Path, tuple[str | Path, Path]] = {}
    skipped = []
    for model in models:
        if len(models) > 1 and Path(model).is_file():
            skipped.append(str(model))
            continue
        folder = resolve_model(str(model))
        found.setdefault(folder.resolve(), (model, folder))
    if not found:
        raise UsageError(f"{skipped[0]} is not a model, and neither is anything else here", hint="give exports or checkpoints")
    return list(found.values()), tuple(skipped)


def _device(device: str, folders: Sequence[tuple[str | Path, Path]]) -> str:
    """``auto``: a GPU where there is one; where all there is to measure are exports, theirs."""
    if device != "auto":
        return device
    if not all(is_export(folder) for _, folder in folders):
        return resolve_device(device)
    return "cuda" if any(engine_of(folder)[1]["device"] == "cuda" for _, folder in folders) else "cpu"


def as_is(folders: Sequence[Path], device: str) -> list[Planned]:
    """Exports and checkpoints the way they lie there.

    Raises:
        MissingError: one is neither.
    """
    ids = subject_names([folder_name(folder) for folder in folders], folders)
    return [_as_it_is(folder, device, name) for folder, name in zip(folders, ids, strict=True)]


def _as_it_is(folder: Path, device: str, name: str) -> Planned:
    engine, options = engine_of(folder, device)
    if options.get("dtype") == "fp32" and options["device"] != "cpu":  # a GPU keeps the floats that are stored
        options["dtype"] = "stored"
    manifest = read_manifest(folder)
    scheme = str(manifest.command.get("scheme")) if manifest and manifest.command.get("scheme") else None
    command = export_command(manifest, folder) if manifest is not None else None
    return Planned(Setting(name, engine, options, scheme=scheme, path=str(folder), export=command), "as it is", None, weight_file_bytes(str(folder)))


def export_command(manifest: Manifest, folder: Path) -> str | None:
    """The `qlt export` that made ``folder``, from its manifest, as it would be typed here; ``None`` where that does not say enough."""
    if manifest.kind != "export" or "scheme" not in manifest.command:
        return None
    command, words = manifest.command, ["qlt", "export"]

    def place(role: str) -> str:
        origin = found_again(manifest.inputs[role], folder)
        return _typed(origin) if origin is not None else str(manifest.inputs[role].get("name"))

    uses: Mapping[str, Mapping[str, Any]] = command.get("adapters") or {}
    words += [place("model")] if "model" in manifest.inputs else ["--base", place("base")] if "base" in manifest.inputs else []
    flags = {"merged": "--adapter", "kept": "--adapters", "fixed": "--branch"}
    for role, part in uses.items():
        weight = part.get("weight", 1)
        words += [flags[part["use"]], place(role) if weight == 1 else f"{place(role)}={weight:g}"]
    words += ["--merge"] if any(part["use"] == "merged" for part in uses.values()) else []
    words += [f"--{command['scheme']}", "--device", str(command.get("device", "cpu"))]
    words += ["--dtype", "bf16"] if command.get("compute") == "BF16" and command["scheme"] != "bf16" else []
    words += ["--standard"] if command.get("standard") else []
    words += ["--task", str(command["task"])] if command.get("task") else []
    words += ["--head-bits", str(command["head_bits"])] if command.get("head_bits") else []
    calib = command.get("calib") or (place("calibration") if "calibration" in manifest.inputs else None)
    return shlex.join([*words, *(["--calib", str(calib)] if calib else []), "-o", _typed(folder)])


def _typed(path: str | Path) -> str:
    """A folder from the working folder: a record may be published, and a way up tells less than where somebody lives."""
    return os.path.relpath(path) if isinstance(path, Path) else path


def _once(planned: Sequence[Planned]) -> list[Planned]:
    """Every way to run a folder once, and no id twice."""
    seen: dict[Any, Planned] = {}
    for found in planned:
        setting = found.setting
        key = (
            setting.engine,
            *sorted((name, str(Path(str(value)).resolve()) if name in ("folder", "path") else str(value)) for name, value in setting.options.items()),
        )
        kept = seen.get(key)
        if kept is None or (kept.subject is None and found.subject is not None):
            seen[key] = found
    counts = Counter(found.setting.id for found in seen.values())
    numbers: Counter[str] = Counter()
    unique = []
    for found in seen.values():
        name = found.setting.id
        numbers[name] += 1
        again = counts[name] > 1 and numbers[name] > 1
        unique.append(replace(found, setting=replace(found.setting, id=f"{name}-{numbers[name]}")) if again else found)
    return unique


def _labelled(planned: Sequence[Planned], *, alone: bool) -> list[Planned]:
    """What tables show: a setting's own name where there is one model, else ids without what they share."""
    if alone:
        return list(planned)
    named = [found for found in planned if found.setting.label != UNTUNED]
    labels = dict(zip((found.setting.id for found in named), short_labels([found.setting.id for found in named]), strict=True))
    labels = {name: name if label == UNTUNED else label for name, label in labels.items()}  # that word is taken
    return [replace(found, setting=replace(found.setting, label=labels.get(found.setting.id, found.setting.label))) for found in planned]


def _judge(reference: str | Path | None, planned: Sequence[Planned], subjects: Sequence[Subject], device: str) -> Planned | None:
    """The reference as the setting that is measured anyway, where it is one."""
    if reference is not None:
        folder = resolve_model(str(reference))
        measured = _running(folder, planned)
        return measured if measured is not None else _as_it_is(folder, device, folder_name(folder))
    if not subjects:
        return None
    judge = subjects[0].reference()
    return next((found for found in planned if found.setting.id == judge.setting.id), judge)


def _running(folder: Path, planned: Sequence[Planned]) -> Planned | None:
    """The setting that runs ``folder`` the way it lies there, as an export or as a checkpoint that nothing is done to on loading."""
    able = (found for found in planned if found.subject is None or "folder" in found.setting.options)
    return next((found for found in able if found.setting.path and Path(found.setting.path).resolve() == folder.resolve()), None)


def _untuned(untuned: str | Path | None, before: Planned | None, planned: Sequence[Planned]) -> str | None:
    if before is not None:
        return before.setting.id
    if untuned is None:
        return None
    found = _running(resolve_model(str(untuned)), planned)
    if found is None:
        raise UsageError(f"{untuned} is the untuned model, and is not among those to measure", hint="name it among the models, too")
    return found.setting.id


def _step(found: Planned, measured: bool) -> Step:
    setting = found.setting
    action = "unavailable" if setting.unavailable is not None else found.action
    return Step(setting.id, setting.name, action, found.bytes, setting.export, measured, setting.unavailable)
