"""Sums over large tensors: fp32 products, fp64 totals, one slab of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_SLAB_ELEMENTS = 1 << 20


def row_slabs(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices along axis 0 of about a million elements each; one empty-safe slice for a scalar or an empty tensor."""
    if not tensor.ndim or not tensor.numel():
        yield slice(None) if tensor.ndim else ...  # type: ignore[misc]
        return
    step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)


def dot(left: torch.Tensor, right: torch.Tensor) -> float:
    """Inner product of two fp32 tensors of one shape: products and row sums in fp32, rows added in fp64."""
    if not left.numel():
        return 0.0
    rows = left.shape[0] if left.ndim else 1
    return float(torch.linalg.vecdot(left.reshape(rows, -1), right.reshape(rows, -1)).double().sum())


def relative_error(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    """||approximation - exact|| / ||exact|| (Frobenius); 0 when both are zero."""
    error = norm = 0.0
    for rows in row_slabs(exact):
        reference = exact[rows].float()
        difference = approximation[rows].float() - reference
        error += dot(difference, difference)
        norm += dot(reference, reference)
    return math.sqrt(error / norm if norm else error)
