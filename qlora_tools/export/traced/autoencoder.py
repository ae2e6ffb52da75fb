"""The two halves of an image pipeline's autoencoder, each a graph of its own: ``vae-encoder`` from pixels to latents, ``vae-decoder`` back.

Tasks, inputs and outputs have Optimum's names, so that the folders of both open in ``ORTStableDiffusionPipeline`` as ``vae_encoder/`` and
``vae_decoder/``. The encoder gives the parameters of the latents' distribution; sampling from it, and the scaling of latents, are the pipeline's.

Kernels stay in floats: each half runs once an image, on feature maps of the whole picture, whose gathered bytes would take gigabytes. So what a
quantized scheme changes is the attention in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from qlora_tools.errors import UsageError
from qlora_tools.export.traced.from_diffusers import build_as, class_of
from qlora_tools.export.traced.inputs import Subject

CLASS = "AutoencoderKL"
ENCODER, DECODER = "vae-encoder", "vae-decoder"
#: (images, height and width in latents): traced at the first, checked at both.
SIZES = ((2, 3, 2), (1, 2, 4))


def autoencoder_subject(config: Mapping[str, Any], task: str | None) -> Subject:
    """The half of the autoencoder that ``task`` names.

    Raises:
        UsageError: neither of the two. UnsupportedError: diffusers is not there, or builds no model from ``config``.
    """
    if task not in (ENCODER, DECODER):
        found = "no task" if task is None else f"task `{task}`"
        raise UsageError(f"an autoencoder has two halves, and {found} names neither", hint=f"give --task {ENCODER} or --task {DECODER}, an export for each")
    given, result = ("sample", "latent_parameters") if task == ENCODER else ("latent_sample", "sample")
    place = "sample" if task == ENCODER else "latent"
    axes = {given: {0: "batch_size", 2: f"{place}_height", 3: f"{place}_width"}}
    return Subject(
        task,
        partial(_build, config, task),
        partial(_inputs, config, task, given),
        axes,
        (result,),
        kernels=False,
        again=partial(autoencoder_subject, task=task),
    )


def _build(config: Mapping[str, Any], task: str, dtype: torch.dtype) -> Any:
    owner = class_of(CLASS)

    class Half(owner):  # type: ignore[misc, valid-type]
        """The whole autoencoder with one half's call."""

        def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
            if task == ENCODER:
                return {"latent_parameters": self.encode(given["sample"], return_dict=False)[0].parameters}
            return {"sample": self.decode(given["latent_sample"], return_dict=False)[0]}

    return build_as(Half, config, dtype)


def _inputs(config: Mapping[str, Any], task: str, name: str, size: int) -> dict[str, torch.Tensor]:
    """The same ones every time."""
    count, high, wide = SIZES[size]
    step = 2 ** (len(config.get("block_out_channels") or (1,)) - 1) if task == ENCODER else 1
    channels = int(config.get("in_channels") or 3) if task == ENCODER else int(config.get("latent_channels") or 4)
    return {name: torch.randn(count, channels, step * high, step * wide, generator=torch.Generator().manual_seed(size))}
