"""``qlt refine``: better numbers in the same files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools import api
from qlora_tools.errors import CorruptError, IncompatibleError, Interrupted, OutputExistsError, UsageError
from qlora_tools.training import events
from qlora_tools.training.state import run_folder
from qlora_tools.verbs.refine import refine_adapter
from tests.conftest import build_llama
from tests.flows.conftest import files
from tests.flows.refining_material import WEIGHTS, build_adapter, build_base, build_teacher, write_text

CONFIG = api.RefineConfig(steps=6, batch=2, length=24, windows=15, lr=2e-3, held_out=3, compute="fp32", eval_every=2, patience=None)


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
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("base_format", ["nf4", "int8", "int4", "bf16"])
def test_only_the_factors_change_and_the_divergence_falls(base, teacher, adapter, text, tmp_path, base_format):
    config = api.RefineConfig(**{**CONFIG.record(), "base_format": base_format, "text": str(text)})
    done = api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=tmp_path / "out")
    assert done.report.end_kl < done.report.start_kl
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (value.dtype, value.shape) == (after[key].dtype, after[key].shape)
        assert torch.equal(value, after[key]) is (".lora_" not in key), key
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    manifest = json.loads((tmp_path / "out" / "qlt-manifest.json").read_text())
    assert manifest["command"]["verb"] == "refine"
    assert manifest["command"]["start"]["verb"] == "extract"
    assert manifest["report"]["refine"]["end_kl"] == done.report.end_kl
    assert str(tmp_path) not in json.dumps(manifest)
    assert not run_folder(tmp_path / "out").exists()


def test_stock_peft_predicts_as_measured(base, teacher, adapter, text, tmp_path):
    """KL(teacher || base + adapter) of transformers' and PEFT's own models on the windows that judged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_tools.live.text import read_windows
    from qlora_tools.live.tokenizer import open_tokenizer

    config = api.RefineConfig(**{**CONFIG.record(), "base_format": "bf16", "text": str(text)})
    done = api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=tmp_path / "out")
    windows = read_windows(text, open_tokenizer(base), length=24, count=(6 * 2 + 3) * 5 // 4 + 1).held_out_NL
    windows = windows[torch.linspace(0, len(windows) - 1, min(3, len(windows))).round().long()]
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out").eval()
    guide = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        found, wanted = (model(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for model in (student, guide))
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert float(kl) == pytest.approx(done.report.end_kl, rel=1e-3)


def test_in_place_with_self_written_text_and_the_same_again(base, teacher, adapter, tmp_path):
    made = []
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / name)
        report = refine_adapter(tmp_path / name, base=base, teacher=teacher, config=CONFIG)
        assert report.text == "self"
        assert report.end_kl <= report.start_kl
        made.append((tmp_path / name / WEIGHTS).read_bytes())
    assert made[0] == made[1]
    assert made[0] != (adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize("text_of", ["self", "file"])
def test_an_interrupted_run_leaves_the_adapter_and_resumes_to_the_same_bytes(base, teacher, adapter, text, tmp_path, text_of):
    config = CONFIG if text_of == "self" else api.RefineConfig(**{**CONFIG.record(), "text": str(text)})
    for name in ("whole", "parts"):
        shutil.copytree(adapter, tmp_path / name)
    refine_adapter(tmp_path / "whole", base=base, teacher=teacher, config=config)

    def stop(event):
        if isinstance(event, events.Step) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step 3") as caught:
        refine_adapter(tmp_path / "parts", base=base, teacher=teacher, config=config, listen=stop)
    assert caught.value.exit_code == 130
    assert "--resume -o" in caught.value.hint
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    with pytest.raises(OutputExistsError, match="interrupted run"):
        refine_adapter(tmp_path / "parts", base=base, teacher=teacher, config=config)
    api.refine(resume=True, output=tmp_path / "parts")
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not run_folder(tmp_path / "parts").exists()


def test_a_changed_adapter_is_not_resumed(base, teacher, adapter, text, tmp_path):
    shutil.copytree(adapter, tmp_path / "mine")

    def stop(event):
        if isinstance(event, events.Step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        refine_adapter(tmp_path / "mine", base=base, teacher=teacher, config=CONFIG, listen=stop)
    tensors = load_file(tmp_path / "mine" / WEIGHTS)
    save_file({key: value * 1.5 for key, value in tensors.items()}, tmp_path / "mine" / WEIGHTS)
    with pytest.raises(IncompatibleError, match="adapter_sha256"):
        api.refine(resume=True, output=tmp_path / "mine")


def test_magnitudes_learn_too(base, teacher, text, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    choices = LoraConfig(r=2, task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), choices).save_pretrained(tmp_path / "dora")
    config = replace(CONFIG, steps=20, lr=1e-2, text=str(text))  # B starts at zero here, which takes more steps than factors of the change
    done = api.refine(adapter=tmp_path / "dora", base=base, teacher=teacher, config=config, output=tmp_path / "out")
    assert not done.report.kept_start
    before, after = load_file(tmp_path / "dora" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(not torch.equal(before[key], after[key]) for key in before if "lora_B" in key or "magnitude" in key)


def test_a_dry_run_says_memory_and_writes_nothing(qlt, here, base, teacher, adapter):
    done = qlt("refine", adapter, "--base", base, "--teacher", teacher, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["estimate_bytes"] > 0
    assert done.json["report"] is None
    assert list(here.glob("adapters/*")) == []


def test_the_command_tells_what_it_did(qlt, here, base, teacher, adapter, text):
    words = ["--base", base, "--teacher", teacher, "--text", text, "--steps", "2", "--batch", "2", "--length", "24", "--compute", "fp32"]
    done = qlt("refine", adapter, *words, "-o", "better")
    assert done.code == 0, done.err
    assert "KL to the teacher" in done.out
    assert (here / "better" / WEIGHTS).is_file()


def test_what_does_not_belong_together_is_refused(base, adapter, tmp_path):
    other = build_llama(tmp_path / "other", vocab_size=200, tokenizer=True)
    with pytest.raises(IncompatibleError, match="the teacher predicts 200"):
        api.refine(adapter=adapter, base=base, teacher=other, output=tmp_path / "out")
    with pytest.raises(UsageError, match="--teacher are needed"):
        api.refine(adapter=adapter, base=base)
    with pytest.raises(UsageError, match="which run"):
        api.refine(resume=True)


def test_after_an_extraction_it_needs_no_words(qlt, here, base, teacher):
    assert qlt("extract", "--base", base, "--tuned", teacher, "--rank", 2, "-o", "adapters/a").code == 0
    done = qlt("refine", "--dry-run")
    assert done.code == 0 and "adapters/a" in done.err and "teacher" in done.err, done.err


TEXT_CONFIG = replace(CONFIG, steps=2, eval_every=1)


def test_a_copy_takes_along_what_belongs_to_the_adapter_and_nothing_else(base, teacher, adapter, text, tmp_path):
    crowded = shutil.copytree(adapter, tmp_path / "crowded")
    for name in ("optimizer.pt", "hook.py", "chat_template.jinja", "training_args.json"):
        (crowded / name).write_text(name)
    (crowded / "checkpoint-1").mkdir()
    api.refine(adapter=crowded, base=base, teacher=teacher, config=replace(TEXT_CONFIG, text=str(text)), output=tmp_path / "out")
    assert files(tmp_path / "out") == {WEIGHTS, "adapter_config.json", "chat_template.jinja", "qlt-manifest.json"}


@pytest.mark.parametrize("name", ["vocab.txt", "adapter_config.json"])
def test_a_link_out_of_the_adapters_folder_is_refused_before_the_run(base, teacher, adapter, text, tmp_path, name):
    crowded = shutil.copytree(adapter, tmp_path / "crowded")
    secret = tmp_path / "credentials"
    secret.write_bytes((adapter / "adapter_config.json").read_bytes())
    (crowded / name).unlink(missing_ok=True)
    (crowded / name).symlink_to(secret)
    with pytest.raises(CorruptError, match=f"{name} is a link that leaves the folder"):
        api.refine(adapter=crowded, base=base, teacher=teacher, config=replace(TEXT_CONFIG, text=str(text)), output=tmp_path / "out", dry_run=True)


def test_in_place_everything_else_in_the_folder_stays(base, teacher, adapter, text, tmp_path):
    mine, secret = shutil.copytree(adapter, tmp_path / "mine"), tmp_path / "credentials"
    secret.write_text("secret")
    (mine / "checkpoint-1/inner").mkdir(parents=True)
    for name in ("optimizer.pt", "hook.py", f"checkpoint-1/{WEIGHTS}", "checkpoint-1/inner/state.json"):
        (mine / name).write_text(name)
    (mine / "vocab.txt").symlink_to(secret)
    (mine / "gone.txt").symlink_to("nowhere")
    before = {path.relative_to(mine) for path in mine.rglob("*")}
    refine_adapter(mine, base=base, teacher=teacher, config=replace(TEXT_CONFIG, text=str(text)))
    assert {path.relative_to(mine) for path in mine.rglob("*")} == before
    assert (mine / f"checkpoint-1/{WEIGHTS}").read_text() == f"checkpoint-1/{WEIGHTS}"
    assert (mine / "vocab.txt").is_symlink() and (mine / "gone.txt").is_symlink()
    assert "vocab.txt" not in json.loads((mine / "qlt-manifest.json").read_text())["files"]


def test_a_text_in_the_output_is_not_lost_with_it(base, teacher, adapter, text, tmp_path):
    out = shutil.copytree(adapter, tmp_path / "out")
    shutil.copyfile(text, out / "text.txt")
    for words in ({"adapter": adapter, "output": out, "force": True}, {"adapter": out, "output": out}):
        with pytest.raises(UsageError, match=r"overlaps the input .*text\.txt"):
            api.refine(**words, base=base, teacher=teacher, config=replace(TEXT_CONFIG, text=str(out / "text.txt")))
    assert (out / "text.txt").exists()


def test_what_came_to_lie_at_the_output_is_not_replaced_by_a_resumed_run_unasked(base, teacher, adapter, text, tmp_path):
    def stop(event):
        if isinstance(event, events.Step):
            os.kill(os.getpid(), signal.SIGINT)

    out, config = tmp_path / "out", replace(CONFIG, text=str(text))
    with pytest.raises(Interrupted) as caught:
        api.refine(adapter=adapter, base=base, teacher=teacher, config=config, output=out, listen=stop)
    assert caught.value.hint.endswith(f"--resume -o {out}")
    shutil.copytree(adapter, out)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="already there"):
        api.refine(resume=True, output=out)
    assert (out / "mine.txt").read_text() == "mine" and run_folder(out).exists()
    with pytest.raises(Interrupted) as caught:
        api.refine(resume=True, output=out, force=True, listen=stop)
    assert caught.value.hint.endswith("--force") and (out / "mine.txt").exists()
    api.refine(resume=True, output=out, force=True)
    assert not (out / "mine.txt").exists() and not run_folder(out).exists()
