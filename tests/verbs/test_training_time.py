"""The work of a step is counted without doing it: products as written on paper, and more of everything for more rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.estimate import empty_base
from qlora_tools.training.lora import choose_modules, rank_of
from qlora_tools.training.masks import EncodeReport, Example
from qlora_tools.training.rows import LanguageRows
from qlora_tools.verbs.training_data import Data
from qlora_tools.verbs.training_memory import adapter_of, codec_of
from qlora_tools.verbs.training_time import seconds_per_step, step_work

TOKENS = 32
CONFIG = TrainConfig(rank=4, batch=2)


@pytest.fixture(scope="module")
def checkpoint(llama):
    return open_checkpoint(llama)


@pytest.fixture(scope="module")
def ranks(checkpoint):
    model = empty_base(checkpoint, "language", None, torch.bfloat16)
    return rank_of(model, choose_modules(model, checkpoint.family, "all"), CONFIG)


def data(rows=8):
    ids = np.arange(3, 3 + TOKENS, dtype=np.int32)
    examples = [Example(ids, np.ones(TOKENS, dtype=np.bool_), number) for number in range(rows)]
    return Data(
        "language", LanguageRows(examples, max_len=64), None, EncodeReport("text", "all", rows, rows * TOKENS, rows * TOKENS, TOKENS), (), (), None, False
    )


def work(checkpoint, ranks, rows):
    model = empty_base(checkpoint, "language", codec_of(CONFIG), torch.bfloat16)
    subject = adapter_of(checkpoint, data().task, ranks, torch.bfloat16, None)(model, CONFIG)
    return step_work(subject, data().rows.batch(range(rows)), "cpu")


def test_the_products_are_those_of_the_frozen_weights_twice_and_of_the_adapter_thrice(checkpoint, ranks):
    flops, _ = work(checkpoint, ranks, rows=2)
    shapes = {name.removesuffix(".weight"): spec.shape for name, spec in checkpoint.specs.items()}
    weights = sum(shapes[path][0] * shapes[path][1] for path in ranks)
    factors = sum(rank * sum(shapes[path]) for path, rank in ranks.items())
    head = shapes["lm_head"][0] * shapes["lm_head"][1]
    by_hand = 2 * TOKENS * 2 * (2 * weights + 3 * factors) + 2 * (TOKENS - 1) * 2 * 2 * head
    assert 0.8 * by_hand < flops < 1.2 * by_hand


def test_twice_the_rows_are_twice_the_work(checkpoint, ranks):
    (flops, size), (more_flops, more_size) = work(checkpoint, ranks, rows=2), work(checkpoint, ranks, rows=4)
    assert more_flops == pytest.approx(2 * flops, rel=0.05)
    assert 1.3 * size < more_size <= 2.1 * size


@pytest.mark.parametrize("held", ["nf4", "int8", "bf16"])
def test_every_kind_of_base_has_its_time(checkpoint, ranks, held):
    assert 0 < seconds_per_step(checkpoint, data(), TrainConfig(rank=4, batch=2, base_format=held), ranks, "cpu", None) < 60
