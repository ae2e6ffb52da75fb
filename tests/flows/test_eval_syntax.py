"""``qlt eval --task python-syntax`` and ``--adapter`` as a user types them."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def {name}(x):"}) + "\n" for name in "abcdefghij"))
    return path


@pytest.fixture
def adapter(qlt, llama, tuned, tmp_path):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 32, "-o", tmp_path / "adapter").code == 0
    return tmp_path / "adapter"


def test_checkpoints_exports_and_adapters_are_judged_on_the_same_prompts(qlt, here, llama, tuned, adapter, prompts, tmp_path):
    export, quantized = tmp_path / "export", tmp_path / "int8"
    assert qlt("export", llama, "--fp32", "-o", export).code == 0 and qlt("quantize", llama, "--int8", "-o", quantized).code == 0
    words = ("eval", llama, tuned, quantized, export, "--adapter", adapter, "--task", "python-syntax", "--text", prompts, "--prompts", 4, "--new-tokens", 12)
    done = qlt(*words, "--json", "-o", here / "out.json")
    assert done.code == 0, done.err
    found = {model["name"]: model for model in done.json["models"]}
    assert json.loads((here / "out.json").read_text()) == {"schema": "qlt.result/1", **done.json}
    assert list(found) == [str(llama), str(tuned), str(quantized), str(export), f"{llama} + {adapter}"]
    texts = {name: [generation["text"] for generation in model["result"]["generations"]] for name, model in found.items()}
    assert all(len(of_model) == 4 for of_model in texts.values())
    assert texts[str(export)] == texts[str(llama)] != texts[str(tuned)], "fp32 checkpoint and fp32 export write the same"
    assert texts[f"{llama} + {adapter}"] == texts[str(tuned)], "an extraction of most ranks writes what the tuned model writes"
    assert found[str(llama)]["against"] is None and found[str(tuned)]["against"]["b"] == str(llama)
    assert all(sum(model["result"]["counts"].values()) == 4 for model in found.values())


def test_the_table_names_shares_and_the_rule(qlt, llama, tuned, prompts):
    done = qlt("eval", tuned, "--against", llama, "--task", "python-syntax", "--text", prompts, "--prompts", 3, "--new-tokens", 4)
    assert done.code == 0 and "McNemar" in done.out and "3 prompts: prompts.jsonl" in done.out and "nothing is run" in done.out


def test_prompts_too_long_for_the_context_are_passed_over(qlt, llama, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def long(" + "a" * 200 + "):", "def b():")))
    done = qlt("eval", llama, "--task", "python-syntax", "--text", path, "--new-tokens", 8, "--json")
    assert (done.json["n_prompts"], done.json["skipped"]) == (1, 1)
    done = qlt("eval", llama, "--task", "python-syntax", "--text", path, "--new-tokens", 4000)
    assert done.code == 2 and "context of 128" in done.err and "--new-tokens" in done.err


def test_perplexity_with_an_adapter_is_that_of_the_merged_model(qlt, here, llama, adapter, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    assert qlt("merge", "--base", llama, "--adapter", adapter, "-o", tmp_path / "merged").code == 0
    done = qlt("eval", llama, tmp_path / "merged", "--adapter", adapter, "--text", text, "--tokens", 512, "--context", 64, "--json")
    assert done.code == 0, done.err
    base, merged, unmerged = (model["perplexity"] for model in done.json["models"])
    assert unmerged == pytest.approx(merged, rel=2e-3) and abs(unmerged - base) > 5 * abs(unmerged - merged)


def test_an_adapter_on_an_export_or_on_a_foreign_base_is_refused_before_loading(qlt, llama, tuned, adapter, tmp_path):
    export = tmp_path / "export"
    assert qlt("export", llama, "--fp32", "-o", export).code == 0
    done = qlt("eval", export, "--adapter", adapter, "--task", "python-syntax")
    assert done.code == 2 and "is an export" in done.err and "--merge" in done.err
    assert qlt("eval", tuned, "--adapter", adapter, "--task", "python-syntax").code == 3
    assert qlt("eval", llama, "--adapter", llama, "--task", "python-syntax").code == 9
