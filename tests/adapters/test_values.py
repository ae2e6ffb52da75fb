"""What is no finite float is refused by the name of its tensor; what is, stays what it was."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.adapters.values import checked
from qlora_tools.errors import CorruptError, NonFiniteError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_come_back_themselves(dtype):
    tensor = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)  # whose sum is beyond the dtype
    assert checked("a", tensor) is tensor


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_come_back_wide_and_equal(dtype):
    tensor = torch.arange(-8, 8).to(dtype)
    assert checked("a", tensor).dtype == torch.float32 and torch.equal(checked("a", tensor), tensor.float())


@pytest.mark.parametrize("tensor", [torch.arange(3), torch.ones(2, dtype=torch.bool), torch.zeros(0, 4), torch.ones(2, dtype=torch.complex64)])
def test_what_holds_no_floats_is_refused(tensor):
    with pytest.raises(CorruptError, match="`m.lora_A` is .*expected floats"):
        checked("m.lora_A", tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_is_enough(value):
    tensor = torch.zeros(5, dtype=torch.float16)
    tensor[3] = value
    with pytest.raises(NonFiniteError, match="`m.lora_A` holds NaN or infinity"):
        checked("m.lora_A", tensor)
    with pytest.raises(NonFiniteError):
        checked("m.lora_A", torch.tensor([value]).to(torch.float8_e5m2))
