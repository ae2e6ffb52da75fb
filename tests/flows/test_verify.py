"""``qlt verify``: a right export passes from its files alone, and what is wrong is called by its name."""

from __future__ import annotations

import json
import shutil

import pytest

from qlora_tools.export import comparison
from qlora_tools.manifest import read_manifest


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llama, tuned):
    from qlora_tools import api

    out = tmp_path_factory.mktemp("verify") / "tuned-r4"
    api.extract(base=llama, tuned=tuned, config=api.ExtractConfig(rank=4), output=out)
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory, llama, adapter):
    """Scheme -> export of the base; ``merged``: with the adapter in it. Do not write into them."""
    from qlora_tools import api

    folder = tmp_path_factory.mktemp("verify-exports")
    for scheme in ("fp32", "int8", "int4"):
        api.export(model=llama, scheme=scheme, device="cpu", verify=False, output=folder / scheme)
    api.export(base=llama, adapters=[(adapter, 1.0)], scheme="int8", device="cpu", verify=False, output=folder / "merged")
    return folder


@pytest.fixture
def own(tmp_path, llama, adapter):
    """Copies of base and adapter that a test may change, and an export of both with the adapter at half its weight."""
    from qlora_tools import api

    base, beside = shutil.copytree(llama, tmp_path / "own/base"), shutil.copytree(adapter, tmp_path / "own/style")
    api.export(base=base, adapters=[(beside, 0.5)], scheme="int8", device="cpu", verify=False, output=tmp_path / "exports/e")
    return tmp_path


def without_statistics(here):
    """The export ``e``, where nothing that it was made of is to be found."""
    return shutil.copytree(here / "e", here / "deeper/down/e")


def checks(done):
    return {check["name"]: check for check in done.json["checks"]}


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_a_right_export_is_verified_and_left_as_it_was(scheme, qlt, exports, llama):
    before = sorted(path.name for path in (exports / scheme).iterdir())
    done = qlt("verify", exports / scheme, "--against", llama, "--json")
    assert done.code == 0, done.out
    assert {check["status"] for check in done.json["checks"]} == {"ok"}
    assert set(checks(done)) == {"files", "inputs", "weights", "graph", "computation"}
    assert done.json["passed"] and done.json["parity"]["layers"] == 2 and done.json["weights"] > 15
    assert sorted(path.name for path in (exports / scheme).iterdir()) == before


def test_a_flipped_bit_names_the_file_and_the_tensor(qlt, exports, llama, tmp_path):
    from qlora_tools.checkpoint.logical import open_checkpoint
    from qlora_tools.export.decoder.export import plan_export
    from qlora_tools.export.external import place

    damaged = shutil.copytree(exports / "fp32", tmp_path / "damaged")
    source = open_checkpoint(llama)
    offset = place(plan_export(source, source.config, "fp32").plan.outputs)[0]["layers.1.down"]
    with (damaged / "model.onnx.data").open("r+b") as stream:
        stream.seek(offset + 2)
        byte = stream.read(1)
        stream.seek(offset + 2)
        stream.write(bytes([byte[0] ^ 0x40]))
    done = qlt("verify", damaged, "--against", llama, "--json")
    found = checks(done)
    assert done.code == 1 and found["files"]["status"] == "fail" and "`model.onnx.data` holds other bytes" in found["files"]["found"]
    assert done.json["differing"] == ["model.layers.1.mlp.down_proj.weight"]


def test_a_damaged_tensor_is_named(qlt, exports, llama, tmp_path):
    damaged = shutil.copytree(exports / "int8", tmp_path / "damaged")
    size = (damaged / "model.onnx.data").stat().st_size
    with (damaged / "model.onnx.data").open("r+b") as stream:
        stream.seek(size - 4096)
        stream.write(bytes(2048))
    done = qlt("verify", damaged, "--against", llama, "--json")
    assert done.code == 1 and len(done.json["differing"]) == 1 and "lm_head.weight" in done.json["differing"][0]
    assert "lm_head.weight" in checks(done)["weights"]["found"]


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_another_checkpoint_of_the_same_shapes_fails(scheme, qlt, exports, tuned):
    done = qlt("verify", exports / scheme, "--against", tuned, "--json")
    found = checks(done)
    assert done.code == 1 and found["files"]["status"] == "ok" and found["weights"]["status"] == "fail"
    assert "made of `base`, given was `tuned`" in found["inputs"]["found"]
    assert all("_proj" in label for label in done.json["differing"])


def test_another_shape_is_said_without_reading_a_weight(qlt, exports, tmp_path):
    from tests.conftest import build_llama

    other = build_llama(tmp_path / "wider", intermediate_size=256)
    done = qlt("verify", exports / "int8", "--against", other, "--json")
    assert done.code == 1 and "this checkpoint exported so has" in checks(done)["weights"]["found"] and done.json["parity"] is None


def test_a_merged_export_wants_its_adapter(qlt, exports, llama, adapter):
    assert qlt("verify", exports / "merged", "--against", llama, "--adapter", adapter).code == 0
    found = qlt("verify", exports / "merged", "--against", llama, "--json")
    assert found.code == 0 and checks(found)["inputs"]["found"] == "`base`, merged `tuned-r4`"
    halved = qlt("verify", exports / "merged", "--against", llama, "--adapter", f"{adapter}=0.5", "--json")
    assert halved.code == 1 and checks(halved)["weights"]["status"] == "fail"
    unasked = qlt("verify", exports / "int8", "--against", llama, "--adapter", adapter, "--json")
    assert unasked.code == 1 and "`tuned-r4` was given and is not part" in checks(unasked)["inputs"]["found"]


def test_a_merged_checkpoint_stands_for_base_and_adapter(qlt, here, exports, llama, adapter):
    assert qlt("merge", "--base", llama, "--adapter", adapter, "-o", "merged").code == 0
    done = qlt("verify", exports / "merged", "--against", "merged", "--json")
    assert checks(done)["inputs"]["status"] == "warn" and checks(done)["computation"]["status"] == "ok"


def test_an_export_says_itself_what_it_is_held_against(qlt, own):
    done = qlt("verify", own / "exports/e", "--json")
    assert done.code == 0 and {check["status"] for check in done.json["checks"]} == {"ok"}
    assert checks(done)["inputs"]["found"] == "`base`, merged `style` x 0.5"
    assert [done.json["against"], *done.json["adapters"]] == [str(own / "own/base"), str(own / "own/style")]
    would = qlt("verify", own / "exports/e", "--dry-run")
    assert would.code == 0 and f"against {own / 'own/base'} + {own / 'own/style'}" in " ".join(would.out.split())


def test_the_manifest_records_what_shaped_the_export(own):
    manifest = read_manifest(own / "exports/e")
    assert manifest.command["adapters"] == {"adapter": {"use": "merged", "weight": 0.5}}
    assert (manifest.command["target"], manifest.command["compute"], manifest.command["standard"]) == ("original", "F32", False)
    assert manifest.inputs["base"]["path"] == "../../own/base" and manifest.inputs["adapter"]["path"] == "../../own/style"


def test_everything_moved_together_is_found(qlt, own):
    (own / "elsewhere").mkdir()
    for name in ("own", "exports"):
        (own / name).rename(own / "elsewhere" / name)
    assert qlt("verify", own / "elsewhere/exports/e").code == 0


def test_a_base_that_is_gone_is_asked_for(qlt, own):
    (own / "own/base").rename(own / "base")
    done = qlt("verify", own / "exports/e")
    assert done.code == 9 and "was made of `base`" in done.err and "--against" in done.err
    given = qlt("verify", own / "exports/e", "--against", own / "base", "--json")
    assert given.code == 0 and checks(given)["inputs"]["status"] == "ok"


def test_an_adapter_that_is_gone_is_named(qlt, own):
    (own / "own/style").rename(own / "style")
    done = qlt("verify", own / "exports/e", "--json")
    assert done.code == 1 and "adapter `style` is part of the export and was not given" in checks(done)["inputs"]["found"]
    assert qlt("verify", own / "exports/e", "--adapter", f"{own / 'style'}=0.5").code == 0


def test_a_base_trained_on_is_called_changed(qlt, own, tuned):
    shutil.rmtree(own / "own/base")
    shutil.copytree(tuned, own / "own/base")
    done = qlt("verify", own / "exports/e", "--json")
    assert done.code == 1 and "base `base` holds other values than it had" in checks(done)["inputs"]["found"]
    assert checks(done)["weights"]["status"] == "fail"


@pytest.mark.parametrize(("file", "what"), [("adapter_config.json", "has another adapter_config.json"), ("adapter_model.safetensors", "holds other values")])
def test_a_changed_adapter_is_called_changed(file, what, qlt, own):
    path = own / "own/style" / file
    content = path.read_bytes()
    changed = content.replace(b'"lora_alpha": ', b'"lora_alpha": 3') if file.endswith("json") else content[:-2] + b"\x00\x3c"
    assert changed != content
    path.write_bytes(changed)
    done = qlt("verify", own / "exports/e", "--json")
    assert done.code == 1 and f"adapter `style` {what}" in checks(done)["inputs"]["found"] and checks(done)["weights"]["status"] == "fail"


def test_a_text_of_choice_is_run(qlt, exports, llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 20)
    assert qlt("verify", exports / "int8", "--against", llama, "--text", text).code == 0
    text.write_text("short")
    assert qlt("verify", exports / "int8", "--against", llama, "--text", text).code == 2


def test_calibrated_weights_are_held_to_a_distance_or_bit_for_bit(qlt, here, llama, tuned, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    assert qlt("calibrate", llama, "--data", text, "-o", "statistics.safetensors").code == 0
    assert qlt("export", llama, "--int4", "--device", "cpu", "--calib", "statistics.safetensors", "--no-verify", "-o", "e").code == 0
    near = qlt("verify", without_statistics(here), "--against", llama)
    assert near.code == 0 and "calibrated ones are as near to it" in " ".join(near.out.split())
    for more in ((), ("--calib", "gone.safetensors")):
        exact = qlt("verify", "e", *more, "--json")
        assert exact.code == 0 and "as near" not in checks(exact)["weights"]["found"]
        (here / "statistics.safetensors").rename(here / "gone.safetensors") if not more else None


@pytest.mark.parametrize("gone", ["model.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(gone, qlt, exports, llama, tmp_path):
    folder = shutil.copytree(exports / "int4", tmp_path / "e")
    (folder / gone).unlink()
    done = qlt("verify", folder, "--against", llama, "--json")
    assert done.code == 1 and f"`{gone}` is missing" in checks(done)["files"]["found"]


def test_what_is_no_export_is_refused(qlt, llama, adapter, tmp_path):
    assert qlt("verify", llama, "--against", llama).code == 9
    assert qlt("verify", adapter, "--against", llama).code == 2
    assert qlt("verify", tmp_path, "--against", llama).code == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"model": "x"}}, "`inputs.model` is 'x'"),
        ({"files": {"a": 3}}, "`files.a` is '3'"),
        ({"files": {"../../base/model.safetensors": {"sha256": "0", "bytes": 1}}}, "expected a path inside the folder"),
        ({"command": {"verb": "export", "adapters": []}}, "`command.adapters`"),
        ({"command": {"verb": "export"}}, "`command.scheme` is missing"),
        ({"report": {"x": [[]] * 3 + [{"y": float("nan")}]}}, "NaN"),
    ],
)
def test_a_manifest_that_no_export_wrote_is_corrupt_and_named(qlt, exports, llama, tmp_path, change, message):
    folder = shutil.copytree(exports / "int4", tmp_path / "e")
    content = json.loads((folder / "qlt-manifest.json").read_text())
    (folder / "qlt-manifest.json").write_text(json.dumps({**content, **change}))
    for words in ((), ("--against", llama)):
        done = qlt("verify", folder, *words)
        assert done.code == 4 and "qlt-manifest.json" in done.err and message in done.err and "hint: " in done.err, done.err


def test_an_export_that_sealed_nothing_is_not_verified(qlt, exports, llama, tmp_path):
    folder = shutil.copytree(exports / "int4", tmp_path / "e")
    content = json.loads((folder / "qlt-manifest.json").read_text())
    (folder / "qlt-manifest.json").write_text(json.dumps({**content, "files": {}}))
    done = qlt("verify", folder, "--against", llama, "--json")
    assert done.code == 1 and "no graph was sealed" in checks(done)["files"]["found"]
    (folder / "model.onnx").unlink()
    assert qlt("verify", folder, "--against", llama).code == 1


def test_manifest_and_dry_run(qlt, exports, llama):
    assert read_manifest(exports / "int8").kind == "export"
    done = qlt("verify", exports / "int8", "--against", llama, "--dry-run")
    assert done.code == 0 and "would verify" in done.out


def test_the_result_can_be_kept(qlt, here, exports, llama):
    assert qlt("verify", exports / "int4", "--against", llama, "-o", "verified.json").code == 0
    assert json.loads((here / "verified.json").read_text())["passed"]


def test_codes_on_a_border_are_tolerated_and_more_are_not():
    assert comparison.Compared("w", 10_000, 10).equal and not comparison.Compared("w", 10_000, 11).equal


def test_kept_adapters_are_run_one_by_one(qlt, here, llama, adapter):
    from qlora_tools import api

    api.export(model=llama, keep=[(adapter, 1.0)], scheme="int8", device="cpu", verify=False, output=here / "e")
    done = qlt("verify", "e", "--against", llama, "--adapter", adapter, "--json")
    assert done.code == 0 and checks(done)["computation with tuned-r4"]["status"] == "ok"
    found = qlt("verify", "e", "--json")
    assert found.code == 0 and checks(found)["computation with tuned-r4"]["status"] == "ok" and "kept `tuned-r4`" in checks(found)["inputs"]["found"]
    moved = shutil.copytree(here / "e", here / "deeper/down/e")
    without = qlt("verify", moved, "--against", llama, "--json")
    assert without.code == 0 and "`tuned-r4` (kept) is part of the export" in checks(without)["inputs"]["found"]


@pytest.mark.slow
def test_a_traced_export_is_verified(qlt, here, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96, "max_position_embeddings": 32}
    BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).save_pretrained(tmp_path / "bert")
    assert qlt("export", tmp_path / "bert", "--int8", "--device", "cpu", "--no-verify", "-o", "e").code == 0
    done = qlt("verify", "e", "--against", tmp_path / "bert", "--json")
    assert done.code == 0 and checks(done)["computation"]["status"] == checks(done)["weights"]["status"] == "ok"


def test_a_head_of_eight_bits_loses_less_and_is_known_again(qlt, here, tmp_path):
    from tests.conftest import build_llama

    tied = build_llama(tmp_path / "tied", tie_word_embeddings=True)
    sizes, lost = {}, {}
    for bits in (4, 8):
        done = qlt("export", tied, "--int4", "--device", "cpu", "--head-bits", bits, "-o", f"e{bits}", "--json")
        assert done.code == 0, done.err
        sizes[bits], lost[bits] = done.json["file_bytes"], done.json["parity"]["error_dense"]
        assert qlt("verify", f"e{bits}").code == 0
    assert sizes[8] > sizes[4] and lost[8] < lost[4]
    refused = qlt("export", tied, "--int8", "--device", "cpu", "--head-bits", 8, "-o", "no")
    assert refused.code == 2 and "--int4 alone" in refused.err and not (here / "no").exists()


@pytest.mark.slow
def test_a_traced_export_keeps_adapters_and_is_calibrated(qlt, here, tmp_path):
    """As a classifier is fine-tuned: LoRA on its attention, beside int4 weights rounded for a text."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    folder = tmp_path / "bert"
    folder.mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(words), num_labels=3))
    model.save_pretrained(folder)
    live = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"]))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    live.save_pretrained(tmp_path / "style")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    done = qlt("export", folder, "--adapters", tmp_path / "style", "--int4", "--device", "cpu", "--calib", tmp_path / "text.txt", "-o", "e", "--json")
    assert done.code == 0, done.err
    assert done.json["adapters"][0]["name"] == "style" and done.json["adapters"][0]["parity"]["error_carried"] < 0.05
    assert done.json["calibration"]["weights"] == 7 and (here / "e/style.onnx_adapter").is_file()
    verified = qlt("verify", "e", "--json")
    assert verified.code == 0 and checks(verified)["computation with style"]["status"] == "ok", verified.out
    assert "calibrated ones are as near" in checks(verified)["weights"]["found"]
