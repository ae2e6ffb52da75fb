"""A base, a teacher near it, an adapter of their difference and a text: what refining is tried on."""

from __future__ import annotations

from safetensors.torch import load_file

from qlora_tools import api
from tests.conftest import build_llama, nudge

WEIGHTS = "adapter_model.safetensors"


def build_base(folder):
    """Weights large enough that predictions differ from token to token."""
    return build_llama(folder, tokenizer=True, initializer_range=0.2)


def build_teacher(base, folder):
    """Linears changed, and a norm, which the adapter holds whole."""
    tensors = load_file(base / "model.safetensors")
    norm = {"model.norm.weight": (tensors["model.norm.weight"].float() * 1.1).bfloat16()}
    return nudge(base, folder, scale=0.2, also=norm)


def build_adapter(base, teacher, folder):
    api.extract(base=base, tuned=teacher, config=api.ExtractConfig(rank=2), output=folder)
    return folder


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and again. " * 30)
    return path
