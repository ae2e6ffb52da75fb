"""Which format each matrix gets, on each provider."""

import pytest

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.formats.normal_floats import NormalFloats
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.export.schemes import FLOATS, NAMES, SMALL, default_scheme, scheme_of, target_for
from qlora_tools.export.target import Target

BIG = (2048, 2048)
ROLES = ("qkv", "output", "gate", "up", "down", "head")


@pytest.mark.parametrize("compute", ["F16", "BF16"])
@pytest.mark.parametrize(("name", "bits", "rows"), [("int8", 8, 32), ("int4", 4, 64)])
def test_cuda_gets_blocks_in_the_shapes_of_its_fast_kernels(name, bits, rows, compute):
    scheme = scheme_of(name, Target("cuda", compute))
    for role in ROLES:
        form = scheme.linear(role, 1000, 2048)
        assert form == Blocks(bits, 32, compute=compute, multiple=rows)
        stored = form.parts("w", 1000, 2048)[0].shape[0]
        assert stored % rows == 0 and stored - 1000 < rows
    assert scheme.tied(50257, 2048) == scheme.linear("head", 50257, 2048)
    assert scheme.table("BF16") == Blocks(8, 32, compute=compute)


def test_columns_that_are_no_whole_blocks_are_not_padded_for_kernels_that_cannot_take_them():
    scheme = scheme_of("int4", Target("cuda", "F16"))
    assert scheme.linear("down", 1000, 2000) == Blocks(4, 32, compute="F16"), "32 is no divisor: other kernels take it"


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("columns", [96, 160, 2080])
def test_columns_that_the_fast_kernels_would_take_and_compute_wrongly_get_other_blocks(name, bits, columns):
    """Whole blocks of 32 that are no multiple of 64: every such matrix must stay away from them, experts' too."""
    scheme = scheme_of(name, Target("cuda", "BF16"))
    assert scheme.linear("down", 128, columns) == Blocks(bits, 16, compute="BF16")
    assert scheme.expert(128, columns) == Blocks(bits, 16, compute="BF16") and scheme.expert(128, 64).block == 64


def test_nf4_on_cuda_is_the_operator_of_its_name_except_where_that_cannot_serve():
    scheme = scheme_of("nf4", Target("cuda", "F16"))
    assert scheme.carried == "nf4" and "slow" in scheme.note
    assert scheme.linear("qkv", *BIG) == NormalFloats("F16")
    for form in (scheme.linear("qkv", 2048, 2080), scheme.linear("head", *BIG), scheme.tied(*BIG)):
        assert isinstance(form, Blocks) and form.bits == 8


def test_nf4_elsewhere_is_carried_as_int8_and_says_so():
    for target in (Target(), Target("cpu", "F32", standard=True), Target("cuda", "F16", standard=True)):
        scheme = scheme_of("nf4", target)
        assert scheme.carried == "int8" and "int8" in scheme.note


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_two_digit_products_are_the_cpus_alone(provider):
    target = target_for("int8", provider)
    assert isinstance(scheme_of("int8", target).linear("down", *BIG), Digits) is (provider == "cpu")
    assert BIG[0] * BIG[1] > SMALL


def test_eight_bit_activations_are_for_the_cpu_alone():
    scheme = scheme_of("w8a8")
    assert scheme.linear("qkv", *BIG) == scheme.linear("down", *BIG) == Digits(digits=1)
    assert scheme.tied(*BIG) == Digits(digits=1, remainder=True)
    for target in (Target("cuda", "F16"), Target("cpu", "F32", standard=True)):
        with pytest.raises(UnsupportedError, match="w8a8 has kernels on the CPU only"):
            scheme_of("w8a8", target)


def test_plain_onnx_quantizes_to_blocks_that_fuse_and_tables_to_what_it_can_look_up():
    scheme = scheme_of("int4", Target("cpu", "F32", standard=True))
    assert scheme.linear("down", *BIG) == StandardBlocks(4) and scheme.tied(*BIG) == StandardBlocks(8)
    assert scheme.table("BF16") == Dense(stored="BF16", compute="F32")
    assert scheme_of("fp32", Target("cpu", "F32", standard=True)).linear("down", *BIG) == Dense()


@pytest.mark.parametrize(("name", "compute"), FLOATS.items())
def test_float_schemes_store_what_the_graph_computes_in(name, compute):
    target = target_for(name, "cpu" if compute == "F32" else "cuda")
    scheme = scheme_of(name, target)
    assert target.compute == compute and scheme.dense and default_scheme(target) == name
    assert scheme.linear("down", *BIG) == scheme.table("BF16") == scheme.tied(*BIG) == Dense(compute, compute)


def test_the_target_of_a_scheme():
    assert target_for("int4", "cpu") == Target()
    assert target_for("int4", "cuda") == Target("cuda", "F16") and target_for("int4", "cuda", compute="BF16") == Target("cuda", "BF16")
    assert target_for("bf16", "cuda") == Target("cuda", "BF16")
    assert target_for("fp16", "cpu", standard=True) == Target("cpu", "F16", standard=True)


def test_floats_that_a_provider_does_not_compute_in_are_refused_with_those_it_does():
    with pytest.raises(UnsupportedError, match="attention operator") as caught:
        target_for("fp32", "cuda")
    assert "fp16 or bf16" in caught.value.hint
    with pytest.raises(UnsupportedError, match="no 16-bit") as caught:
        target_for("fp16", "cpu")
    assert "fp32" in caught.value.hint
    with pytest.raises(UsageError, match="bf16 weights in a graph that computes in F16"):
        target_for("bf16", "cuda", compute="F16")
    with pytest.raises(UnsupportedError, match="fp32 in a graph that computes in F16"):
        scheme_of("fp32", Target("cuda", "F16"))
    with pytest.raises(UnsupportedError, match="vulkan"):
        target_for("int4", "vulkan")


def test_an_unknown_scheme_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedError, match="no scheme `int2`") as caught:
        scheme_of("int2")
    assert all(name in caught.value.hint for name in NAMES)


@pytest.mark.parametrize("target", [Target(), Target("cuda", "F16"), Target("cpu", "F32", standard=True)])
def test_the_head_of_int4_can_have_eight_bits(target):
    scheme = scheme_of("int4", target, 8)
    for form in (scheme.linear("head", *BIG), scheme.tied(*BIG)):
        assert form.bits == 8 and getattr(form, "multiple", 1) in (1, 32)
    assert scheme.linear("down", *BIG).bits == scheme.linear("qkv", *BIG).bits == 4 and scheme_of(scheme, target) is scheme
    assert scheme_of("int4", target, 4) == scheme_of("int4", target)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("fp32", 8), ("nf4", 4), ("int4", 6)])
def test_head_bits_are_about_int4(name, bits):
    with pytest.raises(UsageError, match="--head-bits"):
        scheme_of(name, Target(), bits)
