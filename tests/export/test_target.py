"""Targets: what each provider computes in."""

import onnx_ir as ir
import pytest

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.target import CPU, Target


def test_each_provider_computes_in_what_its_kernels_have():
    assert Target("cpu", "F32") == CPU
    assert Target("cuda", "F16").float_type == ir.DataType.FLOAT16 and Target("cuda", "BF16").float_type == ir.DataType.BFLOAT16
    for provider, compute in (("cpu", "F16"), ("cpu", "BF16"), ("cuda", "F32")):
        with pytest.raises(UnsupportedError, match=f"{provider} graphs do not compute in {compute}"):
            Target(provider, compute)


def test_plain_onnx_has_no_bf16():
    assert Target("cpu", "F32", standard=True) and Target("cuda", "F16", standard=True)
    with pytest.raises(UnsupportedError, match="plain ONNX graphs do not compute in BF16"):
        Target("cuda", "BF16", standard=True)


def test_an_unknown_provider_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="vulkan"):
        Target("vulkan")


def test_logits_are_of_a_dtype_that_hosts_read():
    assert CPU.logits_type == ir.DataType.FLOAT
    assert Target("cuda", "F16").logits_type == ir.DataType.FLOAT16
    assert Target("cuda", "BF16").logits_type == ir.DataType.FLOAT
