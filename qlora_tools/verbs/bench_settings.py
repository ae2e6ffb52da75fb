"""Names such as ``int8`` and ``torch-nf4`` turned into settings of a benchmark: what has to be exported or merged first, and what is there already.

``fp32 fp16 bf16 int8 w8a8 int4 nf4`` are exports in ONNX Runtime, in ``exports/<model>-<name>``. ``torch-fp32 torch-bf16 torch-fp16 torch-nf4
torch-int8`` are the checkpoint itself in transformers, quantized on loading by bitsandbytes: what one has without exporting. With adapters these run
a merged checkpoint, in ``checkpoints/<model>-merged``.

A folder is used again where its manifest says that it was made of the same inputs (names, shapes and values, see ``origins.py``) in the same way. One
that this package made in the same way of what an input used to be is replaced, once its successor is whole. Whatever else lies there is left alone,
and the export goes beside it. What cannot be made becomes a setting with the reason in ``unavailable``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_tools.bench.record import UNTUNED, Setting
from qlora_tools.bench.rows import weight_file_bytes
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import QltError, UsageError
from qlora_tools.export.schemes import NAMES, target_for
from qlora_tools.manifest import Manifest, library_versions
from qlora_tools.models.work import FORWARD, work_of
from qlora_tools.names import nearest, slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.quantize import plan_quantize
from qlora_tools.verbs.engines import ONNX_ENGINE, ONNX_FORWARD, TORCH_ENGINE, TORCH_FORWARD
from qlora_tools.verbs.export import export
from qlora_tools.verbs.exporting import Drawn, Given, open_drawn
from qlora_tools.verbs.merge import merge
from qlora_tools.verbs.opening import readable_manifest
from qlora_tools.verbs.origins import from_one_place, same_inputs
from qlora_tools.verbs.quantize import base_codec

#: Names of transformers' settings: dtype and quantization on loading.
TORCH: Mapping[str, tuple[str, str | None]] = {
    "torch-fp32": ("fp32", None),
    "torch-bf16": ("bf16", None),
    "torch-fp16": ("fp16", None),
    "torch-nf4": ("bf16", "nf4"),
    "torch-int8": ("fp16", "int8"),
}
#: What is measured where nobody says what.
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4", "nf4", "torch-bf16", "torch-nf4"),
}
DEFAULT = "default"
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STORED = {"float32": "torch-fp32", "bfloat16": "torch-bf16", "float16": "torch-fp16"}
_FOLDERS = 100
Action = Literal["found", "make", "replace", "as it is"]


@dataclass(frozen=True, eq=False)
class Planned:
    """A setting, and what has to happen before it can run. ``bytes``: of its weights, as stored or, before they are, as planned. ``folder``: where it
    lies or will lie; ``is_merge``: what is missing there is a merged checkpoint, not an export. ``subject``: who makes it; ``None`` for a folder as it is."""

    setting: Setting
    action: Action
    folder: Path | None
    bytes: int | None
    is_merge: bool = False
    subject: Subject | None = None

    def made(self) -> Planned:
        """The same once it lies there, or with the reason why it does not."""
        return self if self.subject is None else self.subject.make(self)

    def without(self, error: BaseException) -> Planned:
        """The same as a setting that cannot run, for the reason that ``error`` gives."""
        first, kind = next(iter(str(error).strip().splitlines()), ""), type(error).__name__
        reason = first if isinstance(error, QltError) else f"{kind}: {first}" if first else kind
        verb = "merge" if self.is_merge else "export"
        return replace(self, setting=replace(self.setting, unavailable=f"its {verb} failed: {reason}"), action="as it is", bytes=None)


def check_names(names: Sequence[str], device: str = "cpu") -> tuple[str, ...]:
    """The names without repeats; ``default`` stands for those of the device.

    Raises:
        UsageError: one is not known.
    """
    known = (*NAMES, *TORCH)
    wanted = [each for name in names for each in (DEFAULTS[device] if name == DEFAULT else (name,))]
    for name in wanted:
        if name not in known:
            close = f"; did you mean {' or '.join(found)}" if (found := nearest(name, known, 2)) else ""
            raise UsageError(f"`{name}` is not a setting{close}", hint=f"settings: {', '.join(known)}")
    return tuple(dict.fromkeys(wanted))


class Subject:
    """One model, or a base with adapters, that is to be measured in several settings."""

    def __init__(
        self,
        model: str | Path,
        adapters: Given,
        device: str,
        *,
        exports: Path = Path("exports"),
        merged: Path = Path("checkpoints"),
        called: str | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Reads headers only. ``called``: what tells it from other models, where its folder's name does not.

        Raises:
            What opening a checkpoint or reading an adapter for it raises.
        """
        self.model, self.adapters, self.device = model, [(path, float(weight)) for path, weight in adapters], device
        self._exports, self._merged, self._called, self._progress = exports, merged, called, progress
        self._tried: dict[Path, Exception | None] = {}
        self._words: dict[str, Any] = {"base": model, "adapters": self.adapters} if self.adapters else {"model": model}
        self.drawn: Drawn = open_drawn(None if self.adapters else model, model if self.adapters else None, self.adapters, (), (), None, True, progress)

    @property
    def name(self) -> str:
        return slug(self._called or self.drawn.name.replace("+", "-"))

    @property
    def checkpoint(self) -> Path:
        """The folder of the model, or of the base."""
        return self.drawn.checkpoint.folder

    @property
    def _looks(self) -> bool:
        """Whether the model looks once instead of writing."""
        return work_of(self.drawn.config) == FORWARD

    def plan(self, names: Sequence[str]) -> list[Planned]:
        """What each name takes, from headers and manifests alone."""
        return [self._torch(name) if name in TORCH else self._onnx(name) for name in names]

    def reference(self) -> Planned:
        """What quality is judged against: the fp32 export on the CPU; elsewhere the model in the floats that it is stored in."""
        if self.device == "cpu":
            planned = self._onnx("fp32")
            return planned if planned.setting.unavailable is None else self.fallback()
        config = read_json(self.checkpoint / "config.json")
        return self._torch(_STORED.get(str(config.get("dtype") or config.get("torch_dtype")), "torch-bf16"))

    def fallback(self) -> Planned:
        """Who judges where the fp32 export cannot be made."""
        return self._torch("torch-fp32")

    def untuned(self) -> Planned | None:
        """The base without its adapters, in transformers; ``None`` where there are no adapters, or one brings the head: without it there is nothing to judge."""
        merged = self.drawn.merged
        if not self.adapters or (merged is not None and merged.head is not None):
            return None
        dtype = "fp32" if self.device == "cpu" and not self.drawn.checkpoint.quantized else "stored"
        options = {"path": str(self.checkpoint), "dtype": dtype, "device": self.device}
        setting = Setting(f"{self.name}-untuned", TORCH_FORWARD if self._looks else TORCH_ENGINE, options, label=UNTUNED, path=str(self.checkpoint))
        return Planned(setting, "as it is", None, self._torch_bytes(None, dtype), subject=self)

    def make(self, planned: Planned) -> Planned:
        """Export or merge what is missing. A failure becomes the setting's reason and touches nothing else."""
        if planned.action not in ("make", "replace") or planned.setting.unavailable is not None or planned.folder is None:
            return planned
        if planned.folder in self._tried:  # several settings run one merged checkpoint
            error = self._tried[planned.folder]
            return planned if error is None else planned.without(error)
        words: dict[str, Any] = {**self._words, "output": planned.folder, "force": planned.action == "replace", "progress": self._progress}
        try:
            if planned.is_merge:
                merge(**words)
            else:
                export(**words, scheme=planned.setting.scheme, device=self.device)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong belongs to this setting alone, and its row says it
            self._tried[planned.folder] = error
            return planned.without(error)
        self._tried[planned.folder] = None
        return planned

    def _onnx(self, scheme: str) -> Planned:
        folder, action = self._place(self._exports / slug(f"{self.name}-{scheme}"), lambda manifest: self._is_export(manifest, scheme))
        setting = Setting(
            id=f"{self.name}-{scheme}",
            engine=ONNX_FORWARD if self._looks else ONNX_ENGINE,
            options={"folder": str(folder), "device": self.device},
            label=scheme,
            scheme=scheme,
            path=str(folder),
            export=self._command("export", f"--{scheme}", "--device", self.device, "-o", str(folder)),
        )
        planned = Planned(setting, action, folder, None, subject=self)
        if action == "found":
            return replace(planned, bytes=weight_file_bytes(str(folder)))
        try:
            size = export(**self._words, scheme=scheme, device=self.device, output=folder, force=True, dry_run=True).file_bytes
        except Exception as error:  # noqa: BLE001 - as in make(): what cannot even be planned leaves a row, too
            return planned.without(error)
        return replace(planned, bytes=size)

    def _torch(self, name: str) -> Planned:
        dtype, quantize = TORCH[name]
        folder, command = self.checkpoint, None
        action: Action = "as it is"
        if self.adapters:
            folder, action = self._place(self._merged / f"{self.name}-merged", self._is_merge)
            command = self._command("merge", "-o", str(folder))
        options: dict[str, Any] = {"path": str(folder), "dtype": dtype, "device": self.device}
        if quantize is not None:
            options["quantize"] = quantize
        planned = Planned(
            Setting(f"{self.name}-{name}", TORCH_FORWARD if self._looks else TORCH_ENGINE, options, label=name, path=str(folder), export=command),
            action,
            folder if self.adapters else None,
            self._torch_bytes(quantize, dtype),
            is_merge=bool(self.adapters),
            subject=self,
        )
        if quantize is not None and self._looks:
            reason = "a model that looks once is not quantized on loading here"
            return replace(planned, setting=replace(planned.setting, unavailable=reason), bytes=None)
        if self.drawn.checkpoint.quantized and not self.adapters:
            stored = next(iter(self.drawn.checkpoint.quantized.values())).codec.name
            if quantize == stored:
                setting = replace(planned.setting, options={"path": str(folder), "dtype": "stored", "device": self.device})
                return replace(planned, setting=setting)
            reason = f"the checkpoint is {stored} already: its weights were rounded, and the 16-bit ones are not at hand"
            return replace(planned, setting=replace(planned.setting, unavailable=reason), bytes=None)
        return planned

    def _torch_bytes(self, quantize: str | None, dtype: str) -> int | None:
        source, checkpoint = self.drawn.source, self.drawn.checkpoint
        if dtype == "stored":
            return sum(spec.nbytes for spec in checkpoint.stored.specs.values())
        codec = base_codec(quantize)
        if codec is not None:
            return sum(spec.nbytes for spec in plan_quantize(source, checkpoint.family, codec).outputs)
        return sum(spec.numel for spec in source.specs.values()) * _DTYPE_BYTES[dtype]

    def _command(self, verb: str, *rest: str) -> str:
        words = ["qlt", verb]
        if self.adapters:
            words += ["--base", str(self.model)]
            for path, weight in self.adapters:
                words += ["--adapter", str(path) if weight == 1 else f"{path}={weight:g}"]
            words += ["--merge"] if verb == "export" else []
        else:
            words.append(str(self.model))
        return shlex.join([*words, *rest])

    def _place(self, folder: Path, is_like: Callable[[Manifest], bool]) -> tuple[Path, Action]:
        """The first of the folders by this name that holds what is wanted, may be replaced by it, or is free."""
        for place in _folders(folder, self.device):
            if not place.exists() or (place.is_dir() and not any(place.iterdir())):
                return place, "make"
            manifest = readable_manifest(place)  # what cannot be read is not ours to replace
            if manifest is not None and is_like(manifest):
                stale = self._changed(manifest, place)
                if stale is not None:
                    return place, "replace" if stale else "found"
        raise UsageError(f"{folder} and {_FOLDERS} names like it are taken", hint="remove exports that are not needed any more")

    def _changed(self, manifest: Manifest, place: Path) -> bool | None:
        """False where ``manifest`` names the inputs of this subject, True where it names them as they were, ``None`` where it names others: two models
        may have one name, and only what lies, or lay, in the same place is an older state of the same."""
        given, recorded = self.drawn.inputs(place), manifest.inputs
        if recorded.keys() != given.keys() or any(recorded[role].get("name") != entry["name"] for role, entry in given.items()):
            return None
        same = same_inputs(recorded, given) is True
        if same and manifest.versions.get("qlora-tools") == library_versions().get("qlora-tools"):
            return False
        return True if same or all(from_one_place(recorded[role], entry) for role, entry in given.items()) else None

    def _is_export(self, manifest: Manifest, scheme: str) -> bool:
        """Whether the folder was made the way this benchmark would make it, of whatever inputs."""
        try:
            target = target_for(scheme, self.device)
        except QltError:
            return False
        command, parts = manifest.command, zip(self.drawn.roles, self.drawn.adapters, strict=True)
        wanted = {"verb": "export", "scheme": scheme, "device": self.device, "compute": target.compute, "standard": False}
        wanted |= {"adapters": {role: {"use": part.use, "weight": part.weight} for role, part in parts}, "target": self.drawn.target}
        wanted |= {"calib": None, "head_bits": None}
        plain = "calibration" not in manifest.inputs and not command.get("kept") and self._is_own_task(command.get("task"))
        return manifest.kind == "export" and plain and all(command.get(name) == value for name, value in wanted.items())

    def _is_own_task(self, task: str | None) -> bool:
        """Whether a graph for ``task`` is what an export makes of this model unasked; ``None`` is its family's own graph."""
        from qlora_tools.verbs.export_traced import own_task  # brings transformers with it

        return task is None or task == own_task(self.drawn.config)

    def _is_merge(self, manifest: Manifest) -> bool:
        wanted = {"verb": "merge", "scheme": None, "target": self.drawn.target, "weights": [weight for _, weight in self.adapters]}
        return manifest.kind == "checkpoint" and all(manifest.command.get(name) == value for name, value in wanted.items())


def _folders(folder: Path, device: str) -> Iterator[Path]:
    yield folder
    beside = folder.with_name(f"{folder.name}-{device}")
    yield beside
    for number in range(2, _FOLDERS):
        yield beside.with_name(f"{beside.name}-{number}")
