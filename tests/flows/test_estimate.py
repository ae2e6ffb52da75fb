"""``qlt estimate``: figures from a config alone, held against the files and runs that they foretell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError, UsageError
from qlora_tools.live.outline import outline
from qlora_tools.verbs import estimate as estimate_module
from qlora_tools.verbs.published import published_for
from tests.conftest import build_llama

CONFIG = api.EstimateConfig(batch=2, prompt=24, new=8, rank=4, train_batch=2, length=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "any-name.json"
    path.write_bytes((model / "config.json").read_bytes())
    return api.estimate(model=path, config=CONFIG, device="cuda", fits=1 << 30)


@pytest.fixture(scope="module")
def on_cpu(model):
    return api.estimate(model=model, config=CONFIG, device="cpu")


def test_an_outline_has_the_tensors_of_the_checkpoint(model):
    assert outline(model).specs == open_checkpoint(model).specs
    with pytest.raises(MissingError, match="no weights"):
        outline(model).read("lm_head.weight")


def test_an_outline_counts_tied_tensors_once(tmp_path):
    tied = build_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert outline(tied).specs == open_checkpoint(tied).specs


@pytest.mark.slow
def test_sizes_are_those_of_the_files_that_the_verbs_write(model, found, on_cpu, tmp_path):
    sizes = {row.setting: row.file_bytes for row in found.in_memory}
    for setting in ("int8", "nf4"):
        api.quantize(model=model, scheme=setting, output=tmp_path / setting, device="cpu")
        written = sum(path.stat().st_size for path in (tmp_path / setting).glob("*.safetensors"))
        assert 0 <= written - sizes[setting] < 32_768, setting  # the header
    assert len(found.graphs) == len(on_cpu.graphs) == 4
    for row in (*found.graphs, *on_cpu.graphs):
        made = api.export(model=model, scheme=row.setting, output=tmp_path / f"onnx-{row.device}-{row.setting}", verify=False, device=row.device)
        assert row.file_bytes == (made.output / "model.onnx.data").stat().st_size


def test_the_cache_is_that_of_the_model(model, found, on_cpu):
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    cache = live(input_ids=torch.ones((2, 32), dtype=torch.int64), use_cache=True).past_key_values
    assert {row.cache_bytes for row in found.in_memory} == {sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
    for row in (*found.graphs, *on_cpu.graphs):
        assert row.cache_bytes == found.in_memory[0].cache_bytes * (2 if row.device == "cpu" else 1)  # fp32 and fp16


def in_memory(model, config=CONFIG):
    with estimate_module.opened(outline(model), "nf4", "cuda") as base:
        return base.of(config)


def test_a_deep_model_is_foretold_from_shallow_ones(model, found, monkeypatch):
    monkeypatch.setattr(estimate_module, "_LAYERS", 99)
    for name, value in vars(in_memory(model)).items():
        assert getattr(found.in_memory[2], name) == (value if name == "setting" else pytest.approx(value, rel=1e-6)), name


def test_more_of_anything_takes_more(model, found):
    base, wider, longer = found.in_memory[2], in_memory(model, replace(CONFIG, rank=16)), in_memory(model, replace(CONFIG, length=64))
    assert wider.training_bytes > base.training_bytes
    assert longer.plain_training_bytes > base.plain_training_bytes >= base.training_bytes
    assert longer.running_bytes == base.running_bytes > base.weights_bytes + base.cache_bytes


def test_a_cpu_estimate_holds_the_process_and_says_what_it_rests_on(found, on_cpu):
    for row, lean in zip(on_cpu.in_memory, found.in_memory, strict=True):
        assert row.running_bytes > lean.running_bytes + 200_000_000  # torch and transformers
    for graph in on_cpu.graphs:
        assert graph.peak_bytes > graph.weights_bytes > 40_000_000 and graph.basis == "measured runs"
    assert {graph.basis for graph in found.graphs} == {"not measured"}


def test_what_fits_runs_within_the_limit(model, found):
    assert {row.kind for row in found.fits} == {"transformers", "graph"} and len(found.fits) == 7
    longest = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    for row in found.fits:
        assert row.batch >= 1 and 1 <= row.context <= longest and row.peak_bytes <= found.limit_bytes
    with estimate_module.opened(outline(model), "nf4", "cuda") as base:
        fitting = next(row for row in found.fits if row.setting == "nf4" and row.kind == "transformers")
        assert base.peak_bytes(fitting.batch, CONFIG.prompt, CONFIG.new) <= found.limit_bytes


def test_an_export_is_sent_to_the_bench(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="is an export"):
        api.estimate(model=tmp_path)


def test_a_known_shape_brings_what_others_published():
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    figures = published_for(shape)
    assert {row.model for row in figures} == {"LLaMA 7B"} and all("QLoRA" in row.source for row in figures)
    assert next(row for row in figures if row.column == "weights").nbytes == 5_048_000_000
    assert all(row.remark for row in figures if row.column)  # what stands beside ours says how far it is alike
    assert published_for({**shape, "hidden_size": 4097}) == published_for({**shape, "model_type": "qwen2"}) == ()


def test_layers_of_two_kinds_are_counted_in_rounds():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    assert estimate_module._period({"num_hidden_layers": 9, "layer_types": kinds * 3}) == 3
    assert estimate_module._period({"num_hidden_layers": 4, "layer_types": [*kinds, "full_attention"]}) == 4
    assert estimate_module._period({"num_hidden_layers": 4}) == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_hidden_layers": 100_000_000}, 4),
        ({"num_hidden_layers": -1}, 4),
        ({"max_position_embeddings": "long"}, 4),
        ({"hidden_size": 100, "num_attention_heads": 32}, 8),
        ({"rms_norm_eps": "x"}, 8),
    ],
)
def test_a_config_that_describes_no_model_ends_at_once_with_the_reason(qlt, here, model, changes, code):
    (here / "odd.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **changes}))
    done = qlt("estimate", here / "odd.json")
    assert done.code == code and ("odd.json" if code == 4 else "config.json") in done.err and "hint:" in done.err


def test_kinds_of_layers_that_are_no_list_are_named():
    with pytest.raises(CorruptError, match="layer_types"):
        estimate_module._period({"num_hidden_layers": 9, "layer_types": 5})


def test_the_command_prints_a_row_per_setting(qlt, here, model, found, monkeypatch):
    monkeypatch.setattr(estimate_module, "estimate", lambda **_: found)
    done = qlt("estimate", model, "--prompt", 8, "--new", 2, "--length", 8)
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("bf16", "nf4", "int4", "B parameters", "without the context"))
    assert "running within" in done.out and "not measured" in done.out
    assert list(here.iterdir()) == []
    for word in ("24", "24TT", "0GB-"):
        refused = qlt("estimate", model, "--fits", word)
        assert refused.code == 2 and "write 20MB, 1.5GiB" in refused.err
    assert qlt("estimate", model, "--fits", "1.5 GiB").code == 0


def test_refusals(tmp_path):
    with pytest.raises(MissingError, match="not there"):
        api.estimate(model=tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(UnsupportedError, match="builds no language model"):
        api.estimate(model=tmp_path)
    with pytest.raises(UsageError, match="rank 0"):
        api.EstimateConfig(rank=0)


def test_a_shallow_model_keeps_infinity_in_its_config(model, tmp_path):
    config = {**json.loads((model / "config.json").read_text()), "time_step_limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with estimate_module._shallow(outline(tmp_path), 2) as shallow:
        assert shallow.config["time_step_limit"] == [0.0, float("inf")]
