"""``qlt export --adapters``: one graph, a base and several adapters; and ``--branch``, an adapter in 16 bits beside quantized weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools.manifest import read_manifest, sha256_file
from tests.conftest import nudge
from tests.export.adapters_run import Plain, factors_in
from tests.flows.conftest import EXPORT, files

IDS = np.arange(3, 35)[None]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, llama, tuned):
    """Two PEFT adapters for ``llama``: ``style`` of rank 6 on every linear, ``code`` of rank 2 on attention alone."""
    from qlora_tools import api

    folder = tmp_path_factory.mktemp("adapters")
    other = nudge(llama, folder / "other", only="self_attn", seed=5, rank=2)
    style = api.extract(base=llama, tuned=tuned, config=api.ExtractConfig(rank=6), output=folder / "style").output
    return style, api.extract(base=llama, tuned=other, config=api.ExtractConfig(rank=2), output=folder / "code").output


def unmerged(base, adapter=None, ids=IDS):
    """Logits of PEFT's live model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


def divergence(reference, found):
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_one_graph_holds_a_base_and_two_adapters(qlt, here, llama, adapters):
    style, code = adapters
    done = qlt("export", llama, "--int8", "--adapters", f"{style},{code}", "-o", "e", "--json")
    assert done.code == 0, done.err
    assert files(here / "e") == EXPORT | {"style.onnx_adapter", "code.onnx_adapter"}
    assert [(row["name"], row["file"]) for row in done.json["adapters"]] == [("style", "style.onnx_adapter"), ("code", "code.onnx_adapter")]
    assert all(row["parity"]["error_carried"] < 0.03 and row["parity"]["kl_mean"] < 1e-3 for row in done.json["adapters"])
    manifest = read_manifest(here / "e")
    assert manifest.command["kept"] == ["code", "style"] and set(manifest.report["adapters"]) == {"code", "style"}
    graph = Plain(here / "e")
    assert divergence(unmerged(llama), graph.run(IDS)) < 1e-4
    for path in adapters:
        assert divergence(unmerged(llama, path), graph.run(IDS, factors_in(here / "e" / f"{path.name}.onnx_adapter"))) < 1e-4


def test_an_export_is_the_same_bytes_again(qlt, here, llama, adapters):
    for name in ("one", "two"):
        assert qlt("export", llama, "--int4", "--adapters", adapters[0], "--adapters", f"{adapters[1]}=0.5", "-o", name, "--no-verify").code == 0
    assert all((here / "one" / name).read_bytes() == (here / "two" / name).read_bytes() for name in files(here / "one"))


def test_a_weight_scales_an_adapter(qlt, here, llama, adapters):
    assert qlt("export", llama, "--fp32", "--adapters", adapters[0], "-o", "whole").code == 0
    assert qlt("export", llama, "--fp32", "--adapters", f"{adapters[0]}=0.5", "-o", "half").code == 0
    base, whole, half = (
        Plain(here / folder).run(IDS, factors_in(here / folder / "style.onnx_adapter") if on else None)
        for folder, on in (("whole", False), ("whole", True), ("half", True))
    )
    assert 0.3 < np.linalg.norm(half - base) / np.linalg.norm(whole - base) < 0.7


def test_a_dry_run_says_what_would_be_kept_and_writes_nothing(qlt, here, llama, adapters):
    done = qlt("export", llama, "--int4", "--adapters", f"{adapters[0]},{adapters[1]}", "--dry-run")
    assert done.code == 0 and "adapter code: ranks 2 to 6" in done.out and files(here) == set()


def test_an_adapter_stays_in_16_bits_beside_4_bit_weights(qlt, here, llama, adapters):
    style = adapters[0]
    assert qlt("export", llama, "--int4", "--branch", style, "-o", "beside").code == 0
    assert qlt("export", llama, "--int4", "--adapters", style, "-o", "kept").code == 0
    assert files(here / "beside") == EXPORT
    found, kept = Plain(here / "beside").run(IDS), Plain(here / "kept").run(IDS, factors_in(here / "kept" / "style.onnx_adapter"))
    assert np.linalg.norm(found - kept) < 1e-4 * np.linalg.norm(kept)


def test_a_merged_adapter_and_a_kept_one_add_up(qlt, here, llama, adapters):
    style, code = adapters
    assert qlt("export", "--base", llama, "--adapter", style, "--merge", "--adapters", code, "--fp32", "-o", "e").code == 0
    assert qlt("export", "--base", llama, "--adapter", style, "--adapter", code, "--merge", "--fp32", "-o", "both").code == 0
    found = Plain(here / "e").run(IDS, factors_in(here / "e" / "code.onnx_adapter"))
    assert divergence(Plain(here / "both").run(IDS), found) < 1e-8


def test_an_adapter_stays_apart_from_a_quantized_base(qlt, here, llama, adapters):
    assert qlt("quantize", llama, "--nf4", "-o", "nf4").code == 0
    done = qlt("export", "nf4", "--int8", "--adapters", adapters[0], "-o", "e", "--json")
    assert done.code == 0, done.err
    assert done.json["parity"]["kl_mean"] < 1e-3 and done.json["adapters"][0]["parity"]["kl_mean"] < 1e-3


def test_the_branch_of_a_residual_merge_comes_along_by_itself(qlt, here, llama, adapters):
    style = adapters[0]
    assert qlt("merge", "--base", llama, "--adapter", style, "--nf4", "--method", "residual", "--branch-rank", 16, "-o", "m").code == 0
    done = qlt("export", "m", "--int8", "-o", "with", "--json")
    assert done.code == 0 and done.json["residual"].endswith("m-branch") and done.json["branches"] > 0
    assert read_manifest(here / "with").inputs["branch"]["name"] == "m-branch"
    assert qlt("export", "m", "--int8", "--no-residual", "-o", "without").code == 0
    wanted = unmerged(llama, style)
    lost, kept = (divergence(wanted, Plain(here / folder).run(IDS)) for folder in ("without", "with"))
    assert kept < 0.8 * lost


def test_a_checkpoint_has_the_branch_that_its_manifest_names(qlt, here, llama, adapters):
    assert qlt("merge", "--base", llama, "--adapter", adapters[0], "--nf4", "--method", "residual", "-o", "m").code == 0
    named = read_manifest(here / "m").report["branch"]
    assert named["path"] == "../m-branch" and named["sha256"] == sha256_file(here / "m-branch/adapter_model.safetensors")
    assert qlt("quantize", llama, "--int8", "-o", "other").code == 0
    shutil.copytree(here / "m-branch", here / "other-branch")
    unrelated = qlt("export", "other", "--int8", "-o", "e", "--json")
    assert unrelated.code == 0 and unrelated.json["residual"] is None and unrelated.json["branches"] == 0
    assert qlt("verify", "e").code == 0


def test_a_branch_that_was_changed_or_moved_is_no_silent_loss(qlt, here, llama, adapters):
    assert qlt("merge", "--base", llama, "--adapter", adapters[0], "--nf4", "--method", "residual", "-o", "m").code == 0
    assert qlt("export", "m", "--int8", "--no-verify", "-o", "good").code == 0
    verified = qlt("verify", "good", "--json")
    assert verified.code == 0 and verified.json["checks"][1]["status"] == "ok"
    weights = here / "m-branch/adapter_model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-2] + b"\x00\x3c")
    done = qlt("export", "m", "--int8", "-o", "e")
    assert done.code != 0 and "branch of another checkpoint" in done.err and not (here / "e").exists()
    verified = qlt("verify", "good", "--json")
    assert verified.code == 1 and "branch `m-branch` holds other values than it had" in verified.json["checks"][1]["found"]
    weights.write_bytes(right)
    (here / "m-branch").rename(here / "b")
    done = qlt("export", "m", "--int8", "-o", "e")
    assert done.code == 9 and "`m-branch`, which is not at ../m-branch" in done.err and "--no-residual" in done.err and not (here / "e").exists()
    assert qlt("export", "m", "--int8", "--branch", "b", "--no-residual", "-o", "e").code == 0


def test_what_cannot_be_kept_is_refused_before_anything_is_written(qlt, here, llama, adapters):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    live = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    live.save_pretrained("dora")
    shutil.copytree(adapters[0], here / "wrong")
    tensors = load_file(here / "wrong/adapter_model.safetensors")
    save_file({name: torch.zeros(3, 7) for name in tensors}, here / "wrong/adapter_model.safetensors")
    shutil.copytree(adapters[0], here / "deep/style")
    before = files(here)
    for words, said in (
        (("--adapters", "dora"), "DoRA on `model.layers.0.self_attn.q_proj.weight`"),
        (("--branch", "dora"), "--merge"),
        (("--adapters", "wrong"), "does not fit the base"),
        (("--adapters", f"{adapters[0]},deep/style"), "two adapters would be called `style`"),
        (("--adapters", "nowhere"), "nowhere"),
    ):
        done = qlt("export", llama, "--int4", *words)
        assert done.code not in (0, 70) and said in done.err and "traced" not in done.err and files(here) == before, (words, done.err)


def test_an_adapter_for_another_base_is_refused(qlt, here, llama, tuned, adapters):
    done = qlt("export", tuned, "--int4", "--adapters", adapters[0])
    assert done.code not in (0, 70) and "was made for another base" in done.err and not (here / "exports").exists()


def test_the_session_knows_the_base_that_adapters_go_with(qlt, here, llama, tuned):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", "a").code == 0
    done = qlt("export", "--int4", "--adapters", "a")
    assert done.code == 0 and "using model" in done.err
    assert json.loads((here / "exports/base-int4/qlt-manifest.json").read_text())["command"]["kept"] == ["a"]


def test_a_later_adapter_of_any_format_fits_the_exported_graph(qlt, here, llama, adapters):
    style, code = adapters
    assert qlt("export", llama, "--int4", "--adapters", style, "-o", "e").code == 0
    done = qlt("convert", code, "--to", "onnx_adapter", "--for", "e", "--base", llama, "-o", "late", "--json")
    assert done.code == 0, done.err
    assert done.json["files"] == ["code.onnx_adapter"] and files(here / "late") == {"code.onnx_adapter", "qlt-manifest.json"}
    assert qlt("export", llama, "--int4", "--adapters", f"{style},{code}", "-o", "both").code == 0
    assert (here / "late/code.onnx_adapter").read_bytes() == (here / "both/code.onnx_adapter").read_bytes()
    assert qlt("convert", style, "--to", "gguf", "--base", llama, "-o", "g").code == 0
    assert qlt("convert", "g", "--to", "onnx_adapter", "--for", "e", "--base", llama, "-o", "again").code == 0
    (again,) = (here / "again").glob("*.onnx_adapter")
    assert all(np.array_equal(array, factors_in(again)[name]) for name, array in factors_in(here / "e/style.onnx_adapter").items())


def test_a_later_adapter_that_the_graph_has_no_inputs_for_is_refused(qlt, here, llama, adapters):
    style, code = adapters
    assert qlt("export", llama, "--int4", "--adapters", code, "-o", "e").code == 0
    assert qlt("export", llama, "--int4", "-o", "plain").code == 0
    before = files(here)
    for words, said in (
        ((style, "--for", "e", "--base", llama), "takes no adapter on layers.0.gate"),
        ((style, "--for", "plain", "--base", llama), "no inputs for adapters"),
        ((style, "--for", "e"), "--base"),
        ((style, "--for", llama, "--base", llama), "not a whole export"),
    ):
        done = qlt("convert", *words, "--to", "onnx_adapter", "-o", "late")
        assert done.code not in (0, 70) and said in done.err and files(here) == before, done.err


def test_a_damaged_export_takes_no_later_adapter_and_is_named(qlt, here, llama, adapters):
    style, code = adapters
    assert qlt("export", llama, "--int4", "--adapters", code, "--no-verify", "-o", "e").code == 0
    words = ("convert", style, "--for", "e", "--base", llama, "--to", "onnx_adapter", "-o", "late")
    (here / "e/config.json").write_text("{")
    done = qlt(*words)
    assert done.code == 4 and "e/config.json is not JSON" in done.err
    (here / "e/model.onnx").write_bytes((here / "e/model.onnx").read_bytes()[:-3])
    done = qlt(*words)
    assert done.code == 4 and "e/model.onnx is not a whole ONNX graph" in done.err and not (here / "late").exists()


def test_cuda_graphs_take_adapters_in_their_own_16_bits(qlt, here, llama, adapters):
    for dtype, kind in (("fp16", "tensor(float16)"), ("bf16", "tensor(bfloat16)")):
        done = qlt("export", llama, "--int8", "--device", "cuda", "--dtype", dtype, "--adapters", adapters[0], "-o", dtype, "--json")
        assert done.code == 0, done.err
        assert done.json["adapters"][0]["parity"]["kl_mean"] < 1e-3
        wanted = {onnx.TensorProto.FLOAT16: "tensor(float16)", onnx.TensorProto.BFLOAT16: "tensor(bfloat16)"}
        inputs = onnx.load(here / dtype / "model.onnx", load_external_data=False).graph.input
        assert {wanted[value.type.tensor_type.elem_type] for value in inputs if ".lora_" in value.name} == {kind}
