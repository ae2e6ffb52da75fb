"""Adapters of transformers' own making for the tiny decoders of ``tiny_decoders.py``, and graphs run with them in plain ONNX Runtime."""

from __future__ import annotations

import copy

import numpy as np
import torch

from qlora_tools.adapters.copies import bound_without_copies
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.models.family import family_of
from tests.export.tiny_decoders import Tiny

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_adapter(tiny: Tiny, folder, *, seed: int = 0, size: float = 0.3, **options):
    """(PEFT's live model over a copy of ``tiny.model``, the folder it saved its adapter in). B is random, so that it does something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **options}
    live = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(**settings))
    for name, parameter in live.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=size / parameter.shape[-1] ** 0.5)
        elif "modules_to_save.default" in name or (settings.get("bias", "none") != "none" and name.endswith("bias")):
            parameter.data += 0.1  # trained: otherwise a copy of the base's
    live.eval().save_pretrained(str(folder))
    return live, folder


def bound(tiny: Tiny, folder):
    """The adapter in ``folder``, read for ``tiny``."""
    ties = {"lm_head.weight": "model.embed_tokens.weight"} if tiny.config.get("tie_word_embeddings") and tiny.config["model_type"] == "llama" else {}
    return bound_without_copies(read_adapter(folder, tiny.source.specs, family_of(tiny.config), ties=ties), tiny.source, ties)


def on_carried(live, carried: Tiny):
    """``live`` with the base's weights replaced by those of ``carried``, the adapter's as they are: what the graph should compute."""
    given = dict(carried.model.named_parameters(remove_duplicate=False))
    inner = live.get_base_model()
    head, embedding = given["lm_head.weight"], given["model.embed_tokens.weight"]
    if head is not embedding:
        module = getattr(inner.lm_head, "base_layer", inner.lm_head)
        module.weight = torch.nn.Parameter(head.clone(), requires_grad=False)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            parameter.data.copy_(given[name.replace(".base_layer", "")])
    return live


@torch.inference_mode()
def logits_of(live, ids_BT):
    return live(input_ids=torch.from_numpy(ids_BT), use_cache=False).logits.numpy()


class Plain:
    """``model.onnx`` of a folder in onnxruntime itself."""

    def __init__(self, folder):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def feeds(self, ids_BT):
        feeds = {"input_ids": ids_BT, "attention_mask": np.ones_like(ids_BT)}
        pasts = (value for value in self.session.get_inputs() if value.name.startswith("past_key_values."))
        return feeds | {value.name: np.zeros((len(ids_BT), value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}

    def run(self, ids_BT, extra=None, options=None):
        return self.session.run(["logits"], self.feeds(ids_BT) | (extra or {}), options)[0]

    @property
    def factors(self):
        return {value.name: value for value in self.session.get_overridable_initializers() if ".lora_" in value.name}


def factors_in(path):
    """Input name -> array, of an ``.onnx_adapter`` file."""
    import onnxruntime as ort

    file = ort.AdapterFormat.read_adapter(str(path.resolve()))
    return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
