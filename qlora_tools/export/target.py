"""What a graph is drawn for: the execution provider, the dtype it computes in, and whose operators it may use."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qlora_tools.errors import UnsupportedError
from qlora_tools.specs import dtype

PROVIDERS = ("cpu", "cuda")
#: dtypes (safetensors' names) that each provider's kernels compute in, the preferred one first. The CPU has no 16-bit MatMul, CUDA no fp32 attention.
COMPUTE = {"cpu": ("F32",), "cuda": ("F16", "BF16")}
#: Plain ONNX: no bf16, DequantizeLinear scales with fp32 and fp16 only.
STANDARD = ("F32", "F16")


@dataclass(frozen=True)
class Target:
    """``compute`` is the dtype of everything between token ids and logits. ``standard`` keeps to plain ONNX operators, for other runtimes."""

    provider: str = "cpu"
    compute: str = "F32"
    standard: bool = False

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise UnsupportedError(f"no export for provider `{self.provider}`", hint=f"providers: {', '.join(PROVIDERS)}")
        allowed = STANDARD if self.standard else COMPUTE[self.provider]
        if self.compute not in allowed:
            what = "plain ONNX" if self.standard else self.provider
            raise UnsupportedError(f"{what} graphs do not compute in {self.compute}", hint=f"choose {' or '.join(allowed)}")

    @property
    def float_type(self) -> ir.DataType:
        """``compute`` as ONNX names it."""
        code = dtype(self.compute).onnx
        assert code is not None
        return ir.DataType(code)

    @property
    def logits_type(self) -> ir.DataType:
        """dtype of the logits: fp32 where the graph computes in bf16, which hosts (numpy, onnxruntime-genai's search) do not read."""
        return ir.DataType.FLOAT if self.compute == "BF16" else self.float_type


CPU = Target()
