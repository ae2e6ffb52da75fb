"""What a model writes after a prompt: greedy continuations that leave no trace in the run.

A sample is taken in the middle of training, so everything that training depends on is put back: which modules are in training
mode (dropout), and the random state (nothing here draws, but a model's forward pass could). The loop is our own, because
``generate`` obeys whatever generation_config.json happens to hold (sampling, penalties, lengths) and complains about it.
Left out: deciding when to sample, and drawing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora_tools.errors import UsageError


def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int, *, chat: bool = False) -> str:
    """The text that ``model`` puts after ``prompt``, at most ``tokens`` tokens, always the likeliest next one.

    ``chat``: the run's data are messages; the prompt becomes a user's turn through the tokenizer's chat template, where it has one.
    Stops early at an end-of-text token. A prompt that leaves no room in the model's context loses its beginning.

    Raises:
        UsageError: the prompt is empty and the tokenizer has no token to begin with.
    """
    ids = _prompt_ids(tokenizer, prompt, chat)
    limit = _context(model)
    tokens = max(0, min(tokens, limit - 1))
    ids = ids[-(limit - tokens) :]
    with _undisturbed(model):
        added = _greedy(model, ids, tokens, _ends(model, tokenizer))
    return _decoded_tail(tokenizer, ids, added)


@torch.no_grad()
def _greedy(model: Any, ids: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
    """Up to ``tokens`` ids after ``ids``, feeding only what the cache does not hold."""
    device = model.get_input_embeddings().weight.device
    last_only = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}  # a prompt's logits are T x vocabulary for nothing
    feed, cache, added = list(ids), None, []
    for _ in range(tokens):
        answer = model(input_ids=torch.tensor([feed], device=device), past_key_values=cache, use_cache=True, return_dict=True, **last_only)
        chosen = int(answer.logits[0, -1].float().argmax())
        if chosen in ends:
            break
        added.append(chosen)
        cache = getattr(answer, "past_key_values", None)
        feed = [chosen] if cache is not None else [*ids, *added]
    return added


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode and the random states as before."""
    training = [module for module in model.modules() if module.training]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    if ids:
        return ids
    for name in ("bos_token_id", "eos_token_id"):
        if (start := getattr(tokenizer, name, None)) is not None:
            return [int(start)]
    raise UsageError("the sample prompt is empty, and the tokenizer has no token to begin a text with", hint="give --sample a few words")


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those that the model's generation settings name."""
    named = (getattr(tokenizer, "eos_token_id", None), getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return frozenset(int(end) for ends in named for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if end is not None)


def _context(model: Any) -> int:
    """Positions that the model has."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else 1 << 20


def _takes(model: Any, argument: str) -> bool:
    """Whether the model below any adapter wrapper names ``argument`` in its forward pass."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


def _decoded_tail(tokenizer: Any, ids: Sequence[int], added: Sequence[int]) -> str:
    """The new tokens as text. Decoded behind the prompt's last tokens, since a token alone may lose its leading space or half a character."""
    head = list(ids[-8:])
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(head, **options), tokenizer.decode([*head, *added], **options)
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(added), **options))
