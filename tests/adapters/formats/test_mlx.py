"""MLX adapters against MLX's own forward formula, ``y + scale * (x @ a) @ b``, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_tools.adapters.formats import gguf, litgpt, loralib, mlx, onnx_adapter, torchtune
from qlora_tools.adapters.portable import EMBEDDING, Layer, Portable
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, NonFiniteError, UnsupportedError, UsageError
from tests.adapters.formats.references import LLAMA, LLAMA_MODULES, delta, portable, random, worst

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "model": "org/base", "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}}
PAIR = {f"{Q}.lora_a": random(20, 3), f"{Q}.lora_b": random(3, 24)}


def test_the_update_is_what_the_forward_pass_adds() -> None:
    x = random(5, 20, seed=9).double()
    adapter = mlx.read(PAIR, CONFIG, Hints(modules=LLAMA_MODULES, base_config=LLAMA))
    added = 20.0 * (x @ PAIR[f"{Q}.lora_a"].double()) @ PAIR[f"{Q}.lora_b"].double()
    torch.testing.assert_close(x @ delta(adapter.layers[Q]).T, added, rtol=1e-12, atol=1e-10)
    assert adapter.base_name == "org/base"


def test_an_embedding_adds_the_token_s_row() -> None:
    name = "model.embed_tokens"
    tensors = {f"{name}.lora_a": random(33, 3), f"{name}.lora_b": random(3, 20)}
    for modules, base in ((LLAMA_MODULES, LLAMA), (None, None)):
        layer = mlx.read(tensors, CONFIG, Hints(modules=modules, base_config=base)).layers[name]
        assert layer.kind == EMBEDDING
        torch.testing.assert_close(delta(layer), 20.0 * tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double())


def test_dora_lengths_are_peft_s_magnitudes() -> None:
    adapter = mlx.read(PAIR | {f"{Q}.m": random(24)}, CONFIG | {"fine_tune_type": "dora"}, Hints(modules=LLAMA_MODULES))
    weight, x = random(24, 20, seed=4).double(), random(5, 20, seed=9).double()
    layer = adapter.layers[Q]
    a, b, m = (tensor.double() for tensor in (PAIR[f"{Q}.lora_a"], PAIR[f"{Q}.lora_b"], random(24)))
    theirs = (m / (weight + 20.0 * b.T @ a.T).norm(dim=1)) * (x @ weight.T + 20.0 * (x @ a) @ b)
    summed = weight + delta(layer)
    assert layer.magnitude is not None
    torch.testing.assert_close(x @ (layer.magnitude.double()[:, None] * summed / summed.norm(dim=1, keepdim=True)).T, theirs)


def test_a_written_folder_is_read_back_exactly(tmp_path: Path) -> None:
    adapter = portable(LLAMA_MODULES, scale=1.5, base_name="org/base", dtype=torch.bfloat16)
    mlx.write(adapter, tmp_path, base_config=LLAMA)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_layers"] == 2 and config["lora_parameters"]["scale"] == 1.5
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"] and "lm_head" in config["lora_parameters"]["keys"]
    back = mlx.read(load_file(tmp_path / "adapters.safetensors"), config, Hints(modules=LLAMA_MODULES, base_config=LLAMA))
    assert worst(back, adapter) == 0 and back.base_name == "org/base"


def test_scales_that_differ_are_baked_in(tmp_path: Path) -> None:
    ranks = {module: 1 + position % 4 for position, module in enumerate(LLAMA_MODULES)}
    adapter = portable(LLAMA_MODULES, ranks=ranks, scale={module: 16 / rank**0.5 for module, rank in ranks.items()}, dtype=torch.bfloat16)
    mlx.write(adapter, tmp_path, base_config=LLAMA)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 1.0 and config["lora_parameters"]["rank"] == 4
    assert worst(mlx.read(load_file(tmp_path / "adapters.safetensors"), config, Hints(modules=LLAMA_MODULES, base_config=LLAMA)), adapter) < 1e-6


def test_dora_is_written_for_all_layers_or_not_at_all(tmp_path: Path) -> None:
    layers = portable({Q: LLAMA_MODULES[Q]}).layers
    with_lengths = {Q: Layer(layers[Q].a, layers[Q].b, 2.0, magnitude=random(24))}
    config, tensors = mlx.render(Portable(with_lengths), base_config=LLAMA)
    assert config["fine_tune_type"] == "dora" and torch.equal(tensors[f"{Q}.m"], random(24))
    more = portable({"model.layers.0.mlp.up_proj": LLAMA_MODULES["model.layers.0.mlp.up_proj"]}).layers
    with pytest.raises(UnsupportedError, match="all layers with DoRA or none"):
        mlx.write(Portable(with_lengths | dict(more)), tmp_path, base_config=LLAMA)


@pytest.mark.parametrize(
    ("tensors", "error", "named"),
    [
        ({f"{Q}.scale": random(1)}, IncompatibleError, f"{Q}.scale"),
        ({"model.norm.weight": random(20)}, IncompatibleError, "model.norm.weight"),
        ({"model.layers.1.self_attn.v_proj.lora_a": random(20, 3)}, IncompatibleError, "no lora_b"),
        ({f"{Q}.lora_b": random(4, 24)}, IncompatibleError, "differ or are zero"),
        ({f"{Q}.lora_b": random(24)}, IncompatibleError, "expected two matrices"),
        ({f"{Q}.m": random(23)}, IncompatibleError, r"expected \[24\]"),
        ({f"{Q}.lora_a": torch.full((20, 3), float("nan"))}, NonFiniteError, "NaN"),
        ({f"{Q}.lora_a": torch.ones(20, 3, dtype=torch.int32)}, CorruptError, "int32"),
        ({"model.layers.0.mlp.switch.lora_a": random(8, 3, 20), "model.layers.0.mlp.switch.lora_b": random(8, 28, 3)}, UnsupportedError, "experts"),
        ({"model.layers.7.self_attn.q_proj.lora_a": random(20, 3), "model.layers.7.self_attn.q_proj.lora_b": random(3, 24)}, IncompatibleError, "nearest"),
        ({f"{Q}.lora_a": random(24, 3), f"{Q}.lora_b": random(3, 20)}, None, ""),
        ({f"{Q}.lora_a": random(21, 3)}, IncompatibleError, "24 x 21"),
    ],
)
def test_hostile_content_is_refused_by_name(tensors: dict, error: type | None, named: str) -> None:
    if error is None:  # the other way round: a base that stores inputs first may look so
        mlx.read(PAIR | tensors, CONFIG, Hints(modules=LLAMA_MODULES))
        return
    with pytest.raises(error, match=named):
        mlx.read(PAIR | tensors, CONFIG, Hints(modules=LLAMA_MODULES))


def test_a_scale_is_never_guessed() -> None:
    with pytest.raises(UsageError, match="no scale is stated"):
        mlx.read(PAIR, None)
    assert mlx.read(PAIR, None, Hints(alpha=6)).layers[Q].scale == 2.0
    with pytest.raises(UsageError, match="states the scale 20"):
        mlx.read(PAIR, CONFIG, Hints(alpha=6))
    for bad in ("20", None, float("inf"), True):
        with pytest.raises(CorruptError, match="scale"):
            mlx.read(PAIR, {"lora_parameters": {"scale": bad}})
    with pytest.raises(CorruptError, match="lora_parameters"):
        mlx.read(PAIR, {"lora_parameters": [1]})


def test_whole_models_and_foreign_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="whole weights"):
        mlx.read(PAIR, CONFIG | {"fine_tune_type": "full"})
    with pytest.raises(UnsupportedError, match=r"transformer\.h"):
        mlx.write(portable({"transformer.h.0.attn.c_attn": (24, 8)}), tmp_path, base_config=LLAMA)
    with pytest.raises(MissingError, match="number of layers"):
        mlx.write(portable({Q: LLAMA_MODULES[Q]}), tmp_path, base_config=None)
    name = "model.embed_tokens"
    with pytest.raises(UnsupportedError, match="embedding with DoRA"):
        mlx.read({f"{name}.lora_a": random(33, 3), f"{name}.lora_b": random(3, 20), f"{name}.m": random(33)}, CONFIG)


def test_one_side_of_a_tied_weight_is_refused_both_ways(tmp_path: Path) -> None:
    tied, name = LLAMA | {"tie_word_embeddings": True}, "model.embed_tokens"
    for module in (name, "lm_head"):
        with pytest.raises(UnsupportedError, match="shares its weight"):
            mlx.write(portable({module: LLAMA_MODULES[module]}), tmp_path, base_config=tied)
    with pytest.raises(UnsupportedError, match="shares its weight"):
        mlx.read({f"{name}.lora_a": random(33, 3), f"{name}.lora_b": random(3, 20)}, CONFIG, Hints(base_config=tied))


#: Keys (and metadata) of each format as its own tool writes them.
HEADERS = {
    "gguf": (["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"], {"general.type": "adapter"}),
    "mlx": ([f"{Q}.lora_a", f"{Q}.lora_b"], {"format": "mlx"}),
    "torchtune": (["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], {}),
    "litgpt": (["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B", "lm_head.lora_A", "lm_head.lora_B"], {}),
    "loralib": (["transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"], {}),
    "onnx_adapter": ([f"{Q}.lora_A", f"{Q}.lora_B"], {"format": "onnx_adapter"}),
    "peft": ([f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"], {"format": "pt"}),
    "kohya": (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.alpha"], {}),
    "diffusers": (["unet.down_blocks.0.attn.to_q.lora_A.weight", "unet.down_blocks.0.attn.to_q.lora_B.weight"], {"format": "pt"}),
    "diffusers, bare": (["transformer.transformer_blocks.0.attn.to_q.lora_A", "transformer.transformer_blocks.0.attn.to_q.lora_B"], {}),
    "model": (["model.norm.weight", "lm_head.weight"], {"format": "pt"}),
    "nothing": ([], {}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_each_header_is_recognised_by_its_own_format_alone(name: str) -> None:
    formats = {"gguf": gguf, "mlx": mlx, "torchtune": torchtune, "litgpt": litgpt, "loralib": loralib, "onnx_adapter": onnx_adapter}
    keys, metadata = HEADERS[name]
    assert [own for own, module in formats.items() if module.recognise(keys, metadata, None)] == [own for own in formats if own == name]
