"""Bins, windows, positions, and which models keep packed examples apart."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.training.packing import check_isolation, pack, positions, windows


def test_small_bins_by_hand():
    assert pack([6, 4, 5, 3, 2], 10) == [(0, 1), (2, 3, 4)]
    assert pack([10, 10, 1], 10) == [(0,), (1,), (2,)]
    assert pack([], 10) == []


def test_the_fullest_bin_that_fits_is_taken():
    """3 fits beside 6 (room 4) and beside 7 (room 3): the tighter one gets it."""
    assert pack([7, 6, 3, 4], 10) == [(0, 2), (1, 3)]


def best_fit_slowly(lengths, max_len):
    """The definition, with a list of rooms."""
    bins = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        fitting = [one for one in bins if one[0] >= lengths[item]]
        if fitting:
            least = min(one[0] for one in fitting)
            chosen = [one for one in fitting if one[0] == least][-1]
        else:
            chosen = [max_len, []]
            bins.append(chosen)
        chosen[0] -= lengths[item]
        chosen[1].append(item)
    return [len(one[1]) and sum(lengths[item] for item in one[1]) for one in bins]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=150, deadline=None)
def test_every_item_lies_in_one_bin_and_none_overflows(lengths, max_len):
    bins = pack(lengths, max_len)
    assert sorted(item for one in bins for item in one) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in one) for one in bins]
    assert all(total <= max_len for total in sums)
    assert sorted(sums) == sorted(best_fit_slowly(lengths, max_len))
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // max_len) + 1 or len(bins) <= len(lengths)
    assert sum(2 * total <= max_len for total in sums) <= 1, "two half-empty bins fit into one"


def test_packing_is_deterministic_and_takes_any_integers():
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    assert pack(lengths, 512) == pack(lengths.tolist(), 512) == pack(lengths.astype(np.uint16), 512)


def test_a_hundred_thousand_examples_take_seconds_and_fill_nearly_everything():
    lengths = np.random.default_rng(1).lognormal(5, 0.8, 100_000).astype(int).clip(1, 2048)
    start = time.perf_counter()
    bins = pack(lengths, 2048)
    assert time.perf_counter() - start < 5
    assert lengths.sum() / (2048 * len(bins)) > 0.995


def test_windows_hold_every_token_once():
    assert [one.tolist() for one in windows(np.arange(7, dtype=np.int32), 3)] == [[0, 1, 2], [3, 4, 5]]  # a single 6 would have nothing to predict
    assert [one.tolist() for one in windows(np.arange(5, dtype=np.int32), 3, lead=[9])] == [[9, 0, 1], [9, 2, 3], [9, 4]]


@given(n=st.integers(0, 60), max_len=st.integers(2, 20), lead=st.booleans())
def test_windows_joined_are_the_text(n, max_len, lead):
    head = [99] if lead else []
    cut = windows(np.arange(n, dtype=np.int32), max_len, head)
    assert all(2 <= len(one) <= max_len for one in cut)
    joined = [int(token) for one in cut for token in one[len(head) :]]
    assert joined == list(range(n))[: len(joined)] and n - len(joined) <= (0 if lead else 1)


def test_windows_too_short_for_a_target_are_refused():
    with pytest.raises(UsageError, match="windows of 1 tokens"):
        windows(np.arange(4, dtype=np.int32), 1)
    with pytest.raises(UsageError, match="windows of 2 tokens"):
        windows(np.arange(4, dtype=np.int32), 2, lead=[1, 2])


def test_positions_start_again_with_each_example_and_with_the_padding():
    assert positions([3, 1, 2], 8).tolist() == [0, 1, 2, 0, 0, 1, 0, 1]


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen2-sliding": ("Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "mistral-sliding": ("Mistral", {**SIZES, "sliding_window": 4}),
    "gemma": ("Gemma", {**SIZES, "head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
}


def build(name: str, attention: str, dtype: torch.dtype = torch.float32):
    stem, options = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**options)
    head = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, head)._from_config(config, attn_implementation=attention).to(dtype).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_separate_ones_and_nothing_leaks(name, attention):
    """Three examples of 5, 1 and 7 tokens and padding: fp32 rounding apart, and not a bit of one reaches another."""
    model = build(name, attention)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(3, 64, (1, length), generator=generator) for length in (5, 1, 7, 2)]
    places = torch.from_numpy(positions([5, 1, 7], 15))[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts[:3]], dim=1)
        packed = model(input_ids=torch.cat(parts, dim=1), position_ids=places, use_cache=False).logits
        changed = model(
            input_ids=torch.cat([parts[0].flip(1) + 1 - 3 * (parts[0].flip(1) == 63), *parts[1:]], dim=1), position_ids=places, use_cache=False
        ).logits
    torch.testing.assert_close(packed[:, :13], alone, rtol=0, atol=1e-6)
    assert not torch.equal(packed[:, :5], changed[:, :5])
    assert torch.equal(packed[:, 5:], changed[:, 5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_isolate_pass_the_check(name, dtype):
    model = build(name, "sdpa", dtype)
    check_isolation(lambda **inputs: model(**inputs, use_cache=False).logits, 64)


def test_a_cache_breaks_isolation_and_the_check_says_so():
    """transformers builds no block mask once a cache exists; this is the mistake that the check is there to catch."""
    model = build("llama", "sdpa")
    with pytest.raises(UnsupportedError, match="lets packed examples see each other") as caught:
        check_isolation(lambda **inputs: model(**inputs, use_cache=True).logits, 64)
    assert "--pack" in caught.value.hint


def test_an_architecture_that_ignores_position_ids_for_its_mask_is_refused():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32
    )
    model = transformers.OPTForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="see each other"):
        check_isolation(lambda **inputs: model(**inputs, use_cache=False).logits, 64)


def test_a_model_without_position_ids_is_refused():
    def forward(input_ids):
        raise AssertionError

    with pytest.raises(UnsupportedError, match="takes no position_ids"):
        check_isolation(forward, 64)
