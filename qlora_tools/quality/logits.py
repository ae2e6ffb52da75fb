"""Logits to log-probabilities, a few rows at a time in float64.

Every number of this room starts here. A model hands over one window's logits [T, V] in whatever float it
computes; rows are widened in slices, so that beyond the window itself only ``_SLICE_BYTES`` are in use however
large the vocabulary.

Axes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, NonFiniteError

#: A model: token ids i64[T] of one window -> logits [T, V] (numpy or torch, any float). Called anew for every window.
LogitsOf = Callable[[NDArray[np.int64]], Any]
F64 = NDArray[np.float64]
_SLICE_BYTES = 32 << 20


def as_rows(logits: Any, n_rows: int, what: str) -> NDArray[Any]:
    """Logits as a float numpy matrix [T, V]; a leading batch axis of one is dropped.

    Raises:
        IncompatibleError: not one row per position.
    """
    if hasattr(logits, "detach"):  # torch, without importing it; numpy has no bfloat16
        logits = logits.detach().cpu()
        logits = logits.float().numpy() if logits.element_size() < 4 else logits.numpy()
    rows = np.asarray(logits)
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.ndim != 2 or rows.shape[0] != n_rows:
        raise IncompatibleError(f"{what} gave logits of shape {list(rows.shape)}, expected [{n_rows}, vocabulary]")
    return rows


def slices(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Row ranges whose float64 copy stays within the slice budget."""
    step = max(1, _SLICE_BYTES // (8 * max(n_columns, 1)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def log_softmax(rows_TV: NDArray[Any], what: str) -> F64:
    """Natural log-probabilities f64[T, V]. A logit of -inf is a forbidden token; NaN or +inf is an error.

    Raises:
        NonFiniteError: a row has no finite maximum.
    """
    wide_TV = rows_TV.astype(np.float64)
    top_T1 = wide_TV.max(axis=1, keepdims=True)
    if not np.isfinite(top_T1).all():
        raise NonFiniteError(f"{what} gave NaN or infinite logits", hint="the weights or a scale overflowed: inspect the checkpoint, or use a wider dtype")
    wide_TV -= top_T1
    wide_TV -= np.log(np.exp(wide_TV).sum(axis=1, keepdims=True))
    return wide_TV
