"""Both dialects against float64: attention over prompt and past, norms, activations."""

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.dialects import Contrib, Standard, dialect_of
from qlora_tools.export.dialects.dialect import AttentionCall, NormCall, Rotary
from qlora_tools.export.external import ExternalWriter
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.target import CPU, Target
from qlora_tools.specs import spec_of

DIALECTS = {"contrib": CPU, "standard": Target("cpu", "F32", standard=True)}
HEADS, KV_HEADS, SIZE = 4, 2, 32
CASES = {
    "plain": {},
    "packed": {"packed": True},
    "one query head per key": {"kv_heads": 4},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 4, "softcap": 2.0},
    "no rotation": {"rotated": 0},
    "half of each head rotated": {"rotated": 16},
}


def value(name, kind, *shape):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def session_of(folder, dialect, nodes, inputs, outputs):
    graph = ir.Graph(inputs, outputs, nodes=nodes.nodes, initializers=nodes.initializers, opset_imports=dialect.domains(), name="one")
    ir.save(ir.Model(graph, ir_version=dialect.ir_version), folder / "one.onnx")
    if "com.microsoft" not in dialect.domains():
        onnx.checker.check_model(folder / "one.onnx", full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(folder / "one.onnx", options, providers=["CPUExecutionProvider"])


def stored_nodes(folder, tensors, target):
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    with ExternalWriter(folder / "data", specs.values()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return Nodes(specs, writer.offsets, "data", target)


def draw_attention(folder, target, *, packed=False, window=None, softcap=0.0, rotated=SIZE, kv_heads=KV_HEADS):
    angles = torch.arange(32)[:, None] * (1.0 / 100.0 ** (torch.arange(max(rotated, 2) // 2) / max(rotated, 2)))[None]
    nodes = stored_nodes(folder, {"cos": angles.cos(), "sin": angles.sin()}, target)
    dialect, kind = dialect_of(target), target.float_type
    ids, mask = value("ids", ir.DataType.INT64, "B", "S"), value("mask", ir.DataType.INT64, "B", "T")
    sizes = (HEADS * SIZE, kv_heads * SIZE, kv_heads * SIZE)
    parts = [value("q", kind, "B", "S", sum(sizes))] if packed else [value(name, kind, "B", "S", size) for name, size in zip("qkv", sizes, strict=True)]
    pasts = [value(name, kind, "B", kv_heads, "P", SIZE) for name in ("pk", "pv")]
    call = AttentionCall(
        layer=0,
        query=parts[0],
        key=None if packed else parts[1],
        value=None if packed else parts[2],
        past_key=pasts[0],
        past_value=pasts[1],
        heads=HEADS,
        kv_heads=kv_heads,
        head_size=SIZE,
        scale=0.2,
        softcap=softcap,
        window=window,
        rotary=Rotary("cos", "sin", rotated) if rotated else None,
    )
    found = dialect.attention(nodes, call, dialect.prepare(nodes, ids, mask))
    shapes = [("B", "S", HEADS * SIZE), *[("B", kv_heads, "T", SIZE)] * 2]
    for result, shape in zip(found, shapes, strict=True):
        result.type, result.shape = ir.TensorType(kind), ir.Shape(shape)
    return session_of(folder, dialect, nodes, [ids, mask, *parts, *pasts], list(found))


def attend(q_BSHD, k_BTGD, v_BTGD, *, window, softcap):
    """float64, positions 0..T-1, the queries the last ones."""
    repeat = q_BSHD.shape[2] // k_BTGD.shape[2]
    k, v = (x.repeat(repeat, axis=2) for x in (k_BTGD, v_BTGD))
    scores = 0.2 * np.einsum("bshd,bthd->bhst", q_BSHD, k)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    queries, keys = np.arange(k.shape[1] - q_BSHD.shape[1], k.shape[1])[:, None], np.arange(k.shape[1])[None]
    unseen = (keys > queries) | (keys <= queries - (window or 10**6))
    scores = np.where(unseen, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)


def rotate(x_BSHD, first, rotated):
    if not rotated:
        return x_BSHD
    angles = np.arange(first, first + x_BSHD.shape[1])[:, None] / 100.0 ** (np.arange(rotated // 2) / rotated)[None]
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = x_BSHD[..., : rotated // 2], x_BSHD[..., rotated // 2 : rotated]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x_BSHD[..., rotated:]], -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DIALECTS)
def test_attention_over_prompt_and_steps_is_that_of_float64(name, case, tmp_path):
    options = CASES[case]
    rotated, kv_heads = options.get("rotated", SIZE), options.get("kv_heads", KV_HEADS)
    session = draw_attention(tmp_path, DIALECTS[name], **options)
    rng = np.random.default_rng(1)
    batch, prompt, total = 2, 6, 9
    q, k, v = (rng.standard_normal((batch, total, heads, SIZE)).astype(np.float32) for heads in (HEADS, kv_heads, kv_heads))
    reference = attend(
        rotate(q.astype(np.float64), 0, rotated),
        rotate(k.astype(np.float64), 0, rotated),
        v.astype(np.float64),
        window=options.get("window"),
        softcap=options.get("softcap", 0.0),
    )
    past = [np.zeros((batch, kv_heads, 0, SIZE), np.float32)] * 2
    for first, last in ((0, prompt), *((step, step + 1) for step in range(prompt, total))):
        parts = [x[:, first:last].reshape(batch, last - first, -1) for x in (q, k, v)]
        fed = {"q": np.concatenate(parts, -1)} if options.get("packed") else dict(zip("qkv", parts, strict=True))
        feeds = {"ids": np.zeros((batch, last - first), np.int64), "mask": np.ones((batch, last), np.int64), "pk": past[0], "pv": past[1], **fed}
        attended, *past = session.run(None, feeds)
        np.testing.assert_allclose(attended.reshape(batch, last - first, HEADS, SIZE), reference[:, first:last], atol=2e-5)
        assert past[0].shape == (batch, kv_heads, last, SIZE)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_evaluator_of_onnx_reads_plain_attention_alike(case, tmp_path):
    options = CASES[case]
    kv_heads = options.get("kv_heads", KV_HEADS)
    session = draw_attention(tmp_path, DIALECTS["standard"], **options)
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((2, 2, heads * SIZE)).astype(np.float32) for heads in (HEADS, kv_heads, kv_heads)]
    fed = {"q": np.concatenate(parts, -1)} if options.get("packed") else dict(zip("qkv", parts, strict=True))
    past = [rng.standard_normal((2, kv_heads, 3, SIZE)).astype(np.float32) for _ in range(2)]
    feeds = {"ids": np.zeros((2, 2), np.int64), "mask": np.array([[0, 1, 1, 1, 1], [1] * 5]), "pk": past[0], "pv": past[1], **fed}
    reference = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "one.onnx")).run(None, feeds)
    for found, expected in zip(session.run(None, feeds), reference, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_does_not_show_in_plain_onnx(left, tmp_path):
    session = draw_attention(tmp_path, DIALECTS["standard"])
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 5, heads * SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    empty = np.zeros((1, KV_HEADS, 0, SIZE), np.float32)

    def run(parts, mask):
        feeds = {"ids": np.zeros((1, len(mask)), np.int64), "mask": np.array([mask], np.int64), "pk": empty, "pv": empty}
        return session.run(None, {**feeds, **dict(zip("qkv", parts, strict=True))})[0]

    alone = run((q, k, v), [1] * 5)
    widths = ((0, 0), (3, 0) if left else (0, 3), (0, 0))
    padded = run([np.pad(x, widths, constant_values=7.0) for x in (q, k, v)], [0] * 3 + [1] * 5 if left else [1] * 5 + [0] * 3)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, 3:] if left else padded[:, :5], alone, atol=2e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("name", DIALECTS)
def test_norms_and_skip_norms_are_those_of_float64(name, kind, tmp_path):
    target, rng = DIALECTS[name], np.random.default_rng(0)
    weight, shift = (torch.from_numpy(rng.standard_normal(24).astype(np.float32)) for _ in range(2))
    nodes = stored_nodes(tmp_path, {"n.weight": weight, "n.bias": shift}, target)
    dialect = dialect_of(target)
    x, y = (value(label, ir.DataType.FLOAT, "N", 24) for label in "xy")
    call = NormCall(kind, "n.weight", "n.bias" if kind == "layer" else None, 1e-5)
    outputs = [dialect.norm(nodes, x, call), *dialect.skip_norm(nodes, x, y, call, last=False)]
    for output in outputs:
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("N", 24))
    given = {label: rng.standard_normal((5, 24)).astype(np.float32) * 3 for label in "xy"}
    alone, skipped, total = session_of(tmp_path, dialect, nodes, [x, y], outputs).run(None, given)

    def norm(wide):
        if kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        scaled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.numpy()
        return scaled + shift.numpy() if kind == "layer" else scaled

    both = given["x"].astype(np.float64) + given["y"]
    for found, expected in ((alone, norm(given["x"].astype(np.float64))), (skipped, norm(both)), (total, both)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("name", DIALECTS)
def test_activations_are_torchs(name, kind, tmp_path):
    dialect = dialect_of(DIALECTS[name])
    nodes = Nodes({}, {}, "data", DIALECTS[name])
    x = value("x", ir.DataType.FLOAT, "N")
    y = dialect.activate(nodes, x, kind)
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("N",))
    given = np.linspace(-6, 6, 101, dtype=np.float32)
    wide = torch.from_numpy(given).double()
    functional = torch.nn.functional
    expected = {
        "silu": functional.silu(wide),
        "gelu": functional.gelu(wide),
        "gelu_tanh": functional.gelu(wide, approximate="tanh"),
        "relu": functional.relu(wide),
    }[kind]
    np.testing.assert_allclose(session_of(tmp_path, dialect, nodes, [x], [y]).run(None, {"x": given})[0], expected, atol=2e-6)


@pytest.mark.parametrize("name", DIALECTS)
def test_an_unknown_activation_is_refused_by_name(name):
    with pytest.raises(UnsupportedError, match="snake"):
        dialect_of(DIALECTS[name]).activate(Nodes({}, {}, "data"), value("x", ir.DataType.FLOAT, "N"), "snake")


def test_versions_are_the_lowest_that_have_the_operators():
    schemas = {kind: onnx.defs.get_schema(kind).since_version for kind in ("RMSNormalization", "RotaryEmbedding")}
    assert Standard.opset == 23 and max(schemas.values()) == 23 and onnx.defs.get_schema("Attention", 23).since_version == 23
    assert Contrib.opset == 17 == onnx.defs.get_schema("LayerNormalization").since_version
    for dialect in (Standard, Contrib):  # the IR that first allowed the opset, by the checker's own table
        needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", dialect.opset)], True)
        assert dialect.ir_version == needed, needed
