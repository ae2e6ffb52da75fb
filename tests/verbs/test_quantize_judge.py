"""The whole model against itself with other weights: exact zero, and back to it."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.verbs import quantize_judge
from qlora_tools.verbs.quantize_judge import WholeModel

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def windows_NL():
    return torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(0))


def test_a_model_against_itself_is_exactly_zero_before_and_after_a_weight_was_replaced(llama, windows_NL):
    checkpoint = open_checkpoint(llama)
    pair = WholeModel(checkpoint, windows_NL)
    assert pair.divergence().kl_mean == 0
    pair.put([NAME], lambda name: torch.zeros(checkpoint.specs[name].shape))
    changed = pair.divergence()
    assert changed.kl_mean > 0 and changed.n_tokens == 3 * 15 and pair.divergence(1).n_tokens == 15
    pair.restore([NAME])
    assert pair.divergence().kl_mean == 0


def test_gpt2_weights_are_put_in_the_right_way_round(tmp_path, windows_NL):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    checkpoint = open_checkpoint(tmp_path / "gpt2")
    pair = WholeModel(checkpoint, windows_NL)
    name = next(name for name in checkpoint.specs if name.endswith("c_attn.weight"))
    pair.put([name], checkpoint.read)
    assert pair.divergence().kl_mean == 0


def test_what_does_not_fit_into_memory_is_said_before_it_is_loaded(llama, windows_NL, monkeypatch):
    monkeypatch.setattr(quantize_judge, "available_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedError, match="are free"):
        WholeModel(open_checkpoint(llama), windows_NL)
