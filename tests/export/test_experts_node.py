"""One node for all experts, on the bytes of one tall matrix: against a float64 reference, and the operators' habits that the code rests on."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.formats.experts import has_one_node

E, H, N, K, T = 5, 64, 96, 2, 9
FORMS = {"fp32": Dense(), "int4": Blocks(4), "int8": Blocks(8, zeros=True), "int4, blocks of 16": Blocks(4, 16), "int8 without zeros": Blocks(8)}


def weights(seed=0):
    """(gate, up, down), each [E, rows, columns]."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((E, N, H)) / 8, draw.standard_normal((E, N, H)) / 8, draw.standard_normal((E, H, N)) / 10


def inputs(seed=1):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((T, H)), 2 * draw.standard_normal((T, E))


def tall(form, name, w_ERC):
    """(parts, what they mean in float64) of all experts below one another."""
    rows = torch.from_numpy(w_ERC.reshape(-1, w_ERC.shape[-1])).float()
    parts = form.encode(name, rows)
    return {part: tensor.numpy() for part, tensor in parts.items()}, form.decode(name, parts, w_ERC.shape[-1]).double().numpy().reshape(w_ERC.shape)


def reference(x_TH, scores_TE, gate, up, down, *, normalized):
    """float64; the lower-numbered of two experts that score alike."""
    weights_TE = np.exp(scores_TE - scores_TE.max(-1, keepdims=True))
    weights_TE /= weights_TE.sum(-1, keepdims=True)
    y_TH = np.zeros_like(x_TH)
    for token, chosen in enumerate(np.argsort(-weights_TE, -1, kind="stable")[:, :K]):
        shares = weights_TE[token, chosen]
        for expert, share in zip(chosen, shares / shares.sum() if normalized else shares, strict=True):
            inner = gate[expert] @ x_TH[token]
            y_TH[token] += share * (down[expert] @ (inner / (1 + np.exp(-inner)) * (up[expert] @ x_TH[token])))
    return y_TH


def run_node(kind, names, tensors, feeds, **attributes):
    node = helper.make_node(kind, names, ["y"], domain="com.microsoft", k=K, activation_type="swiglu", swiglu_fusion=1, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", value.shape[1]]) for name, value in feeds.items()]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.astype(np.float32) for name, value in feeds.items()})[0]


def joint(form, x_TH, scores_TE, *, normalized, own_weights=True):
    """(what the node computes, what it means)."""
    gate, up, down = weights()
    woven = np.stack([gate, up], 2).reshape(E, 2 * N, H)
    first, first_dense = tall(form, "a", woven)
    second, second_dense = tall(form, "b", down)
    tensors = {name: value.reshape(E, -1, value[0].size) for name, value in {**first, **second}.items()}
    softmax = np.exp(scores_TE) / np.exp(scores_TE).sum(-1, keepdims=True)
    feeds = {"x": x_TH, "scores": scores_TE}
    if isinstance(form, Dense):
        found = run_node("MoE", ["x", "scores", "a", "", "b"], tensors, feeds, normalize_routing_weights=int(normalized))
    else:
        zeros = [name if name in tensors else "" for name in ("a.zero", "b.zero")]
        names = ["x", "scores", "a", "a.scale", "", "b", "b.scale", "", "", "", "", *zeros, "", "weights" if own_weights else ""]
        feeds |= {"weights": softmax} if own_weights else {}
        options = {"expert_weight_bits": form.bits, "block_size": form.block, "normalize_routing_weights": int(normalized), "accuracy_level": 4}
        while not names[-1]:
            names.pop()
        found = run_node("QMoE", names, tensors, feeds, **options)
    return found, reference(x_TH, scores_TE, first_dense[:, ::2], first_dense[:, 1::2], second_dense, normalized=normalized)


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_the_node_multiplies_by_what_the_bytes_mean(name, normalized):
    assert error(*joint(FORMS[name], *inputs(), normalized=normalized)) < (1e-6 if name == "fp32" else 0.03)


def test_qmoe_normalises_weights_unasked_unless_they_are_given():
    """The reason why they always are; should this fail one day, an input can go."""
    x_TH, scores_TE = inputs()
    found, unnormalized = joint(Blocks(4), x_TH, scores_TE, normalized=False, own_weights=False)
    _, normalized = joint(Blocks(4), x_TH, scores_TE, normalized=True)
    assert error(found, unnormalized) > 0.1 and error(found, normalized) < 0.03


def test_no_tokens_give_no_rows():
    x_TH, scores_TE = inputs()
    for form in FORMS.values():
        assert joint(form, x_TH[:0], scores_TE[:0], normalized=True)[0].shape == (0, H)


def test_tied_scores_give_one_of_the_tied_experts():
    x_TH, _ = inputs()
    scores_TE = np.zeros((T, E))
    scores_TE[:, 4] = 1.0  # 4 is best, and then all the others
    gate, up, down = weights()
    found = joint(Dense(), x_TH, scores_TE, normalized=True)[0]
    for token in range(T):
        possible = []
        for second in range(4):
            told = scores_TE[token : token + 1].copy()
            told[0, second] += 1e-9
            possible.append(error(found[token], reference(x_TH[token : token + 1], told, gate, up, down, normalized=True)[0]))
        assert min(possible) < 1e-5


@pytest.mark.parametrize(
    ("form", "columns", "taken"),
    [
        (Dense(), (57, 75), True),
        (Dense("BF16", "F32"), (64, 64), False),
        (Blocks(4), (64, 96), True),
        (Blocks(4), (64, 80), False),
        (Blocks(8, zeros=True), (57, 64), False),
        (Blocks(4, multiple=64), (64, 64), False),
        (Blocks(4, 32, compute="F16"), (64, 64), False),
        (Blocks(8, 64, compute="F16"), (64, 128), True),
        (Digits(), (64, 64), False),
    ],
)
def test_which_experts_have_one_node(form, columns, taken):
    assert has_one_node(form, *columns) == taken
