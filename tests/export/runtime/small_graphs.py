"""Graphs of a few nodes that look like decoders, made here so that the runtime is tested without an exporter.

``summing``: logits of a position are the sum of one table row per token so far. Its keys are those rows, its values mean nothing but have
other sizes; both only grow. ``pastless``: the same without a past.
``adapted``: no past; logits are ``x W + (x A) B`` of the token's own row x, with A and B optional inputs.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

VOCAB, WIDTH = 7, 5
CARRIERS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: np.uint16}


def value(name, kind, *shape, const=None):
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
    if const is not None:
        made.const_value = ir.tensor(const, dtype=kind, name=name)
    return made


class Drawing:
    def __init__(self):
        self.nodes, self.initializers = [], []

    def constant(self, content, kind=ir.DataType.INT64):
        made = value(f"c{len(self.initializers)}", kind, *np.shape(content), const=np.asarray(content))
        self.initializers.append(made)
        return made

    def op(self, kind, *inputs, **attributes):
        node = ir.node(kind, list(inputs), attributes=attributes)
        self.nodes.append(node)
        return node.outputs[0]


def table():
    return np.random.default_rng(3).integers(-3, 4, (VOCAB, VOCAB)).astype(np.float32)


def save(folder, inputs, outputs, drawing, initializers=()):
    folder.mkdir(exist_ok=True, parents=True)
    graph = ir.Graph(inputs, outputs, nodes=drawing.nodes, initializers=[*drawing.initializers, *initializers], opset_imports={"": 21}, name="small")
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return folder


def named(made, name, kind, *shape):
    made.name, made.shape, made.type = name, ir.Shape(shape), ir.TensorType(kind)
    return made


def summing(folder, kind=ir.DataType.FLOAT, mask=ir.DataType.INT64, positions=False):
    d, floats = Drawing(), ir.DataType.FLOAT
    ids, seen = value("input_ids", mask, "B", "S"), value("attention_mask", mask, "B", "T")
    past_key, past_value = value("past_key_values.0.key", kind, "B", 1, "P", VOCAB), value("past_key_values.0.value", kind, "B", 2, "P", 3)
    rows = d.op("Gather", d.constant(table(), floats), ids)
    new_key = d.op("Cast", d.op("Unsqueeze", rows, d.constant([1])), to=kind)
    key = d.op("Concat", past_key, new_key, axis=2)
    length = d.op("Slice", d.op("Shape", ids), d.constant([1]), d.constant([2]))
    batch = d.op("Slice", d.op("Shape", ids), d.constant([0]), d.constant([1]))
    wanted = d.op("Concat", batch, d.constant([2]), length, d.constant([3]), axis=0)
    zeros = d.op("Cast", d.op("Expand", d.constant(np.zeros((1, 1, 1, 1), np.float32), floats), wanted), to=kind)
    grown = d.op("Concat", past_value, zeros, axis=2)
    before = d.op("ReduceSum", d.op("Cast", past_key, to=floats), d.constant([1, 2]), keepdims=0)
    sums = d.op("Add", d.op("CumSum", rows, d.constant(1)), d.op("Unsqueeze", before, d.constant([1])))
    inputs = [ids, seen, past_key, past_value]
    if positions:
        inputs.append(value("position_ids", mask, "B", "S"))
        sums = d.op("Add", sums, d.op("Unsqueeze", d.op("Cast", inputs[-1], to=floats), d.constant([2])))
    logits = named(d.op("Cast", sums, to=kind), "logits", kind, "B", "S", VOCAB)
    outputs = [logits, named(key, "present.0.key", kind, "B", 1, "T", VOCAB), named(grown, "present.0.value", kind, "B", 2, "T", 3)]
    return save(folder, inputs, outputs, d)


def pastless(folder):
    """The same sums, without a past and without a mask."""
    d = Drawing()
    ids = value("input_ids", ir.DataType.INT64, "B", "S")
    sums = d.op("CumSum", d.op("Gather", d.constant(table(), ir.DataType.FLOAT), ids), d.constant(1))
    return save(folder, [ids], [named(sums, "logits", ir.DataType.FLOAT, "B", "S", VOCAB)], d)


def summed(ids_BT):
    """What ``summing`` computes: [B, T, VOCAB]."""
    return table()[ids_BT].cumsum(1)


def weights(seed=5):
    """(rows [VOCAB, WIDTH], W [WIDTH, VOCAB])."""
    random = np.random.default_rng(seed)
    return random.standard_normal((VOCAB, WIDTH), np.float32), random.standard_normal((WIDTH, VOCAB), np.float32)


def adapted(folder, kind=ir.DataType.FLOAT16, matrix="head"):
    d, floats = Drawing(), ir.DataType.FLOAT
    ids, seen = value("input_ids", ir.DataType.INT64, "B", "S"), value("attention_mask", ir.DataType.INT64, "B", "T")
    carrier = CARRIERS[kind]
    a = value(f"{matrix}.lora_A", kind, WIDTH, f"{matrix}.rank", const=None)
    b = value(f"{matrix}.lora_B", kind, f"{matrix}.rank", VOCAB, const=None)
    a.const_value = ir.Tensor(np.zeros((WIDTH, 0), carrier).view(kind.numpy()), dtype=kind, name=a.name)
    b.const_value = ir.Tensor(np.zeros((0, VOCAB), carrier).view(kind.numpy()), dtype=kind, name=b.name)
    rows, w = weights()
    x = d.op("Gather", d.constant(rows, floats), ids)
    branch = d.op("MatMul", d.op("MatMul", x, d.op("Cast", a, to=floats)), d.op("Cast", b, to=floats))
    logits = named(d.op("Add", d.op("MatMul", x, d.constant(w, floats)), branch), "logits", floats, "B", "S", VOCAB)
    return save(folder, [ids, seen, a, b], [logits], d, [a, b])


def write_adapter(path, tensors, kind=10):
    """``tensors``: name -> array in the carrier of ONNX element type ``kind``."""
    import onnxruntime as ort

    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), kind) for name, array in tensors.items()})
    file.export_adapter(str(path))
    return path


def factors(rank, seed=1, matrix="head"):
    random = np.random.default_rng(seed)
    return {
        f"{matrix}.lora_A": random.standard_normal((WIDTH, rank)).astype(np.float16),
        f"{matrix}.lora_B": random.standard_normal((rank, VOCAB)).astype(np.float16),
    }


def write_genai(folder, session_options=None, **changes):
    model = {"context_length": 40, "eos_token_id": 1, "decoder": {"head_size": 16, "session_options": session_options or {}}}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"past_present_share_buffer": False, **changes}}))


def held_bytes(path):
    """Of the initializers, as the package onnx reads the graph; nothing is stored twice in graphs that are made here."""
    import onnx

    held = onnx.load(path, load_external_data=False).graph.initializer
    return sum(
        next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        else onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in held
    )
