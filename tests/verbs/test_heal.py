"""Healing: what is refused, and that without progress the checkpoint is the one that plain merging gives."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from qlora_tools import api
from qlora_tools.errors import UnsupportedError, UsageError
from tests.conftest import nudge

TEXT = "Tomorrow, and tomorrow, and tomorrow, creeps in this petty pace from day to day. " * 30


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama):
    """A folder with an adapter, the base in NF4 and a text."""
    folder = tmp_path_factory.mktemp("heal")
    (folder / "text.txt").write_text(TEXT)
    api.extract(base=llama, tuned=nudge(llama, folder / "tuned", scale=0.05), config=api.ExtractConfig(rank=4), output=folder / "adapter")
    api.quantize(model=llama, scheme="nf4", output=folder / "nf4")
    return folder


def healing(made, **changes):
    return api.HealConfig(**{"steps": 1, "text": made / "text.txt", "length": 64, "batch": 2, "held_out": 2, **changes})


@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_steps_that_change_nothing_store_what_merging_stores(made, llama, tmp_path, onto):
    base = llama if onto == "original" else made / "nf4"
    plain = api.merge(base=base, adapters=[(made / "adapter", 1.0)], scheme="nf4", output=tmp_path / "plain")
    config = api.MergeConfig(heal=healing(made, lr=1e-12))
    healed = api.merge(base=base, adapters=[(made / "adapter", 1.0)], scheme="nf4", config=config, output=tmp_path / "healed")
    assert healed.healed is not None and healed.healed.best_step == 0 and healed.healed.end_kl == healed.healed.start_kl
    before, after = load_file(plain.output / "model.safetensors"), load_file(healed.output / "model.safetensors")
    differing = {name: (before[name] != after[name]).float().mean() for name in before if not torch.equal(before[name], after[name])}
    assert all(share < 0.001 for share in differing.values()), differing  # a tie on the edge between two codes may fall either way


def test_int8_is_healed_on_its_own_grid(made, llama, tmp_path):
    api.quantize(model=llama, scheme="int8", output=tmp_path / "int8")
    config = api.MergeConfig(heal=healing(made))
    result = api.merge(base=tmp_path / "int8", adapters=[(made / "adapter", 1.0)], scheme="int8", config=config, output=tmp_path / "m")
    assert result.healed is not None and result.healed.end_kl <= result.healed.start_kl
    before, after = load_file(tmp_path / "int8/model.safetensors"), load_file(tmp_path / "m/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("SCB"))


def test_the_teachers_own_text_serves(made, llama, tmp_path):
    config = api.MergeConfig(heal=healing(made, text="self", windows=6, length=16))
    result = api.merge(base=llama, adapters=[(made / "adapter", 1.0)], scheme="nf4", config=config, output=tmp_path / "m")
    assert result.healed is not None and result.healed.text == "self"


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5]])
def test_only_one_adapter_of_weight_one_is_healed(made, llama, tmp_path, weights):
    config = api.MergeConfig(heal=healing(made))
    with pytest.raises(UsageError, match="one adapter of weight 1|`qlt adapters sum`|moves the factors"):
        api.merge(base=llama, adapters=[(made / "adapter", weight) for weight in weights], scheme="nf4", config=config, output=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_dora_is_not_healed(made, llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "dora")
    with pytest.raises(UnsupportedError, match="cannot be healed"):
        api.merge(base=llama, adapters=[(tmp_path / "dora", 1.0)], scheme="nf4", config=api.MergeConfig(heal=healing(made)), output=tmp_path / "m")


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": float("nan")}, {"length": 1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        api.HealConfig(**wrong)


def test_the_manifest_tells_how_it_was_healed_and_names_no_places(made, llama, tmp_path):
    from qlora_tools.manifest import read_manifest

    config = api.MergeConfig(heal=healing(made, teacher=str(llama)))
    api.merge(base=llama, adapters=[(made / "adapter", 1.0)], scheme="nf4", config=config, output=tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    assert manifest.command["heal"]["steps"] == 1 and manifest.command["heal"]["teacher"] == llama.name
    assert manifest.report["healed"]["end_kl"] <= manifest.report["healed"]["start_kl"]
    assert str(made) not in (tmp_path / "m/qlt-manifest.json").read_text()
