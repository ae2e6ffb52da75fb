"""The grammar of the tensor names in a PEFT adapter, of any age.

Owns what a stored key says: which module, which part of it. Leaves out whether module and shape fit a base (``adapter.py``).

A key may carry the name of its adapter (``lora_A.default.weight``: a raw state dict), lack the prefix ``base_model.model.``,
and hold marks of wrappers: ``module.`` (data parallel), ``_fsdp_wrapped_module``, ``_orig_mod`` (compiled).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
_LEADING = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+(?=base_model\.)")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.)")
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?P<adapter>[^.]+))??(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>[^.]+)")
_ORIGINAL = re.compile(r".+\.(?:original_module\..+|token_adapter\.trainable_tokens_original(?:\..+)?)")

LORA, TOKENS, WHOLE, ORIGINAL = "lora", "tokens", "whole", "original"


@dataclass(frozen=True)
class Key:
    """What a stored key names.

    ``kind``: ``lora`` (``slot``: A, B, embedding_A, embedding_B, magnitude_vector, B.bias, A.bias), ``tokens`` (rows of the embedding ``path``), ``whole``
    (the tensor ``path``) or ``original`` (PEFT's copy of a base tensor, which changes nothing). ``path``: of the module for
    ``lora`` and ``tokens``. ``adapter``: the adapter's name, where the key holds one.
    """

    kind: str
    path: str
    slot: str = ""
    adapter: str | None = None


def parse_key(key: str) -> Key:
    """Read one stored key. Every key means something: what is no part of a LoRA is a whole tensor."""
    path = _WRAPPERS.sub("", _LEADING.sub("", key).removeprefix(PREFIX)).removeprefix(".")
    if match := _LORA.fullmatch(path):
        return Key(LORA, match["module"], match["part"].removeprefix("lora_") + (".bias" if match["leaf"] == "bias" else ""), match["adapter"])
    if match := _TOKENS.fullmatch(path):
        return Key(TOKENS, match["module"], adapter=match["adapter"])
    if match := _SAVED.fullmatch(path):
        return Key(WHOLE, f"{match['module']}.{match['leaf']}", adapter=match["adapter"])
    if _ORIGINAL.fullmatch(path):
        return Key(ORIGINAL, path)
    return Key(WHOLE, path)
