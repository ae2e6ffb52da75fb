"""loralib state dicts against the package's formulas for merged weights, re-implemented in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qlora_tools.adapters.formats import loralib
from qlora_tools.adapters.portable import CONV, EMBEDDING
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import IncompatibleError, NonFiniteError, UnsupportedError, UsageError
from tests.adapters.formats.references import delta, random

ALPHA, RANK = 8.0, 4
GPT2 = {"model_type": "gpt2"}


def pair(module: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A": random(*a), f"{module}.lora_B": random(*b, seed=1)}


def read(tensors: dict, modules: dict | None = None, config: dict | None = None, base: dict | None = None, alpha: float | None = ALPHA, **more):
    return loralib.read(tensors, config, Hints(modules=modules, base_config=base, alpha=alpha, **more))


def merged_delta(a: torch.Tensor, b: torch.Tensor, enabled: list[bool], outputs: int) -> torch.Tensor:
    """A grouped convolution over the rank, its rows put where parts are enabled, zeros elsewhere."""
    product = functional.conv1d(a.double().unsqueeze(0), b.double().unsqueeze(-1), groups=sum(enabled)).squeeze(0)
    mask = torch.zeros(len(enabled), outputs // len(enabled), dtype=torch.bool)
    mask[torch.tensor(enabled)] = True
    whole = torch.zeros(outputs, a.shape[1], dtype=torch.float64)
    whole[mask.flatten()] = product
    return ALPHA / RANK * whole


@pytest.mark.parametrize("modules", [None, {"encoder.fc": (10, 6)}, {"encoder.fc": (6, 10)}])
def test_a_linear_is_b_times_a_times_alpha_over_rank(modules: dict | None) -> None:
    tensors = pair("encoder.fc", (RANK, 6), (10, RANK))
    layer = read(tensors, modules).layers["encoder.fc"]
    torch.testing.assert_close(delta(layer), ALPHA / RANK * tensors["encoder.fc.lora_B"].double() @ tensors["encoder.fc.lora_A"].double())


@pytest.mark.parametrize("modules", [None, {"embeddings.word_embeddings": (30, 6)}])
def test_an_embedding_is_the_transpose(modules: dict | None) -> None:
    tensors = pair("embeddings.word_embeddings", (RANK, 30), (6, RANK))
    layer = read(tensors, modules).layers["embeddings.word_embeddings"]
    a, b = tensors["embeddings.word_embeddings.lora_A"].double(), tensors["embeddings.word_embeddings.lora_B"].double()
    assert layer.kind == EMBEDDING
    torch.testing.assert_close(delta(layer), ALPHA / RANK * (b @ a).T)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False], [False, True, True]])
@pytest.mark.parametrize("stored", [(6, 30), (30, 6), None])
def test_a_merged_linear_keeps_its_groups_apart(enabled: list[bool], stored: tuple[int, int] | None) -> None:
    groups, module = sum(enabled), "transformer.h.0.attn.c_attn"
    if stored is None and groups == 1:
        return  # without the base, one adapted part looks like a linear
    tensors = pair(module, (groups * RANK, 6), (groups * 10, RANK))
    layer = read(tensors, {module: stored} if stored else None, {"enable_lora": {"c_attn": enabled}}).layers[module]
    torch.testing.assert_close(delta(layer), merged_delta(tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"], enabled, 30))
    assert layer.scale == ALPHA / RANK


def test_all_parts_adapted_need_no_word_but_some_do() -> None:
    module = "h.0.attn.c_attn"
    full = pair(module, (3 * RANK, 6), (30, RANK))
    torch.testing.assert_close(
        delta(read(full, {module: (6, 30)}).layers[module]), merged_delta(full[f"{module}.lora_A"], full[f"{module}.lora_B"], [True] * 3, 30)
    )
    partial = pair(module, (2 * RANK, 6), (20, RANK))
    for modules, said in (({module: (6, 30)}, "2 of 3 parts"), (None, "2 parts")):
        with pytest.raises(UsageError, match=said) as caught:
            read(partial, modules)
        assert "enable_lora" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="1 of 3 parts"):
        read(pair(module, (RANK, 6), (10, RANK)), {module: (6, 30)})
    with pytest.raises(IncompatibleError, match="does not fit"):
        read(partial, {module: (6, 30)}, {"enable_lora": [True, False, False]})
    with pytest.raises(IncompatibleError, match="does not fit"):
        read(partial, {module: (6, 30)}, {"enable_lora": [True, True]})
    with pytest.raises(UsageError, match="truth values"):
        read(partial, {module: (6, 30)}, {"enable_lora": "yes"})


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_is_the_reshaped_product(size: int) -> None:
    shape = (10, 6, size, size)
    tensors = pair("conv1", (RANK * size, 6 * size), (10 * size, RANK * size))
    layer = read(tensors, {"conv1": shape}).layers["conv1"]
    expected = ALPHA / RANK * (tensors["conv1.lora_B"].double() @ tensors["conv1.lora_A"].double()).reshape(shape)
    assert layer.kind == CONV and layer.rank == RANK * size * size
    torch.testing.assert_close(delta(layer), expected)


def test_a_convolution_applies_as_its_two_factors_do() -> None:
    layer = read(pair("conv1", (RANK * 3, 18), (30, RANK * 3)), {"conv1": (10, 6, 3, 3)}).layers["conv1"]
    x = random(1, 6, 7, 7, seed=3).double()
    apart = functional.conv2d(functional.conv2d(x, layer.a.double()), layer.b.double()) * layer.scale
    torch.testing.assert_close(apart, functional.conv2d(x, delta(layer)))


@pytest.mark.parametrize("shape", [(10, 3, 3, 3), (10, 6, 3, 5), (10, 6, 3)])
def test_other_convolutions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="convolution"):
        read(pair("conv1", (RANK * 3, 18), (30, RANK * 3)), {"conv1": shape})


def test_a_convolution_s_rank_is_told_by_the_base_and_without_it_the_rank_given_shows_the_mistake() -> None:
    tensors = pair("conv1", (RANK * 3, 18), (30, RANK * 3))
    assert read(tensors, {"conv1": (10, 6, 3, 3)}, rank=RANK).layers["conv1"].kind == CONV
    with pytest.raises(UsageError, match="rank 12, 4 was given") as caught:
        read(tensors, rank=RANK)
    assert "--base" in (caught.value.hint or "")


def test_biases_replace_those_of_the_base() -> None:
    adapter = read(pair("fc", (RANK, 6), (10, RANK)) | {"fc.bias": random(10), "other.bias": random(3)}, {"fc": (10, 6), "other": (3, 4)})
    assert adapter.replacements.keys() == {"fc.bias", "other.bias"} and adapter.layers["fc"].bias is None


def test_alpha_is_asked_for() -> None:
    with pytest.raises(UsageError, match="does not state alpha") as caught:
        read(pair("fc", (RANK, 6), (10, RANK)), alpha=None)
    assert "--alpha" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="rank 4, 8 was given"):
        read(pair("fc", (RANK, 6), (10, RANK)), rank=8)
    assert read(pair("fc", (RANK, 6), (10, RANK)), rank=4).layers["fc"].scale == 2.0


def test_a_leading_part_may_differ_from_the_base() -> None:
    adapter = read(pair("transformer.h.0.mlp.c_fc", (RANK, 6), (10, RANK)), {"h.0.mlp.c_fc": (6, 10)}, base=GPT2)
    assert adapter.layers.keys() == {"h.0.mlp.c_fc"}


@pytest.mark.parametrize(
    ("tensors", "error", "named"),
    [
        ({"fc.weight": random(10, 6)}, IncompatibleError, "fc.weight"),
        ({"gone.lora_A": random(RANK, 6), "gone.lora_B": random(10, RANK)}, IncompatibleError, "no module `gone`"),
        ({"fc2.lora_A": random(RANK, 6)}, IncompatibleError, "expected two matrices"),
        ({"fc.lora_B": random(10, 3)}, IncompatibleError, "ranks"),
        ({"fc.lora_B": random(10)}, IncompatibleError, "two matrices"),
        ({"fc.lora_A": random(RANK, 7)}, IncompatibleError, "updates 10 x 7"),
        ({"fc.lora_A": torch.full((RANK, 6), float("inf"))}, NonFiniteError, "infinity"),
    ],
)
def test_hostile_content_is_refused_by_name(tensors: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        read(pair("fc", (RANK, 6), (10, RANK)) | tensors, {"fc": (10, 6), "fc2": (10, 6)})
    with pytest.raises(IncompatibleError, match="biases but no"):
        read({"fc.bias": random(10)})
