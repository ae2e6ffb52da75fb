"""Traced graphs run as they will be measured: drawn inputs, outputs left in place, any batch."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qlora_tools.errors import MissingError, UnsupportedError, UsageError
from qlora_tools.export.runtime.forward import ForwardSession, graph_of, open_forward
from qlora_tools.export.runtime.values import FLOATS, narrowed, widened
from qlora_tools.export.traced.inputs import results
from tests.export.runtime.small_graphs import held_bytes
from tests.export.traced.tiny_models import tiny

CASE = {"prompt_tokens": 12, "batch": 3, "new_tokens": 1}


def exported(name, folder, scheme="fp32"):
    model = tiny(name)
    model.export(scheme, folder)
    (folder / "config.json").write_text(json.dumps(model.config))
    return model


def rows(found, *names):
    return {name: found[name] for name in names}


@torch.inference_mode()
def live(model, feed):
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    return {name: tensor.numpy() for name, tensor in results(model.model(**tensors, **model.subject.options), model.subject.outputs).items()}


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "vit"])
def test_a_graph_gives_what_the_live_model_gives_for_the_same_drawn_inputs(name, tmp_path):
    from qlora_tools.models.feeds import draw_feed

    model = exported(name, tmp_path)
    session = open_forward(str(tmp_path), threads=1)
    given = draw_feed(model.drawn.traced.inputs, model.config, batch=3, length=12, seed=5)
    found, wanted = session.read(session.forward(session.feed(CASE, 5))), live(model, given)
    assert found.keys() == wanted.keys()
    for output, expected in wanted.items():
        assert found[output].shape == expected.shape and found[output].shape[0] == 3
        np.testing.assert_allclose(found[output], expected, atol=2e-5, rtol=1e-4)


def test_what_was_read_stays_when_the_next_pass_writes_its_buffers(tmp_path):
    exported("bert", tmp_path)
    session = open_forward(str(tmp_path), threads=1)
    feed = session.feed(CASE, 0)
    first = session.read(session.forward(feed))["logits"]
    kept = first.copy()
    other = session.read(session.forward(session.feed(CASE, 1)))["logits"]
    again = session.read(session.forward(feed))["logits"]
    assert (first == kept).all() and (first == again).all() and (first != other).any()


def test_batch_and_length_follow_the_case_and_images_ignore_the_length(tmp_path):
    (tmp_path / "text").mkdir(), (tmp_path / "image").mkdir()
    exported("bert-mlm", tmp_path / "text")
    exported("vit", tmp_path / "image")
    text, image = open_forward(str(tmp_path / "text"), threads=1), open_forward(str(tmp_path / "image"), threads=1)
    assert text.read(text.forward(text.feed({"prompt_tokens": 5, "batch": 4}, 0)))["logits"].shape[:2] == (4, 5)
    assert image.read(image.forward(image.feed({"prompt_tokens": 9999, "batch": 2}, 0)))["logits"].shape[0] == 2
    assert image.info()["prompt"] == "ignored" and "prompt" not in text.info()
    assert text.info()["work"] == image.info()["work"] == "forward"
    assert text.info()["weights_bytes"] == held_bytes(tmp_path / "text/model.onnx")
    with pytest.raises(UsageError, match="512 positions"):
        ForwardSession(_with(tmp_path / "text", max_position_embeddings=512), threads=1).feed({"prompt_tokens": 513, "batch": 1}, 0)


def _with(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_given_inputs_take_the_place_of_drawn_ones(tmp_path):
    model = exported("bert", tmp_path)
    session = open_forward(str(tmp_path), threads=1)
    ids = np.array([[5, 6, 7, 8]], np.int64)
    found = session.read(session.forward(session.feed(CASE, 0, {"input_ids": ids})))["logits"]
    types = np.zeros_like(ids)
    wanted = live(model, {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types})["logits"]
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="pixel_values"):
        session.feed(CASE, 0, {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})


def test_a_graph_of_fixed_sizes_says_so(tmp_path):
    _graph(tmp_path / "model.onnx", "pixel_values", [1, 3, 8, 8])
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 8}))
    session = open_forward(str(tmp_path), threads=1)
    assert session.read(session.forward(session.feed({"prompt_tokens": 1, "batch": 1}, 0)))["y"].shape == (1, 3, 8, 8)
    with pytest.raises(UnsupportedError, match=r"\[1, 3, 8, 8\] in the graph, \[2, 3, 8, 8\]"):
        session.feed({"prompt_tokens": 1, "batch": 2}, 0)


def test_graphs_that_cannot_be_fed_and_adapters_are_refused(tmp_path):
    with pytest.raises(MissingError, match="encoder_model.onnx"):
        open_forward(str(tmp_path), threads=1)
    _graph(tmp_path / "one.onnx", "secret", [1, 2])
    assert graph_of(tmp_path) == tmp_path / "one.onnx"
    with pytest.raises(UnsupportedError, match="`secret`"):
        open_forward(str(tmp_path), threads=1)
    with pytest.raises(UsageError, match="keeps no adapters"):
        open_forward(str(tmp_path), threads=1, adapter="a")
    _graph(tmp_path / "two.onnx", "secret", [1, 2])
    with pytest.raises(MissingError, match="one.onnx, two.onnx"):
        graph_of(tmp_path)
    _graph(tmp_path / "encoder_model.onnx", "input_ids", [1, 2])
    assert graph_of(tmp_path).name == "encoder_model.onnx"


def _graph(path, name, shape):
    given = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [given])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)


@pytest.mark.gpu
def test_on_a_gpu_a_graph_gives_what_it_gives_on_the_cpu(tmp_path):
    exported("bert", tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        session = open_forward(str(tmp_path), threads=1, device=device)
        feed = session.feed(CASE, 0)
        found.append([session.read(session.forward(feed))["logits"] for _ in range(2)])
    np.testing.assert_allclose(found[1], found[0], atol=1e-2)
    assert session.info()["nodes"]["CUDAExecutionProvider"] > 0


@pytest.mark.parametrize("kind", list(FLOATS.values()), ids=lambda kind: kind.name)
def test_floats_are_rounded_as_torch_rounds_them(kind):
    values = np.concatenate([np.random.default_rng(0).standard_normal(1000).astype(np.float32), np.float32([0, -0.0, 1.0, 65504, 1 + 2**-8, 1 + 3 * 2**-8])])
    torch_kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind.name]
    wanted = torch.from_numpy(values).to(torch_kind).float().numpy()
    assert (widened(kind, narrowed(kind, values)).astype(np.float32) == wanted).all()
    assert narrowed(kind, np.array(1.5, np.float32)).shape == ()
