"""A checkpoint as a frozen torch model: linears in the form a codec stores, everything else in the compute dtype.

Weights stream in one tensor at a time and are encoded on the way, so memory never holds the dense model. The model's class is
built without weights; each of its parameters must then find its tensor in the checkpoint, the head of a new task excepted (a stored
head for another number of classes counts as none).
Checkpoints that transformers renames while loading (old layouts, fused experts) are loaded by transformers itself, dense, and
frozen in place: slower and larger for a moment, never wrong. No code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.engine.run import single_threaded_blas
from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.live.foreign import REFUSALS, load_foreign
from qlora_tools.live.frozen import StoredWeight, can_freeze, freeze_layer
from qlora_tools.models.sizes import check_sizes
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import MIN_ELEMENTS, Codec, Stored
from qlora_tools.specs import TensorSpec, dtype_of, spec_of

_READERS = 2
_CLASSES = {"language": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded base. ``model`` is frozen, in eval mode. ``tensor_of``: module path -> the name of its weight in the checkpoint.

    ``fresh``: modules that the checkpoint does not hold (a new task's head), initialised from the seed. ``sha256``: of the stored bytes
    of every tensor that was read, by name.
    """

    model: Any
    checkpoint: LogicalCheckpoint
    tensor_of: Mapping[str, str]
    fresh: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """One hash over all weights."""
        return hashlib.sha256(repr(sorted(self.sha256.items())).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they lie in memory."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def build_empty(checkpoint: LogicalCheckpoint, task: str, labels: Iterable[str] = (), dtype: torch.dtype | None = None) -> Any:
    """The model without weights (on ``meta``; its buffers are real), in eval mode. ``dtype``: what it will compute in, if not what its config says.

    Raises:
        CorruptError: a size in config.json that no model has. UnsupportedError: transformers has no class of its own for this model and task, or its class
        refuses the config.
    """
    check_sizes(checkpoint.config, checkpoint.folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, **_label_settings(tuple(labels)))
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        with init_empty_weights(include_buffers=False):
            model = _CLASSES[task].from_config(config, trust_remote_code=False, **({"dtype": dtype} if dtype else {}))
    except REFUSALS as error:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers builds no {task} model from its config.json: {str(error)[:300]}",
            hint="check `model_type` in config.json, or give --task",
        ) from error
    return model.eval()


def _label_settings(labels: tuple[str, ...]) -> dict[str, Any]:
    """What a config says about the classes of a head; nothing where the stored ones hold."""
    if not labels:
        return {}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}


def load_base(
    checkpoint: LogicalCheckpoint,
    task: str,
    codec: Codec | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    labels: Iterable[str] = (),
    seed: int = 0,
    device: str = "cpu",
    tidy: Callable[[], Any] = lambda: None,
    progress: Progress = SILENT,
) -> Base:
    """Load ``checkpoint`` for ``task`` with its linears stored by ``codec`` (``None``: dense in ``dtype``).

    ``tidy`` is called between layers, to give back what the last one took in passing.
    A checkpoint that is already stored in ``codec``'s form keeps its very bytes; one stored in another form is refused. Only the head of a
    classification may be missing, or be for another number of classes than ``labels``: it then starts anew, from ``seed``.

    Raises:
        IncompatibleError: weights the model needs are not in the checkpoint. UnsupportedError: see :func:`build_empty`.
    """
    _refuse_other_codec(checkpoint, codec)
    labels = tuple(labels)
    model = build_empty(checkpoint, task, labels, dtype)
    names = tensor_names(model, checkpoint)
    fresh = _fresh_heads(model, checkpoint, names, resized=bool(labels)) if task != "language" else []
    unknown = [name for name, stored in names.items() if stored is None and _module_of(name) not in fresh]
    if unknown and checkpoint.quantized:
        raise _missing(checkpoint, model, unknown)
    if unknown:
        return _load_by_transformers(checkpoint, task, codec, dtype, labels, seed, device)
    return _Loader(model, checkpoint, names, codec, dtype, device).load(fresh, seed, tidy, progress)


def _missing(checkpoint: LogicalCheckpoint, model: Any, names: Iterable[str]) -> IncompatibleError:
    missing = list(names)
    return IncompatibleError(
        f"{checkpoint.folder}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint: {shortened(missing, 3)}",
        hint="give the 16-bit model, which may have them under older names"
        if checkpoint.quantized
        else "check that config.json belongs to these weights, and --task",
    )


def _refuse_other_codec(checkpoint: LogicalCheckpoint, codec: Codec | None) -> None:
    held = {item.codec.name for item in checkpoint.quantized.values()}
    wanted = codec.name if codec else "bf16"
    if held and held != {wanted}:
        raise IncompatibleError(
            f"{checkpoint.folder} is stored in {', '.join(sorted(held))}, the run asks for {wanted}",
            hint=f"train with --{sorted(held)[0]}, or give the 16-bit model",
        )


def tensor_names(model: Any, checkpoint: LogicalCheckpoint) -> dict[str, str | None]:
    """Parameter or persistent buffer of ``model`` -> tensor of the checkpoint, ``None`` where there is none. A tied one may lie under either name."""
    buffers = dict(model.named_buffers())
    wanted = [name for name, _ in model.named_parameters()] + [name for name in model.state_dict() if name in buffers]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ties = {**checkpoint.ties, **(getattr(model, "all_tied_weights_keys", None) or {})}
    rules: list[Callable[[str], str]] = [lambda name: name, lambda name: name.removeprefix(prefix), lambda name: prefix + name]
    rule = max(rules, key=lambda rule: sum(rule(name) in checkpoint.specs for name in wanted))

    def find(name: str) -> str | None:
        owner = ties.get(name, name)
        partners = [owner, *(other for other, its_owner in ties.items() if its_owner == owner)]
        for candidate in (name, *partners):
            for spelled in (candidate, rule(candidate)):
                if spelled in checkpoint.specs:
                    return spelled
        return None

    return {name: find(name) for name in wanted}


def _fresh_heads(model: Any, checkpoint: LogicalCheckpoint, names: dict[str, str | None], *, resized: bool) -> list[str]:
    """Modules of the head that the checkpoint does not hold, or (``resized``) holds in another size; their ``names`` become ``None``."""
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    heads = [name for name in names if checkpoint.family.role(_module_of(name)) == "head"]
    fresh = {_module_of(name) for name in heads if (stored := names[name]) is None or (resized and checkpoint.specs[stored].shape != sizes[name])}
    names.update({name: None for name in heads if _module_of(name) in fresh})
    return sorted(fresh)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


class _Loader:
    """Fills one empty model from one checkpoint."""

    def __init__(
        self, model: Any, checkpoint: LogicalCheckpoint, names: Mapping[str, str | None], codec: Codec | None, dtype: torch.dtype, device: str
    ) -> None:
        self._model, self._checkpoint, self._names, self._codec, self._dtype, self._device = model, checkpoint, names, codec, dtype, device
        self._sha256: dict[str, str] = {}

    def load(self, fresh: list[str], seed: int, tidy: Callable[[], Any], progress: Progress) -> Base:
        frozen = {path: module for path, module in self._model.named_modules() if self._names.get(f"{path}.weight") and freezes(self._checkpoint, path, module)}
        others = {name: stored for name, stored in self._names.items() if stored is not None and _module_of(name) not in frozen}
        with progress.task("load the base", len(frozen) + len(others), "layers") as task:
            # reading and hashing one while another is encoded; one thread in each, so that the codes are those of the quantize verb
            with single_threaded_blas(), ThreadPoolExecutor(_READERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for path, layer in pool.map(lambda item: (item[0], self._frozen(*item)), frozen.items()):
                    self._model.set_submodule(path, layer)
                    task.advance(1, path)
                    tidy()
            for name, stored in others.items():
                self._place(name, self._read(stored))
                task.advance(1, name)
        self._initialise(fresh, seed)
        self._model.tie_weights()
        self._model.to(self._device).requires_grad_(False)
        tensor_of = {name.removesuffix(".weight"): stored for name, stored in self._names.items() if stored and name.endswith(".weight")}
        return Base(self._model, self._checkpoint, tensor_of, tuple(fresh), dict(sorted(self._sha256.items())))

    def _frozen(self, path: str, module: nn.Module) -> nn.Module:
        name, bias = str(self._names[f"{path}.weight"]), self._names.get(f"{path}.bias")
        item = self._checkpoint.quantized.get(name)
        if item is not None:  # its very bytes
            spec = TensorSpec(item.spec.name, dtype_of(self._dtype).name, item.spec.shape)
            stored = StoredWeight(item.codec, spec, self._parts(item))
        else:
            codec = None if self._checkpoint.quantized else self._codec  # of a quantized checkpoint, what is dense was left so on purpose
            stored = store(name, stored_orientation(module, self._read(name)), codec, self._dtype, self._device)
        self._check_shape(name, stored.spec.shape, tuple(stored_orientation(module, module.weight).shape))  # type: ignore[arg-type]
        bias_O = self._read(bias).to(self._dtype) if bias else None
        if bias_O is not None:
            self._check_shape(str(bias), tuple(bias_O.shape), tuple(module.bias.shape))  # type: ignore[union-attr, arg-type]
        return freeze_layer(module, stored, bias_O)

    def _parts(self, item: Stored) -> dict[str, torch.Tensor]:
        parts = {part: self._checkpoint.stored.read(part) for part in item.parts}
        self._sha256.update({part: tensor_sha256(tensor) for part, tensor in parts.items()})
        return parts

    def _read(self, name: str) -> torch.Tensor:
        """A stored tensor, whose bytes are hashed in passing."""
        stored = name in self._checkpoint.stored.specs and name not in self._checkpoint.quantized
        tensor = (self._checkpoint.stored if stored else self._checkpoint).read(name)
        self._sha256[name] = tensor_sha256(tensor)
        return tensor

    def _place(self, name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        value = value.to(self._dtype) if value.is_floating_point() else value
        self._check_shape(name, tuple(value.shape), tuple(getattr(module, leaf).shape))
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise IncompatibleError(
                f"{self._checkpoint.folder}: `{name}` is {list(found)}, the model has {list(expected)}",
                hint="config.json does not belong to these weights",
            )

    def _initialise(self, fresh: list[str], seed: int) -> None:
        """A new head as transformers starts one: normal weights of the config's standard deviation, zero bias; seeded."""
        generator = torch.Generator().manual_seed(seed)
        deviation = float(getattr(self._model.config, "initializer_range", 0.02) or 0.02)
        for path in fresh:
            module = self._model.get_submodule(path)
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.device.type == "meta":
                    value = torch.randn(parameter.shape, generator=generator) * deviation if leaf == "weight" else torch.zeros(parameter.shape)
                    module._parameters[leaf] = nn.Parameter(value.to(self._dtype), requires_grad=False)


def freezes(checkpoint: LogicalCheckpoint, path: str, module: Any) -> bool:
    """Whether the weight of ``module`` at ``path`` is held in stored form: linears that are neither head nor embedding, and convolutions."""
    return can_freeze(module) and checkpoint.family.role(path) not in ("embedding", "head", "norm") and module.weight.numel() >= MIN_ELEMENTS


def stored_orientation(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` of ``module`` as [O, I, ...]: codecs store it so even where the class (GPT-2's Conv1D) has it the other way round."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def store(name: str, dense: torch.Tensor, codec: Codec | None, dtype: torch.dtype, device: str = "cpu") -> StoredWeight:
    """``dense`` [O, I, ...] as ``codec`` stores it, decoding to ``dtype``. Weights that the codec has no form for stay dense."""
    recorded = spec_of(name, dense)
    if codec is None or (codec.name == "int8" and dense.ndim != 2):
        value = dense.to(dtype)
        return StoredWeight(None, spec_of(name, value), {name: value})
    parts = codec.encode(recorded, dense.to(device))
    return StoredWeight(codec, TensorSpec(name, dtype_of(dtype).name, recorded.shape), parts)


def _load_by_transformers(
    checkpoint: LogicalCheckpoint,
    task: str,
    codec: Codec | None,
    dtype: torch.dtype,
    labels: tuple[str, ...],
    seed: int,
    device: str,
) -> Base:
    """The general way: a dense model by ``from_pretrained``, then layer by layer into stored form.

    Which stored tensor became which weight is told from the values, which renaming leaves alone.
    """
    logging.disable_progress_bar()
    settings: dict[str, Any] = {**_label_settings(labels), "ignore_mismatched_sizes": True} if labels else {}
    words = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # a new head
        loaded, report = load_foreign(_CLASSES[task], checkpoint.folder, checkpoint.config, {**words, **settings})
    made_up = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    fresh = sorted({_module_of(name) for name in made_up}) if task != "language" else []
    if strangers := sorted(name for name in made_up if task == "language" or checkpoint.family.role(_module_of(name)) != "head"):
        raise _missing(checkpoint, loaded, strangers)
    stored_names, sha256 = _by_content(checkpoint, dtype)
    tensor_of = {}
    for path, module in list(loaded.named_modules()):
        if freezes(checkpoint, path, module) and path not in fresh:
            bias = None if module.bias is None else module.bias.detach()
            stored = store(f"{path}.weight", stored_orientation(module, module.weight.detach()), codec, dtype, device)
            loaded.set_submodule(path, freeze_layer(module, stored, bias))
            tensor_of[path] = stored_names.get(_content(module.weight.detach()), f"{path}.weight")
    loaded.eval().to(device).requires_grad_(False)
    return Base(loaded, checkpoint, tensor_of, tuple(fresh), sha256)


def _by_content(checkpoint: LogicalCheckpoint, dtype: torch.dtype) -> tuple[dict[str, str], dict[str, str]]:
    """(content in ``dtype`` -> name, where only one tensor has it; name -> sha256 of the stored bytes) of all stored tensors."""
    names: dict[str, list[str]] = {}
    sha256 = {}
    for name in checkpoint.stored.specs:
        tensor = checkpoint.stored.read(name)
        sha256[name] = tensor_sha256(tensor)
        names.setdefault(_content(tensor.to(dtype) if tensor.is_floating_point() else tensor), []).append(name)
    return {content: found[0] for content, found in names.items() if len(found) == 1}, sha256


def _content(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor_sha256(tensor.contiguous())}"
