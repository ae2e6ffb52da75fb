"""``qlt refine --by-block``: the same files, closer to the teacher, with a block in memory at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qlora_tools import api
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.cli.main import group
from qlora_tools.errors import IncompatibleError, Interrupted, NonFiniteError, OutputExistsError, UnsupportedError, UsageError
from qlora_tools.live.base import load_base
from qlora_tools.live.parking import Parking
from qlora_tools.live.text import TextWindows
from qlora_tools.live.weights import Weights
from qlora_tools.quant.nf4 import NF4
from qlora_tools.training import distill_blocks as distill_module
from qlora_tools.training.distill_adapter import put_adapter
from qlora_tools.training.distill_blocks import distill_blocks
from qlora_tools.training.lora import trainable_parameters
from qlora_tools.training.state import run_folder
from qlora_tools.training.student_blocks import Student
from tests.conftest import build_llama, nudge
from tests.flows.refining_material import WEIGHTS, build_adapter, build_base, build_teacher, write_text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def teacher(base, tmp_path_factory):
    return build_teacher(base, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def adapter(base, teacher, tmp_path_factory):
    return build_adapter(base, teacher, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_text(tmp_path_factory.mktemp("text"))
    return api.RefineConfig(by_block=True, text=str(path), steps=12, batch=2, length=24, lr=2e-3, held_out=3, compute="fp32")


@pytest.mark.parametrize("base_format", ["nf4", "bf16"])
def test_only_the_factors_change_and_every_measure_falls(base, teacher, adapter, config, tmp_path, base_format):
    done = api.refine(adapter=adapter, base=base, teacher=teacher, config=replace(config, base_format=base_format), output=tmp_path / "out")
    assert done.report.end_kl < done.report.start_kl
    assert len(done.report.blocks) == 2
    assert all(block.after <= block.before for block in done.report.blocks)
    assert done.report.blocks[-1].after < done.report.blocks[-1].start
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (value.dtype, value.shape) == (after[key].dtype, after[key].shape)
        assert torch.equal(value, after[key]) is (".lora_" not in key), key
    manifest = json.loads((tmp_path / "out" / "qlt-manifest.json").read_text())
    assert manifest["report"]["refine"]["blocks"][0]["block"] == "model.layers.0"
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_same_again_gives_the_same_bytes(base, teacher, adapter, config, tmp_path):
    for name in ("a", "b"):
        api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=tmp_path / name)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def windows_of(seed=0):
    ids_NL = torch.randint(3, 90, (9, 20), generator=torch.Generator().manual_seed(seed))
    return TextWindows(ids_NL[:6], ids_NL[6:], "random", "0" * 64)


def divergence(student, teacher, windows_NL):
    """Mean KL(teacher || student), fp64."""
    with torch.no_grad():
        found, wanted = (model(input_ids=windows_NL).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def gpt2_family(tmp_path_factory):
    """GPT-2, whose layers hold their weights transposed and whose head is its embedding: (base, teacher, adapter)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=160, n_positions=64, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder / "base")
    nudge(folder / "base", folder / "teacher", scale=0.2, only="mlp.c_")
    api.extract(base=folder / "base", tuned=folder / "teacher", config=api.ExtractConfig(rank=2), output=folder / "adapter")
    return folder / "base", folder / "teacher", folder / "adapter"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergences_are_those_of_the_whole_models(family, base, teacher, adapter, gpt2_family, config, tmp_path):
    """Start and end against base, adapter and teacher loaded whole, NF4 in bitsandbytes' own arithmetic."""
    base, teacher, adapter = (base, teacher, adapter) if family == "llama" else gpt2_family
    first, second = open_checkpoint(base), open_checkpoint(teacher)

    def bound():
        return read_adapter(adapter, first.specs, first.family, ties=first.ties)

    student, text = Student(first, bound(), NF4(), torch.float32, "cpu"), windows_of()
    made = distill_blocks(Weights(second, "language", torch.float32, "cpu"), student, text, config, Parking(tmp_path, budget_bytes=0))
    guide = load_base(second, "language", None, dtype=torch.float32).model
    whole = put_adapter(load_base(first, "language", NF4(), dtype=torch.float32), bound(), torch.float32)
    assert made.start_kl == pytest.approx(divergence(whole.model, guide, text.held_out_NL), rel=1e-3)
    with torch.no_grad():
        for name, parameter in trainable_parameters(whole.model).items():
            path, side = name.removeprefix("base_model.model.").split(".lora_")
            parameter.copy_(made.factors[path][side.startswith("B")])
    assert not made.kept_start
    assert made.end_kl == pytest.approx(divergence(whole.model, guide, text.held_out_NL), rel=1e-3)


def test_no_more_than_a_block_of_either_is_resident(base, teacher, adapter, config, tmp_path, monkeypatch):
    first, second, most = open_checkpoint(base), open_checkpoint(teacher), []
    student = Student(first, read_adapter(adapter, first.specs, first.family, ties=first.ties), None, torch.float32, "cpu")
    guide, fill = Weights(second, "language", torch.float32, "cpu"), Weights.fill

    def counting(self, path, leaving=()):
        fill(self, path, leaving)
        most.append(sum(layer.self_attn.q_proj.weight.device.type != "meta" for weights in (student, guide) for layer in weights.model.model.layers))

    monkeypatch.setattr(Weights, "fill", counting)
    distill_blocks(guide, student, windows_of(), config, Parking(tmp_path))
    assert max(most) == 1


def test_a_block_that_gets_no_better_keeps_its_factors(base, teacher, adapter, config, tmp_path):
    done = api.refine(adapter=adapter, base=base, teacher=teacher, config=replace(config, lr=100.0, steps=2), output=tmp_path / "out")
    assert done.report.kept_start
    assert done.report.end_kl == done.report.start_kl
    assert all(block.kept_start for block in done.report.blocks)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


@pytest.fixture
def interrupted(base, teacher, adapter, config, tmp_path, monkeypatch):
    """A run into ``parts`` that was stopped in its second block."""
    train = distill_module._Lockstep._train

    def stopping(self, path, *rest):
        if path == "model.layers.1":
            raise KeyboardInterrupt
        train(self, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module._Lockstep, "_train", stopping)
        with pytest.raises(Interrupted, match="after 1 blocks") as caught:
            api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=tmp_path / "parts")
    assert "--resume -o" in caught.value.hint and not (tmp_path / "parts").exists()
    return tmp_path / "parts"


def test_an_interrupted_run_learns_only_the_blocks_that_are_left_and_ends_in_the_same_bytes(base, teacher, adapter, config, interrupted, tmp_path, monkeypatch):
    api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=tmp_path / "whole")
    with pytest.raises(OutputExistsError, match="interrupted run"):
        api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=interrupted)
    learnt, train = [], distill_module._Lockstep._train
    monkeypatch.setattr(distill_module._Lockstep, "_train", lambda self, path, *rest: (learnt.append(path), train(self, path, *rest)))
    api.refine(resume=True, output=interrupted)
    assert learnt == ["model.layers.1"]
    assert (interrupted / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not run_folder(interrupted).exists()


def test_a_teacher_that_changed_meanwhile_is_noticed(base, teacher, adapter, config, interrupted, tmp_path):
    run = json.loads((run_folder(interrupted) / "run.json").read_text())
    other = nudge(teacher, tmp_path / "other", scale=0.1)
    run["words"]["teacher"] = str(other)
    (run_folder(interrupted) / "run.json").write_text(json.dumps(run))
    with pytest.raises(IncompatibleError, match=r"not the run that was interrupted: `model\.layers\.0`"):
        api.refine(resume=True, output=interrupted)


def test_refusals(base, teacher, adapter, config, tmp_path):
    with pytest.raises(UsageError, match="whole teacher"):
        api.RefineConfig(by_block=True)
    other = build_llama(tmp_path / "other", tokenizer=True, num_hidden_layers=1)
    with pytest.raises(IncompatibleError, match="has 2 blocks, the teacher 1"):
        api.refine(adapter=adapter, base=base, teacher=other, config=config, output=tmp_path / "out")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    choices = LoraConfig(r=2, task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), choices).save_pretrained(tmp_path / "dora")
    with pytest.raises(UnsupportedError, match="more than plain LoRA"):
        api.refine(adapter=tmp_path / "dora", base=base, teacher=teacher, config=config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_nan_is_named(base, teacher, adapter, config, tmp_path):
    broken = nudge(teacher, tmp_path / "broken", scale=0.0)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        api.refine(adapter=adapter, base=base, teacher=broken, config=config, output=tmp_path / "out")


def test_extraction_refines_by_block_too(base, teacher, config, tmp_path):
    chosen = api.ExtractConfig(rank=2, base_format="nf4")
    done = api.extract(base=base, tuned=teacher, config=chosen, text=config.text, refine=1, by_block=True, output=tmp_path / "out")
    assert len(done.refined.blocks) == 2
    with pytest.raises(UsageError, match="not asked for"):
        api.extract(base=base, tuned=teacher, config=chosen, by_block=True, output=tmp_path / "other")


def test_the_command_says_how_far_the_blocks_are_off(base, teacher, adapter, config, tmp_path):
    words = ["refine", str(adapter), "--base", str(base), "--teacher", str(teacher), "--by-block", "--text", config.text, "--steps", "8", "--batch", "2"]
    done = CliRunner().invoke(group, [*words, "--length", "24", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "block outputs" in done.output
