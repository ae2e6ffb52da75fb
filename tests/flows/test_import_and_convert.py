"""``qlt import`` and ``qlt convert`` as typed: what they write, what they refuse, what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.checkpoint.writer import SafetensorsWriter
from tests.adapters.tiny_models import forward, gpt2, save
from tests.conftest import build_llama
from tests.flows.conftest import files

FOLDER = {"adapter_config.json", "adapter_model.safetensors", "qlt-manifest.json"}


def peft_adapter(base: Path, dest: Path, seed: int = 1, **options) -> Path:
    """A PEFT adapter with random values in every factor."""
    torch.manual_seed(seed)
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    )
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    live.save_pretrained(dest)
    return dest


@pytest.fixture(scope="module")
def stock(tmp_path_factory, llama) -> Path:
    """A stock PEFT adapter of ``llama``; do not write into it."""
    return peft_adapter(llama, tmp_path_factory.mktemp("stock") / "stock")


def merged(qlt, here: Path, base: Path, adapter: Path | str, name: str) -> dict[str, torch.Tensor]:
    done = qlt("merge", "--base", base, "--adapter", adapter, "-o", name)
    assert done.code == 0, done.err
    return load_file(here / name / "model.safetensors")


def edited(source: Path, dest: Path, tensors=None, **config) -> Path:
    """A copy of an adapter with ``tensors`` (a function of the dict) and config fields changed."""
    shutil.copytree(source, dest)
    content = json.loads((dest / "adapter_config.json").read_text()) | config
    (dest / "adapter_config.json").write_text(json.dumps(content))
    if tensors is not None:
        save_file(tensors(load_file(dest / "adapter_model.safetensors")), dest / "adapter_model.safetensors")
    return dest


def as_pickle(source: Path, dest: Path) -> Path:
    dest.mkdir()
    shutil.copy(source / "adapter_config.json", dest)
    torch.save(load_file(source / "adapter_model.safetensors"), dest / "adapter_model.bin")
    return dest


def test_import_writes_these_files_and_the_next_step_needs_no_paths(qlt, here, llama, stock):
    done = qlt("import", stock, "--base", llama)
    assert done.code == 0 and "peft: 4 layers of rank 4" in done.out and "4 fingerprints" in done.out
    assert {path.name for path in (here / "adapters/stock").iterdir()} == FOLDER
    assert qlt("merge", "-o", "a").code == 0
    ours, theirs = load_file(here / "a/model.safetensors"), merged(qlt, here, llama, stock, "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    manifest = json.loads((here / "adapters/stock/qlt-manifest.json").read_text())
    assert manifest["kind"] == "adapter" and len(manifest["base_tensors"]) == 4 and manifest["inputs"]["adapter"]["name"] == "stock"


def test_without_a_base_nothing_is_checked_and_that_is_said(qlt, here, stock):
    done = qlt("import", stock, "--json")
    assert done.code == 0 and done.json["fingerprints"] == 0 and "not checked against a base" in done.err
    assert json.loads((here / "adapters/stock/adapter_config.json").read_text())["target_modules"][0].startswith("model.layers.0.")


def test_the_same_input_gives_the_same_bytes(qlt, here, llama, stock):
    for name in "ab":
        assert qlt("import", stock, "--base", llama, "-o", name).code == 0
    assert all((here / "a" / name).read_bytes() == (here / "b" / name).read_bytes() for name in FOLDER)


def test_a_dry_run_checks_everything_and_writes_nothing(qlt, here, llama, stock, tmp_path):
    done = qlt("import", stock, "--base", llama, "--dry-run")
    assert done.code == 0 and "would write" in done.out and files(here) == set() and not (here / ".qlt").exists()
    other = build_llama(tmp_path / "other", hidden_size=32, intermediate_size=48)
    assert qlt("import", stock, "--base", other, "--dry-run").code == 3


def test_keys_of_raw_state_dicts_are_cleaned(qlt, here, llama, stock, tmp_path):
    def dirty(tensors):
        return {f"module._orig_mod.{name.replace('.weight', '.default.weight')}": value for name, value in tensors.items()}

    assert qlt("import", edited(stock, tmp_path / "dirty", dirty), "--base", llama).code == 0
    clean, original = load_file(here / "adapters/dirty/adapter_model.safetensors"), load_file(stock / "adapter_model.safetensors")
    assert clean.keys() == original.keys() and all(torch.equal(clean[name], original[name]) for name in clean)


def test_a_file_without_configuration_needs_alpha(qlt, here, llama, stock, tmp_path):
    raw = tmp_path / "raw.safetensors"
    shutil.copy(stock / "adapter_model.safetensors", raw)
    done = qlt("import", raw, "--base", llama)
    assert done.code == 2 and "--alpha" in done.err and files(here) == set()
    assert qlt("import", raw, "--base", llama, "--alpha", "nan").code == 2
    assert qlt("import", raw, "--base", llama, "--alpha", 6).code == 0
    ours, theirs = merged(qlt, here, llama, "adapters/raw", "a"), merged(qlt, here, llama, stock, "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_named_adapter_in_a_subfolder_is_found_and_several_are_listed(qlt, here, stock, tmp_path):
    shutil.copytree(stock, tmp_path / "run/first")
    assert qlt("import", tmp_path / "run", "--dry-run").code == 0
    shutil.copytree(stock, tmp_path / "run/second")
    done = qlt("import", tmp_path / "run")
    assert done.code == 2 and "first, second" in done.err and files(here) == set()


def test_pickles_are_read_on_request_only(qlt, here, llama, stock, tmp_path):
    pickled = as_pickle(stock, tmp_path / "pickled")
    done = qlt("import", pickled, "--base", llama)
    assert done.code == 8 and "--allow-pickle" in done.err and files(here) == set()
    assert qlt("import", pickled, "--base", llama, "--allow-pickle").code == 0
    ours = load_file(here / "adapters/pickled/adapter_model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in load_file(stock / "adapter_model.safetensors").items())


class Exploit:
    """A pickle that would make a file when opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["exploit", "list", "number", "noise"])
def test_hostile_pickles_do_nothing_and_leave_nothing(qlt, here, tmp_path, content):
    target = tmp_path / "made by the pickle"
    if content == "noise":
        (tmp_path / "x.bin").write_bytes(os.urandom(500))
    else:
        torch.save({"exploit": {"a": Exploit(target)}, "list": [torch.ones(2)], "number": {"a": 1}}[content], tmp_path / "x.bin")
    done = qlt("import", tmp_path / "x.bin", "--allow-pickle")
    assert done.code == 4 and not target.exists() and files(here) == set()


def test_an_unknown_format_is_refused_with_samples_of_its_names(qlt, here, tmp_path):
    save_file({"some.strange.tensor": torch.ones(2)}, tmp_path / "x.safetensors")
    done = qlt("import", tmp_path / "x.safetensors")
    assert done.code == 8 and "some.strange.tensor" in done.err and "kohya" in done.err and files(here) == set()
    done = qlt("import", tmp_path / "x.safetensors", "--format", "khoya")
    assert done.code == 2 and "did you mean kohya" in done.err


def test_another_base_is_refused_before_anything_is_written(qlt, here, stock, tmp_path):
    other = build_llama(tmp_path / "other", hidden_size=32, intermediate_size=48)
    done = qlt("import", stock, "--base", other)
    assert done.code == 3 and "expected" in done.err and files(here) == set()


def test_strays_are_refused_by_name_before_a_weight_is_read(qlt, here, stock, tmp_path, monkeypatch):
    strange = edited(stock, tmp_path / "strange", lambda tensors: tensors | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a weight was read"))
    done = qlt("import", strange)
    assert done.code == 4 and "up_proj.lora_A" in done.err and files(here) == set()


@pytest.mark.parametrize(
    ("config", "code", "named"),
    [
        ({"init_lora_weights": "pissa"}, 2, "--base"),
        ({"init_lora_weights": "pissa_niter_4"}, 8, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, 8, "loftq"),
        ({"init_lora_weights": "corda"}, 8, "corda"),
        ({"peft_type": "ADALORA"}, 8, "ADALORA"),
        ({"r": 5}, 4, "rank 5"),
        ({"r": -1}, 4, "`r`"),
        ({"lora_alpha": "many"}, 4, "lora_alpha"),
        ({"rank_pattern": {"(": 2}}, 4, "rank_pattern"),
        ({"use_qalora": True}, 8, "use_qalora"),
        ({"some_new_switch": 3}, 8, "some_new_switch"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused_by_field(qlt, here, stock, tmp_path, config, code, named):
    done = qlt("import", edited(stock, tmp_path / "bad", **config))
    assert done.code == code and named in done.err and files(here) == set()


def test_a_pissa_start_on_the_wrong_base_is_refused(qlt, here, llama, stock, tmp_path):
    done = qlt("import", edited(stock, tmp_path / "pissa", init_lora_weights="pissa"), "--base", llama)
    assert done.code == 3 and "not where the adapter started" in done.err and files(here) == set()


def test_nan_is_named_with_its_tensor(qlt, here, stock, tmp_path):
    def poison(tensors):
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = float("nan")
        return tensors

    done = qlt("import", edited(stock, tmp_path / "bad", poison))
    assert done.code == 6 and "layers.1.mlp.down_proj.lora_B" in done.err and files(here) == set()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"r": 4, "r"', "\xff"])
def test_broken_configurations_are_refused(qlt, here, stock, tmp_path, content):
    bad = edited(stock, tmp_path / "bad")
    (bad / "adapter_config.json").write_bytes(content.encode("latin-1"))
    assert qlt("import", bad).code == 4 and files(here) == set()


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files_are_refused(qlt, here, stock, tmp_path, cut):
    bad = edited(stock, tmp_path / "bad")
    data = (bad / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(data[:cut])
    assert qlt("import", bad).code == 4 and files(here) == set()


@pytest.mark.parametrize("magic", [b"ggla", b"GGUF", b"\x00\x00"])
def test_broken_gguf_and_its_predecessor_are_refused(qlt, here, llama, tmp_path, magic):
    (tmp_path / "x.gguf").write_bytes(magic + b"\x03\x00\x00\x00" + b"\xff" * 40)
    assert qlt("import", tmp_path / "x.gguf", "--base", llama).code in (4, 8) and files(here) == set()


@pytest.mark.parametrize("words", [["--alpha", 3], ["--rank", 4], ["--component", "unet"]])
def test_words_that_would_be_ignored_are_refused(qlt, here, stock, words):
    done = qlt("import", stock, *words)
    assert done.code == 2 and "leave" in done.err and files(here) == set()


def test_nothing_there_is_said_so(qlt, here, tmp_path):
    assert qlt("import", tmp_path / "nowhere").code == 9
    (tmp_path / "empty").mkdir()
    assert qlt("import", tmp_path / "empty").code == 9
    (tmp_path / "note.txt").write_text("hello")
    assert qlt("import", tmp_path / "note.txt").code == 8
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert qlt("import", tmp_path / "pipe.safetensors").code == 9


def test_an_output_that_is_there_is_kept_unless_forced(qlt, here, stock):
    assert qlt("import", stock).code == 0
    before = (here / "adapters/stock/adapter_model.safetensors").read_bytes()
    assert qlt("import", stock).code == 7 and (here / "adapters/stock/adapter_model.safetensors").read_bytes() == before
    assert qlt("import", stock, "--force").code == 0
    assert qlt("import", "adapters/stock", "-o", "adapters/stock", "--force").code == 2


@pytest.mark.parametrize("verb", [["import"], ["convert", "--to", "kohya", "--component", "unet"], ["adapters", "resize", "--rank", "2"]])
def test_a_write_that_explodes_leaves_nothing(qlt, here, stock, monkeypatch, verb):
    count = []

    def explode(self, name, tensor, row=0):
        count.append(name)
        if len(count) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", explode)
    done = qlt(*verb, stock)
    assert done.code == 5 and len(count) == 3 and files(here) == set() and not list(here.glob("adapters/.*"))


ROUND_TRIPS = {
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "gguf": ["adapter.gguf"],
    "mlx": ["adapter_config.json", "adapters.safetensors"],
    "onnx_adapter": ["adapter.onnx_adapter"],
    "diffusers": ["pytorch_lora_weights.safetensors"],
    "kohya": ["adapter.safetensors"],
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 3}}], ids=["plain", "rslora with ranks"])
def test_every_written_format_is_recognised_and_says_the_same(qlt, here, llama, tmp_path, name, options):
    adapter = peft_adapter(llama, tmp_path / "adapter", **options)
    component = ["--component", "text_encoder"] if name == "kohya" else []
    done = qlt("convert", adapter, "--to", name, "--base", llama, "-o", "other", *component, "--json")
    assert done.code == 0, done.err
    assert done.json["files"] == ROUND_TRIPS[name] and files(here / "other") == {*ROUND_TRIPS[name], "qlt-manifest.json"}
    done = qlt("import", "other", "--base", llama, "-o", "again", "--json")
    assert done.code == 0 and done.json["format"] == name, done.err
    ours, theirs = merged(qlt, here, llama, "again", "a"), merged(qlt, here, llama, adapter, "b")
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=2e-3, rtol=1e-2) for key in theirs)
    done = qlt("adapters", "compare", adapter, "again", "--json")
    assert done.json["cosine"] == pytest.approx(1.0, abs=1e-6) and done.json["ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "to", "named"),
    [
        ({"use_dora": True}, "gguf", "DoRA"),
        ({"lora_bias": True}, "gguf", "biases"),
        ({"modules_to_save": ["lm_head"]}, "gguf", "lm_head"),
        ({"modules_to_save": ["lm_head"]}, "kohya", "lm_head"),
        ({"trainable_token_indices": [1, 2]}, "onnx_adapter", "token rows"),
    ],
)
def test_what_the_target_cannot_carry_is_refused_by_name_even_in_a_dry_run(qlt, here, llama, tmp_path, options, to, named):
    if "lora_bias" in options:
        llama = build_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    adapter = peft_adapter(llama, tmp_path / "adapter", **options)
    for more in ([], ["--dry-run"]):
        done = qlt("convert", adapter, "--to", to, "--base", llama, "-o", "other", *more)
        assert done.code == 8 and named in done.err and files(here) == set()


@pytest.mark.parametrize("to", ["gguf", "mlx", "onnx_adapter"])
def test_factors_on_the_head_are_converted_without_peft_s_copy_of_it(qlt, here, llama, tmp_path, to):
    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    done = qlt("convert", adapter, "--to", to, "--base", llama, "-o", "other")
    assert done.code == 0 and "equal to the base and left out" in done.err and "lm_head.weight" in done.err, done.err
    assert qlt("import", "other", "--base", llama, "-o", "again").code == 0
    ours, theirs = merged(qlt, here, llama, "again", "a"), merged(qlt, here, llama, adapter, "b")
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=2e-3, rtol=1e-2) for key in theirs)


def test_the_copy_of_a_tied_head_is_left_out_of_what_is_imported(qlt, here, tmp_path):
    base = build_llama(tmp_path / "tied", tie_word_embeddings=True)
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in name or "embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert qlt("import", adapter, "--base", base, "-o", "again").code == 0
    assert all("lora_" in name for name in load_file(here / "again/adapter_model.safetensors"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), here / "again").eval()
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    torch.testing.assert_close(forward(again), forward(live), atol=2e-6, rtol=1e-5)
    ours, theirs = merged(qlt, here, base, "again", "a"), merged(qlt, here, base, adapter, "b")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_trained_head_stays_and_is_refused_by_formats_of_factors(qlt, here, llama, tmp_path):
    def trained(tensors):
        tensors["base_model.model.lm_head.base_layer.weight"][3, 1] += 1
        return tensors

    adapter = edited(peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "lm_head"]), tmp_path / "trained", trained)
    done = qlt("convert", adapter, "--to", "gguf", "--base", llama, "-o", "other")
    assert done.code == 8 and "lm_head.weight" in done.err and files(here) == set()
    assert qlt("import", adapter, "--base", llama, "-o", "again").code == 0
    assert "base_model.model.lm_head.base_layer.weight" in load_file(here / "again/adapter_model.safetensors")


def test_a_rank_that_the_file_does_not_have_is_refused(qlt, here, llama, stock, tmp_path):
    raw = tmp_path / "raw.safetensors"
    shutil.copy(stock / "adapter_model.safetensors", raw)
    done = qlt("import", raw, "--base", llama, "--alpha", 6, "--rank", 8)
    assert done.code == 2 and "has rank 4, 8 was given" in done.err and files(here) == set()
    assert qlt("import", raw, "--base", llama, "--alpha", 6, "--rank", 4).code == 0
    assert qlt("convert", raw, "--to", "mlx", "--base", llama, "--alpha", 6, "--rank", 4).code == 0


def test_an_unknown_target_is_refused_before_the_adapter_is_opened(qlt, here, tmp_path):
    done = qlt("convert", tmp_path / "nowhere", "--to", "tensorrt")
    assert done.code == 2 and "peft" in done.err and "gguf" in done.err


@pytest.mark.parametrize("verb", [["import"], ["convert", "--to", "gguf"], ["adapters", "resize", "--rank", "2"], ["adapters", "sum"]])
def test_an_output_in_the_way_is_seen_before_a_weight_is_read(qlt, here, stock, monkeypatch, verb):
    (here / "taken").mkdir()
    (here / "taken/file").write_text("mine")
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a weight was read"))
    for force in ([], ["--force"]):
        done = qlt(*verb, stock, "-o", "taken", *force)
        assert done.code == 7 and (here / "taken/file").read_text() == "mine"


def test_gpt2_stored_without_its_prefix_gets_the_names_of_the_live_model(qlt, here, tmp_path):
    saved = save(tmp_path, gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    weights = load_file(saved.base / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in weights.items()}, saved.base / "model.safetensors", metadata={"format": "pt"})
    assert qlt("convert", saved.adapter, "--to", "gguf", "--base", saved.base, "-o", "g").code == 0
    assert qlt("import", "g", "--base", saved.base, "-o", "again").code == 0
    config = json.loads((here / "again/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["target_modules"] == ["c_attn"]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), here / "again").eval()
    torch.testing.assert_close(forward(again), forward(saved.live), atol=2e-6, rtol=1e-5)


def test_a_pissa_start_needs_the_weights_unquantized(qlt, here, llama, stock, tmp_path):
    assert qlt("quantize", llama, "--nf4", "-o", "nf4").code == 0
    done = qlt("import", edited(stock, tmp_path / "pissa", init_lora_weights="pissa"), "--base", "nf4", "-o", "x")
    assert done.code == 2 and "16-bit" in done.err and not (here / "x").exists()


def test_an_adapter_on_a_quantized_base_keeps_the_hashes_of_what_was_quantized(qlt, here, llama, stock):
    assert qlt("quantize", llama, "--nf4", "-o", "nf4").code == 0
    for name, base in (("a", "nf4"), ("b", llama)):
        assert qlt("import", stock, "--base", base, "-o", name).code == 0
    first, second = (json.loads((here / name / "qlt-manifest.json").read_text())["base_tensors"] for name in "ab")
    assert first == second and len(first) == 4


def test_of_a_file_for_several_models_one_is_chosen(qlt, here, tmp_path):
    tensors = {
        f"{component}.{module}.lora_{side}.weight": torch.randn(shape)
        for component, module in (("unet", "mid_block.attentions.0.proj_in"), ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"))
        for side, shape in (("A", (2, 8)), ("B", (6, 2)))
    }
    save_file(tensors, tmp_path / "style.safetensors")
    done = qlt("import", tmp_path / "style.safetensors")
    assert done.code == 2 and "text_encoder, unet" in done.err and "--component" in done.err and files(here) == set()
    assert qlt("import", tmp_path / "style.safetensors", "--component", "prior").code in (2, 3) and files(here) == set()
    assert qlt("import", tmp_path / "style.safetensors", "--component", "unet").code == 0
    assert {name.split(".")[2] for name in load_file(here / "adapters/style/adapter_model.safetensors")} == {"mid_block"}
    done = qlt("convert", tmp_path / "style.safetensors", "--to", "kohya", "-o", "k", "--json")
    assert done.code == 0 and done.json["components"] == ["text_encoder", "unet"]
    names = load_file(here / "k/adapter.safetensors")
    assert {name.split(".")[0] for name in names} == {"lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"}
    done = qlt("convert", tmp_path / "style.safetensors", "--to", "gguf")
    assert done.code == 2 and "--component" in done.err


def test_a_loralib_state_dict_needs_alpha_and_then_says_the_same(qlt, here, llama, stock, tmp_path):
    tensors = load_file(stock / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in tensors.items()}
    torch.save({"model_state_dict": bare, "epoch": 3}, tmp_path / "lora.pt")
    done = qlt("import", tmp_path / "lora.pt", "--base", llama, "--allow-pickle")
    assert done.code == 2 and "--alpha" in done.err and files(here) == set()
    done = qlt("import", tmp_path / "lora.pt", "--base", llama, "--allow-pickle", "--alpha", 6, "--json")
    assert done.code == 0 and done.json["format"] == "loralib"
    ours, theirs = merged(qlt, here, llama, "adapters/lora", "a"), merged(qlt, here, llama, stock, "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lycoris_products_become_plain_factors(qlt, here, llama, tmp_path):
    torch.manual_seed(0)
    name = "lycoris_model_layers_0_self_attn_q_proj"
    shapes = {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)}
    tensors = {f"{name}.{leaf}": torch.randn(shape) * 0.1 for leaf, shape in shapes.items()} | {f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "loha.safetensors")
    done = qlt("import", tmp_path / "loha.safetensors", "--base", llama, "--json")
    assert done.code == 0 and (done.json["format"], done.json["ranks"]) == ("lycoris", [4, 4]), done.err
    delta = 0.5 * (tensors[f"{name}.hada_w1_a"] @ tensors[f"{name}.hada_w1_b"]) * (tensors[f"{name}.hada_w2_a"] @ tensors[f"{name}.hada_w2_b"])
    base = load_file(llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    ours = merged(qlt, here, llama, "adapters/loha", "m")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(ours, (base.float() + delta).to(torch.bfloat16))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_started_inside_the_weights_is_made_plain(qlt, here, llama, tmp_path, init):
    torch.manual_seed(0)
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
    )
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    live.eval().save_pretrained(tmp_path / init)
    done = qlt("import", tmp_path / init, "--base", llama)
    assert done.code == 0 and "of rank 8" in done.out and "training moved the factors" in done.out and "twice the rank" in done.err
    manifest = json.loads((here / f"adapters/{init}/qlt-manifest.json").read_text())
    assert len(manifest["report"]["moved"]) == 2 and all(0 < moved < 0.5 for moved in manifest["report"]["moved"].values())
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), here / f"adapters/{init}").eval()
    torch.testing.assert_close(forward(again), forward(live), atol=1e-5, rtol=1e-4)
