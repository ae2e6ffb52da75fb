"""Which ONNX Runtime CPU kernel is fastest for a quantized linear layer, and how exact it is.

    python benchmarks/cpu_kernels.py [--threads 1 2] [--seconds 0.15]

Every candidate is a graph of one layer ``y = x W`` on the same Gaussian weights and inputs: the fastest run's milliseconds at several
numbers of tokens M, and the relative error of y at M = 128. Candidates:

    fp32        Gemm
    nb8, nb4    MatMulNBits, accuracy level 4, by bits and block; z: with zero points
    dqmm        DynamicQuantizeMatMul: W int8 per channel, x in 8 bits with one scale per tensor
    token       the same with one scale per token, built from Abs, ReduceMax, Div, QuantizeLinear, MatMulIntegerToFloat, Mul
    digits      x in two 7-bit digits through one QGemm, W int8 with scale and zero point per row and 1024 columns (``export/formats``)
    u8u8        QGemm with unsigned weights: shows what the choice of signed ones is worth

MatMulNBits at 8 bits is always asked for accuracy level 4; at the operator's default it dequantizes W on every call. Writes
``benchmarks/results/cpu_kernels.json`` and prints the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measured import write_result

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.external import ExternalWriter
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.nodes import CONTRIB, Nodes

SHAPES = [(384, 640), (384, 2048), (1024, 384), (1024, 1024), (1024, 2048), (1024, 2816), (2816, 1024), (3072, 3072)]
TOKENS = (1, 16, 64, 128, 256)
FORMATS = {
    "fp32": Dense(),
    **{f"nb8 {block}": Blocks(8, block) for block in (32, 64, 128)},
    "nb8 32 z": Blocks(8, 32, zeros=True),
    **{f"nb4 {block}": Blocks(4, block) for block in (32, 64, 128)},
    "digits": Digits(),
}


def per_channel(w_OI: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 codes [I, O] and fp32 scales [O]."""
    scale_O = w_OI.abs().amax(1) / 127
    return (w_OI / scale_O[:, None]).round().to(torch.int8).T.contiguous().numpy(), scale_O.numpy()


def constant(nodes: Nodes, array: np.ndarray) -> ir.Value:
    return nodes.constant(array, array.dtype)


def dqmm(nodes: Nodes, x: ir.Value, w_OI: torch.Tensor) -> ir.Value:
    codes, scale = per_channel(w_OI)
    return nodes.contrib("DynamicQuantizeMatMul", x, constant(nodes, codes), constant(nodes, scale))


def token(nodes: Nodes, x: ir.Value, w_OI: torch.Tensor) -> ir.Value:
    codes, scale = per_channel(w_OI)
    largest = nodes.op("ReduceMax", nodes.op("Abs", x), axes=[1], keepdims=1)
    step, zero = nodes.constant(1 / 127, np.float32), nodes.constant(128, np.uint8)
    quantized = nodes.op("QuantizeLinear", nodes.op("Div", x, largest), step, zero)
    y = nodes.contrib("MatMulIntegerToFloat", quantized, constant(nodes, codes), step, constant(nodes, scale), zero)
    return nodes.op("Mul", y, largest)


def unsigned(nodes: Nodes, x: ir.Value, w_OI: torch.Tensor) -> ir.Value:
    codes, scale = per_channel(w_OI)
    shifted = np.ascontiguousarray((codes.T.astype(np.int16) + 128).astype(np.uint8))
    quantized, step, zero = nodes.op("DynamicQuantizeLinear", x, outputs=3)
    weight = (constant(nodes, shifted), constant(nodes, scale), constant(nodes, np.full(len(scale), 128, np.uint8)))
    return nodes.contrib("QGemm", quantized, step, zero, *weight, transB=1)


BY_HAND: dict[str, Callable[[Nodes, ir.Value, torch.Tensor], ir.Value]] = {"dqmm": dqmm, "token": token, "u8u8": unsigned}


def build(folder: Path, name: str, w_OI: torch.Tensor, threads: int) -> ort.InferenceSession:
    """A session for one candidate on one weight."""
    rows, columns = w_OI.shape
    form = FORMATS.get(name)
    specs = form.parts("w", rows, columns) if form else ()
    (folder / DATA_FILE).unlink(missing_ok=True)
    with ExternalWriter(folder / DATA_FILE, specs) as writer:
        for part, tensor in form.encode("w", w_OI).items() if form else ():
            writer.write(part, tensor)
    nodes = Nodes({spec.name: spec for spec in specs}, writer.offsets, DATA_FILE)
    x = ir.Value(name="x", shape=ir.Shape(("T", columns)), type=ir.TensorType(ir.DataType.FLOAT))
    y = form.multiply(nodes, x, "w", rows, columns) if form else BY_HAND[name](nodes, x, w_OI)
    y.shape, y.type = ir.Shape(("T", rows)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports={"": Contrib.opset, CONTRIB: 1}, name="one")
    ir.save(ir.Model(graph, ir_version=Contrib.ir_version), folder / "one.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(folder / "one.onnx", options, providers=["CPUExecutionProvider"])


def milliseconds(session: ort.InferenceSession, x_TI: np.ndarray, seconds: float) -> float:
    """The fastest of at least seven runs after two that are not counted: what the kernel takes when nobody interrupts it."""
    values: list[float] = []
    until = time.perf_counter() + seconds
    for turn in range(10_000):
        began = time.perf_counter()
        session.run(None, {"x": x_TI})
        values += [1e3 * (time.perf_counter() - began)] if turn > 1 else []
        if time.perf_counter() > until and len(values) >= 7:
            break
    return min(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.15)
    options = parser.parse_args()
    rows = []
    print(f"{'K x N':>12} {'threads':>7} {'kernel':10}" + "".join(f"{f'M={m}':>9}" for m in TOKENS) + "    error")
    with tempfile.TemporaryDirectory() as text:
        for threads in options.threads:
            for k, n in SHAPES:
                w_OI = torch.randn(n, k, generator=torch.Generator().manual_seed(k * n)) * 0.02
                inputs = {m: np.random.default_rng(m).standard_normal((m, k)).astype(np.float32) for m in TOKENS}
                exact = inputs[128].astype(np.float64) @ w_OI.numpy().T.astype(np.float64)
                for name in (*FORMATS, *BY_HAND):
                    session = build(Path(text), name, w_OI, threads)
                    found = session.run(None, {"x": inputs[128]})[0]
                    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
                    row = {
                        "k": k,
                        "n": n,
                        "threads": threads,
                        "kernel": name,
                        "ms": {str(m): milliseconds(session, x, options.seconds) for m, x in inputs.items()},
                        "error": error,
                    }
                    rows.append(row)
                    print(
                        f"{f'{k} x {n}':>12} {threads:>7} {name:10}" + "".join(f"{value:9.3f}" for value in row["ms"].values()) + f"  {error:.5f}", flush=True
                    )
    print("wrote", write_result("cpu_kernels", " ".join(["python", "benchmarks/cpu_kernels.py", *sys.argv[1:]]), {"rows": rows}))


if __name__ == "__main__":
    main()
