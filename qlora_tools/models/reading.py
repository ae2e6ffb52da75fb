"""A config.json that is being read: what was asked for is remembered, so that what nobody asked for can be refused.

A description that skips an option computes something else without a word. So every key whose name suggests that
it changes attention, positions, norms or scales must be asked for by whoever builds the description, or be known
to change nothing; set to anything but zero, false or null it is refused by name otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.names import shortened

_MATTERS = re.compile(
    r"attn|attention|rope|rotary|scal|multipl|norm|soft_?cap|bias|window|position|residual|expert|moe|router|parallel|logit|activation|_act\b|act_fn"
    r"|embed|interleav|sink|mask|causal|alibi|mup|clip|clamp|partial|n_inner|n_ctx|kv_|qk_|latent|lora|recurr|shared"
)
#: Options that matter to training, loading or generation only, under names that sound as if they changed the computation.
_NEUTRAL = frozenset(
    [
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "residual_dropout",
        "embedding_dropout",
        "resid_dropout",
        "n_ctx",
        "num_logits_to_keep",
        "logits_to_keep",
        "tie_word_embeddings",
        "reorder_and_upcast_attn",
        "use_flash_attn",
        "use_flash_attention_2",
        "attn_implementation",
        "attention_implementation",
        "output_attentions",
        "rms_norm_eps_in_fp32",
    ]
)


class ConfigReader:
    """Access to a parsed config.json. ``renamed`` maps the usual key to the family's own; ``defaults`` hold where the config is silent."""

    def __init__(self, config: Mapping[str, Any], renamed: Mapping[str, str], defaults: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        self._config, self._renamed, self._defaults = config, renamed, defaults
        self._known = set(ignored)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``: the config's, even null; else the family's default; else ``default``."""
        for name in (self._renamed.get(key, key), key):
            self._known.add(name)
            if name in self._config:
                return self._config[name]
        return self._defaults.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; ``default`` where it is missing or null.

        Raises:
            IncompatibleError: anything else.
        """
        value = self.get(key)
        found = default if value is None else value
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise IncompatibleError(
                f"config.json: {key} is {found!r}, expected a positive whole number", hint="the config.json does not describe this model; take the original one"
            )
        return found

    def number(self, key: str) -> float:
        """A positive number.

        Raises:
            IncompatibleError: anything else.
        """
        return positive(self.get(key), key)

    def refuse_unread(self) -> None:
        """Whatever nobody asked for must be off, or must not matter.

        Raises:
            UnsupportedError: names the options.
        """
        unread = [
            key
            for key, value in self._config.items()
            if value and key not in self._known and key not in _NEUTRAL and not key.startswith("_") and _MATTERS.search(key)
        ]
        if unread:
            raise UnsupportedError(
                f"config.json sets {shortened(f'{key}={self._config[key]!r}' for key in sorted(unread))}, which has no graph here",
                hint="if the option changes nothing in this model, remove it from config.json",
            )


def positive(value: Any, key: str) -> float:
    """``value`` as a positive number, for the config entry ``key``.

    Raises:
        IncompatibleError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise IncompatibleError(f"config.json: `{key}` is {value!r}, expected a positive number")
    return float(value)
