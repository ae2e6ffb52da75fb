"""Tiny models of other families than the fixtures', and moments taken the plain way: the whole model resident, float64 throughout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


def save(folder: Path, model) -> Path:
    model.float().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return save(folder, GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1)))


def bert(folder: Path, labels: int | None = None) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=96, max_position_embeddings=64)
    if labels is None:
        return save(folder, BertForMaskedLM(config))
    config.num_labels = labels
    return save(folder, BertForSequenceClassification(config))


def resnet(folder: Path) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=3)
    return save(folder, ResNetForImageClassification(config))


def reference(model, weight_of, batches) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Weight -> (sum of x x', sum of x, count), float64, of a float64 ``model`` run whole."""
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    keep = None

    def hook(name):
        def hear(module, args):
            x = args[0]
            if isinstance(module, nn.Conv2d):
                rows = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2).flatten(0, 1)
            else:
                rows = x[keep] if keep is not None and keep.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
            old = sums.get(name, (0, 0, 0))
            sums[name] = (old[0] + rows.T @ rows, old[1] + rows.sum(0), old[2] + len(rows))

        return hear

    handles = [
        module.register_forward_pre_hook(hook(weight_of[path]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d) and path in weight_of
    ]
    with torch.no_grad():
        for batch in batches:
            keep = batch.keep
            model(**{name: value.double() if value.is_floating_point() else value for name, value in batch.inputs.items()})
    for handle in handles:
        handle.remove()
    return sums


def gradient_reference(model, weight_of, batches, seed=0) -> dict[str, tuple[torch.Tensor, int]]:
    """Weight -> (sum of g g' at its output, count), float64: labels drawn from the softmax of a float64 ``model`` run whole, batch by batch."""
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    keep = None

    def hook(name):
        def hear(module, args, output):
            mask = keep

            def add(grad):
                if isinstance(module, nn.Conv2d):
                    rows = grad.movedim(1, -1).flatten(0, 2)
                else:
                    rows = grad[mask] if mask is not None and mask.shape == grad.shape[:-1] else grad.reshape(-1, grad.shape[-1])
                old = sums.get(name, (0, 0))
                sums[name] = (old[0] + rows.T @ rows, old[1] + len(rows))

            output.register_hook(add)

        return hear

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handles = [
        module.register_forward_hook(hook(weight_of[path]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d) and path in weight_of and module is not head
    ]
    for number, batch in enumerate(batches):
        keep = batch.keep
        logits = model(**{name: value.double() if value.is_floating_point() else value for name, value in batch.inputs.items()}).logits
        flat = logits.reshape(-1, logits.shape[-1])
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.cat([torch.multinomial(part, 1, generator=generator)[:, 0] for part in torch.softmax(flat.detach().float(), -1).split(256)])
        losses = functional.cross_entropy(flat, drawn, reduction="none").view(logits.shape[:-1])
        (losses if keep is None or keep.shape != losses.shape else losses[keep]).sum().backward()
    for handle in handles:
        handle.remove()
    return sums
