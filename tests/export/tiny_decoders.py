"""Tiny random decoders of every family, held in memory as sources, and what transformers says they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.genai import write_genai_config
from qlora_tools.export.target import CPU, Target
from qlora_tools.specs import spec_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

#: Sizes that a family's config does not have: it would keep them as strangers.
WITHOUT = {"gpt2": ("num_key_value_heads", "intermediate_size")}


@dataclass
class MemorySource:
    """A source over a dict of tensors."""

    tensors: dict[str, torch.Tensor]

    @property
    def specs(self):
        return {name: spec_of(name, tensor) for name, tensor in self.tensors.items()}

    def read(self, name, rows=None):
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


@dataclass
class Tiny:
    """A transformers model and the same weights as a source."""

    model: Any
    source: MemorySource
    config: dict[str, Any]

    @torch.inference_mode()
    def logits(self, ids_BT):
        return self.model(input_ids=torch.from_numpy(np.asarray(ids_BT)), use_cache=False).logits.numpy()


def build(family: str, seed: int = 0, spread: float = 6.0, **changes) -> Tiny:
    """A random model of ``family``, weights rounded to bf16. ``spread`` scales the initial weights so that logits are not flat."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    sizes = {key: value for key, value in SIZES.items() if key not in WITHOUT.get(family, ())}
    config = CONFIG_MAPPING[family](**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_((0.1 * noise if name.endswith("bias") else parameter + 0.2 * noise if parameter.ndim == 1 else parameter * spread).bfloat16())
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if not (config.tie_word_embeddings and name == "lm_head.weight")}
    return Tiny(model, MemorySource(tensors), {**config.to_dict(), "architectures": [type(model).__name__]})


def export(tiny: Tiny, folder, scheme: str = "fp32", target: Target = CPU):
    """Export into ``folder``; the planned export."""
    planned = plan_export(tiny.source, tiny.config, scheme, target)
    write_graph(planned, tiny.source, folder)
    write_genai_config(planned, tiny.config, folder)
    return planned


def carry(tiny: Tiny, planned) -> Tiny:
    """``tiny`` with the weights as the export carries them: encoded and decoded again."""
    import copy

    model = copy.deepcopy(tiny.model)
    parameters = dict(model.named_parameters())

    def carried(matrix, weight, looked_up=False):
        return matrix.format.decode("w", matrix.format.encode("w", weight), weight.shape[1], looked_up=looked_up)

    if planned.decoder.tied:
        model.lm_head.weight = torch.nn.Parameter(carried(planned.layout.head, model.lm_head.weight.detach().clone()), requires_grad=False)
    tables, places = (planned.layout.embedding, planned.layout.positions), planned.decoder.stacked_places()

    def own(name):
        place = places.get(name)
        if place is None:
            return parameters[name]
        return (parameters[place.tensor] if place.expert is None else parameters[place.tensor][place.expert])[place.start : place.stop]

    for matrix in planned.layout.matrices():
        for piece in matrix.pieces:
            weight = own(f"{piece.module}.weight").detach()
            rows = (weight.T if piece.transposed else weight)[piece.first : piece.first + piece.rows]
            rows.copy_(carried(matrix, rows.contiguous(), looked_up=matrix in tables))
    return Tiny(model, tiny.source, tiny.config)


def tokens(tiny: Tiny, batch: int, length: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, tiny.config["vocab_size"], (batch, length))


def relative_error(found, reference):
    found, reference = found - found.mean(-1, keepdims=True), reference - reference.mean(-1, keepdims=True)
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)
