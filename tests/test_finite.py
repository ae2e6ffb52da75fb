"""NaN and infinity are found wherever they are, and named with where."""

from __future__ import annotations

import pytest
import torch

from qlora_tools import finite
from qlora_tools.errors import NonFiniteError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_count_and_first_index_are_told(monkeypatch, value, dtype):
    monkeypatch.setattr(finite, "_SLAB_ELEMENTS", 6)
    tensor = torch.zeros(7, 3, dtype=dtype)
    tensor[4, 2] = tensor[6, 0] = value
    with pytest.raises(NonFiniteError, match=r"^w: 2 of 21 values are NaN or infinite, the first at index \[14, 2\]$"):
        finite.refuse_non_finite("w", tensor, row=10)
    assert not finite.is_finite(tensor)


def test_finite_values_integers_and_nothing_pass():
    for tensor in (torch.full((3,), 3e38), torch.tensor(1.0), torch.zeros(0, 4), torch.arange(3)):
        finite.refuse_non_finite("w", tensor)
    assert finite.is_finite(torch.full((1000,), 3e38))


def test_a_scalar_is_named_too():
    with pytest.raises(NonFiniteError, match=r"index \[\]"):
        finite.refuse_non_finite("w", torch.tensor(float("nan")))
