"""The estimate is what the run keeps alive, part by part, and its alternatives need less."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.live.base import load_base
from qlora_tools.live.footprint import LiveBytes
from qlora_tools.training import estimate as E
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.fused import fuse
from qlora_tools.training.lora import choose_modules, inject, rank_of
from qlora_tools.training.loss import LanguageLoss, label_loss
from qlora_tools.training.rows import Batch
from qlora_tools.verbs.quantize import codec_for
from tests.conftest import build_llama, save_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def codec_of(config):
    return None if config.base_format == "bf16" else codec_for(config.base_format)


def adapt(checkpoint, task):
    def put(model, config):
        ranks = rank_of(model, choose_modules(model, checkpoint.family, "all"), config)
        heads = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and checkpoint.family.role(path) == "head"]
        adapted = inject(model, ranks, config, {"language": "CAUSAL_LM", "classification": "SEQ_CLS"}.get(task), heads=heads if task != "language" else ())
        loss = LanguageLoss(model) if task == "language" else label_loss
        fuse(adapted)
        return E.Subject(adapted, loss)

    return put


def batch_for(task, rows=4, length=24):
    ids = torch.arange(rows * length).view(rows, length) % 90 + 3
    if task == "image":
        return Batch({"pixel_values": torch.zeros(rows, 3, 32, 32)}, torch.zeros(rows, dtype=torch.long), rows, rows)
    if task == "classification":
        return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(rows, dtype=torch.long), rows, ids.numel())
    targets = ids.clone()
    targets[:, :5] = -100
    inputs = {"input_ids": ids, "position_ids": torch.arange(length)[None].expand(rows, length).contiguous()}
    return Batch(inputs, targets, int((targets != -100).sum()), ids.numel())


def estimator_for(folder, task="language", batch=None, **choices):
    checkpoint = open_checkpoint(folder)
    config = TrainConfig(**{"rank": 4, **choices})
    labels = ("a", "b") if task != "language" else ()
    options = {"adapt": adapt(checkpoint, task), "codec_of": codec_of, "dtype": torch.bfloat16, "device": "cpu", "labels": labels}
    return E.estimator(checkpoint, task, batch or batch_for(task), config, **options)


def real_step(folder, task, config):
    """Live bytes of the same step on the loaded model, with real tensors."""
    checkpoint = open_checkpoint(folder)
    base = load_base(checkpoint, task, codec_of(config), labels=("a", "b") if task != "language" else ())
    subject, batch = adapt(checkpoint, task)(base.model, config), batch_for(task)
    if config.checkpointing == "on":
        subject.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        subject.model.enable_input_require_grads()
    live = LiveBytes("activations")
    for tensor in [*subject.model.parameters(), *subject.model.buffers()]:
        live.note(tensor.detach())
    with E._labelled(subject, live), live:
        masters, optimizer = E._with_optimizer(subject.model, config, live)
        subject.model.train()
        total, _ = subject.loss(subject.model, batch)
        (total / batch.count).backward()
        masters.gather()
    del optimizer
    return live.peak


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification, ViTConfig
    from transformers import ViTForImageClassification as ViT

    root = tmp_path_factory.mktemp("estimates")
    torch.manual_seed(0)
    return {
        "llama": llama,
        "gpt2": save_model(root / "gpt2", GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=160, bos_token_id=0, eos_token_id=0))),
        "bert": save_model(root / "bert", BertForSequenceClassification(BertConfig(vocab_size=160, **SIZES))),
        "vit": save_model(root / "vit", ViT(ViTConfig(image_size=32, patch_size=8, **SIZES))),
        "resnet": save_model(root / "resnet", ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]))),
    }


TASKS = {"llama": "language", "gpt2": "language", "bert": "classification", "vit": "image", "resnet": "image"}
CASES = [
    ("llama", {}),
    ("llama", {"checkpointing": "on"}),
    ("llama", {"base_format": "int8", "dropout": 0.1}),
    ("llama", {"dora": True}),
    ("gpt2", {"base_format": "bf16"}),
    ("gpt2", {"init": "pissa"}),
    ("bert", {}),
    ("bert", {"base_format": "int8", "checkpointing": "on"}),
    ("vit", {}),
    ("resnet", {}),
]


@pytest.mark.parametrize(("name", "choices"), CASES, ids=str)
def test_a_step_without_content_keeps_as_much_alive_as_the_real_step(folders, name, choices):
    found = estimator_for(folders[name], TASKS[name], **choices).estimate()
    traced = found.total_bytes - dict(found.parts)[E.PROCESS] - dict(found.parts)[E.SLACK]
    measured = real_step(folders[name], TASKS[name], TrainConfig(**{"rank": 4, **choices}))
    assert traced == pytest.approx(measured, rel=0.015)


def test_parts_are_what_the_formats_say(folders):
    estimator = estimator_for(folders["llama"])
    found = estimator.estimate()
    parts = dict(found.parts)
    config = estimator.config
    subject = estimator.build(config)
    trained = sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad)
    assert parts[E.ADAPTER] == 2 * trained
    assert parts[E.MASTERS] == parts[E.GRADIENTS] == 4 * trained
    assert 8 * trained <= parts[E.OPTIMIZER] <= 8 * trained + 8 * len(list(subject.model.parameters())), "two fp32 moments and a step counter each"
    base = load_base(open_checkpoint(folders["llama"]), "language", codec_of(config))
    assert parts[E.WEIGHTS] == pytest.approx(base.bytes, rel=0.05), "but for the description beside each weight"
    assert parts[E.PROCESS] > 50 << 20
    assert found.total_bytes == sum(size for _, size in found.rows()) and all(size for _, size in found.rows())


def test_the_record_is_plain_json(folders):
    found = estimator_for(folders["llama"]).estimate()
    assert set(dataclasses.asdict(found)) == {"device", "parts", "checkpointing"}
    assert json.loads(json.dumps(dataclasses.asdict(found)))["device"] == "cpu"


def test_moments_of_other_optimizers_need_no_device(folders):
    def moments(optim, **more):
        return dict(estimator_for(folders["llama"], optim=optim, **more).estimate().parts)[E.OPTIMIZER]

    assert moments("paged-adamw", rank=32) == pytest.approx(moments("adamw", rank=32), rel=0.01)
    assert moments("adamw8bit", rank=32) < moments("adamw", rank=32)
    value = torch.empty(1 << 14)
    assert E._moments(value, "adamw8bit") == (2**14 + 4 * 2**6,) * 2 and E._moments(value[:100], "paged-adamw8bit") == (400, 400)


def test_checkpointing_is_chosen_by_what_is_free(folders):
    estimator = estimator_for(folders["llama"])
    plain = estimator.of(False)
    assert not estimator.choose_checkpointing(2 * plain.total_bytes)
    assert estimator.choose_checkpointing(plain.total_bytes)
    assert not plain.checkpointing and estimator.of(True).checkpointing
    assert estimator.of(True).total_bytes < plain.total_bytes


def test_auto_turns_checkpointing_on_where_memory_is_short(folders, monkeypatch):
    monkeypatch.setattr(E, "available_bytes", lambda device: 1 << 10)
    assert estimator_for(folders["llama"]).estimate().checkpointing
    monkeypatch.setattr(E, "available_bytes", lambda device: 1 << 60)
    assert not estimator_for(folders["llama"]).estimate().checkpointing
    assert not estimator_for(folders["llama"], checkpointing="off").estimate().checkpointing
    assert estimator_for(folders["llama"], checkpointing="on").estimate().checkpointing


def test_a_model_that_cannot_checkpoint_is_estimated_without(folders):
    estimator = estimator_for(folders["resnet"], "image")
    assert not estimator.of(True).checkpointing and "--checkpointing on" not in dict(estimator.of(False).alternatives())


def test_the_wait_for_alternatives_is_limited_and_shown(folders, monkeypatch):
    told = []
    task = SimpleNamespace(advance=lambda amount, label: told.append(label))
    progress = SimpleNamespace(task=lambda title, total, unit: contextlib.nullcontext(task))
    monkeypatch.setattr(E, "_PATIENCE_SECONDS", 0.0)
    assert estimator_for(folders["llama"], base_format="bf16").of(False).alternatives(progress) == []
    assert told[0] == "--checkpointing on" and told[-1] == "--nf4"


def test_alternatives_are_estimates_of_their_own_and_need_less(folders, monkeypatch):
    monkeypatch.setattr(E, "_PATIENCE_SECONDS", math.inf)
    estimator = estimator_for(folders["llama"], base_format="bf16", batch=batch_for("language", 4, 24))
    found = estimator.of(False)
    others = dict(found.alternatives())
    assert set(others) == {"--checkpointing on", "--batch 2 --accum 2", "--max-len 12", "--nf4"}
    assert list(others.values()) == sorted(others.values()) and max(others.values()) < found.total_bytes
    assert others["--checkpointing on"] == estimator.of(True).total_bytes
    halved = dataclasses.replace(estimator, batch=E.first_rows(estimator.batch, 2))
    assert others["--batch 2 --accum 2"] == pytest.approx(halved.of(False).total_bytes, abs=64 << 20)


def test_a_growing_rank_is_estimated_at_its_end(folders):
    grown, fixed = (dict(estimator_for(folders["llama"], **choices).estimate().parts) for choices in ({"start_rank": 2, "rank": 8}, {"rank": 8}))
    assert grown[E.ADAPTER] == fixed[E.ADAPTER]


def test_a_teacher_counts_with_its_weights(folders):
    checkpoint = open_checkpoint(folders["llama"])
    plain = estimator_for(folders["llama"])

    def with_teacher(model, config):
        subject = adapt(checkpoint, "language")(model, config)
        guide = E.empty_base(checkpoint, "language", None, torch.bfloat16)
        return E.Subject(subject.model, LanguageLoss(subject.model.get_base_model(), teacher=guide), (guide,))

    options = {"adapt": with_teacher, "codec_of": codec_of, "dtype": torch.bfloat16, "device": "cpu"}
    taught = E.estimator(checkpoint, "language", plain.batch, plain.config, **options).estimate()
    dense = load_base(checkpoint, "language", None).bytes
    assert dict(taught.parts)[E.WEIGHTS] - dict(plain.estimate().parts)[E.WEIGHTS] == pytest.approx(dense, rel=0.05)


def test_cutting_a_batch_recounts_its_targets():
    batch = batch_for("language", 4, 24)
    assert (E.first_rows(batch, 1).count, E.first_rows(batch, 1).tokens) == (19, 24)
    shorter = E.first_positions(batch)
    assert shorter.inputs["position_ids"].shape == (4, 12) and shorter.count == 4 * 7
    assert E.first_positions(batch_for("image")) is None
    assert E.first_positions(batch_for("classification")).targets.shape == (4,)


PEAK = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from qlora_tools.training.allocator import Heap, peak_bytes
from tests.training import test_estimate as T
folder, batch = Path(sys.argv[1]), T.batch_for("language", 8, 128)
found = T.estimator_for(folder, batch=batch, rank=16).of(False)
checkpoint = T.open_checkpoint(folder)
subject = T.adapt(checkpoint, "language")(T.load_base(checkpoint, "language", T.codec_for("nf4")).model, T.TrainConfig(rank=16))
masters = T.E.Masters({name: value for name, value in subject.model.named_parameters() if value.requires_grad})
optimizer = T.E.make_optimizer(masters, T.TrainConfig(rank=16))
subject.model.train()
heap = Heap()
heap.give_back()
for step in range(2):
    loss = subject.loss(subject.model, batch)[0] / batch.count
    heap.give_back()
    loss.backward()
    masters.gather(); optimizer.step(); masters.publish(); masters.clear()
print(found.total_bytes, peak_bytes("cpu"), dict(found.parts)["process"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sets are read from /proc")
def test_the_estimate_is_within_ten_percent_of_a_fresh_process(tmp_path):
    folder = build_llama(tmp_path / "model", hidden_size=256, intermediate_size=688, num_hidden_layers=4, vocab_size=4000, max_position_embeddings=256)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, str(folder)], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    estimated, peak, process = map(int, done.stdout.split())
    assert peak > process + (60 << 20), "the run itself is a good part of it"
    assert estimated == pytest.approx(peak, rel=0.10)
