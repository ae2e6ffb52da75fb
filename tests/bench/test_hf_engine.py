import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qlora_tools.bench.hf_engine import load, stored_bytes
from qlora_tools.errors import MissingError, UsageError

IDS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder, threads=1, dtype="fp32")


def test_prefill_and_decode_continue_what_scoring_sees_at_once(engine):
    whole = engine.score(IDS)
    assert whole.shape == (2, 12, 96)
    found = [engine.prefill(IDS[:, :9])]
    found += [engine.decode(IDS[:, t]) for t in range(9, 12)]
    for t, logits in zip(range(8, 12), found, strict=True):
        assert torch.allclose(logits, whole[:, t], atol=1e-5)


def test_prefill_forgets_and_scoring_leaves_the_past_alone(engine):
    first = engine.prefill(IDS[:, :4])
    engine.decode(IDS[:, 4])
    assert torch.equal(engine.prefill(IDS[:, :4]), first)
    engine.score(IDS)
    continued = engine.decode(IDS[:, 4])
    engine.prefill(IDS[:, :4])
    assert torch.equal(engine.decode(IDS[:, 4]), continued)


def test_facts_name_the_dtype_and_count_tied_weights_once(folder, engine):
    facts = engine.info()
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert (facts["vocab_size"], facts["max_length"], facts["dtype"], facts["device"]) == (96, 64, "float32", "cpu")
    assert 4 * parameters <= facts["weights_bytes"] <= 4 * parameters + 256
    assert load(folder, threads=1).info()["dtype"] == "bfloat16"


def test_a_bitsandbytes_folder_is_loaded_by_its_own_config(folder, engine, tmp_path):
    setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=setting, dtype=torch.float32).save_pretrained(tmp_path)
    quantized = load(str(tmp_path), threads=1, dtype="fp32")
    logits, exact = quantized.score(IDS), engine.score(IDS)
    assert 0 < (logits - exact).abs().max() < 1.0
    assert quantized.info()["quantization"] == "bitsandbytes"
    linear = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    dense = engine.info()["weights_bytes"] - 4 * linear
    assert linear / 2 < stored_bytes(quantized._model) - dense < 0.75 * linear


def test_wrong_words_are_refused_before_loading(folder, tmp_path):
    with pytest.raises(UsageError, match="dtype 'int3'"):
        load(folder, threads=1, dtype="int3")
    with pytest.raises(MissingError, match=r"config\.json"):
        load(str(tmp_path), threads=1)
    with pytest.raises(UsageError, match="decode before prefill"):
        load(folder, threads=1).decode(IDS[:, 0])
