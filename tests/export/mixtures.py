"""Tiny mixtures of experts, and their weights in the form that holds experts one by one."""

from __future__ import annotations

from qlora_tools.models.decoder import decoder_of
from tests.export.tiny_decoders import MemorySource, Tiny, build

MIXTURES = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-odd-sizes": ("mixtral", {"num_local_experts": 3, "hidden_size": 57, "intermediate_size": 75, "head_dim": 16}),
    "qwen2-moe": (
        "qwen2_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "norm_topk_prob": False},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 16},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}


def mixture(name: str, **more) -> Tiny:
    """A random model; its experts are multiplied one after the other, which asks nothing of their sizes."""
    family, changes = MIXTURES[name]
    tiny = build(family, **{**changes, **more})
    tiny.model.set_experts_implementation("eager")
    return tiny


def separated(tiny: Tiny) -> Tiny:
    """The same model, its experts held one by one under the names of the family's checkpoints."""
    places = decoder_of(tiny.config).stacked_places()
    stacked = {place.tensor for place in places.values()}
    tensors = {name: tensor for name, tensor in tiny.source.tensors.items() if name not in stacked}
    for name, place in places.items():
        whole = tiny.source.tensors[place.tensor]
        tensors[name] = (whole if place.expert is None else whole[place.expert])[place.start : place.stop].clone()
    return Tiny(tiny.model, MemorySource(tensors), tiny.config)
