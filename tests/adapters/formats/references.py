"""Deltas in float64, and small portable adapters to convert; what the tests of formats compare with."""

from __future__ import annotations

import math

import torch

from qlora_tools.adapters.portable import EMBEDDING, LINEAR, Layer, Portable

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 6
HIDDEN, WIDE, VOCAB = 20, 28, 33
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
#: Module -> weight of a Llama with the sizes above, odd on purpose.
LLAMA_MODULES: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)} | {
    f"model.layers.{layer}.{leaf}": shape
    for layer in range(2)
    for leaf, shape in {
        "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
    }.items()
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers around 1 that bf16 holds exactly, so that layouts can be compared bit by bit."""
    generator = torch.Generator().manual_seed(seed * 1009 + math.prod(shape) + len(shape))
    return torch.randn(*shape, generator=generator).bfloat16().to(dtype)


def delta(layer: Layer) -> torch.Tensor:
    """The update of the weight in float64, shaped as the module stores it ([O, I], [O, I, k, k] or [V, D])."""
    product = layer.scale * (layer.b.double().flatten(1) @ layer.a.double().flatten(1))
    if layer.kind == EMBEDDING:
        return product.T
    return product.reshape(layer.b.shape[0], *layer.a.shape[1:])


def portable(
    modules: dict[str, tuple[int, ...]], *, ranks: int | dict[str, int] = 3, scale: float | dict[str, float] = 2.0, dtype: torch.dtype = torch.float32, **more
) -> Portable:
    """An adapter of every module; embeddings by their name. ``ranks`` and ``scale`` may differ between modules."""
    layers = {}
    for seed, (module, shape) in enumerate(modules.items()):
        rank = ranks if isinstance(ranks, int) else ranks[module]
        kind = EMBEDDING if module.endswith(("embed_tokens", "wte")) else LINEAR
        outputs, inputs = shape[::-1] if kind == EMBEDDING else shape
        layers[module] = Layer(
            random(rank, inputs, seed=seed, dtype=dtype),
            random(outputs, rank, seed=seed + 100, dtype=dtype),
            scale if isinstance(scale, float) else scale[module],
            kind,
        )
    return Portable(layers, **more)


def worst(found: Portable, expected: Portable) -> float:
    """Largest difference of any update, relative to the largest entry of that update. The modules must be the same."""
    assert found.layers.keys() == expected.layers.keys()
    assert all(found.layers[module].kind == layer.kind for module, layer in expected.layers.items())
    differences = [(delta(found.layers[m]) - delta(layer)).abs().max() / delta(layer).abs().max().clamp_min(1e-30) for m, layer in expected.layers.items()]
    return float(max(differences))
