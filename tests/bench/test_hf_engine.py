import gc
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qlora_tools.bench.hf_engine import config_of, load, loading_words, stored_bytes
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError, UsageError
from tests.conftest import with_config

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


LINEAR = [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 64 * 128] * 2


def nf4_bytes(count):
    """Codes, 8-bit scales of 64 each, fp32 scales of 256 of those each, and the tables (16 and 256 fp32, one offset) that every weight has its own of."""
    scales = math.ceil(count / 64)
    return count // 2 + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


@pytest.mark.parametrize(
    ("quantize", "expected", "bound"),
    [("nf4", sum(map(nf4_bytes, LINEAR)), 1.0), ("int8", sum(LINEAR) + 4 * 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64), 0.1)],
)
def test_a_dense_folder_is_quantized_while_it_is_loaded(folder, engine, quantize, expected, bound):
    quantized = load(folder, threads=1, dtype="fp32", quantize=quantize)
    if quantize == "nf4":
        assert quantized._model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    facts = quantized.info()
    dense = engine.info()["weights_bytes"] - 4 * sum(LINEAR)
    assert facts["quantization"] == "bitsandbytes" and facts["weights_bytes"] == dense + expected
    difference = (quantized.score(IDS) - engine.score(IDS)).abs().max()
    assert 0 < difference < bound
    assert torch.isfinite(quantized.prefill(IDS[:, :9])).all() and torch.isfinite(quantized.decode(IDS[:, 9])).all()
    if quantize == "int8":  # its scales move with the first use
        assert quantized.info()["weights_bytes"] == facts["weights_bytes"]


def test_nf4_on_the_way_in_is_what_a_converted_folder_holds(folder, tmp_path):
    setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=setting, dtype="auto").save_pretrained(tmp_path)
    on_the_way = load(folder, threads=1, quantize="nf4")
    assert on_the_way.info()["dtype"] == "bfloat16" and on_the_way._model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert torch.equal(on_the_way.score(IDS), load(str(tmp_path), threads=1).score(IDS))
    with pytest.raises(UsageError, match="quantized already"):
        load(str(tmp_path), threads=1, quantize="int8")


def test_eight_bit_products_do_not_write_while_they_are_timed(folder, caplog):
    load(folder, threads=1, quantize="int8").score(IDS)
    assert "inputs will be cast" not in caplog.text


def test_a_device_or_limit_that_torch_cannot_give_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no CUDA device"):
        load(folder, threads=1, device="cuda")
    with pytest.raises(UsageError, match="memory_limit is 9 bytes on device `cpu`"):
        load(folder, threads=1, memory_limit=9)


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_a_limit_is_the_share_of_the_device_that_torch_is_told(folder, monkeypatch, device, number):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=400))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *words: told.append(words))
    for limit in (100, 900):
        loading_words(folder, config_of(folder), threads=1, dtype="fp32", device=device, memory_limit=limit)
    assert told == [(0.25, number), (1.0, number)]


def test_a_dtype_that_is_none_is_named(folder, tmp_path):
    config = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "load"}))
    with pytest.raises(CorruptError, match="says dtype 'load'"):
        load(str(tmp_path), threads=1, quantize="nf4")


def test_modes_of_memory_change_nothing(folder, engine):
    assert torch.equal(load(folder, threads=1, dtype="fp32", memory="deployed").score(IDS), engine.score(IDS))


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_gpu_continues_what_it_scores_and_gives_logits_on_the_host(folder, quantize):
    engine = load(folder, threads=1, dtype="fp16", device="cuda", quantize=quantize)
    whole, first = engine.score(IDS), engine.prefill(IDS[:, :9])
    assert whole.device.type == first.device.type == "cpu" and engine.info()["device"] == "cuda:0"
    for t, logits in zip(range(8, 12), [first, *(engine.decode(IDS[:, t]) for t in range(9, 12))], strict=True):
        assert torch.allclose(logits.float(), whole[:, t].float(), atol=5e-2)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_left_to_do_once_loading_returned(folder):
    load(folder, threads=1, device="cuda")
    assert torch.cuda.current_stream().query()


@pytest.mark.gpu
def test_a_limit_of_torch_is_kept(folder):
    gc.collect()
    torch.cuda.empty_cache()  # what the allocator holds already is given out below the limit, too
    try:
        with pytest.raises(torch.OutOfMemoryError):
            load(folder, threads=1, dtype="fp32", device="cuda", memory_limit=4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_wrong_words_are_refused_before_loading(folder, tmp_path):
    with pytest.raises(UsageError, match="dtype 'int3'"):
        load(folder, threads=1, dtype="int3")
    with pytest.raises(UsageError, match="quantize 'int4': expected one of nf4, int8"):
        load(folder, threads=1, quantize="int4")
    with pytest.raises(UsageError, match="memory 'tight'"):
        load(folder, threads=1, memory="tight")
    with pytest.raises(MissingError, match=r"config\.json"):
        load(str(tmp_path), threads=1)
    with pytest.raises(UsageError, match="decode before prefill"):
        load(folder, threads=1).decode(IDS[:, 0])


def test_nothing_but_safetensors_and_the_librarys_own_code_is_asked_for(folder):
    words = loading_words(folder, config_of(folder), threads=1, dtype="fp32", device="cpu")
    assert words["trust_remote_code"] is False and words["use_safetensors"] is True and words["local_files_only"] is True


def test_a_folder_of_pickles_is_refused_before_one_is_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    path = str(with_config(Path(folder), tmp_path / "model"))
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"w": Bomb()}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin: pickle files can run code"):
        load(path, threads=1)
    (tmp_path / "model/pytorch_model.bin").unlink()
    with pytest.raises(MissingError, match="no weights in safetensors"):
        load(path, threads=1)
    assert not (tmp_path / "boom").exists()


def test_code_of_the_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    path = str(with_config(Path(folder), tmp_path / "model", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}))
    (tmp_path / "model/own.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(UnsupportedError, match="transformers cannot load it") as raised:
        load(path, threads=1)
    assert "never run" in raised.value.hint and not (tmp_path / "boom").exists()


def test_sizes_that_no_model_has_and_broken_weights_are_named(folder, tmp_path):
    with pytest.raises(CorruptError, match="num_hidden_layers"):
        load(str(with_config(Path(folder), tmp_path / "deep", num_hidden_layers=100_000_000)), threads=1)
    with pytest.raises(UnsupportedError, match="cannot load it"):
        load(str(with_config(Path(folder), tmp_path / "odd", hidden_size=100, num_attention_heads=32)), threads=1)
    path = str(with_config(Path(folder), tmp_path / "broken"))
    (tmp_path / "broken/model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptError, match="cannot be read as safetensors"):
        load(path, threads=1)
