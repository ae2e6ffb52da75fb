"""What falls back says so, by name."""

import pytest

from qlora_tools.export.decoder.export import plan_export
from qlora_tools.export.notes import Carried, carried_otherwise, joined
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.target import Target
from tests.export.mixtures import mixture
from tests.export.test_calibrated import statistics_of
from tests.export.tiny_decoders import build

CUDA = Target("cuda", "F16")


def note(tiny, scheme, target=None):
    return plan_export(tiny.source, tiny.config, scheme, target or Target()).note


def test_floats_have_nothing_to_say():
    for target, scheme in ((Target(), "fp32"), (CUDA, "fp16")):
        assert note(build("llama"), scheme, target) is None


@pytest.mark.parametrize(
    ("scheme", "target", "said"),
    [
        ("int4", Target(), "int8, not int4: embedding ("),
        ("int8", Target(), "bf16, not int8: embedding ("),
        ("int4", CUDA, "int8, not int4: embedding ("),
        ("nf4", CUDA, "int8, not nf4: embedding, head ("),
        ("int4", Target("cpu", "F32", standard=True), "bf16, not int4: embedding ("),
    ],
)
def test_tables_in_another_form_are_named_with_their_share(scheme, target, said):
    assert said in note(build("llama", intermediate_size=128), scheme, target)


def test_a_tied_table_is_one_thing():
    assert "int8, not int4: embedding and head in one (" in note(build("llama", tie_word_embeddings=True), "int4", Target("cpu", "F32", standard=True))


def test_experts_that_no_node_takes_as_nf4_are_said_to_be_int8():
    found = note(mixture("mixtral", hidden_size=64, intermediate_size=64), "nf4", CUDA)
    assert "int8, not nf4: embedding, experts, head (" in found and "one by one" not in found


def test_experts_one_by_one_are_said_to_be_slower():
    assert "multiplied one by one" in note(mixture("mixtral-odd-sizes"), "int8")
    assert "plain ONNX has no node" in note(mixture("mixtral"), "int8", Target("cpu", "F32", standard=True))


@pytest.mark.parametrize("target", [Target(), Target("cpu", "F32", standard=True)])
def test_experts_that_calibration_leaves_out_are_named(target):
    for tiny, said in ((build("llama"), False), (mixture("mixtral"), True)):
        planned = plan_export(tiny.source, tiny.config, "int4", target, statistics=statistics_of(tiny))
        assert ("rounded without calibration: experts (83% of the weights" in planned.note) == said == ("without calibration" in planned.note)
    assert "without calibration" not in note(mixture("mixtral"), "int4", target)


def test_columns_without_fast_kernels_are_named():
    found = note(build("llama", hidden_size=48, intermediate_size=80, head_dim=16), "int4", CUDA)
    assert "48, 80 inputs miss CUDA's fast kernels" in found
    assert "96 inputs miss" in note(build("llama", hidden_size=64, intermediate_size=96), "int4", CUDA)
    assert "miss" not in note(build("llama", hidden_size=64, intermediate_size=128), "int4", CUDA)


def test_shares_are_of_all_weights():
    weights = [Carried("a", "int8", 30, "x.a"), Carried("b", "int4", 60, "x.b"), Carried("a", "int8", 10, "y.a")]
    assert list(carried_otherwise(weights, scheme_of("int4"))) == ["int8, not int4: a (40% of the weights)"]
    assert list(carried_otherwise([Carried("a", "int8", 1, "a")], scheme_of("w8a8"))) == []


def test_notes_join():
    assert joined(None, "", None) is None and joined("a", None, "b") == "a; b"
