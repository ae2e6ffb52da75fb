"""Which base a merge is onto, and merging onto the grids of models that other libraries and other families store."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UsageError
from qlora_tools.manifest import FILE_NAME
from qlora_tools.progress import SILENT
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.verbs.merging import correction, open_merged, trained_on
from tests.conftest import nudge, save_model


def extracted(base, folder, only="_proj", scale=0.01, **manifest):
    """An adapter of a small change of ``base``, whose manifest says ``manifest`` of its making."""
    tuned = nudge(base, folder / "tuned", scale=scale, only=only)
    api.extract(base=base, tuned=tuned, config=api.ExtractConfig(rank=4), output=folder / "adapter")
    if manifest:
        path = folder / "adapter" / FILE_NAME
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "command": manifest}))
    return folder / "adapter"


@pytest.mark.parametrize(
    ("manifest", "corrects", "codec"),
    [
        ({"verb": "init", "method": "qera", "base_format": "nf4"}, True, NF4()),
        ({"verb": "train", "init": "loftq", "base_format": "int8"}, True, Int8()),
        ({"verb": "extract", "objective": "total", "base_format": "nf4"}, True, NF4()),
        ({"verb": "extract", "objective": "delta"}, False, None),
        ({"verb": "init", "method": "pissa", "base_format": "bf16"}, False, None),
    ],
)
def test_a_manifest_tells_what_an_adapter_corrects_and_what_it_was_trained_on(tmp_path, llama, manifest, corrects, codec):
    adapter = extracted(llama, tmp_path, **manifest)
    assert bool(correction(adapter)) is corrects and trained_on(adapter) == codec
    merged = open_merged(llama, [(adapter, 1.0)], None, NF4(), SILENT)
    assert merged.target == ("trained" if corrects else "original") and merged.simulated == (codec if corrects else None)
    if corrects:
        with pytest.raises(UsageError, match="count twice"):
            open_merged(llama, [(adapter, 1.0)], "original", NF4(), SILENT)
        assert open_merged(llama, [(adapter, 1.0)], "original", NF4(), SILENT, anyway=True).target == "original"


def test_an_adapter_without_a_manifest_is_taken_as_it_is(tmp_path, llama):
    adapter = extracted(llama, tmp_path)
    (adapter / FILE_NAME).unlink()
    assert correction(adapter) is None and trained_on(adapter) is None


def test_what_was_trained_on_int8_is_simulated_in_int8(tmp_path, llama):
    adapter = extracted(llama, tmp_path, verb="train", init="loftq", base_format="int8")
    result = api.merge(base=llama, adapters=[(adapter, 1.0)], scheme="int8", output=tmp_path / "m")
    assert result.method == "keep-grid" and result.retention is not None and 0.9 < result.retention.retention < 1.1
    other = api.merge(base=llama, adapters=[(adapter, 1.0)], scheme="nf4", output=tmp_path / "n", dry_run=True)
    assert other.method == "requant"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0)
    return save_model(tmp_path_factory.mktemp("gpt2") / "base", GPT2LMHeadModel(config))


@pytest.mark.parametrize("simulated", [False, True])
def test_weights_that_store_inputs_first_keep_their_grid(tmp_path, gpt2, simulated):
    adapter = extracted(gpt2, tmp_path, only="c_")
    api.quantize(model=gpt2, scheme="nf4", output=tmp_path / "nf4")
    config = api.MergeConfig(target="trained", method="residual", branch_rank=2)
    result = api.merge(base=gpt2 if simulated else tmp_path / "nf4", adapters=[(adapter, 1.0)], scheme="nf4", config=config, output=tmp_path / "m")
    assert result.method == "keep-grid" and min(row.retention for row in result.tensors) > 0.85
    before, after = open_checkpoint(tmp_path / "nf4"), open_checkpoint(tmp_path / "m")
    for name, item in before.quantized.items():
        scales = [part for part in item.parts if part != name]
        assert all(torch.equal(before.stored.read(part), after.stored.read(part)) for part in scales)
    both = api.merge(base=tmp_path / "m", adapters=[(result.branch, 1.0)], output=tmp_path / "both")
    assert both.changed_tensors == result.changed_tensors


def test_the_grid_of_a_model_that_bitsandbytes_quantized_is_kept(tmp_path, llama):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=setting, dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    adapter = extracted(llama, tmp_path)
    result = api.merge(base=tmp_path / "stock", adapters=[(adapter, 1.0)], scheme="nf4", output=tmp_path / "m")
    assert result.method == "keep-grid" and min(row.retention for row in result.tensors) > 0.85
    before, after = open_checkpoint(tmp_path / "stock"), open_checkpoint(tmp_path / "m")
    assert before.stored.specs.keys() == after.stored.specs.keys()
    changed = {name for name in before.stored.specs if not torch.equal(before.stored.read(name), after.stored.read(name))}
    assert changed == set(before.quantized)
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_dora_adapter_goes_onto_the_grid_too(tmp_path, llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    model.save_pretrained(tmp_path / "dora")
    api.quantize(model=llama, scheme="nf4", output=tmp_path / "nf4")
    result = api.merge(base=tmp_path / "nf4", adapters=[(tmp_path / "dora", 1.0)], scheme="nf4", output=tmp_path / "m")
    assert result.retention is not None and 0.7 < result.retention.retention < 1.2
