"""int8 convolutions on the CPU: which form is fastest, and what a whole ResNet-50 gains.

    python benchmarks/convolutions.py [--threads 1 2] [--rounds 20] [--skip-network | --only-network]

Layers: one convolution on Gaussian weights and a rectified Gaussian input, every candidate in turn, the fastest round's milliseconds and the relative
error against fp32:

    fp32          Conv
    patches       what `qlt export --int8` emits (``export/formats/convolution.py``), both transpositions included
    standard      the same in plain ONNX
    qlinear       QLinearConv between QuantizeLinear and DequantizeLinear; its ranges are those of this very input, which an export does not have
    integer u8    DynamicQuantizeLinear and ConvInteger, unsigned weights; s8: signed
    stored        DequantizeLinear of int8 weights before Conv; folded: with the runtime told to fold it on loading

Network: ResNet-50 with random weights and live normalization statistics, traced and exported to fp32 and int8 by the library, and the fp32 graph
through ``onnxruntime.quantization.quantize_static`` (QDQ, per channel, calibrated on 8 of the benchmark's own images). The last normalization of every
residual branch has a small gain, as in trained networks; with random gains of 1 the logits are chaos, and fp32 itself does not repeat them.

Rounds are interleaved. Writes ``benchmarks/results/convolutions.json`` and prints the tables.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))

from measured import median, write_result

from qlora_tools.export.formats.convolution import Patches

#: (input channels, output channels, kernel, stride, height and width)
LAYERS = {
    "ResNet 7x7 stem": (3, 64, 7, 2, 224),
    "ResNet 3x3 64 @ 56": (64, 64, 3, 1, 56),
    "ResNet 1x1 256-64 @ 56": (256, 64, 1, 1, 56),
    "ResNet 1x1 64-256 @ 56": (64, 256, 1, 1, 56),
    "ResNet 3x3 128 @ 28": (128, 128, 3, 1, 28),
    "ResNet 3x3 256 @ 14": (256, 256, 3, 1, 14),
    "ResNet 3x3 512 @ 7": (512, 512, 3, 1, 7),
    "UNet 3x3 320 @ 32": (320, 320, 3, 1, 32),
    "UNet 3x3 640 @ 16": (640, 640, 3, 1, 16),
    "UNet 3x3 1280 @ 8": (1280, 1280, 3, 1, 8),
}
IMAGE = (1, 3, 224, 224)


def session(model: Any, threads: int, *, fold: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(model if isinstance(model, (bytes, str)) else str(model), options, providers=["CPUExecutionProvider"])


def graph(nodes: list[Any], constants: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> bytes:
    inputs, outputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "layer", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()


def patches(w_OCS: np.ndarray, bias: np.ndarray, x: np.ndarray, size: int, stride: int, folder: Path, *, standard: bool) -> bytes:
    """The library's own nodes, their weights put into the graph."""
    import onnx_ir as ir

    from qlora_tools.export.external import ExternalWriter
    from qlora_tools.export.formats.convolution import Window
    from qlora_tools.export.nodes import Nodes
    from qlora_tools.export.target import Target

    form, pad = Patches(), size // 2
    specs = form.parts("w", w_OCS.shape)
    data = folder / "w.data"
    data.unlink(missing_ok=True)
    with ExternalWriter(data, specs) as writer:
        for name, tensor in form.encode("w", torch.from_numpy(w_OCS)).items():
            writer.write(name, tensor)
    nodes = Nodes({spec.name: spec for spec in specs}, writer.offsets, data.name, Target(standard=standard))
    given = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    y = form.convolve(nodes, given, "w", Window(*((number,) * 2 for number in (size, stride, pad, pad, 1))), nodes.constant(bias, np.float32))
    y.shape, y.type = ir.Shape([None] * 4), ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph([given], [y], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports={"": 21, "com.microsoft": 1}, name="layer")
    ir.save(ir.Model(made, ir_version=10), folder / "w.onnx")
    return onnx.load(folder / "w.onnx").SerializeToString()


def candidates(shape: tuple[int, int, int, int, int], folder: Path) -> tuple[dict[str, tuple[bytes, bool]], np.ndarray]:
    """Name -> (graph, whether the runtime folds), and the input."""
    channels, out, size, stride, edge = shape
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((out, channels, size, size)) / np.sqrt(channels * size**2)).astype(np.float32)
    bias = (rng.standard_normal(out) * 0.1).astype(np.float32)
    x = np.maximum(rng.standard_normal((1, channels, edge, edge)), 0).astype(np.float32)
    node, window = helper.make_node, {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [size // 2] * 4}
    plain = graph([node("Conv", ["x", "w", "b"], ["y"], **window)], {"w": w, "b": bias}, x.shape)
    y = session(plain, 1).run(None, {"x": x})[0]
    ws = (np.abs(w).max((1, 2, 3)) / 127).astype(np.float32)
    codes = np.round(w / ws[:, None, None, None]).astype(np.int8)
    xs, ys = np.float32(x.max() / 255), np.float32((y.max() - y.min()) / 255)
    fixed = {"xs": xs, "xz": np.uint8(0), "w": codes, "ws": ws, "wz": np.zeros(out, np.int8), "ys": ys, "yz": np.uint8(round(float(-y.min() / ys)))}
    static = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["r"], **window),
        node("DequantizeLinear", ["r", "ys", "yz"], ["y"]),
    ]
    stored = graph(
        [node("DequantizeLinear", ["w", "ws", "wz"], ["d"], axis=0), node("Conv", ["x", "d", "b"], ["y"], **window)],
        {"w": codes, "ws": ws, "wz": fixed["wz"], "b": bias},
        x.shape,
    )

    def integer(weight: np.ndarray, zero: list[str]) -> bytes:
        nodes = [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("ConvInteger", ["q", "w", "z", *zero], ["i"], **window)]
        nodes += [node("Cast", ["i"], ["f"], to=TensorProto.FLOAT), node("Mul", ["s", "ws"], ["t"]), node("Mul", ["f", "t"], ["m"])]
        constants = {"w": weight, "ws": ws[:, None, None], "b": bias[:, None, None], "wz": np.uint8(128)}
        return graph([*nodes, node("Add", ["m", "b"], ["y"])], constants, x.shape)

    return {
        "fp32": (plain, False),
        "patches": (patches(w, bias, x, size, stride, folder, standard=False), False),
        "standard": (patches(w, bias, x, size, stride, folder, standard=True), False),
        "qlinear": (graph(static, fixed | {"b": np.round(bias / (xs * ws)).astype(np.int32)}, x.shape), False),
        "integer u8": (integer((codes.astype(np.int16) + 128).astype(np.uint8), ["wz"]), False),
        "integer s8": (integer(codes, []), False),
        "stored": (stored, False),
        "folded": (stored, True),
    }, x


def race(sessions: Mapping[str, ort.InferenceSession], feeds: Mapping[str, np.ndarray], rounds: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Milliseconds of every round, taken in turn, and the first output of each."""
    answers = {name: one.run(None, dict(feeds))[0] for name, one in sessions.items()}
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, one in sessions.items():
            began = time.perf_counter()
            one.run(None, dict(feeds))
            spent[name].append((time.perf_counter() - began) * 1e3)
    return spent, answers


def rows(spent: Mapping[str, list[float]], answers: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    reference = answers["fp32"].astype(np.float64)
    return {
        name: {
            "best_ms": min(times),
            "median_ms": median(times),
            "speedup": min(spent["fp32"]) / min(times),
            "error": float(np.linalg.norm(answers[name] - reference) / np.linalg.norm(reference)),
        }
        for name, times in spent.items()
    }


def resnet(folder: Path) -> Path:
    """A checkpoint of ResNet-50's shape."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).train()
    for layer in model.modules():
        if type(layer).__name__ == "ResNetBottleNeckLayer":
            layer.layer[-1].normalization.weight.data.fill_(0.2)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the average over all images
    with torch.no_grad():
        for seed in range(3):
            model(torch.randn(4, *IMAGE[1:], generator=torch.Generator().manual_seed(seed)))
    model.eval().save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def network(folder: Path, threads: list[int], rounds: int) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from qlora_tools.checkpoint.logical import open_checkpoint
    from qlora_tools.export.schemes import scheme_of
    from qlora_tools.export.traced.export import draw, fill, write_traced
    from qlora_tools.export.traced.inputs import subject_of
    from qlora_tools.export.traced.parity import check_traced

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._seeds = iter(range(100, 108))

        def get_next(self) -> dict[str, np.ndarray] | None:
            seed = next(self._seeds, None)
            return None if seed is None else {"pixel_values": np.random.default_rng(seed).standard_normal(IMAGE).astype(np.float32)}

    checkpoint = open_checkpoint(resnet(folder))
    drawn = draw(subject_of(checkpoint.config), checkpoint, checkpoint.config)
    found: dict[str, Any] = {"parity": {}, "file_bytes": {}}
    for scheme in ("fp32", "int8"):
        (folder / scheme).mkdir()
        export = fill(drawn, checkpoint, scheme_of(scheme))
        write_traced(export, checkpoint, folder / scheme)
        found["parity"][scheme] = check_traced(export, checkpoint, folder / scheme).summary
        found["file_bytes"][scheme] = export.file_bytes
    onnx.save(onnx.load(folder / "fp32/model.onnx"), folder / "whole.onnx")  # the quantizer follows no external data
    quant_pre_process(str(folder / "whole.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
    quantize_static(str(folder / "prepared.onnx"), str(folder / "static.onnx"), Images(), per_channel=True, **kinds)
    found["file_bytes"]["quantize_static"] = (folder / "static.onnx").stat().st_size
    feeds = {"pixel_values": np.random.default_rng(7).standard_normal(IMAGE).astype(np.float32)}
    paths = {"fp32": folder / "fp32/model.onnx", "int8": folder / "int8/model.onnx", "quantize_static": folder / "static.onnx"}
    for count in threads:
        found[f"threads {count}"] = rows(*race({name: session(path, count) for name, path in paths.items()}, feeds, rounds))
    return found


def show(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    cells = (f"{name} {row['best_ms']:.2f} ms ({row['speedup']:.2f}x, error {row['error']:.4f})" for name, row in found.items())
    print(f"{title}: {'; '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip-network", action="store_true")
    parser.add_argument("--only-network", action="store_true")
    asked = parser.parse_args()
    content: dict[str, Any] = {"layers": {}}
    with tempfile.TemporaryDirectory() as name:
        for title, shape in LAYERS.items() if not asked.only_network else ():
            graphs, x = candidates(shape, Path(name))
            for threads in asked.threads:
                sessions = {kind: session(model, threads, fold=fold) for kind, (model, fold) in graphs.items()}
                found = rows(*race(sessions, {"x": x}, asked.rounds))
                content["layers"].setdefault(title, {})[f"threads {threads}"] = found
                show(f"{title}, {threads} threads", found)
        if not asked.skip_network:
            content["resnet50"] = network(Path(name), asked.threads, asked.rounds)
            for threads in asked.threads:
                show(f"ResNet-50, {threads} threads", content["resnet50"][f"threads {threads}"])
            print(content["resnet50"]["parity"], content["resnet50"]["file_bytes"])
    print(write_result("convolutions", f"python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip(), content))


if __name__ == "__main__":
    main()
