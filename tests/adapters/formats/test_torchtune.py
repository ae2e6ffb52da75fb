"""torchtune adapters: the order of rows checked by running rotary attention scores in both conventions, in float64."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.adapters.formats import torchtune
from qlora_tools.adapters.portable import EMBEDDING
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import IncompatibleError, MissingError, UnsupportedError, UsageError
from tests.adapters.formats.references import HEAD_SIZE, HEADS, KV_HEADS, LLAMA, LLAMA_MODULES, delta, random

Q, K = "layers.0.attn.q_proj", "layers.0.attn.k_proj"
CONFIG = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"], "peft_type": "LORA", "base_model_name_or_path": "org/base"}


def pair(path: str, outputs: int, inputs: int = 20, rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_a.weight": random(rank, inputs, seed=seed), f"{path}.lora_b.weight": random(outputs, rank, seed=seed + 1)}


QUERY_KEY = pair(Q, 24) | pair(K, 12, seed=5)


def read(tensors: dict, base: dict | None = LLAMA, modules: dict | None = LLAMA_MODULES, config: dict | None = CONFIG, **more):
    return torchtune.read(tensors, config, Hints(modules=modules, base_config=base, **more))


def rotated_in_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """torchtune's rotation of [heads, size]: dimensions 2i and 2i+1 together."""
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(1)


def rotated_in_halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Hugging Face's: dimensions i and i + size/2 together."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def test_attention_scores_are_those_of_torchtune() -> None:
    adapter = read(QUERY_KEY)
    x, y = random(20, seed=7).double(), random(20, seed=8).double()
    angle = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)

    def scores(query: torch.Tensor, key: torch.Tensor, rotate) -> torch.Tensor:
        turned_q, turned_k = rotate((query @ x).reshape(HEADS, HEAD_SIZE), angle), rotate((key @ y).reshape(KV_HEADS, HEAD_SIZE), 2 * angle)
        return (turned_q.reshape(KV_HEADS, -1, HEAD_SIZE) * turned_k[:, None]).sum(-1)

    theirs = [4.0 * QUERY_KEY[f"{path}.lora_b.weight"].double() @ QUERY_KEY[f"{path}.lora_a.weight"].double() for path in (Q, K)]
    ours = [delta(adapter.layers[f"model.layers.0.self_attn.{name}_proj"]) for name in "qk"]
    torch.testing.assert_close(scores(*ours, rotated_in_halves), scores(*theirs, rotated_in_pairs))
    assert not torch.allclose(ours[0], theirs[0])
    assert adapter.base_name == "org/base"


def test_every_name_and_orientation_is_mapped() -> None:
    shapes = {
        "layers.1.attn.v_proj": ("model.layers.1.self_attn.v_proj", 12, 20),
        "layers.1.attn.output_proj": ("model.layers.1.self_attn.o_proj", 20, 24),
        "layers.1.mlp.w1": ("model.layers.1.mlp.gate_proj", 28, 20),
        "layers.1.mlp.w2": ("model.layers.1.mlp.down_proj", 20, 28),
        "layers.1.mlp.w3": ("model.layers.1.mlp.up_proj", 28, 20),
        "output": ("lm_head", 33, 20),
        "tok_embeddings": ("model.embed_tokens", 20, 33),
    }
    tensors = {key: tensor for path, (_, outputs, inputs) in shapes.items() for key, tensor in pair(path, outputs, inputs).items()}
    adapter = read(tensors)
    assert adapter.layers.keys() == {name for name, _, _ in shapes.values()}
    for path, (name, _, _) in shapes.items():
        layer = adapter.layers[name]
        product = 4.0 * tensors[f"{path}.lora_b.weight"].double() @ tensors[f"{path}.lora_a.weight"].double()
        torch.testing.assert_close(delta(layer), product.T if layer.kind == EMBEDDING else product)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_families_rotated_in_halves_keep_their_rows(model_type: str) -> None:
    layer = read(pair(Q, 24), LLAMA | {"model_type": model_type}).layers["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.b, QUERY_KEY[f"{Q}.lora_b.weight"])


def test_dora_lengths_follow_their_rows() -> None:
    adapter = read(pair(Q, 24) | {f"{Q}.magnitude": QUERY_KEY[f"{Q}.lora_b.weight"][:, 0].clone()})
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    assert layer.magnitude is not None and torch.equal(layer.magnitude, layer.b[:, 0])


PHI = LLAMA | {"model_type": "phi3"}
PHI_MODULES = {"model.layers.0.self_attn.qkv_proj": (48, 20), "model.layers.0.mlp.gate_up_proj": (56, 20), "model.layers.0.mlp.down_proj": (20, 28)}


def test_phi_3_is_fused_again_block_by_block() -> None:
    tensors = pair(Q, 24) | pair("layers.0.attn.v_proj", 12, seed=3) | pair("layers.0.mlp.w3", 28, seed=4) | pair("layers.0.mlp.w2", 20, 28, seed=6)
    adapter = read(tensors, PHI, PHI_MODULES)

    def product(path: str) -> torch.Tensor:
        return 4.0 * tensors[f"{path}.lora_b.weight"].double() @ tensors[f"{path}.lora_a.weight"].double()

    fused = torch.cat([product(Q), torch.zeros(12, 20), product("layers.0.attn.v_proj")])
    torch.testing.assert_close(delta(adapter.layers["model.layers.0.self_attn.qkv_proj"]), fused)
    torch.testing.assert_close(delta(adapter.layers["model.layers.0.mlp.gate_up_proj"]), torch.cat([torch.zeros(28, 20), product("layers.0.mlp.w3")]))
    torch.testing.assert_close(delta(adapter.layers["model.layers.0.mlp.down_proj"]), product("layers.0.mlp.w2"))


def test_phi_3_parts_that_cannot_be_fused_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="DoRA on some"):
        read(pair(Q, 24) | {f"{Q}.magnitude": random(24)}, PHI, PHI_MODULES)
    with pytest.raises(IncompatibleError, match="different ranks"):
        read(pair(Q, 24) | pair(K, 12, rank=2), PHI, PHI_MODULES)
    with pytest.raises(IncompatibleError, match="11 rows, the base 12"):
        read(pair(K, 11), PHI, PHI_MODULES)


def test_alpha_comes_from_the_config_or_the_user_and_never_from_a_default() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert read(pair(Q, 24)).layers[name].scale == 4.0
    assert read(pair(Q, 24), config=None, alpha=6).layers[name].scale == 2.0
    with pytest.raises(UsageError, match="do not state alpha"):
        read(pair(Q, 24), config=None)
    with pytest.raises(UsageError, match="states alpha 12"):
        read(pair(Q, 24), alpha=6)
    with pytest.raises(UsageError, match="rank 3, 8 was given"):
        read(pair(Q, 24), rank=8)


def test_without_the_base_the_order_of_rows_is_not_guessed() -> None:
    with pytest.raises(MissingError, match="permuted") as caught:
        read(pair(Q, 24), None, None)
    assert "--base" in (caught.value.hint or "")
    with pytest.raises(UnsupportedError, match="falcon"):
        read(pair(Q, 24), {"model_type": "falcon"}, None)
    for heads in (None, "4", 0, True):
        with pytest.raises(IncompatibleError, match="num_attention_heads"):
            read(pair(Q, 24), {"model_type": "llama", "num_attention_heads": heads}, None)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"layers.0.sa_norm.scale": random(20)}, "layers.0.sa_norm.scale"),
        ({f"{Q}.lora_a.bias": random(3)}, "lora_a.bias"),
        ({f"{K}.lora_a.weight": random(3, 20)}, "no lora_b.weight"),
        ({f"{Q}.magnitude": random(23)}, r"expected \[24\]"),
        (pair("layers.0.attn.mystery", 24), "mystery"),
        (pair("layers.9.attn.q_proj", 24), "no module"),
        (pair("layers.0.attn.v_proj", 13), "updates 13 x 20"),
        (pair(Q, 22), "22 rows"),
    ],
)
def test_hostile_content_is_refused_by_name(tensors: dict, named: str) -> None:
    with pytest.raises(IncompatibleError, match=named):
        read(pair(Q, 24) | tensors)
