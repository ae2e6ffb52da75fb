"""What a denoising network of diffusers is traced as: the one part of an image pipeline that runs at every step.

Such a folder (``unet/`` of a pipeline) has a ``config.json`` with ``_class_name`` and no ``model_type``. Names of inputs and outputs are those that
Optimum's ``ORTStableDiffusionPipeline`` opens: ``sample``, ``timestep`` (a float without axes), ``encoder_hidden_states``, and what a config adds
to them, to ``out_sample``. The text encoders of a pipeline are ordinary models of transformers; the autoencoder is :mod:`.autoencoder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.traced.autoencoder import CLASS, autoencoder_subject
from qlora_tools.export.traced.inputs import Subject

TASK = "denoising"
CLASSES = ("UNet2DConditionModel", "UNet2DModel")
_LATENT = {0: "batch_size", 2: "height", 3: "width"}
AXES: Mapping[str, Mapping[int, str]] = {
    "sample": _LATENT,
    "timestep": {},
    "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
    "text_embeds": {0: "batch_size"},
    "time_ids": {0: "batch_size"},
    "timestep_cond": {0: "batch_size"},
    "class_labels": {0: "batch_size"},
}
#: (images, height and width in the coarsest level's pixels, tokens): traced at the first, checked at both.
SIZES = ((2, 2, 2, 16), (1, 3, 2, 11))
_TIME_IDS = 6
#: Config fields that ask for inputs nobody feeds here.
_FOREIGN = {"addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "encoder_hid_dim_type": (None, "text_proj")}


def diffusion_subject(config: Mapping[str, Any], task: str | None = None) -> Subject:
    """The network that ``config`` describes, with inputs of two sizes; of an autoencoder the half that ``task`` names.

    Raises:
        UnsupportedError: diffusers is not there, another class, or a config that wants inputs with no generator. UsageError: another task.
    """
    name = str(config.get("_class_name"))
    if name == CLASS:
        return autoencoder_subject(config, task)
    if name not in CLASSES:
        raise UnsupportedError(f"no export of diffusers' `{name}`", hint=f"exported are {', '.join(CLASSES)} and {CLASS}")
    if task not in (None, TASK):
        raise UsageError(f"`{name}` is no model for `{task}`", hint=f"leave --task out: it is {TASK}")
    for field, known in _FOREIGN.items():
        if config.get(field) not in known:
            raise UnsupportedError(f"`{field}` is `{config[field]}`: its inputs are not drawn", hint=f"exported are {', '.join(map(str, known))}")
    inputs = _inputs(config, 0)
    axes = {key: AXES[key] for key in inputs}
    return Subject(TASK, lambda dtype: _build(config, dtype), lambda size: _inputs(config, size), axes, ("out_sample",), again=diffusion_subject)


def _build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError("a model of diffusers needs the package diffusers", hint="pip install diffusers") from error
    owner = getattr(diffusers, str(config["_class_name"]))

    class Denoiser(owner):  # type: ignore[misc, valid-type]
        """Its tensors by Optimum's names, one by one."""

        def forward(self, text_embeds: Any = None, time_ids: Any = None, **given: Any) -> dict[str, torch.Tensor]:
            added = {} if text_embeds is None else {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
            return {"out_sample": super().forward(**given, **added, return_dict=False)[0]}

    Denoiser.__name__ = owner.__name__
    model = Denoiser.from_config(dict(config))
    if model is None:
        raise UnsupportedError(f"diffusers builds no {owner.__name__} from this config.json", hint="check it against the model it came from")
    return torch.nn.Module.to(model, dtype)  # diffusers' own warns of layers it keeps in fp32, and has none here


def _inputs(config: Mapping[str, Any], size: int) -> dict[str, torch.Tensor]:
    """The same ones every time."""
    count, high, wide, length = SIZES[size]
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    step = 2 ** (len(config.get("block_out_channels") or (1,)) - 1)
    drawn = {"sample": normal(count, int(config.get("in_channels") or 4), step * high, step * wide), "timestep": torch.tensor(731.0 - 400 * size)}
    if config["_class_name"] == "UNet2DConditionModel":
        drawn["encoder_hidden_states"] = normal(count, length, _width_of_text(config))
    if config.get("addition_embed_type") == "text_time":
        width = int(config["projection_class_embeddings_input_dim"]) - _TIME_IDS * int(config["addition_time_embed_dim"])
        drawn |= {"text_embeds": normal(count, width), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]]).repeat(count, 1)}
    if config.get("time_cond_proj_dim"):
        drawn["timestep_cond"] = normal(count, int(config["time_cond_proj_dim"]))
    if config.get("num_class_embeds"):
        drawn["class_labels"] = torch.arange(count)
    return drawn


def _width_of_text(config: Mapping[str, Any]) -> int:
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim") or 1280
    return int(width if isinstance(width, int) else width[0])
