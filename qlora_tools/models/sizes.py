"""The numbers in a config.json, looked at before anything is built with them.

transformers builds what it is told: of a hundred million layers it builds one after the other, and a size below zero fails deep inside torch. Only what no
model has is refused here; whether sizes fit each other is for the class to say, which knows. Sections (``text_config``) are looked at like the whole.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError

MOST, MOST_LAYERS, _MOST_LABELS = 2**31, 10_000, 2**20
_SIZES = (
    "hidden_size", "n_embd", "d_model", "embedding_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_kv", "n_head", "n_heads",
    "encoder_attention_heads", "decoder_attention_heads", "head_dim", "vocab_size", "max_position_embeddings", "n_positions", "n_ctx",
)  # fmt: skip
#: Some models have another one in each layer or stage.
_LISTED = ("intermediate_size", "ffn_dim", "num_attention_heads", "num_heads", "num_key_value_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PARTS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_experts", "num_local_experts", "n_routed_experts")
#: Key -> the least and the most it may be. Some models have none of this or that, and say 0; where that does not go, the class fails at once.
#: transformers makes a name for each label.
_BOUNDS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys((*_SIZES, *_LISTED), (0, MOST)),
    **dict.fromkeys((*_LAYERS, *_PARTS), (0, MOST_LAYERS)),
    "num_labels": (0, _MOST_LABELS),
}
#: Computed with while a model is built. Elsewhere infinity may be meant: Mamba's ``time_step_limit`` has it.
_FINITE = frozenset(
    ("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
     "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
)  # fmt: skip
_HINT = "the config.json does not describe a model; take the original one"
#: Characters of a name in a message: names are the file's choice too.
_SHOWN = 120


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Look at every size in ``config``, the content of ``path``. Null counts as missing.

    Raises:
        CorruptError: a size that is no whole number within its bounds, or an infinite number that is computed with; names the key, with its section.
    """
    sections = [("", config)]
    while sections:  # not by recursion: how deep it goes is the file's choice
        owner, section = sections.pop()
        for key, value in section.items():
            if isinstance(value, Mapping):
                sections.append((f"{owner}{key}."[-_SHOWN:], value))
            elif key in _FINITE and isinstance(value, float) and not math.isfinite(value):
                raise CorruptError(f"{path}: `{owner}{key}` is {value}, expected a finite number", hint=_HINT)
            elif key in _BOUNDS:
                least, most = _BOUNDS[key]
                sizes = value if isinstance(value, list) and key in _LISTED else [value]
                if not all(size is None or _is_within(size, least, most) for size in sizes):
                    raise CorruptError(f"{path}: `{owner}{key}` is {reprlib.repr(value)}, expected a whole number from {least} to {most}", hint=_HINT)


def _is_within(size: Any, least: int, most: int) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
