"""Seeded inputs for models that look once, sized by config.json alone, so that every engine of a model is fed the same numbers.

Each input is drawn from its own name and the seed: two engines of which one wants a mask and the other does not still share all else. Images are smooth,
as photographs are, since noise would be unlike anything that a model has learned; latents, spectrograms and waveforms are noise, as they are at work.
Nothing is given that a user would not have to give: no padding, no second kind of token.

Axes: B sequences or images, T positions, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import UnsupportedError, UsageError

#: Where a config leaves it open.
_VOCAB, _CHANNELS, _SIDE, _LATENT_SIDE, _LATENT_CHANNELS = 1000, 3, 224, 64, 4
#: Tokens of a prompt for an image: pipelines pad all of them to this. Samples of one second of speech.
_CONDITION_TOKENS, _SAMPLES = 77, 16_000
_TIME_IDS = 6
_TIMESTEP = 500.0
_COARSE = 16
_TEXT = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class _Draw:
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    batch: int
    length: int
    generator: np.random.Generator

    def normal(self, *shape: int) -> NDArray[np.float32]:
        return self.generator.standard_normal((self.batch, *shape), dtype=np.float32)

    @property
    def text(self) -> Mapping[str, Any]:
        return _part(self.config, "text_config")


def draw_feed(
    names: Iterable[str],
    config: Mapping[str, Any],
    *,
    batch: int,
    length: int,
    seed: int,
    processor: Mapping[str, Any] | None = None,
    given: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs ``names``: i64 or f32. ``processor``: the content of preprocessor_config.json, which knows the size of images where ``config`` does not.

    ``given`` ones are taken as they are, and say how many and how long the others are.

    Raises:
        UnsupportedError: an input that cannot be drawn. UsageError: a text longer than the model's positions, or something given that is not read.
    """
    names, given = tuple(names), dict(given or {})
    if strangers := sorted(set(given) - set(names)):
        raise UsageError(f"`{strangers[0]}` was given, but the model reads {', '.join(names)}", hint="give inputs of the model's own kind")
    for array in given.values():
        batch = array.shape[0]
    for name in _TEXT:
        if name in given:
            length = given[name].shape[1]
    room = positions(config)
    if room is not None and length > room and reads_text(names):
        raise UsageError(f"{length} tokens are more than the model's {room} positions", hint="use a shorter prompt")
    return {name: given[name] if name in given else _drawn(name, config, processor or {}, batch, length, seed) for name in names}


def reads_text(names: Iterable[str]) -> bool:
    """Whether an input has a length in tokens."""
    return any(name in _TEXT for name in names)


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that a text may have; ``None`` where ``config`` does not say. RoBERTa counts positions from behind its padding."""
    text = _part(config, "text_config")
    found = text.get("max_position_embeddings", text.get("n_positions"))
    if not isinstance(found, int) or found < 1 or text.get("relative_attention_num_buckets"):
        return None
    behind = str(text.get("model_type", "")).endswith(("roberta", "camembert", "longformer", "mpnet"))
    padding = text.get("pad_token_id")
    return found - (1 if padding is None else int(padding)) - 1 if behind else found


def image_size(config: Mapping[str, Any], processor: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the images that a model reads: what its processor makes, else what its config says."""
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    for found in (crop, processor.get("size"), _part(config, "vision_config").get("image_size")):
        pair = _pair(found)
        if pair is not None:
            return pair
    return _SIDE, _SIDE


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config of one part of a model, where it has one of its own."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else config


def _pair(found: Any) -> tuple[int, int] | None:
    if isinstance(found, Mapping):
        found = found.get("shortest_edge") or [found.get("height"), found.get("width")]
    sides = found if isinstance(found, (list, tuple)) else [found, found]
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides) else None


def _drawn(name: str, config: Mapping[str, Any], processor: Mapping[str, Any], batch: int, length: int, seed: int) -> NDArray[Any]:
    if name not in KNOWN:
        raise UnsupportedError(f"the model reads `{name}`, which cannot be drawn here", hint=f"inputs that can: {', '.join(KNOWN)}")
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint32)
    generator = np.random.Generator(np.random.PCG64([seed, *words.tolist()]))
    return np.asarray(KNOWN[name](_Draw(config, processor, batch, length, generator)), order="C")


def _ids(draw: _Draw) -> NDArray[Any]:
    """Words alone, and the mark of the end where the model has one: some read their answer there."""
    special = {draw.text.get(f"{kind}_token_id") for kind in ("pad", "bos", "eos", "decoder_start")}
    vocab = int(draw.text.get("vocab_size") or _VOCAB)
    words = np.array([token for token in range(vocab) if token not in special], np.int64)
    ids_BT = words[draw.generator.integers(0, len(words), (draw.batch, draw.length))]
    end = draw.text.get("eos_token_id")
    if isinstance(end, int) and draw.length > 1:
        ids_BT[:, -1] = end
    return ids_BT


def _boxes(draw: _Draw) -> NDArray[Any]:
    """Corners (left, top, right, bottom) on a page of 1000 by 1000."""
    corners = np.sort(draw.generator.integers(0, 1001, (draw.batch, draw.length, 2, 2)), axis=2)
    return corners.reshape(draw.batch, draw.length, 4)


def _images(draw: _Draw) -> NDArray[Any]:
    height, width = image_size(draw.config, draw.processor)
    channels = int(_part(draw.config, "vision_config").get("num_channels") or _CHANNELS)
    coarse = draw.normal(channels, -(-height // _COARSE) + 1, -(-width // _COARSE) + 1)
    down, across = _stretch(height, coarse.shape[2]), _stretch(width, coarse.shape[3])
    return (down @ coarse @ across.T + 0.1 * draw.normal(channels, height, width)).astype(np.float32)


def _stretch(fine: int, coarse: int) -> NDArray[np.float32]:
    """[fine, coarse]: straight lines between the coarse points."""
    places = np.linspace(0, coarse - 1, fine)
    return np.stack([np.interp(places, np.arange(coarse), row) for row in np.eye(coarse)], axis=1).astype(np.float32)


def _waveform(draw: _Draw) -> NDArray[Any]:
    """A second of it, or the spectrogram that models of audio by that name read."""
    frames, bins = draw.config.get("max_length"), draw.config.get("num_mel_bins")
    return draw.normal(int(frames), int(bins)) if isinstance(frames, int) and isinstance(bins, int) else draw.normal(_SAMPLES)


def _spectrogram(draw: _Draw) -> NDArray[Any]:
    bins, half = draw.config.get("num_mel_bins"), draw.config.get("max_source_positions")
    if not (isinstance(bins, int) and isinstance(half, int)):
        raise UnsupportedError("config.json has no num_mel_bins and max_source_positions, so no `input_features` can be drawn", hint="check config.json")
    return draw.normal(bins, 2 * half)


def _latent(draw: _Draw) -> NDArray[Any]:
    height, width = _pair(draw.config.get("sample_size")) or (_LATENT_SIDE, _LATENT_SIDE)
    return draw.normal(int(draw.config.get("in_channels") or _LATENT_CHANNELS), height, width)


def condition_width(config: Mapping[str, Any]) -> int:
    """Features of each token of the prompt that a denoiser reads."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim") or 1280
    return int(width if isinstance(width, int) else width[0])


def pooled_width(config: Mapping[str, Any]) -> int:
    """Features of the whole prompt, in denoisers that also read sizes."""
    return int(config["projection_class_embeddings_input_dim"]) - _TIME_IDS * int(config["addition_time_embed_dim"])


def _time_ids(draw: _Draw) -> NDArray[Any]:
    """(height, width) of the original, of the crop's corner, and of the target."""
    return np.repeat(np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32), draw.batch, axis=0)


def _ones(draw: _Draw) -> NDArray[Any]:
    return np.ones((draw.batch, draw.length), np.int64)


#: Input -> what makes it.
KNOWN: Mapping[str, Callable[[_Draw], NDArray[Any]]] = {
    "input_ids": _ids,
    "attention_mask": _ones,
    "token_type_ids": lambda draw: np.zeros((draw.batch, draw.length), np.int64),
    "position_ids": lambda draw: np.repeat(np.arange(draw.length)[None], draw.batch, axis=0),
    "bbox": _boxes,
    "pixel_values": _images,
    "input_values": _waveform,
    "input_features": _spectrogram,
    "decoder_input_ids": _ids,
    "sample": _latent,
    "timestep": lambda draw: np.array(_TIMESTEP, np.float32),
    "encoder_hidden_states": lambda draw: draw.normal(_CONDITION_TOKENS, condition_width(draw.config)),
    "text_embeds": lambda draw: draw.normal(pooled_width(draw.config)),
    "time_ids": _time_ids,
    "timestep_cond": lambda draw: draw.normal(int(draw.config["time_cond_proj_dim"])),
    "class_labels": lambda draw: draw.generator.integers(0, int(draw.config["num_class_embeds"]), (draw.batch,)),
}
