"""The head that an adapter brings along, and the base as the class that has this head would store it.

Training a classifier on a base without a head for its classes makes the head in the adapter (``modules_to_save``). Merged, base and head are a model of
another class than the base: ``BertForSequenceClassification`` where there was a ``BertModel``. Its checkpoint has the prefix that this class puts before
its body, so that body and head are found again whoever loads it; what the class has no place for (the old head, a masked-language head) is left out and
named; and config.json says class and classes.

Which class that is, and what it holds, transformers says. Accepted is only what makes it whole: every tensor that the base lacks must come with the adapter,
in the shape that the class has. Anything else is left to the ordinary matching of adapter and base, which refuses it by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tools.adapters.peft_config import FILE_NAME, read_config
from qlora_tools.adapters.peft_files import WEIGHTS
from qlora_tools.adapters.peft_keys import WHOLE, parse_key
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.checkpoint.renamed import RenamedCheckpoint
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.live.loading import loaded_names
from qlora_tools.manifest import read_manifest
from qlora_tools.names import shortened, split_tensor
from qlora_tools.specs import TensorSpec

Shape = tuple[int, ...]
#: PEFT's task type -> the task that names the class. PEFT has none for images.
_TASKS: Mapping[str | None, str] = {"SEQ_CLS": "classification", None: "image"}


@dataclass(frozen=True)
class Head:
    """A new head. ``adapter`` brings it; ``architecture``: the class that has it; ``added``: its tensors, in the dtype that the base has;
    ``dropped``: tensors of the base, by the names in its folder, that this class has no place for; ``live``: see :func:`live_names`."""

    adapter: Path
    architecture: str
    added: Mapping[str, TensorSpec]
    dropped: tuple[str, ...]
    live: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """One sentence for the user."""
        left = f"; it has no place for {shortened(self.dropped)}, left out" if self.dropped else ""
        return f"the result is a {self.architecture}, whose {shortened(self.added)} {self.adapter} brings{left}"

    def record(self) -> dict[str, Any]:
        """What a manifest says: nothing of the base goes in silence."""
        return {"architecture": self.architecture, "added": sorted(self.added), "dropped": list(self.dropped)}


def with_head(opened: LogicalCheckpoint, folders: Iterable[Path]) -> tuple[LogicalCheckpoint, Head | None]:
    """``opened`` as the class with the head that one of the adapters in ``folders`` brings, and that head; ``opened`` itself where none does.

    Only headers are read.

    Raises:
        IncompatibleError: a tensor that the class needs is neither in the base nor in the adapter. And what reading a PEFT configuration raises.
    """
    for folder in folders:
        saved = _whole_modules(folder)
        if all(_holds(opened.specs, name, shape) for name, shape in saved.items()):
            continue
        found = _headed(opened, folder, saved)
        if found is not None:
            return found
    return opened, None


def live_names(opened: LogicalCheckpoint, folder: Path) -> dict[str, str]:
    """Tensor of ``opened`` -> what the class that the adapter in ``folder`` was trained on calls it, where that is another name.

    transformers renames while it loads and back while it stores; an adapter has the names of the model in memory.
    """
    model = _model_of(opened, folder, {}, ())
    return {} if model is None else _called_otherwise(model, opened.specs)


def labels_of(folder: Path) -> tuple[str, ...]:
    """The names of the classes that the adapter in ``folder`` was trained to tell apart, as its manifest has them, by number."""
    manifest = read_manifest(folder)
    found = manifest.command.get("labels") if manifest else None
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()


def labelled(config: Mapping[str, Any], labels: Iterable[str], *, single: bool = True) -> dict[str, Any]:
    """``config`` with the names of the classes. ``single``: it is known that an input has one class; otherwise config.json does not say what the
    old head's problem was."""
    names = list(labels)
    rest = {key: value for key, value in config.items() if key not in ("num_labels", "_num_labels", "problem_type")}
    rest |= {"problem_type": "single_label_classification"} if single else {}
    return {**rest, "id2label": {str(number): name for number, name in enumerate(names)}, "label2id": {name: number for number, name in enumerate(names)}}


def _whole_modules(folder: Path) -> dict[str, Shape]:
    """Tensor -> shape of the modules that the adapter's configuration says are saved whole."""
    config, path = read_config(folder), folder / WEIGHTS
    if not config.modules_to_save or not path.is_file():
        return {}
    with SafetensorsFile(path) as file:
        keys = {parse_key(key): spec.shape for key, spec in file.specs.items()}
    return {key.path: shape for key, shape in keys.items() if key.kind == WHOLE and config.saves(split_tensor(key.path)[0])}


def _holds(specs: Mapping[str, TensorSpec], name: str, shape: Shape) -> bool:
    """Whether a base has a tensor of this shape by this name, but for leading parts."""
    return any(spec.shape == shape and (f".{name}".endswith(f".{stored}") or f".{stored}".endswith(f".{name}")) for stored, spec in specs.items())


def _headed(opened: LogicalCheckpoint, folder: Path, saved: Mapping[str, Shape]) -> tuple[LogicalCheckpoint, Head] | None:
    """``opened`` with the head among ``saved``; ``None`` where this is no head that the base could do without."""
    labels = labels_of(folder)
    model = _model_of(opened, folder, saved, labels)
    if model is None:
        return None
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    kept = _kept(model, opened, state)
    lacking = state.keys() - set(kept.values()) - _shared(model, set(kept.values()))
    if not lacking & saved.keys() or any(saved[name] != state[name] for name in lacking & saved.keys()):
        return None
    architecture = type(model).__name__
    if missing := sorted(lacking - saved.keys()):
        raise IncompatibleError(
            f"adapter {folder} was trained on a {architecture}, whose {shortened(missing)} neither {opened.folder} nor the adapter holds",
            hint="give the base that it was trained on; weights that started at random and were not saved are lost",
        )
    names, dtype = _spelled(model, kept), _dtype_of(opened)
    if len(set(names.values())) < len(names) or _called_otherwise(model, lacking):  # one tensor under two names, or a head that is stored under another
        return None
    added = {name: TensorSpec(name, dtype, state[name]) for name in sorted(lacking)}
    config = _config(opened.config, model, architecture, bool(labels), {split_tensor(name)[0] for name in added})
    dropped = tuple(sorted(opened.specs.keys() - names.keys()))
    head = Head(folder, architecture, added, dropped, _called_otherwise(model, names.values()))
    return RenamedCheckpoint(opened, names, config, known=state.keys()), head


def _model_of(opened: LogicalCheckpoint, folder: Path, saved: Mapping[str, Shape], labels: tuple[str, ...]) -> Any:
    """The empty model that the adapter was trained on; ``None`` where transformers has no class for its task.

    Where no manifest names the classes, their number is that of the rows in which the adapter's head differs from the class's own.
    """
    kind = read_json(folder / FILE_NAME).get("task_type")
    if kind not in [*_TASKS]:  # which may be anything, lists included
        return None
    from qlora_tools.live.base import build_empty  # brings transformers with it

    try:
        model = build_empty(opened, _TASKS[kind], labels)
        if labels:
            return model
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        other = {shape[0] for name, shape in saved.items() if name in shapes and shape != shapes[name] and shape[1:] == shapes[name][1:]}
        return model if len(other) != 1 else build_empty(opened, _TASKS[kind], [f"LABEL_{number}" for number in range(other.pop())])
    except UnsupportedError:
        return None


def _kept(model: Any, opened: LogicalCheckpoint, state: Mapping[str, Shape]) -> dict[str, str]:
    """Tensor of the base -> the tensor of the class that it is, or becomes a part of. A head of another size is not among them."""
    return {
        stored: loaded
        for stored, (loaded, gathered) in loaded_names(model, opened.specs).items()
        if loaded in state and (gathered or opened.specs[stored].shape == state[loaded])
    }


def _shared(model: Any, held: set[str]) -> set[str]:
    """Names of the class that share the values of one that is held."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {tied for tied, owner in ties.items() if owner in held} | {owner for tied, owner in ties.items() if tied in held}


def _spelled(model: Any, kept: Mapping[str, str]) -> dict[str, str]:
    """Tensor of the base -> its name in the new checkpoint: with the prefix of the body where the class has one and the base leaves it out. Older names
    stay, where transformers knows them."""
    prefix = f"{model.base_model_prefix}."
    longer = {stored: f"{prefix}{stored}" for stored, loaded in kept.items() if loaded.startswith(prefix) and not stored.startswith(prefix)}
    again = loaded_names(model, longer.values())
    return {stored: longer[stored] if stored in longer and again[longer[stored]][0] == loaded else stored for stored, loaded in kept.items()}


def _called_otherwise(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> name in the model, where they differ and nothing is put together."""
    state = model.state_dict()
    found = loaded_names(model, stored).items()
    return {name: loaded for name, (loaded, gathered) in found if loaded != name and not gathered and loaded in state}


def _dtype_of(opened: LogicalCheckpoint) -> str:
    """What most of the base's tensors are stored in, or were before they were quantized."""
    kinds = [spec.dtype for spec in opened.specs.values() if spec.torch_dtype.is_floating_point]
    return max(sorted(set(kinds)), key=kinds.count, default="F32")


def _config(old: Mapping[str, Any], model: Any, architecture: str, trained: bool, heads: set[str]) -> dict[str, Any]:
    """config.json of the class. ``trained``: the class names are those of a training run; ``heads``: modules that no quantizer touches."""
    known: Mapping[int, str] = model.config.id2label
    config = labelled(old, (known[number] for number in sorted(known)), single=trained) | {"architectures": [architecture]}
    if isinstance(quantized := old.get("quantization_config"), Mapping):
        config["quantization_config"] = {**quantized, "llm_int8_skip_modules": [*(quantized.get("llm_int8_skip_modules") or ()), *sorted(heads)]}
    return config
