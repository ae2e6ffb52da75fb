"""Tiny random models of many kinds, held in memory as sources, each traced once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.target import CPU
from qlora_tools.export.traced.export import Drawn, TracedExport, draw, fill, write_traced
from qlora_tools.export.traced.inputs import Subject, results, subject_of
from tests.export.tiny_decoders import MemorySource

_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    # wide enough for every format: a table that is packed, a linear in two digits, an odd number of classes
    "bert": {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **_BODY, "num_hidden_layers": 1, "hidden_size": 64,
             "intermediate_size": 4096, "vocab_size": 4100, "id2label": {"0": "a", "1": "b", "2": "c"}},
    "bert-mlm": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **_BODY, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 4100},
    "distilbert": {"model_type": "distilbert", "architectures": ["DistilBertForTokenClassification"], "vocab_size": 99, "dim": 32, "n_layers": 1,
                   "n_heads": 2, "hidden_dim": 57},
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8, **_BODY},
    "t5": {"model_type": "t5", "architectures": ["T5EncoderModel"], "vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
}  # fmt: skip


@dataclass
class Tiny:
    """A live model, the same weights as a source, and its graph without weights."""

    config: dict[str, Any]
    model: Any
    source: MemorySource
    subject: Subject
    drawn: Drawn

    def export(self, scheme: str, folder: Path, source: Any = None) -> TracedExport:
        export = fill(self.drawn, source or self.source, scheme_of(scheme, CPU))
        write_traced(export, source or self.source, folder)
        return export

    @torch.inference_mode()
    def answers(self, size: int) -> dict[str, np.ndarray]:
        found = results(self.model(**self.subject.draw(size), **self.subject.options), self.subject.outputs)
        return {name: tensor.numpy() for name, tensor in found.items()}


@lru_cache
def tiny(name: str) -> Tiny:
    """The model ``name`` of :data:`CONFIGS`, random from a fixed seed."""
    config = CONFIGS[name]
    subject = subject_of(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = subject.build(torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (0 if parameter.ndim > 1 else 0.5))
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    source = MemorySource({name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied})
    return Tiny(config, model, source, subject, draw(subject, source, config))


def run(folder: Path, drawn: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The graph in ``folder`` on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: value.numpy() for name, value in drawn.items()}), strict=True))


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    assert found.shape == reference.shape
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
