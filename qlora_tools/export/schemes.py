"""Which weight format each matrix of a decoder gets, by scheme, target and size.

CPU. The choices rest on ``benchmarks/cpu_kernels.py``: on CPUs with 8-bit dot products the two-digit format runs
prefill several times faster than ``MatMulNBits`` at the same error; a small matrix is better off with the
single node. Attention's matrices stay in blocks of 32 with zero points: the rounding of a weight is the same for
every token, attention does not average it away as it does the rounding of activations, and with one scale per row
these few matrices would make most of the divergence. ``MatMulBnb4`` is never used on the CPU: it dequantizes the whole matrix on every call, so ``nf4``
is carried as int8 there. ``w8a8`` takes one digit of 8 bits everywhere it pays: the fastest prompts, and several times the divergence.

CUDA. There are no 8-bit activations: int8 and int4 are ``MatMulNBits`` in the shapes its tensor-core kernels take, symmetric, blocks of 32, rows
padded to what they want. Columns that are not whole blocks go without those kernels, and without padding. ``nf4`` is ``MatMulBnb4``, in the
checkpoint's own bytes where it has them; tables and head, which have no such bytes, are int8.

``head_bits=8`` stores the head of an int4 graph in 8 bits, a table that is also the embedding with it. Measured on two trained models of 11 M with a tied
head of 14 % of the weights: half the divergence for 11 % more bytes, where all of int8 takes 99 % of it for 87 % more; the one product takes 1.4 times as
long at batch 1, so it is not the default.

Plain ONNX. ``DequantizeLinear`` before ``MatMul``, which ONNX Runtime fuses into ``MatMulNBits`` and others run as they can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.formats.experts import CUDA_BLOCK
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.formats.normal_floats import NormalFloats
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.export.target import COMPUTE, CPU, Target

#: Schemes that do not round, and the dtype that a graph of each computes in.
FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
NAMES = (*FLOATS, "int8", "w8a8", "int4", "nf4")
#: Below this many weights the single MatMulNBits node decodes faster than the two-digit group of nodes.
SMALL = 1 << 18
_BLOCK = 32
#: Rows that CUDA's mixed-precision kernels want a multiple of, by bits.
_CUDA_ROWS = {4: 64, 8: 32}
#: Columns that the same kernels take at a time.
CUDA_COLUMNS = 64


@dataclass(frozen=True)
class Scheme:
    """``name`` is what was asked for, ``carried`` what the weights are stored as; ``note`` says what is worth knowing about that. ``head_bits``: of
    the head of an int4 graph."""

    name: str
    carried: str
    note: str | None = None
    target: Target = CPU
    head_bits: int = 4

    def linear(self, role: str, rows: int, columns: int) -> WeightFormat:
        """Format of a linear in a layer (roles of ``models.decoder``) or of an untied ``head``."""
        if self.dense:
            return Dense(self.target.compute, self.target.compute)
        bits = self.head_bits if role == "head" and self.carried == "int4" else self._bits
        if self.target.standard:
            return StandardBlocks(bits, compute=self.target.compute)
        if self.target.provider == "cuda":
            return self._cuda_linear(role, columns, bits)
        if self.carried == "int4":
            return Blocks(bits)
        if self.carried == "w8a8":
            return Digits(digits=1) if rows * columns >= SMALL else Blocks(8, zeros=True)
        if role in ("qkv", "output") or (role != "head" and rows * columns < SMALL):
            return Blocks(8, zeros=True)
        return Digits()

    def tied(self, rows: int, columns: int) -> WeightFormat:
        """Format of one table that is both embedding and head. Plain ONNX looks no 4-bit values up, so it is 8 bits there."""
        if self.target.standard and not self.dense:
            return StandardBlocks(8, compute=self.target.compute)
        form = self.linear("head", rows, columns)
        return replace(form, remainder=True) if isinstance(form, Digits) else form

    def expert(self, *columns: int) -> WeightFormat:
        """Format of the matrices of experts, which read ``columns`` inputs: one that a single node for all of them takes, where there is such a node."""
        if self.dense or self.target.standard:
            return self.linear("expert", 0, columns[0])
        if self.target.provider == "cuda":
            whole = all(size % CUDA_BLOCK == 0 for size in columns)
            return Blocks(self._bits, CUDA_BLOCK if whole else _cuda_block(*columns), compute=self.target.compute)
        return Blocks(self._bits, zeros=self._bits == 8)

    def table(self, dtype: str) -> WeightFormat:
        """Format of an embedding that is only looked up; ``dtype`` is what the checkpoint stores."""
        compute = self.target.compute
        if self.dense:
            return Dense(compute, compute)
        if self.target.standard:
            return Dense(stored=dtype if dtype in ("BF16", "F16") else compute, compute=compute)
        if self.target.provider == "cuda":
            return Blocks(8, _BLOCK, compute=compute)
        if self.carried == "int4":
            return Blocks(8)
        return Dense(stored=dtype if dtype in ("BF16", "F16") else "F32")

    @property
    def dense(self) -> bool:
        """Whether weights are stored as floats."""
        return self.carried in FLOATS

    @property
    def _bits(self) -> int:
        return 4 if self.carried == "int4" else 8

    def _cuda_linear(self, role: str, columns: int, bits: int) -> WeightFormat:
        compute = self.target.compute
        if self.carried == "nf4" and role != "head" and NormalFloats.fits(columns):
            return NormalFloats(compute)
        return Blocks(bits, _cuda_block(columns), compute=compute, multiple=_CUDA_ROWS[bits] if columns % CUDA_COLUMNS == 0 else 1)


def _cuda_block(*columns: int) -> int:
    """32; 16 where that divides columns that are no multiple of 64. ONNX Runtime gives every matrix of whole blocks of 32 to its mixed-precision kernels, and
    their layout holds 64 columns at a time: others fail at prompts and come out wrong at single steps (``CheckFpAIntBEligibility`` in matmul_nbits.cc)."""
    return _BLOCK // 2 if any(size % CUDA_COLUMNS and size % _BLOCK == 0 for size in columns) else _BLOCK


def target_for(scheme: str, provider: str, *, compute: str | None = None, standard: bool = False) -> Target:
    """The target that ``scheme`` is drawn for on ``provider``. ``compute``: F16 or BF16 for quantized weights on CUDA; float schemes say it themselves.

    Raises:
        UnsupportedError: the provider cannot compute so. UsageError: ``compute`` contradicts the scheme.
    """
    wanted = FLOATS.get(scheme)
    if wanted is not None and compute is not None and compute != wanted:
        raise UsageError(f"{scheme} weights in a graph that computes in {compute}", hint=f"leave the dtype out: {scheme} computes in {wanted}")
    if provider in COMPUTE and wanted is not None and wanted not in COMPUTE[provider] and not standard:
        offered = " or ".join(name for name, kind in FLOATS.items() if kind in COMPUTE[provider])
        reason = "its attention operator takes 16-bit floats only" if provider == "cuda" else "it has no 16-bit matrix product"
        raise UnsupportedError(f"{provider} graphs do not compute in {scheme}: {reason}", hint=f"choose {offered}")
    return Target(provider, wanted or compute or (COMPUTE[provider][0] if provider in COMPUTE else "F32"), standard)


def default_scheme(target: Target) -> str:
    """The scheme that stores weights as the target computes."""
    return next(name for name, kind in FLOATS.items() if kind == target.compute)


def scheme_of(name: str | Scheme, target: Target = CPU, head_bits: int | None = None) -> Scheme:
    """The scheme ``name`` in graphs for ``target``; one that is known already is given back.

    Raises:
        UnsupportedError: no such scheme, or floats that the target does not compute in. UsageError: ``head_bits`` for another scheme than int4, or
        a number that is neither 4 nor 8.
    """
    if isinstance(name, Scheme):
        return name
    if head_bits is not None and (name != "int4" or head_bits not in _CUDA_ROWS):
        raise UsageError(
            f"--head-bits {head_bits} with {name}", hint="it is 4 or 8, and about --int4 alone: the other schemes have a head of 8 bits, or floats"
        )
    if name not in NAMES:
        raise UnsupportedError(f"no scheme `{name}`", hint=f"schemes: {', '.join(NAMES)}")
    if name == "w8a8" and (target.standard or target.provider != "cpu"):
        raise UnsupportedError("w8a8 has kernels on the CPU only", hint="take int8, whose weights are the same")
    if name in FLOATS and FLOATS[name] != target.compute:
        raise UnsupportedError(f"{name} in a graph that computes in {target.compute}", hint=f"choose {default_scheme(target)}")
    if name != "nf4":
        return Scheme(name, name, target=target, head_bits=head_bits or 4)
    if target.standard:
        return Scheme(name, "int8", "nf4 has no form in plain ONNX; its values are carried as int8", target)
    if target.provider == "cpu":
        return Scheme(name, "int8", "nf4 has no fast kernel on the CPU; its values are carried as int8", target)
    return Scheme(
        name,
        "nf4",
        "nf4 is the slowest of the quantized schemes on CUDA: several tokens at once dequantize whole matrices; int8 carries its values too",
        target,
    )
