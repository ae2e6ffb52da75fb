"""Sums, cuts and comparisons of whole adapters against the dense float64 deltas that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.combine import compared, kinds_of, resized, sum_of
from qlora_tools.adapters.portable import CONV, EMBEDDING, Layer, Portable
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from tests.adapters.tiny_models import Convolutions, llama, save

LINEARS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": LINEARS}),
    "rslora": (llama, {"target_modules": LINEARS, "use_rslora": True}),
    "pattern": (llama, {"target_modules": LINEARS, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2.5}}),
    "bias": (llama, {"target_modules": LINEARS, "lora_bias": True}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv": (Convolutions, {"target_modules": ["one", "two", "three", "point"]}),
}


def delta(layer: Layer) -> torch.Tensor:
    return layer.scale * (layer.b.double().flatten(1) @ layer.a.double().flatten(1))


def deltas(portable: Portable) -> dict[str, torch.Tensor]:
    found = {module: delta(layer) for module, layer in portable.layers.items()}
    return found | {f"{module}.bias": layer.bias.double() for module, layer in portable.layers.items() if layer.bias is not None}


def from_peft(folder: Path, kind: str, seed: int = 1) -> Portable:
    build, options = KINDS[kind]
    saved = save(folder, build, seed, **options)
    return portable_peft.read(json.loads((saved.adapter / "adapter_config.json").read_text()), load_file(saved.adapter / "adapter_model.safetensors"))


def random_layer(outputs: int = 8, inputs: int = 6, rank: int = 3, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32, **more: Any) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    return Layer(torch.randn(rank, inputs, generator=generator).to(dtype), torch.randn(outputs, rank, generator=generator).to(dtype), scale, **more)


def assert_equal_deltas(found: Portable, expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert deltas(found).keys() == expected.keys()
    for name, value in deltas(found).items():
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_one_is_itself(kind: str, tmp_path: Path) -> None:
    portable = from_peft(tmp_path, kind)
    assert sum_of([("x", portable, 1.0)])[0] is portable
    halves, _ = sum_of([("x", portable, 0.25), ("x", portable, 0.75)])
    assert_equal_deltas(halves, deltas(portable))
    ranked, rows = sum_of([("x", portable, 1.0)], rank=4)
    assert_equal_deltas(ranked, deltas(portable))
    assert all(row.cut.error < 1e-6 for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_sum_is_the_sum_of_the_deltas(kind: str, tmp_path: Path) -> None:
    first, second = from_peft(tmp_path, kind, 1), from_peft(tmp_path, kind, 2)
    expected = {name: 0.7 * value - 2.0 * deltas(second)[name] for name, value in deltas(first).items()}
    total, rows = sum_of([("x", first, 0.7), ("y", second, -2.0)])
    assert_equal_deltas(total, expected)
    assert all(row.full_rank == row.cut.rank == first.layers[row.module].rank + second.layers[row.module].rank for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_sum_is_the_best_of_its_rank_and_reports_its_error(kind: str, tmp_path: Path) -> None:
    first, second = from_peft(tmp_path, kind, 1), from_peft(tmp_path, kind, 2)
    total, rows = sum_of([("x", first, 0.7), ("y", second, -2.0)], rank=2)
    for row in rows:
        dense = 0.7 * delta(first.layers[row.module]) - 2.0 * delta(second.layers[row.module])
        values = torch.linalg.svdvals(dense)
        assert row.cut.optimum == pytest.approx(float(values[2:].norm() / values.norm()), abs=1e-6)
        assert row.cut.error == pytest.approx(float((dense - delta(total.layers[row.module])).norm() / dense.norm()), abs=1e-6)
        assert total.layers[row.module].kind == first.layers[row.module].kind


def test_different_targets_ranks_and_scales_add_up() -> None:
    first = Portable({"q": random_layer(rank=2, scale=0.5), "v": random_layer(seed=3)})
    second = Portable({"q": random_layer(rank=5, seed=1, scale=3 / 5**0.5), "o": random_layer(seed=4)})
    total, _ = sum_of([("x", first, 1.0), ("y", second, 1.0)])
    expected = {"q": delta(first.layers["q"]) + delta(second.layers["q"]), "v": delta(first.layers["v"]), "o": delta(second.layers["o"])}
    assert_equal_deltas(total, expected)
    assert total.layers["q"].rank == 7


def test_bf16_factors_stay_bf16_where_weights_are_powers_of_two_and_become_fp32_where_not() -> None:
    layers = {"q": random_layer(dtype=torch.bfloat16, scale=2.0)}
    exact, _ = sum_of([("x", Portable(layers), 0.5), ("y", Portable(layers), -1.0)])
    assert exact.layers["q"].b.dtype == torch.bfloat16
    torch.testing.assert_close(delta(exact.layers["q"]), -0.5 * delta(layers["q"]), atol=0, rtol=1e-12)
    wide, _ = sum_of([("x", Portable(layers), 0.3), ("y", Portable(layers), 1.0)])
    assert wide.layers["q"].b.dtype == torch.float32
    cut, _ = sum_of([("x", Portable(layers), 0.3), ("y", Portable(layers), 1.0)], rank=2)
    assert cut.layers["q"].b.dtype == torch.bfloat16


def test_whole_tensors_are_taken_once_where_all_agree_or_one_has_them() -> None:
    head = torch.randn(4, 3)
    rows = {"e.weight": ((1, 2), torch.randn(2, 3))}
    first, second = Portable({"q": random_layer()}, {"head.weight": head}), Portable({"q": random_layer()}, {"head.weight": head.clone()}, rows)
    total, _ = sum_of([("x", first, 1.0), ("y", second, 1.0)])
    assert torch.equal(total.replacements["head.weight"], head) and total.token_rows["e.weight"][0] == (1, 2)


@pytest.mark.parametrize(
    ("first", "second", "weights", "kind", "named"),
    [
        (
            {"replacements": {"h.weight": torch.ones(2)}},
            {"replacements": {"h.weight": torch.zeros(2)}},
            (1, 1),
            IncompatibleError,
            "`h.weight` differs in x and y",
        ),
        ({"replacements": {"h.weight": torch.ones(2)}}, {}, (0.5, 1), IncompatibleError, "cannot be taken 0.5 times"),
        (
            {"token_rows": {"e.weight": ((1,), torch.ones(1, 2))}},
            {"token_rows": {"e.weight": ((2,), torch.ones(1, 2))}},
            (1, 1),
            IncompatibleError,
            "token rows",
        ),
        ({"layers": {"q": random_layer(magnitude=torch.ones(8))}}, {}, (1, 1), UnsupportedError, r"x is DoRA \(q\)"),
        ({"layers": {"q": random_layer(outputs=9)}}, {}, (1, 1), IncompatibleError, r"`q` is 9 x \[6\] in x and 8 x \[6\] in y"),
        ({"layers": {"q": random_layer(kind=EMBEDDING)}}, {}, (1, 1), IncompatibleError, "`q`"),
    ],
)
def test_what_has_no_sum_is_refused_by_name(first: Any, second: Any, weights: Any, kind: type[Exception], named: str) -> None:
    x, y = (Portable(**{"layers": {"q": random_layer()}, **more}) for more in (first, second))
    with pytest.raises(kind, match=named):
        sum_of([("x", x, weights[0]), ("y", y, weights[1])])


def test_nothing_has_no_sum() -> None:
    with pytest.raises(UsageError):
        sum_of([])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 99])
def test_resizing_gives_the_best_of_the_rank(kind: str, rank: int, tmp_path: Path) -> None:
    portable = from_peft(tmp_path, kind)
    smaller, rows, dropped = resized("x", portable, rank=rank)
    assert not dropped and smaller.layers.keys() == portable.layers.keys()
    for row in rows:
        before, after = portable.layers[row.module], smaller.layers[row.module]
        values = torch.linalg.svdvals(delta(before))
        assert after.rank == min(rank, before.rank) and (after.rank < before.rank or after is before)
        assert (delta(before) - delta(after)).norm() == pytest.approx(float(values[after.rank :].norm()), abs=2e-6)
        assert (after.bias is None) == (before.bias is None)


def test_energy_keeps_its_share_in_every_layer_and_not_one_rank_more() -> None:
    portable = Portable({f"q{seed}": random_layer(20, 16, 8, seed) for seed in range(3)})
    smaller, rows, _ = resized("x", portable, energy=0.8)
    for row in rows:
        values = torch.linalg.svdvals(delta(portable.layers[row.module])).square()
        kept = values.cumsum(0) / values.sum()
        assert kept[row.cut.rank - 1] >= 0.8 - 1e-9 and (row.cut.rank == 1 or kept[row.cut.rank - 2] < 0.8)
        assert smaller.layers[row.module].rank == row.cut.rank


def test_a_byte_budget_is_kept_and_spent_where_it_matters() -> None:
    strong, weak = random_layer(16, 16, 6), random_layer(16, 16, 6, seed=1, scale=0.01)
    portable = Portable({"strong": strong, "weak": weak})
    smaller, rows, dropped = resized("x", portable, max_bytes=5 * 32 * 4)
    assert smaller.nbytes <= 5 * 32 * 4 and dropped == ["weak"] and rows[0].cut.rank == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "each decide"),
        ({"rank": 2, "energy": 0.5}, "each decide"),
        ({"rank": 0}, "keeps nothing"),
        ({"energy": 1.5}, "not a share"),
        ({"max_bytes": 10}, "no layer would keep"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        resized("x", Portable({"q": random_layer()}), **options)


def test_dora_is_not_cut() -> None:
    with pytest.raises(UnsupportedError, match="cannot be cut"):
        resized("x", Portable({"q": random_layer(magnitude=torch.ones(8))}), rank=1)


def test_comparing_sees_angle_size_and_what_only_one_changes() -> None:
    first = Portable({"q": random_layer(), "v": random_layer(seed=1)})
    second = Portable({"q": random_layer(scale=-2.0), "o": random_layer(seed=2)})
    found = compared(first, second)
    assert [row.module for row in found.rows] == ["q"] and (found.only_first, found.only_second) == (("v",), ("o",))
    assert found.rows[0].agreement.cosine == pytest.approx(-1.0) and found.rows[0].agreement.ratio == pytest.approx(2.0)
    x = torch.cat([delta(first.layers["q"]).flatten(), delta(first.layers["v"]).flatten(), torch.zeros(48)])
    y = torch.cat([delta(second.layers["q"]).flatten(), torch.zeros(48), delta(second.layers["o"]).flatten()])
    assert found.cosine == pytest.approx(float(torch.dot(x, y) / x.norm() / y.norm()))
    assert found.ratio == pytest.approx(float(y.norm() / x.norm()))


def test_shapes_that_differ_do_not_compare() -> None:
    with pytest.raises(IncompatibleError, match="`q`"):
        compared(Portable({"q": random_layer()}), Portable({"q": random_layer(outputs=9)}))


def test_what_an_adapter_holds_is_named() -> None:
    assert kinds_of(Portable({"q": random_layer(kind=CONV, bias=torch.ones(8))}, {"h": torch.ones(1)})) == ("bias", "convolution", "whole tensors")


def test_a_byte_budget_counts_what_is_no_factor() -> None:
    portable = Portable({"q": random_layer(16, 16, 6, bias=torch.ones(16))}, {"norm.weight": torch.ones(64)})
    smaller, _, _ = resized("x", portable, max_bytes=16 * 4 + 64 * 4 + 2 * 32 * 4)
    assert smaller.layers["q"].rank == 2 and smaller.nbytes == 16 * 4 + 64 * 4 + 2 * 32 * 4


def test_a_sum_keeps_orientation_and_tying() -> None:
    plain, marked = Portable({"q": random_layer()}), Portable({"q": random_layer()}, inputs_first=True, tied=True, base_name="org/base")
    total, _ = sum_of([("x", plain, 1.0), ("y", marked, 1.0)])
    assert (total.inputs_first, total.tied, total.base_name) == (True, True, "org/base")
