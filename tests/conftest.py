"""Tiny models that tests build themselves: real transformers classes with random weights, saved as folders."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import json
from pathlib import Path

import pytest
import torch

TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def pytest_configure() -> None:
    torch.set_num_threads(1)  # for fixtures of modules, which come before those of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first: at the end one process would run them while the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported stays: walking it at every collection took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread_per_test_process():
    """Two test processes share two cores; with more threads they wait for each other, and every later test takes several times as long."""
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1, "the test leaves torch with other threads than it found"


def save_model(folder: Path, model, tokenizer: bool = False) -> Path:
    """Save with transformers' own writer, in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder, model.config.vocab_size)
    return folder


def build_llama(folder: Path, seed: int = 0, tokenizer: bool = False, **changes) -> Path:
    """A random Llama folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return save_model(folder, LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})), tokenizer)


def nudge(base: Path, folder: Path, *, rank: int = 4, scale: float = 0.05, noise: float = 0.0, only: str = "_proj", seed: int = 1, also=None) -> Path:
    """A tuned copy of ``base``: low-rank (plus noise) change of ``scale`` times the weight norm on every tensor whose name holds ``only``."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(seed)
    for name in sorted(tensors):
        weight = tensors[name].float()
        if only in name and weight.ndim == 2:
            delta = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
            weight = weight + scale * weight.norm() * delta / delta.norm() + noise * weight.norm() * torch.randn_like(weight) / weight.numel() ** 0.5
            tensors[name] = weight.to(tensors[name].dtype)
    for name, value in (also or {}).items():
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(folder: Path, target: Path, **changes) -> Path:
    """A copy of ``folder`` with other values in its config.json."""
    import shutil

    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-ish tokenizer whose ids all lie below ``vocab_size``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + position for position, letter in enumerate(letters)}
    assert len(vocab) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer; do not write into it."""
    return build_llama(tmp_path_factory.mktemp("llama") / "base", tokenizer=True)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, llama) -> Path:
    """A rank-4 fine-tune of ``llama`` (5 % of the weight norm, plus a little noise); do not write into it."""
    return nudge(llama, tmp_path_factory.mktemp("llama-tuned") / "tuned", noise=0.002)
