"""Models that read with one half and write with the other (Whisper, BART): three graphs over one file of weights.

``encoder_model`` runs once. ``decoder_model`` reads the beginning of an answer and gives, with its logits, the keys and values of both attentions;
``decoder_with_past_model`` goes on from them and gives only its own, which alone have grown. File names, inputs and outputs are those that Optimum's
``ORTModelForSpeechSeq2Seq`` and ``ORTModelForSeq2SeqLM`` open.

The halves are traced through the class of the whole model, so that names of weights are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.traced.inputs import Subject, model_class

ENCODER, DECODER, WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
_BATCH, _READ, _WRITTEN, _PAST = "batch_size", "encoder_sequence_length", "decoder_sequence_length", "past_decoder_sequence_length"
#: (sequences, tokens read, tokens written, tokens in the past): traced at the first, checked at both.
SIZES = ((2, 12, 4, 5), (3, 9, 1, 7))


@dataclass(frozen=True)
class _Dimensions:
    """What the inputs of the halves are sized by. ``features``: (channels, frames) of a spectrogram, where that is what is read."""

    layers: int
    heads: int
    head_size: int
    width: int
    vocab: int
    features: tuple[int, int] | None

    def read(self, length: int) -> int:
        """Positions that the encoder gives: a spectrogram's frames are halved once, tokens are as many as they are."""
        return length if self.features is None else self.features[1] // 2


def encoder_decoder_subjects(config: Mapping[str, Any], task: str | None = None) -> dict[str, Subject]:
    """Graph name -> what it computes, in the order in which they are called.

    Raises:
        UnsupportedError: a model that is not one of two halves with a cache of keys and values, or one of more than two.
    """
    made, chosen, owner = model_class(config, task)
    if not getattr(made, "is_encoder_decoder", False) or not hasattr(owner, "prepare_inputs_for_generation"):
        raise UnsupportedError(f"{owner.__name__} does not write what another half of it read", hint="export it as one graph")
    sizes = _dimensions(made, owner)
    text = sizes.features is None
    past = [f"{layer}.{half}.{kind}" for layer in range(sizes.layers) for half in ("decoder", "encoder") for kind in ("key", "value")]
    mask = {"attention_mask": {0: _BATCH, 1: _READ}} if text else {}
    given = {"encoder_attention_mask": {0: _BATCH, 1: _READ}} if text else {}
    ids, states = {"input_ids": {0: _BATCH, 1: _WRITTEN}}, {"encoder_hidden_states": {0: _BATCH, 1: _READ}}
    read: dict[str, dict[int, str]] = {"input_ids": {0: _BATCH, 1: _READ}} | mask if text else {"input_features": {0: _BATCH}}
    kept = {f"past_key_values.{name}": {0: _BATCH, 2: _PAST if ".decoder." in name else _READ} for name in past}
    grown = tuple(f"present.{name}" for name in past if ".decoder." in name)
    parts = {
        ENCODER: (read, ("last_hidden_state",)),
        DECODER: (ids | states | given, ("logits", *(f"present.{name}" for name in past))),
        WITH_PAST: (ids | given | kept, ("logits", *grown)),
    }
    return {
        name: Subject(
            chosen,
            _building(owner, made, name, sizes),
            _drawing(sizes, name, tuple(axes)),
            axes,
            outputs,
            again=partial(_again, chosen, name),
        )
        for name, (axes, outputs) in parts.items()
    }


def _again(task: str, part: str, config: Mapping[str, Any]) -> Subject:
    return encoder_decoder_subjects(config, task)[part]


def _dimensions(made: Any, owner: Any) -> _Dimensions:
    def first(*names: str) -> int:
        found = next((value for name in names if (value := getattr(made, name, None)) is not None), None)
        if found is None:
            raise UnsupportedError(
                f"{owner.__name__}: its config has none of {', '.join(names)}", hint="export it as one graph, with --task feature-extraction"
            )
        return int(found)

    heads, width = first("decoder_attention_heads", "num_heads"), first("d_model", "hidden_size")
    features = None
    if owner.main_input_name == "input_features":
        features = first("num_mel_bins"), 2 * first("max_source_positions")
    elif owner.main_input_name != "input_ids":
        raise UnsupportedError(f"{owner.__name__} reads `{owner.main_input_name}`, which is not drawn", hint="readers of text and of spectrograms are")
    size = int(getattr(made, "d_kv", None) or width // heads)
    return _Dimensions(first("decoder_layers", "num_decoder_layers"), heads, size, width, first("vocab_size"), features)


def _building(owner: Any, made: Any, part: str, sizes: _Dimensions) -> Any:
    """A function that builds the model whose ``forward`` is that of ``part``."""

    class Half(owner):  # type: ignore[misc, valid-type]
        """The whole model with one half's call."""

        def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
            if part == ENCODER:
                return {"last_hidden_state": self.get_encoder()(**given).last_hidden_state}
            return _decode(super().forward, self.config, given, sizes, with_past=part == WITH_PAST)

    Half.__name__ = owner.__name__
    return lambda dtype: Half._from_config(made, dtype=dtype)


def _decode(call: Any, config: Any, given: dict[str, torch.Tensor], sizes: _Dimensions, *, with_past: bool) -> dict[str, torch.Tensor]:
    """Logits and keys and values, of the whole model's forward with the encoder's states in hand."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own, other = DynamicCache(), DynamicCache()
    states = given.get("encoder_hidden_states")
    if with_past:
        for layer in range(sizes.layers):
            for cache, half in ((own, "decoder"), (other, "encoder")):
                cache.update(given[f"past_key_values.{layer}.{half}.key"], given[f"past_key_values.{layer}.{half}.value"], layer)
        key = other.layers[0].keys
        states = key.new_zeros(key.shape[0], key.shape[2], sizes.width)  # of the right length for the mask; its keys and values are in the past
    mask = given.get("encoder_attention_mask")
    found = call(
        encoder_outputs=(states,),
        decoder_input_ids=given["input_ids"],
        past_key_values=EncoderDecoderCache(own, other),
        use_cache=True,
        **({} if mask is None else {"attention_mask": mask}),
    )
    answer = {"logits": found.logits}
    for layer in range(sizes.layers):
        for cache, half in ((own, "decoder"), *(() if with_past else ((other, "encoder"),))):
            answer |= {f"present.{layer}.{half}.key": cache.layers[layer].keys, f"present.{layer}.{half}.value": cache.layers[layer].values}
    return answer


def _drawing(sizes: _Dimensions, part: str, names: tuple[str, ...]) -> Any:
    """A function that makes the inputs ``names`` of size 0 or 1, the same ones every time."""

    def draw(size: int) -> dict[str, torch.Tensor]:
        count, length, written, past = SIZES[size]
        generator = torch.Generator().manual_seed(size)
        read = sizes.read(length)

        def one(name: str) -> torch.Tensor:
            if name == "input_ids":
                return torch.randint(0, sizes.vocab, (count, length if part == ENCODER else written), generator=generator)
            if name.endswith("attention_mask"):
                return torch.ones(count, read, dtype=torch.int64)
            if name == "input_features":
                assert sizes.features is not None
                return torch.randn(count, *sizes.features, generator=generator)
            if name == "encoder_hidden_states":
                return torch.randn(count, read, sizes.width, generator=generator)
            return torch.randn(count, sizes.heads, past if ".decoder." in name else read, sizes.head_size, generator=generator)

        return {name: one(name) for name in names}

    return draw
