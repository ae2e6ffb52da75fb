"""The three lines of the README, typed in one folder; and what export, bench and eval promise around them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest
from qlora_tools.verbs.bench_reference import judges
from tests.flows.conftest import EXPORT, files

RUN = {"bench.json", "report.html", "report.md", "qlt-manifest.json"}


def logits(folder, ids):
    """Logits of an export through plain onnxruntime, with nothing of this package in between."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


def expected(folder, ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids)).logits.numpy()


def distance(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 120)
    return path


def test_the_three_lines_work_as_typed(qlt, here, llama, tuned, text):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 16).code == 0
    exported = qlt("export", "--merge", "--int8")
    assert exported.code == 0 and "using base" in exported.err and "parity: " in exported.out
    benched = qlt("bench", "--rounds", 1, "--prompt", 16, "--new", 4, "--tokens", 512, "--text", text, "--threads", 1)
    assert benched.code == 0, benched.err
    assert "making the fp32 export" in benched.err and "int8" in benched.out and "fp32" in benched.out
    exports = sorted(path.name for path in (here / "exports").iterdir())
    assert exports == ["base-tuned-r16-fp32", "base-tuned-r16-int8"] and all(files(here / "exports" / name) == EXPORT for name in exports)
    run = here / "runs/bench-001"
    assert files(run) >= RUN and any(name.startswith("plots/") and name.endswith(".png") for name in files(run))
    record = json.loads((run / "bench.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["ok", "ok"]
    quality = {item["setting"]: item["figures"] for item in record["quality"]}
    assert quality["base-tuned-r16-fp32"]["kl_mean"] == 0 and 0 < quality["base-tuned-r16-int8"]["kl_mean"] < 0.1
    assert str(here) not in json.dumps(record["settings"])


def test_exports_of_the_model_as_it_was_are_neither_measured_nor_judge(qlt, here, llama):
    shutil.copytree(llama, here / "m")
    assert qlt("export", "m", "--fp32", "--no-verify").code == 0
    weights = load_file(here / "m/model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, here / "m/model.safetensors", {"format": "pt"})
    assert qlt("export", "m", "--int8", "--no-verify").code == 0
    planned = qlt("bench", "--dry-run", "--prompt", 16, "--new", 4)
    assert planned.code == 0 and "exports/m-fp32: made of another state of the model than exports/m-int8" in planned.err
    assert "would be made, as the reference" in planned.err and "exports/m-fp32" not in planned.out and "not judged" not in planned.err
    shutil.rmtree(here / "exports/m-int8")
    gone = qlt("bench", "--dry-run", "--prompt", 16, "--new", 4)
    assert gone.code == 9 and "is not there any more" in gone.err


def test_no_reference_is_made_that_could_not_judge(qlt, here, llama):
    shutil.copytree(llama, here / "m")
    assert qlt("export", "m", "--int8", "--no-verify").code == 0
    weights = load_file(here / "m/model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, here / "m/model.safetensors", {"format": "pt"})
    benched = qlt("bench", "--rounds", 1, "--prompt", 8, "--new", 2, "--threads", 1)
    assert benched.code == 0 and "m is not what exports/m-int8 was made of any more" in benched.err and "quality is not judged" in benched.err
    assert [path.name for path in (here / "exports").iterdir()] == ["m-int8"]


def test_exports_with_kept_adapters_are_judged_as_the_base_that_they_are_without(qlt, here, llama, tuned):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", "ad").code == 0
    assert qlt("export", llama, "--fp32", "--no-verify", "-o", "exports/a-fp32").code == 0
    assert qlt("export", llama, "--int8", "--adapters", "ad", "--no-verify", "-o", "exports/a-int8").code == 0
    assert judges(here / "exports/a-fp32", here / "exports/a-int8")


def test_a_merged_export_computes_what_the_tuned_model_computes(qlt, here, llama, tuned):
    qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 16)
    assert qlt("export", "--merge", "--fp32", "-o", "e").code == 0
    assert qlt("merge", "-o", "m").code == 0
    ids = np.arange(3, 30)[None]
    assert distance(logits(here / "e", ids), expected(here / "m", ids)) < 0.01  # the checkpoint was rounded to bf16, the graph was not
    assert distance(logits(here / "e", ids), expected(tuned, ids)) < 0.3 * distance(expected(llama, ids), expected(tuned, ids))


@pytest.mark.parametrize(("scheme", "bound"), [("fp32", 1e-5), ("int8", 0.05), ("int4", 0.4)])
def test_a_model_is_exported_by_name(qlt, here, llama, scheme, bound):
    done = qlt("export", llama, f"--{scheme}", "--json")
    assert done.code == 0 and done.json["carried"] == scheme and files(here / f"exports/base-{scheme}") == EXPORT
    ids = np.array([[5, 9, 100, 42, 7, 7, 30]])
    assert distance(logits(here / f"exports/base-{scheme}", ids), expected(llama, ids)) < bound


def test_nf4_on_the_cpu_says_that_it_is_carried_as_int8(qlt, here, llama):
    done = qlt("export", llama, "--nf4", "--json")
    assert done.code == 0 and done.json["carried"] == "int8" and "int8" in done.err


def test_a_quantized_checkpoint_exports_with_the_values_it_decodes_to(qlt, here, llama):
    qlt("quantize", llama, "-o", "q")
    assert qlt("export", "q", "--fp32", "-o", "e").code == 0
    decoded = open_checkpoint(here / "q")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.load_state_dict({name: decoded.read(name).float() for name in decoded.specs})
    ids = np.arange(3, 30)[None]
    with torch.no_grad():
        assert distance(logits(here / "e", ids), model(torch.from_numpy(ids)).logits.numpy()) < 1e-5


def test_the_same_input_gives_the_same_bytes(qlt, here, llama):
    for name in "ab":
        assert qlt("export", llama, "--int8", "-o", name).code == 0
    assert all((here / "a" / name).read_bytes() == (here / "b" / name).read_bytes() for name in EXPORT)


def test_a_failed_parity_check_leaves_nothing(qlt, here, llama, monkeypatch):
    from qlora_tools.export import bounds

    monkeypatch.setitem(bounds.BOUNDS, "fp32", bounds.Bound(1e-12, 1e-12))
    done = qlt("export", llama, "--fp32")
    assert done.code == 1 and "parity" in done.err and files(here) == set()


def test_without_verification_the_export_says_so(qlt, here, llama):
    done = qlt("export", llama, "--int8", "--no-verify")
    assert done.code == 0 and "not verified" in done.err
    assert read_manifest(here / "exports/base-int8").report == {"parity": None}


def test_a_dry_run_writes_nothing(qlt, here, llama):
    done = qlt("export", llama, "--int8", "--dry-run", "--json")
    assert done.code == 0 and done.json["dry_run"] and done.json["file_bytes"] > 0 and files(here) == set()


def test_floats_that_a_provider_does_not_compute_in_are_refused_by_name(qlt, here, llama):
    for words in (("--fp32", "--device", "cuda"), ("--fp16", "--device", "cpu"), ("--int8", "--device", "cpu", "--dtype", "bf16")):
        done = qlt("export", llama, *words)
        assert done.code in (2, 8) and words[2] in done.err and files(here) == set()


def test_a_cuda_graph_is_made_where_there_is_no_gpu(qlt, here, llama):
    done = qlt("export", llama, "--int8", "--device", "cuda", "--dtype", "bf16", "--json")
    assert done.code == 0, done.err
    assert (done.json["device"], done.json["compute"], done.json["scheme"]) == ("cuda", "BF16", "int8") and done.json["parity"]["kl_mean"] < 0.1
    plain = qlt("export", llama, "--device", "cuda", "--json")
    assert (plain.json["compute"], plain.json["scheme"]) == ("F16", "fp16")


def test_a_setting_that_cannot_run_keeps_its_row(qlt, here, llama, text):
    for name in ("good", "bad"):
        assert qlt("export", llama, "--fp32", "--no-verify", "-o", name).code == 0
    (here / "bad/model.onnx").write_bytes(b"not a graph")
    done = qlt(
        "bench", "good", "bad", "--reference", "good", "--rounds", 1, "--prompt", 8, "--new", 3, "--tokens", 300, "--text", text, "--threads", 1, "--json"
    )
    assert done.code == 0
    rows = {row["setting"]: row for row in done.json["record"]["rows"]}
    assert rows["good"]["status"] == "ok" and rows["bad"]["status"] == "error" and rows["bad"]["reason"]


def test_eval_judges_checkpoints_and_exports_on_one_text(qlt, here, llama, tuned, text):
    qlt("export", llama, "--fp32", "--no-verify", "-o", "e")
    done = qlt("eval", llama, tuned, "e", "--against", llama, "--text", text, "--tokens", 512, "--json")
    same, other, export = done.json["models"]
    assert same["figures"]["kl_mean"] == 0 and same["figures"]["top1_agreement"] == 1
    assert other["figures"]["kl_mean"] > 1e-5 > export["figures"]["kl_mean"]
    assert export["perplexity"] == pytest.approx(same["perplexity"], rel=1e-4)


def test_models_of_different_tokenizers_are_not_compared(qlt, here, llama, text, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("<unk>", "<unknown>"))
    done = qlt("eval", llama, other, "--text", text)
    assert done.code == 3 and "tokenizer" in done.err


def test_a_model_without_a_tokenizer_can_be_timed_but_not_judged(qlt, here, llama, tmp_path):
    bare = shutil.copytree(llama, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert qlt("export", bare, "--fp32", "--no-verify", "-o", "e").code == 0
    done = qlt("bench", "e", "--reference", "e", "--rounds", 1, "--prompt", 8, "--new", 3, "--threads", 1, "--json")
    assert done.code == 0 and "no tokenizer" in " ".join(done.json["record"]["notes"]) and done.json["record"]["rows"][0]["status"] == "ok"


def test_nothing_to_measure_is_a_usage_error(qlt, here):
    done = qlt("bench")
    assert done.code == 2 and "hint:" in done.err


def test_inspect_tells_every_kind_of_folder(qlt, here, llama, tuned):
    qlt("extract", "--base", llama, "--tuned", tuned, "-o", "a")
    qlt("export", llama, "--int4", "--no-verify", "-o", "e")
    kinds = {path: qlt("inspect", path, "--json").json["kind"] for path in (llama, "a", "e", llama / "model.safetensors")}
    assert list(kinds.values()) == ["checkpoint", "adapter", "export", "safetensors"]
    assert "MatMulNBits" in qlt("inspect", "e").out


def test_doctor_is_healthy_where_the_tests_run(qlt):
    done = qlt("doctor", "--json")
    assert done.code == 0 and done.json["healthy"] and {check["name"] for check in done.json["checks"]} >= {"torch", "codecs", "onnxruntime"}


def test_doctor_exits_with_one_where_something_is_broken(qlt, monkeypatch):
    from qlora_tools.verbs import doctor

    monkeypatch.setattr(doctor, "_torch", lambda: ("fail", "not there", None))
    assert qlt("doctor").code == 1
