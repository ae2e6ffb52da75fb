"""``qlt train --merge-aware``: training through the quantizer that the merged model will go through."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from qlora_tools import api
from qlora_tools.adapters.merged import MergedSource
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UsageError
from qlora_tools.live.base import load_base
from qlora_tools.quant.nf4 import NF4
from qlora_tools.training import events
from tests.flows.training_material import write_pairs

CHOICES = {"rank": 2, "batch": 4, "steps": 2, "max_len": 32, "lr": 1e-2, "compute": "fp32", "eval_every": 1, "schedule": "constant", "targets": "mlp"}


def test_the_loss_it_reports_is_that_of_the_merged_and_quantized_model(llama, tmp_path):
    write_pairs(tmp_path / "data.jsonl")
    write_pairs(tmp_path / "val.jsonl", count=4, shift=1)
    losses = []
    config = api.TrainConfig(merge_aware=True, **CHOICES)
    heard = lambda event: losses.append(event.loss) if isinstance(event, events.Evaluation) else None  # noqa: E731
    done = api.train(base=llama, data=tmp_path / "data.jsonl", val=tmp_path / "val.jsonl", config=config, output=tmp_path / "out", listen=heard)
    assert done.report.estimate_bytes > 0
    assert json.loads((tmp_path / "out" / "qlt-manifest.json").read_text())["command"]["merge_aware"] is True
    base = open_checkpoint(llama)
    merged = MergedSource(base, [(read_adapter(tmp_path / "out", base.specs, base.family), 1.0)])
    model = load_base(base, "language", None, dtype=torch.float32).model
    with torch.no_grad():
        for name in merged.changed:
            spec = base.specs[name]
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.stored.part0.copy_(NF4().decode(spec, NF4().encode(spec, merged.read(name))))
    loss = _loss(model, llama, tmp_path / "val.jsonl")
    assert loss == pytest.approx(min(losses), rel=2e-3)  # the adapter's file is bf16


def _loss(model, folder, path):
    from qlora_tools.live.tokenizer import open_tokenizer

    tokenizer, total, count = open_tokenizer(folder), 0.0, 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt, answer = (tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += float(functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += len(ids[0]) - len(prompt)
    return total / count


@pytest.mark.parametrize("wrong", [{"base_format": "bf16"}, {"dora": True}, {"dropout": 0.1}, {"init": "pissa"}])
def test_what_a_merged_weight_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError, match="merge-aware"):
        api.TrainConfig(merge_aware=True, **wrong)
