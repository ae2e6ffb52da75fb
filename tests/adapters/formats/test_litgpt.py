"""litgpt adapters against litgpt's own semantics, written out loop by loop in float64: grouped parts, scattered by release."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.adapters.formats import litgpt
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import IncompatibleError, MissingError, UnsupportedError, UsageError
from tests.adapters.formats.references import HEAD_SIZE, HEADS, KV_HEADS, LLAMA, LLAMA_MODULES, delta, random

GROUPS, ROWS = KV_HEADS, (HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE)
NEW, OLD = "transformer.h.0.attn.qkv", "transformer.h.0.attn.attn"
NEOX = {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 20, "intermediate_size": 80}


def fused(path: str, parts: tuple[int, ...], rows: tuple[int, ...] = ROWS, inputs: int = 20, rank: int = 3) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A": random(rank * len(parts), inputs), f"{path}.lora_B": random(sum(rows[part] for part in parts), rank, seed=1)}


def read(tensors: dict, config: dict | None = None, base: dict | None = LLAMA, modules: dict | None = LLAMA_MODULES, alpha: float | None = 6.0, **more):
    return litgpt.read(tensors, config, Hints(modules=modules, base_config=base, alpha=alpha, **more))


def grouped_product(tensors: dict, path: str, parts: tuple[int, ...], rows: tuple[int, ...], scale: float = 2.0) -> list[torch.Tensor]:
    """Part i of B times part i of A: what the grouped convolution computes."""
    a, b = tensors[f"{path}.lora_A"].double(), tensors[f"{path}.lora_B"].double()
    found, row = [], 0
    for position, part in enumerate(parts):
        found.append(scale * b[row : row + rows[part]] @ a[3 * position : 3 * position + 3])
        row += rows[part]
    return found


def split_interleaved(weight: torch.Tensor, heads: int, groups: int, size: int) -> list[torch.Tensor]:
    """The interleaved fused weight taken apart as litgpt's converter put it together: group by group queries, key, value."""
    found: list[list[torch.Tensor]] = [[], [], []]
    row = 0
    for _ in range(groups):
        for part, count in ((0, heads // groups), (1, 1), (2, 1)):
            found[part].append(weight[row : row + count * size])
            row += count * size
    return [torch.cat(pieces) for pieces in found]


def updates(adapter) -> list[torch.Tensor]:
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    return [delta(adapter.layers[name]) if name in adapter.layers else torch.zeros(rows, 20).double() for name, rows in zip(names, ROWS, strict=True)]


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (0, 1), (1, 2), (0,), (1,), (2,)])
def test_the_concatenated_layout_gives_each_projection_its_own_pair(parts: tuple[int, ...]) -> None:
    tensors = fused(NEW, parts)
    adapter = read(tensors, {"enable_lora": [part in parts for part in range(3)]})
    expected = dict(zip(parts, grouped_product(tensors, NEW, parts, ROWS), strict=True))
    for part, found in enumerate(updates(adapter)):
        torch.testing.assert_close(found, expected.get(part, torch.zeros(ROWS[part], 20).double()))
    assert len(adapter.layers) == len(parts) and all(layer.rank == 3 for layer in adapter.layers.values())


def test_the_old_layout_with_all_parts_mixes_them_as_the_training_did() -> None:
    tensors = fused(OLD, (0, 1, 2))
    expected = split_interleaved(torch.cat(grouped_product(tensors, OLD, (0, 1, 2), ROWS)), HEADS, GROUPS, HEAD_SIZE)
    for found, wanted in zip(updates(read(tensors)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_old_layout_with_some_parts_is_asked_for() -> None:
    tensors = fused(OLD, (0, 2))
    hyperparameters = {"lora_query": True, "lora_key": False, "lora_value": True}
    with pytest.raises(UsageError, match="depends on when") as caught:
        read(tensors, hyperparameters)
    assert "litgpt_qkv" in (caught.value.hint or "")
    q, v = grouped_product(tensors, OLD, (0, 2), ROWS)
    scattered = updates(read(tensors, hyperparameters | {"litgpt_qkv": "concatenated"}))
    torch.testing.assert_close(scattered, [q, torch.zeros(12, 20).double(), v])
    placed = torch.cat([q, torch.zeros(12, 20).double(), v])  # one after the other over the interleaved weight
    torch.testing.assert_close(updates(read(tensors, hyperparameters | {"litgpt_qkv": "interleaved"})), split_interleaved(placed, HEADS, GROUPS, HEAD_SIZE))
    with pytest.raises(UsageError, match="sideways"):
        read(tensors, hyperparameters | {"litgpt_qkv": "sideways"})


def test_adapted_parts_are_inferred_only_where_the_sizes_leave_one_answer() -> None:
    assert [bool(update.any()) for update in updates(read(fused(NEW, (0,))))] == [True, False, False]
    assert [bool(update.any()) for update in updates(read(fused(NEW, (1, 2))))] == [False, True, True]
    with pytest.raises(UsageError, match=r"query\+key or query\+value") as caught:
        read(fused(NEW, (0, 2)))
    assert "enable_lora" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="key or value"):
        read(fused(NEW, (1,)))
    with pytest.raises(IncompatibleError, match="does not fit"):
        read(fused(NEW, (0, 2)), {"enable_lora": [False, True, True]})
    with pytest.raises(UsageError, match="three truth values"):
        read(fused(NEW, (0, 2)), {"enable_lora": [True]})


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_gpt_neox_keeps_one_fused_weight(layout: str) -> None:
    rows, modules = (20, 20, 20), {"gpt_neox.layers.0.attention.query_key_value": (60, 20)}
    tensors = fused(NEW, (0, 1, 2), rows)
    found = delta(read(tensors, {"litgpt_qkv": layout}, NEOX, modules).layers["gpt_neox.layers.0.attention.query_key_value"])
    parts = grouped_product(tensors, NEW, (0, 1, 2), rows)
    taken_apart = split_interleaved(found, 2, 2, 10)
    if layout == "concatenated":
        torch.testing.assert_close(taken_apart, parts)
    else:
        torch.testing.assert_close(found, torch.cat(parts))


def test_plain_modules_are_named_as_in_the_checkpoint() -> None:
    shapes = {"attn.proj": ("self_attn.o_proj", 20, 24), "mlp.fc_1": ("mlp.gate_proj", 28, 20), "mlp.fc_2": ("mlp.up_proj", 28, 20)}
    shapes["mlp.proj"] = ("mlp.down_proj", 20, 28)
    tensors = {"lm_head.lora_A": random(3, 20), "lm_head.lora_B": random(33, 3)}
    for leaf, (_, outputs, inputs) in shapes.items():
        tensors |= {f"transformer.h.1.{leaf}.lora_A": random(3, inputs), f"transformer.h.1.{leaf}.lora_B": random(outputs, 3)}
    adapter = read(tensors, {"lora_alpha": 16}, alpha=None)
    assert adapter.layers.keys() == {"lm_head"} | {f"model.layers.1.{name}" for name, _, _ in shapes.values()}
    for leaf, (name, _, _) in shapes.items():
        a, b = (tensors[f"transformer.h.1.{leaf}.lora_{letter}"].double() for letter in "AB")
        torch.testing.assert_close(delta(adapter.layers[f"model.layers.1.{name}"]), 16 / 3 * b @ a)


def test_nothing_is_guessed_about_alpha_or_the_base() -> None:
    tensors = fused(NEW, (0, 1, 2))
    with pytest.raises(UsageError, match="do not state alpha"):
        read(tensors, alpha=None)
    with pytest.raises(UsageError, match="state alpha 16, 6 was given"):
        read(tensors, {"lora_alpha": 16})
    with pytest.raises(UsageError, match="alpha is 0"):
        read(tensors, alpha=0.0)
    with pytest.raises(UsageError, match="has rank 3, 8 was given"):
        read(tensors, rank=8)
    with pytest.raises(MissingError, match="base's config"):
        read(tensors, base=None)
    with pytest.raises(UnsupportedError, match="falcon"):
        read(tensors, base={"model_type": "falcon"})


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"transformer.h.0.mlp.experts.0.fc_1.lora_A": random(3, 20)}, "experts"),
        ({f"{NEW}.linear.weight": random(48, 20)}, "linear.weight"),
        ({f"{NEW}.lora_B": random(48, 4)}, "not 1, 2 or 3 times"),
        ({f"{NEW}.lora_B": random(47, 3)}, "47 rows"),
        ({"transformer.h.1.attn.qkv.lora_A": random(9, 20)}, "lacks lora_A or lora_B"),
        ({"transformer.h.1.mlp.fc.lora_A": random(3, 20), "transformer.h.1.mlp.fc.lora_B": random(28, 3)}, "not a module of this family"),
        ({"transformer.h.5.attn.proj.lora_A": random(3, 24), "transformer.h.5.attn.proj.lora_B": random(20, 3)}, "no module"),
    ],
)
def test_hostile_content_is_refused_by_name(tensors: dict, named: str) -> None:
    with pytest.raises(IncompatibleError, match=named):
        read(fused(NEW, (0, 1, 2)) | tensors)
