"""What a benchmark decides before it measures: settings by name, exports found, made or replaced, who judges, and what stays untouched."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools import api
from qlora_tools.bench.record import Workload
from qlora_tools.errors import MissingError, UnsupportedError, UsageError
from qlora_tools.verbs import bench_settings
from qlora_tools.verbs.bench_plan import check_room, line_up, sweep

TINY_BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}


@pytest.fixture
def here(tmp_path, monkeypatch, llama):
    """A working folder with a copy of the base that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "base")
    return tmp_path


@pytest.fixture
def adapter(here, llama, tuned):
    api.extract(base=llama, tuned=tuned, config=api.ExtractConfig(rank=4), output=here / "ad")
    return here / "ad"


def plan(*names, **words):
    return line_up(["base"], settings=names, device="cpu", **words)


def actions(found):
    return {item.setting.name: item.action for item in found.everything}


def quick(monkeypatch):
    """Exports without the check, which is another test's subject."""
    real = bench_settings.export
    monkeypatch.setattr(bench_settings, "export", lambda **words: real(**{"verify": False, **words}))


def test_an_export_that_carries_its_weights_otherwise_is_named(here, monkeypatch):
    quick(monkeypatch)
    found = plan("nf4", "int8", "torch-fp32", judged=False)
    assert found.notes == ()  # nothing is made yet
    assert found.made().notes == ("base-nf4 carries its weights as int8: what it was made for has no fast form of nf4.",)


def test_names_become_engines_folders_and_commands(here):
    found = plan("int8", "torch-bf16", "torch-nf4")
    int8, bf16, nf4 = (item.setting for item in found.planned)
    assert (int8.id, int8.name, int8.options) == ("base-int8", "int8", {"folder": "exports/base-int8", "device": "cpu"})
    assert int8.export == "qlt export base --int8 --device cpu -o exports/base-int8" and bf16.export is None
    assert bf16.options == {"path": "base", "dtype": "bf16", "device": "cpu"} and nf4.options["quantize"] == "nf4"
    assert actions(found) == {"int8": "make", "torch-bf16": "as it is", "torch-nf4": "as it is", "fp32": "make"}
    sizes = {item.setting.name: item.bytes for item in found.planned}
    assert 0 < sizes["torch-nf4"] < sizes["torch-bf16"] and sizes["int8"] > 0 and not (here / "exports").exists()


@pytest.mark.parametrize("names", [("int9",), ("torch-int4",), ("",)])
def test_unknown_names_are_refused(here, names):
    with pytest.raises(UsageError, match="not a setting") as refused:
        plan(*names)
    assert "torch-nf4" in refused.value.hint


def test_an_export_is_made_once_and_found_again(here, monkeypatch):
    quick(monkeypatch)
    made = plan("int8").made()
    assert all(item.setting.unavailable is None for item in made.everything)
    again = plan("int8")
    assert actions(again) == {"int8": "found", "fp32": "found"} and again.planned[0].bytes > 0
    stamp = (here / "exports/base-int8/model.onnx").stat().st_mtime_ns
    again.made()
    assert (here / "exports/base-int8/model.onnx").stat().st_mtime_ns == stamp


def test_an_export_of_what_the_model_used_to_be_is_replaced(here, monkeypatch):
    quick(monkeypatch)
    plan("int8", judged=False).made()
    before = (here / "exports/base-int8/model.onnx.data").read_bytes()
    weights = load_file(here / "base/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    weights["lm_head.weight"] = weights["lm_head.weight"] + torch.ones(1, dtype=torch.bfloat16)
    save_file(weights, here / "base/model.safetensors", {"format": "pt"})
    found = plan("int8", judged=False)
    assert actions(found) == {"int8": "replace"}
    found.made()
    assert actions(plan("int8", judged=False)) == {"int8": "found"} and (here / "exports/base-int8/model.onnx.data").read_bytes() != before


def test_a_replacement_that_fails_leaves_the_old_export(here, monkeypatch):
    quick(monkeypatch)
    plan("int8", judged=False).made()
    manifest = here / "exports/base-int8/qlt-manifest.json"
    content = json.loads(manifest.read_text())
    content["inputs"]["model"]["content_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    found = plan("int8", judged=False)
    assert actions(found) == {"int8": "replace"}

    def full(**words):
        raise UnsupportedError("no room in this test")

    monkeypatch.setattr(bench_settings, "export", full)
    (made,) = found.made().planned
    assert made.setting.unavailable == "its export failed: no room in this test" and (here / "exports/base-int8/model.onnx").exists()


def test_exports_for_something_else_are_left_alone(here, monkeypatch):
    quick(monkeypatch)
    api.export(model="base", scheme="int8", device="cuda", verify=False)
    api.export(model="base", scheme="int4", head_bits=8, verify=False)
    api.export(model="base", scheme="w8a8", verify=False)
    calibrated = here / "exports/base-w8a8/qlt-manifest.json"
    content = json.loads(calibrated.read_text())
    content["command"]["calib"] = "self"
    calibrated.write_text(json.dumps(content))
    (here / "exports/base-fp32").mkdir()
    (here / "exports/base-fp32/notes.txt").write_text("mine")
    found = plan("int8", "int4", "w8a8", "fp32").made()
    places = {item.setting.name: item.setting.options["folder"] for item in found.planned}
    assert places == {name: f"exports/base-{name}-cpu" for name in ("int8", "int4", "w8a8", "fp32")}
    assert json.loads((here / "exports/base-int8/qlt-manifest.json").read_text())["command"]["device"] == "cuda"
    assert (here / "exports/base-fp32/notes.txt").read_text() == "mine"


def test_what_cannot_be_planned_or_made_becomes_a_reason(here, monkeypatch):
    found = plan("fp16", "int8", judged=False)
    assert "its export failed: cpu graphs do not compute in fp16" in found.planned[0].setting.unavailable

    def broken(**words):
        raise MemoryError

    monkeypatch.setattr(bench_settings, "export", broken)
    made = {item.setting.name: item.setting.unavailable for item in found.made().planned}
    assert made["int8"] == "its export failed: MemoryError"


def test_adapters_are_merged_once_for_all_of_transformers(here, adapter, monkeypatch):
    quick(monkeypatch)
    found = plan("torch-bf16", "torch-nf4", "int8", adapters=[(adapter, 1.0)])
    assert actions(found) == {"torch-bf16": "make", "torch-nf4": "make", "int8": "make", "untuned": "as it is", "fp32": "make"}
    assert found.untuned == "base-ad-untuned" and found.planned[0].setting.export.startswith("qlt merge --base base --adapter")
    made = found.made()
    assert all(item.setting.unavailable is None for item in made.everything) and (here / "checkpoints/base-ad-merged/config.json").exists()
    again = actions(plan("torch-bf16", "int8", adapters=[(adapter, 1.0)]))
    assert again == {"torch-bf16": "found", "int8": "found", "untuned": "as it is", "fp32": "found"}
    half = plan("int8", adapters=[(adapter, 0.5)], judged=False)
    assert actions(half)["int8"] == "make" and "ad=0.5" in half.planned[0].setting.export


def test_a_merge_that_fails_is_the_reason_of_every_setting_that_needs_it(here, adapter, monkeypatch):
    tried = []

    def broken(**words):
        tried.append(words["output"])
        raise UnsupportedError("not today")

    monkeypatch.setattr(bench_settings, "merge", broken)
    made = plan("torch-bf16", "torch-fp16", adapters=[(adapter, 1.0)], judged=False).made()
    assert [item.setting.unavailable for item in made.planned[:2]] == ["its merge failed: not today"] * 2 and len(tried) == 1


def test_the_fp32_export_judges_on_the_cpu_and_the_stored_floats_on_a_gpu(here):
    assert plan("int8").reference.setting.id == "base-fp32"
    on_gpu = line_up(["base"], settings=["int8", "torch-bf16"], device="cuda")
    assert on_gpu.reference is on_gpu.planned[1] and on_gpu.reference.setting.options["device"] == "cuda"
    assert line_up(["base"], settings=["default"], device="cuda").planned[0].setting.name == "fp16"
    assert plan("int8", judged=False).reference is None


def test_the_checkpoint_itself_judges_where_its_fp32_export_cannot_be_made(here, monkeypatch):
    found = plan("torch-bf16")

    def broken(**words):
        raise UnsupportedError("no graph")

    monkeypatch.setattr(bench_settings, "export", broken)
    assert found.made().reference.setting.options == {"path": "base", "dtype": "fp32", "device": "cpu"}


def test_a_quantized_checkpoint_runs_in_its_own_format_alone(here, llama):
    api.quantize(model=llama, scheme="nf4", output=here / "q")
    found = line_up(["q"], settings=["torch-nf4", "torch-bf16"], device="cpu", judged=False)
    nf4, bf16 = (item.setting for item in found.planned)
    assert nf4.options["dtype"] == "stored" and "quantize" not in nf4.options and "nf4 already" in bf16.unavailable


def test_exports_and_checkpoints_mix_and_nothing_runs_twice(here, monkeypatch):
    quick(monkeypatch)
    plan("int8", judged=False).made()
    (here / "exports/README.md").write_text("words")
    found = line_up(["exports/README.md", "exports/base-int8", "base"], settings=["int8", "int4"], device="cpu", judged=False)
    assert [item.setting.name for item in found.planned] == ["int8", "int4"] and found.skipped == ("exports/README.md",)
    as_they_are = line_up(["exports/base-int8", "base"], reference="base")
    assert [item.setting.id for item in as_they_are.planned] == ["base-int8", "base"] and as_they_are.reference is as_they_are.planned[1]
    assert as_they_are.planned[0].setting.export == "qlt export base --int8 --device cpu -o exports/base-int8"


def test_two_models_with_one_name_keep_apart(here, llama, tuned, monkeypatch):
    quick(monkeypatch)
    shutil.copytree(llama, here / "run1/step-5")
    shutil.copytree(tuned, here / "run2/step-5")
    found = line_up(["run1/step-5", "run2/step-5"], settings=["torch-bf16", "int8"], device="cpu", judged=False)
    places = [str(item.folder) for item in found.planned if item.folder]
    assert len({item.setting.id for item in found.planned}) == 4 and places == ["exports/run1-step-5-int8", "exports/run2-step-5-int8"]
    assert {item.setting.name for item in found.planned} == {"run1-step-5-torch-bf16", "run1-step-5-int8", "run2-step-5-torch-bf16", "run2-step-5-int8"}


def test_the_export_of_another_model_of_that_name_is_not_an_older_state_of_this_one(here, llama, tuned, monkeypatch):
    quick(monkeypatch)
    for number, model in ((1, llama), (2, tuned)):
        shutil.copytree(model, here / f"run{number}/step-5")
    line_up(["run1/step-5"], settings=["int8"], device="cpu", judged=False).made()
    before = (here / "exports/step-5-int8/model.onnx.data").read_bytes()
    (found,) = line_up(["run2/step-5"], settings=["int8"], device="cpu", judged=False).planned
    assert (found.action, str(found.folder)) == ("make", "exports/step-5-int8-cpu")
    found.made()
    assert (here / "exports/step-5-int8/model.onnx.data").read_bytes() == before
    shutil.move(here / "run1", here / "moved")
    (same,) = line_up(["moved/step-5"], settings=["int8"], device="cpu", judged=False).planned
    assert (same.action, str(same.folder)) == ("found", "exports/step-5-int8"), "the same values, wherever they lie now"


def test_what_is_read_is_no_place_for_the_results(here, adapter):
    found = plan("int8", "torch-bf16", adapters=[(adapter, 1.0)])
    assert {"base", "ad", "exports/base-ad-int8", "checkpoints/base-ad-merged"} <= {
        str(path.relative_to(here) if path.is_absolute() else path) for path in found.inputs
    }


@pytest.mark.parametrize(
    ("models", "words", "kind", "said"),
    [
        ([], {}, UsageError, "nothing to measure"),
        (["none/at/all/here"], {}, MissingError, "not there"),
        (["base", "base2"], {"adapters": [("x", 1.0)]}, UsageError, "one base"),
        (["base"], {"untuned": "base2"}, UsageError, "not among those"),
    ],
)
def test_what_makes_no_sense_is_refused(here, llama, models, words, kind, said):
    shutil.copytree(llama, here / "base2")
    with pytest.raises(kind, match=said):
        line_up(models, **words)


def test_settings_of_exports_alone_are_refused(here, monkeypatch):
    quick(monkeypatch)
    plan("int8", judged=False).made()
    with pytest.raises(UsageError, match="settings are made of a checkpoint"):
        line_up(["exports/base-int8"], settings=["int4"])


def test_a_sweep_is_every_combination_once():
    cases = sweep(prompt=(128, 512), new=(4,), batch=(1, 8))
    assert [(case.batch, case.prompt_tokens, case.new_tokens) for case in cases] == [(1, 128, 4), (1, 512, 4), (8, 128, 4), (8, 512, 4)]
    assert len(sweep(prompt=(8, 8), new=(4,), batch=(1, 1))) == 1


def test_work_longer_than_the_model_is_refused_with_the_case(here):
    found = plan("int8", judged=False)
    check_room(found, Workload(sweep(prompt=(64,), new=(64,), batch=(1,))))
    with pytest.raises(UsageError, match=r"base has 128 positions, 132 tokens were asked for \(128 \+ 4\)"):
        check_room(found, Workload(sweep(prompt=(8, 128), new=(4,), batch=(1,))))


def test_a_model_that_looks_once_needs_room_for_what_it_reads_alone(here):
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(**TINY_BERT)).save_pretrained("bert")
    found = line_up(["bert"], settings=["torch-fp32"], device="cpu", judged=False)
    assert found.planned[0].setting.engine == "qlora_tools.bench.hf_forward:load"
    assert "looks once" in line_up(["bert"], settings=["torch-nf4"], device="cpu", judged=False).planned[0].setting.unavailable
    check_room(found, Workload(sweep(prompt=(64,), new=(65,), batch=(1,))))
    with pytest.raises(UsageError, match="bert has 64 positions, 65 tokens were asked for$"):
        check_room(found, Workload(sweep(prompt=(65,), new=(1,), batch=(1,))))


def test_a_traced_export_for_another_task_is_left_alone(here, monkeypatch):
    from transformers import BertConfig, BertForSequenceClassification

    quick(monkeypatch)
    BertForSequenceClassification(BertConfig(**TINY_BERT)).save_pretrained("bert")
    api.export(model="bert", scheme="int8", task="feature-extraction", verify=False)
    made = line_up(["bert"], settings=["int8"], device="cpu", judged=False).made()
    assert made.planned[0].setting.options["folder"] == "exports/bert-int8-cpu"
    again = line_up(["bert"], settings=["int8"], device="cpu", judged=False)
    assert (again.planned[0].action, again.planned[0].setting.options["folder"]) == ("found", "exports/bert-int8-cpu")
    headless = line_up(["exports/bert-int8"]).planned[0].setting
    assert headless.export == "qlt export bert --int8 --device cpu --task feature-extraction -o exports/bert-int8"


def test_the_command_of_an_export_is_told_from_its_manifest(here, adapter):
    api.export(base="base", adapters=[(adapter, 0.5)], scheme="int8", device="cuda", dtype="bf16", verify=False, output=here / "e")
    found = line_up(["e"]).planned[0].setting
    assert found.export == "qlt export --base base --adapter ad=0.5 --merge --int8 --device cuda --dtype bf16 -o e"
    api.export(model="base", scheme="int4", head_bits=8, verify=False, output=here / "h")
    assert line_up(["h"]).planned[0].setting.export == "qlt export base --int4 --device cpu --head-bits 8 -o h"


def test_a_plan_counts_processes_and_bytes(here):
    described = plan("int8", "fp16", "torch-bf16").described(Workload(sweep(prompt=(8, 16), new=(4,), batch=(1,))), 3)
    steps = {step.name: step for step in described.steps}
    assert (described.processes, steps["fp16"].action, steps["fp32"].measured) == (12, "unavailable", False)
    assert described.new_bytes == steps["int8"].bytes + steps["fp32"].bytes and replace(described, steps=()).rounds == 3
