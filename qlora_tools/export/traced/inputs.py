"""What a model is traced as: its task, the class that computes it, and inputs to run it on.

Tasks, the classes that serve them and the inputs come from Optimum's tables and generators (its ONNX configs live in another package, which no
version of transformers 5 can install beside). What is added here is which of a class's arguments are inputs of the graph and which of their axes
move; names are Optimum's, so that its ORTModel classes and transformers.js open the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.live.foreign import REFUSALS
from qlora_tools.models.work import inputs_of_class

_BATCH, _LENGTH, _DECODED = "batch_size", "sequence_length", "decoder_sequence_length"
_TOKENS, _IMAGE = {0: _BATCH, 1: _LENGTH}, {0: _BATCH, 2: "height", 3: "width"}
#: Arguments that become inputs of a graph, with their axes that may move.
AXES: Mapping[str, Mapping[int, str]] = {
    "input_ids": _TOKENS,
    "attention_mask": _TOKENS,
    "token_type_ids": _TOKENS,
    "bbox": _TOKENS,
    "pixel_values": _IMAGE,
    "input_values": _TOKENS,
    "input_features": {0: _BATCH},
    "decoder_input_ids": {0: _BATCH, 1: _DECODED},
}
#: Two sets of sizes: a graph is traced at the first and checked at both.
SIZES: tuple[Mapping[str, int], ...] = (
    {"batch_size": 2, "sequence_length": 16, "height": 64, "width": 64, "audio_sequence_length": 4000},
    {"batch_size": 3, "sequence_length": 11, "height": 96, "width": 80, "audio_sequence_length": 3200},
)
#: What a model gives besides its results.
_SIDE_OUTPUTS = ("loss", "hidden_states", "attentions", "past_key_values", "cross_attentions", "encoder_", "decoder_")


@dataclass(frozen=True)
class Subject:
    """A model to trace. ``build`` makes it without weights, its computation in a given dtype; ``draw`` makes inputs of size 0 or 1 of :data:`SIZES`, by name, in
    the order of the graph. ``outputs``: those wanted, in order; empty: all that are results. ``options``: arguments held fixed.
    ``again`` makes the same of another config, where :func:`subject_of` does not. ``kernels``: whether convolutions may be carried in int8."""

    task: str
    build: Callable[[torch.dtype], Any]
    draw: Callable[[int], dict[str, torch.Tensor]]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=lambda: AXES)
    outputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    again: Callable[[Mapping[str, Any]], Subject] | None = None
    kernels: bool = True


def subject_of(config: Mapping[str, Any], task: str | None = None) -> Subject:
    """What ``config`` describes, traced for ``task`` (Optimum's name, or a synonym of it); without one, for what its ``architectures`` says.

    Raises:
        UnsupportedError: transformers has no class of its own for it. UsageError: no such task.
    """
    made, chosen, owner = model_class(config, task)
    parameters = inspect.signature(owner.forward).parameters
    names = list(inputs_of_class(made.to_dict(), owner.main_input_name, parameters))
    options: dict[str, Any] = {"return_dict": True} | ({"use_cache": False} if "use_cache" in parameters else {})
    note = "the graph keeps no past: every step computes the whole text" if chosen in ("text-generation", "text2text-generation") else None

    def build(dtype: torch.dtype) -> Any:
        return owner._from_config(made, dtype=dtype)

    return Subject(chosen, build, lambda size: _draw(made, chosen, names, size), AXES, _outputs(chosen), options, note)


def model_class(config: Mapping[str, Any], task: str | None = None) -> tuple[Any, str, Any]:
    """(transformers' config, task, model class) of what ``config`` describes; raises as :func:`subject_of`."""
    from transformers import PreTrainedModel

    made = _config(config)
    chosen, owner = _class_of(made, config, task)
    if not (isinstance(owner, type) and issubclass(owner, PreTrainedModel)):
        raise UnsupportedError(f"`{getattr(owner, '__name__', owner)}` is not a model of transformers", hint="give --task")
    return made, chosen, owner


def results(found: Any, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a model's output that are outputs of its graph, in order."""
    fields = {"output_0": found} if isinstance(found, torch.Tensor) else dict(found.items())
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    if wanted and all(name in tensors for name in wanted):
        return {name: tensors[name] for name in wanted}
    return {name: value for name, value in tensors.items() if not name.startswith(_SIDE_OUTPUTS)}


def _config(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type") or "")
    if model_type not in CONFIG_MAPPING:
        own_code = "auto_map" in config
        raise UnsupportedError(
            f"transformers has no model of type `{model_type}`" + (", its code is in the checkpoint" if own_code else ""),
            hint="code that comes with a checkpoint is never run" if own_code else "check `model_type` in config.json",
        )
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map", "_pre_quantization_dtype")}
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except REFUSALS as error:
        raise UnsupportedError(f"transformers cannot read this config.json: {str(error)[:300]}", hint="check it against the model it came from") from error


def _class_of(made: Any, config: Mapping[str, Any], wanted: str | None) -> tuple[str, Any]:
    """(task, model class)."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    architecture = str((config.get("architectures") or [""])[0])
    named = getattr(transformers, architecture, None) if architecture else None
    own = _task_of(named)
    if wanted is None and named is None:
        raise UnsupportedError(
            f"config.json names {f'an architecture `{architecture}` that transformers does not have' if architecture else 'no architecture'}",
            hint="give --task, for example text-classification, feature-extraction or image-classification",
        )
    if wanted is None:
        return own, named
    task = TasksManager.map_from_synonym(wanted)
    if named is not None and task == own:
        return task, named
    if task not in (known := TasksManager.get_all_tasks()):
        raise UsageError(f"no task `{wanted}`", hint=f"tasks: {', '.join(sorted(known))}")
    try:
        auto = TasksManager.get_model_class_for_task(task, model_type=made.model_type)
        owner = auto._model_mapping[type(made)] if hasattr(auto, "_model_mapping") else auto
    except (KeyError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"transformers has no {made.model_type} model for {task}", hint="choose another --task") from error
    owner = owner[0] if isinstance(owner, (tuple, list)) else owner
    if made.is_encoder_decoder and task == "feature-extraction":
        owner = getattr(transformers, owner.__name__.removesuffix("Model") + "EncoderModel", owner)
    return task, owner


def _task_of(owner: Any) -> str:
    from optimum.exporters.tasks import TasksManager

    if owner is None:
        return ""
    try:
        return str(TasksManager.infer_task_from_model(owner))
    except ValueError:
        return "feature-extraction"


def _outputs(task: str) -> tuple[str, ...]:
    from optimum.exporters.base import ExporterConfig

    return tuple(ExporterConfig._TASK_TO_COMMON_OUTPUTS.get(task, ()))


def _draw(made: Any, task: str, names: list[str], size: int) -> dict[str, torch.Tensor]:
    """Inputs by Optimum's generators, the same ones every time."""
    from optimum.utils import input_generators as generators
    from optimum.utils.normalized_config import NormalizedConfig, NormalizedConfigManager, NormalizedTextConfig, NormalizedVisionConfig

    text, vision = made.get_text_config(), getattr(made, "vision_config", made)
    known = NormalizedConfigManager._conf.get(made.model_type.replace("_", "-"), NormalizedTextConfig)(text)
    sizes = dict(SIZES[size])
    longest = int(getattr(text, "max_position_embeddings", 0) or 0)
    if longest > 0:
        sizes["sequence_length"] = min(sizes["sequence_length"], longest // 2)
    kinds = {
        generators.DummyTextInputGenerator: known if isinstance(known, NormalizedTextConfig) else NormalizedTextConfig(text),
        generators.DummyVisionInputGenerator: NormalizedVisionConfig(vision),
        generators.DummyAudioInputGenerator: NormalizedConfig(made),
        generators.DummyBboxInputGenerator: NormalizedConfig(made),
    }
    drawn: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size)
        for name in names:
            kind = next(kind for kind in kinds if any(name.removeprefix("decoder_").startswith(prefix) for prefix in kind.SUPPORTED_INPUT_NAMES))
            try:
                drawn[name] = kind(task, kinds[kind], **sizes).generate(name.removeprefix("decoder_"))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UnsupportedError(f"no `{name}` can be drawn for `{made.model_type}`: {str(error)[:200]}", hint="check config.json") from error
    if "attention_mask" in drawn:
        drawn["attention_mask"] = _padded(*drawn["attention_mask"].shape)
    return drawn


def _padded(batch: int, length: int) -> torch.Tensor:
    """A mask of texts that end at different places, the first the longest; Optimum's own ends all at one place, which differs from call to call."""
    ends_B = length - torch.arange(batch) * (length // (batch + 1))
    return (torch.arange(length) < ends_B[:, None]).to(torch.int64)
