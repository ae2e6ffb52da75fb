"""What a denoising network of diffusers is traced as: the one part of an image pipeline that runs at every step.

Such a folder (``unet/`` of a pipeline) has a ``config.json`` with ``_class_name`` and no ``model_type``. Names of inputs and outputs are those that
Optimum's ``ORTStableDiffusionPipeline`` opens: ``sample``, ``timestep`` (a float without axes), ``encoder_hidden_states``, and what a config adds
to them, to ``out_sample``. The text encoders of a pipeline are ordinary models of transformers; the autoencoder is :mod:`.autoencoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.traced.autoencoder import CLASS, autoencoder_subject
from qlora_tools.export.traced.from_diffusers import build_as, class_of
from qlora_tools.export.traced.inputs import Subject
from qlora_tools.models.feeds import condition_width, pooled_width
from qlora_tools.models.work import inputs_of_denoiser

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
    owner = class_of(str(config["_class_name"]))

    class Denoiser(owner):  # type: ignore[misc, valid-type]
        """Its tensors by Optimum's names, one by one."""

        def forward(self, text_embeds: Any = None, time_ids: Any = None, **given: Any) -> dict[str, torch.Tensor]:
            added = {} if text_embeds is None else {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
            return {"out_sample": super().forward(**given, **added, return_dict=False)[0]}

    return build_as(Denoiser, config, dtype)


def _inputs(config: Mapping[str, Any], size: int) -> dict[str, torch.Tensor]:
    """The same ones every time."""
    count, high, wide, length = SIZES[size]
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    step = 2 ** (len(config.get("block_out_channels") or (1,)) - 1)
    draws: dict[str, Callable[[], torch.Tensor]] = {
        "sample": lambda: normal(count, int(config.get("in_channels") or 4), step * high, step * wide),
        "timestep": lambda: torch.tensor(731.0 - 400 * size),
        "encoder_hidden_states": lambda: normal(count, length, condition_width(config)),
        "text_embeds": lambda: normal(count, pooled_width(config)),
        "time_ids": lambda: torch.tensor([[512.0, 512, 0, 0, 512, 512]]).repeat(count, 1),
        "timestep_cond": lambda: normal(count, int(config["time_cond_proj_dim"])),
        "class_labels": lambda: torch.arange(count),
    }
    return {name: draws[name]() for name in inputs_of_denoiser(config)}
