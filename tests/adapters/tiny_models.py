"""Tiny models with PEFT adapters whose every stored number is random, saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.merged import MergedSource
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
    )
    return _with_random_biases(LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return _with_random_biases(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)))


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16))


def _with_random_biases(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


class Convolutions(torch.nn.Module):
    """Convolutions in one, two and three dimensions, and one of kernel size 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Conv1d(6, 10, 3)
        self.two = torch.nn.Conv2d(5, 7, (3, 2))
        self.three = torch.nn.Conv3d(3, 4, 2)
        self.point = torch.nn.Conv2d(8, 6, 1)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")


def forward(model: Any) -> torch.Tensor:
    """Logits of a few tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 7, 2, 60, 5]])).logits


@dataclass
class Saved:
    """A base folder, an adapter folder beside it, and PEFT's live model."""

    base: Path
    adapter: Path
    live: PeftModel

    def open(self) -> tuple[LogicalCheckpoint, Adapter]:
        base = open_checkpoint(self.base)
        return base, read_adapter(self.adapter, base.specs, base.family, ties=base.ties)

    def merged(self, weight: float = 1.0) -> MergedSource:
        base, adapter = self.open()
        return MergedSource(base, [(adapter, weight)], ties=base.ties)


def save(folder: Path, build: Callable[[], Any], seed: int = 1, **options: Any) -> Saved:
    """Save ``build()`` as base, wrap it with LoRA of ``options`` and random values, save the adapter."""
    base, adapter = folder / "base", folder / f"adapter-{seed}"
    model = build()
    if not base.exists():
        model.save_pretrained(base)
    live = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if any(mark in name for mark in ("lora_", "modules_to_save", "trainable_tokens")) or (parameter.requires_grad and name.endswith("bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    live.eval()
    live.save_pretrained(adapter)
    return Saved(base, adapter, live)
