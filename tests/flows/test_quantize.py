"""``qlt quantize`` end to end: stock transformers loads the folder and computes with what the codec stored."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest, sha256_file
from tests.conftest import build_llama
from tests.flows.conftest import files

FOLDER = {"config.json", "generation_config.json", "model.safetensors", "qlt-manifest.json", "tokenizer.json", "tokenizer_config.json"}


def logits(folder, dense=None):
    """Logits of stock transformers on a few tokens; ``dense``: weights to put in first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if dense is not None:
        model.load_state_dict(dense, strict=False)
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits.float()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    """Widths in multiples of 64: the forward pass of stock bitsandbytes fails or errs on others on some CPUs."""
    return build_llama(tmp_path_factory.mktemp("aligned") / "base", tokenizer=True, intermediate_size=128, num_attention_heads=2)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_stock_transformers_loads_the_folder_and_agrees_with_the_decoded_weights(qlt, here, aligned, scheme):
    llama = aligned
    assert qlt("quantize", llama, f"--{scheme}").code == 0
    out = here / f"checkpoints/base-{scheme}"
    assert files(out) == FOLDER
    decoded = open_checkpoint(out)
    expected = logits(llama, {name: decoded.read(name) for name in decoded.specs})
    assert distance(logits(out), expected) < 0.05


def test_the_parts_are_those_that_bitsandbytes_makes(qlt, here, llama):
    import bitsandbytes

    qlt("quantize", llama, "--nf4")
    stored, dense = load_file(here / "checkpoints/base-nf4/model.safetensors"), load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    packed, state = bitsandbytes.functional.quantize_4bit(dense[name], quant_type="nf4", compress_statistics=True, blocksize=64)
    assert torch.equal(stored[name], packed)
    for part, tensor in state.as_dict(packed=True).items():
        mine = stored[f"{name}.{part}"]
        if "quant_state" in part:
            assert json.loads(bytes(mine.tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(mine, tensor)


def test_gpt2_is_stored_transposed_and_loads(qlt, here, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1)).to(
        torch.bfloat16
    ).save_pretrained(tmp_path / "gpt2")
    assert qlt("quantize", tmp_path / "gpt2", "--nf4", "-o", "out").code == 0
    decoded = open_checkpoint(here / "out")
    dense = open_checkpoint(tmp_path / "gpt2")
    assert {name: spec.shape for name, spec in decoded.specs.items()} == {name: spec.shape for name, spec in dense.specs.items()}
    expected = logits(tmp_path / "gpt2", {name: decoded.read(name) for name in decoded.specs})
    assert type(AutoModelForCausalLM.from_pretrained(here / "out").transformer.h[0].attn.c_attn).__name__ == "Linear4bit"
    assert distance(logits(here / "out"), expected) < 0.02


def test_bert_loads(qlt, here, tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=90, num_labels=3)
    BertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    assert qlt("quantize", tmp_path / "bert", "--nf4", "-o", "out").code == 0
    model = AutoModelForSequenceClassification.from_pretrained(here / "out")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["bert.encoder.layer.0.attention.self.query"] == "Linear4bit" and kinds["classifier"] == "Linear"
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_the_same_input_gives_the_same_bytes(qlt, here, llama):
    qlt("quantize", llama, "-o", "a")
    qlt("quantize", llama, "-o", "b")
    assert all((here / "a" / name).read_bytes() == (here / "b" / name).read_bytes() for name in FOLDER)


def test_the_manifest_names_what_went_in_and_what_came_out(qlt, here, llama):
    qlt("quantize", llama, "-o", "out")
    manifest = read_manifest(here / "out")
    base = open_checkpoint(llama)
    assert manifest.source_tensors["model.layers.0.mlp.up_proj.weight"] == base.sha256("model.layers.0.mlp.up_proj.weight")
    assert manifest.files["model.safetensors"]["sha256"] == sha256_file(here / "out/model.safetensors")
    assert str(here) not in (here / "out/qlt-manifest.json").read_text()


def test_a_dry_run_writes_nothing_and_says_what_it_would(qlt, here, llama):
    done = qlt("quantize", llama, "--dry-run", "--json")
    assert done.code == 0 and done.json["dry_run"] and done.json["quantized_tensors"] == 14 and files(here) == set()


def test_an_existing_output_is_kept_unless_forced(qlt, here, llama):
    assert qlt("quantize", llama).code == 0
    before = (here / "checkpoints/base-nf4/model.safetensors").stat().st_mtime_ns
    again = qlt("quantize", llama)
    assert again.code == 7 and "--force" in again.err and (here / "checkpoints/base-nf4/model.safetensors").stat().st_mtime_ns == before
    assert qlt("quantize", llama, "--force").code == 0
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["base-nf4"]


def test_int8_is_made_by_the_cpus_cores_where_there_is_a_gpu_too(here, llama, monkeypatch):
    api.quantize(model=llama, scheme="int8", output=here / "cpu", device="cpu")
    monkeypatch.setattr("qlora_tools.verbs.quantize.resolve_device", lambda device: "cuda")  # on which nothing can be put here
    api.quantize(model=llama, scheme="int8", output=here / "gpu")
    assert files(here / "gpu") == files(here / "cpu")


def test_a_quantized_model_is_not_quantized_again(qlt, here, llama):
    qlt("quantize", llama, "-o", "q")
    done = qlt("quantize", "q", "--int8")
    assert done.code == 3 and "quantized already (nf4)" in done.err and "hint:" in done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_named_and_leave_nothing(qlt, here, llama, tmp_path, value):
    bad = shutil.copytree(llama, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    done = qlt("quantize", bad)
    assert done.code == 6 and "model.layers.1.self_attn.o_proj.weight" in done.err and done.err.count("\n") <= 2
    assert files(here) == set()


def test_a_truncated_shard_is_named_and_leaves_nothing(qlt, here, llama, tmp_path):
    bad = shutil.copytree(llama, tmp_path / "bad")
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:-100])
    done = qlt("quantize", bad)
    assert done.code == 4 and "model.safetensors" in done.err and "hint:" in done.err and files(here) == set()


def test_an_output_that_cannot_be_written_is_named(qlt, here, llama):
    (here / "file").write_text("in the way")
    done = qlt("quantize", llama, "-o", "file/out")
    assert done.code == 5 and "file/out" in done.err


def test_remote_code_is_ignored_with_a_note(qlt, here, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "remote")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text("raise SystemExit")
    done = qlt("quantize", model, "-o", "out")
    assert done.code == 0 and "auto_map" in done.err and "auto_map" not in (here / "out/config.json").read_text() and files(here / "out") == FOLDER


def test_searched_weights_in_16_bits_quantize_to_the_same_codes_again(qlt, here, aligned):
    """Stock ``load_in_4bit`` of the folder is as good as the quantized folder itself."""
    codes = qlt("quantize", aligned, "--nf4", "--search", "positive", "-o", "codes")
    dense = qlt("quantize", aligned, "--nf4", "--search", "positive", "--as-16bit", "-o", "dense")
    again = qlt("quantize", "dense", "--nf4", "-o", "again")
    assert (codes.code, dense.code, again.code) == (0, 0, 0), dense.err + again.err
    wanted, found, plain = (open_checkpoint(here / name) for name in ("codes", "again", "dense"))
    assert not plain.quantized and "quantization_config" not in plain.config
    assert found.quantized.keys() == wanted.quantized.keys() and wanted.quantized
    for name in wanted.quantized:
        assert torch.equal(found.stored.read(name), wanted.stored.read(name)), name


def test_16_bits_are_for_positive_scales_alone(qlt, here, aligned):
    for words in (["--search", "signed"], [], ["--search", "positive", "--calib", "builtin"]):
        done = qlt("quantize", aligned, "--nf4", "--as-16bit", *words)
        assert done.code == 2 and "--search positive" in done.err
    assert files(here) == set()
