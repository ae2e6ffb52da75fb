"""What a model does, told from its config.json: write token after token, or look once; and which inputs a live class of it is fed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qlora_tools.errors import UnsupportedError

DECODER, FORWARD = "decoder", "forward"
_WRITERS = ("ForCausalLM", "LMHeadModel", "LMHead")
#: Classes that read something else first: with a half of its own that does, a model looks once here (its reading half); without, it writes.
_CONDITIONAL = "ForConditionalGeneration"
TEXT_TASK = "text-generation"
_FED = ("input_ids", "attention_mask", "token_type_ids", "bbox", "pixel_values", "input_values", "input_features", "decoder_input_ids")


def work_of(config: Mapping[str, Any], task: str | None = None) -> str:
    """``decoder`` for a model whose class writes text on its own, ``forward`` for every other. ``task``: what an export says of itself, which counts first.

    A config without ``architectures`` is of a decoder, unless diffusers wrote it.
    """
    if task is not None:
        return DECODER if task == TEXT_TASK else FORWARD
    if is_of_diffusers(config):
        return FORWARD
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(_CONDITIONAL):
        return FORWARD if config.get("is_encoder_decoder") else DECODER
    return DECODER if not architecture or architecture.endswith(_WRITERS) else FORWARD


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """True where ``config`` is of a class of diffusers."""
    return "_class_name" in config and "model_type" not in config


def inputs_of_class(config: Mapping[str, Any], main: str, parameters: Collection[str]) -> tuple[str, ...]:
    """Inputs to feed a class of transformers whose ``forward`` has ``parameters``, in their order; ``main`` is the one that it cannot do without.

    ``config``: with the class's defaults filled in.

    Raises:
        UnsupportedError: ``main`` is none that can be drawn.
    """
    from qlora_tools.models.feeds import KNOWN

    text = "input_ids" in parameters
    types = int((config.get("text_config") or config).get("type_vocab_size") or 0)
    kept = {"attention_mask": text, "token_type_ids": types > 1, "decoder_input_ids": bool(config.get("is_encoder_decoder"))}
    names = tuple(name for name in parameters if name in _FED and kept.get(name, True))
    if main not in names:
        raise UnsupportedError(f"the model reads `{main}`, which cannot be drawn here", hint=f"inputs that can: {', '.join(KNOWN)}")
    return names


def inputs_of_denoiser(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Inputs of a UNet of diffusers, by the names that its graph has."""
    names = ["sample", "timestep"]
    if config["_class_name"] == "UNet2DConditionModel":
        names.append("encoder_hidden_states")
    if config.get("addition_embed_type") == "text_time":
        names += ["text_embeds", "time_ids"]
    if config.get("time_cond_proj_dim"):
        names.append("timestep_cond")
    if config.get("num_class_embeds"):
        names.append("class_labels")
    return tuple(names)
