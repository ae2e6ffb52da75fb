"""Which weight format each matrix of a decoder gets, by scheme, provider and size.

The choices rest on ``benchmarks/cpu_kernels.py``: on CPUs with 8-bit dot products the two-digit format runs
prefill several times faster than ``MatMulNBits`` at the same error; a small matrix is better off with the
single node. Attention's matrices stay in blocks of 32 with zero points: the rounding of a weight is the same for
every token, attention does not average it away as it does the rounding of activations, and with one scale per row
these few matrices would make most of the divergence. ``MatMulBnb4`` is never used on the CPU: it dequantizes the whole matrix on every call, so ``nf4``
is carried as int8 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.target import CPU, Target

NAMES = ("fp32", "int8", "int4", "nf4")
#: Below this many weights the single MatMulNBits node decodes faster than the two-digit group of nodes.
SMALL = 1 << 18


@dataclass(frozen=True)
class Scheme:
    """``name`` is what was asked for, ``carried`` what the weights are stored as; ``note`` says so where the two differ."""

    name: str
    carried: str
    note: str | None = None

    def linear(self, role: str, rows: int, columns: int) -> WeightFormat:
        """Format of a linear in a layer (roles of ``models.decoder``) or of an untied ``head``."""
        if self.carried == "fp32":
            return Dense()
        if self.carried == "int4":
            return Blocks(4)
        if role in ("qkv", "output") or (role != "head" and rows * columns < SMALL):
            return Blocks(8, zeros=True)
        return Digits()

    def tied(self, rows: int, columns: int) -> WeightFormat:
        """Format of one table that is both embedding and head."""
        form = self.linear("head", rows, columns)
        return replace(form, remainder=True) if isinstance(form, Digits) else form

    def packs_feed(self, rows: int, columns: int) -> bool:
        """Whether gate and up are one matrix. Two spare the two-digit format a copy that costs more than the node it saves."""
        return self.carried != "fp32" and not isinstance(self.linear("gate_up", rows, columns), Digits)

    def table(self, dtype: str) -> WeightFormat:
        """Format of an embedding that is only looked up; ``dtype`` is what the checkpoint stores."""
        if self.carried == "fp32":
            return Dense()
        if self.carried == "int4":
            return Blocks(8)
        return Dense(stored=dtype if dtype in ("BF16", "F16") else "F32")


def scheme_of(name: str, target: Target = CPU) -> Scheme:
    """The scheme ``name`` in graphs for ``target``.

    Raises:
        UnsupportedError: no such scheme, or a target without graphs yet.
    """
    if target.provider != "cpu":
        raise UnsupportedError(f"no export for provider `{target.provider}` yet", hint="providers: cpu")
    if name not in NAMES:
        raise UnsupportedError(f"no scheme `{name}`", hint=f"schemes: {', '.join(NAMES)}")
    if name == "nf4":
        return Scheme(name, "int8", note="nf4 has no fast kernel on the CPU; its values are carried as int8")
    return Scheme(name, name)
