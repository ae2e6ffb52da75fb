"""Models that look once, as folders, for the flows that judge and measure them."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import torch
import transformers

from tests.conftest import write_tokenizer

BODY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
WORDS = "the quick brown fox jumps over the lazy dog; "


def saved(folder, config, owner, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = owner(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn(parameter.shape) * 0.15
    model.save_pretrained(folder)
    return folder


def bert(folder, owner=transformers.BertForSequenceClassification, **more):
    labels = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
    saved(folder, transformers.BertConfig(**BODY, vocab_size=160, max_position_embeddings=64, **labels, **more), owner)
    write_tokenizer(folder, 160)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"mask_token": "~"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def linear_graph(folder, noise=0.0, classes=5, side=8):
    """An export of a classifier of images with one layer, drawn by hand: it opens in a moment. ``noise`` is added to its weights."""
    folder.mkdir()
    drawn = np.random.default_rng(0).standard_normal((3 * side * side, classes)) + noise * np.random.default_rng(1).standard_normal((3 * side * side, classes))
    shape = ir.Shape(["batch_size", 3, side, side])
    pixels = ir.Value(name="pixel_values", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="w", const_value=ir.tensor(drawn.astype(np.float32), name="w"))
    flat = ir.node("Flatten", [pixels])
    product = ir.node("MatMul", [flat.outputs[0], weight])
    product.outputs[0].name, product.outputs[0].type = "logits", ir.TensorType(ir.DataType.FLOAT)
    product.outputs[0].shape = ir.Shape(["batch_size", classes])
    graph = ir.Graph([pixels], product.outputs, nodes=[flat, product], initializers=[weight], opset_imports={"": 18}, name="linear")
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": side}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
