"""An export's plan run once more against its file: last bits of floats pass, changed codes do not, and a tensor is called by the checkpoint's name."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.engine.run import run
from qlora_tools.export.comparison import comparing
from qlora_tools.export.decoder.weights import MODEL
from qlora_tools.export.external import ExternalWriter, place
from tests.export.tiny_decoders import MemorySource, build, export


@pytest.fixture
def written(tmp_path):
    tiny = build("llama")
    return tiny, export(tiny, tmp_path, "int8"), tmp_path / "model.onnx.data"


def labels(planned, path, source):
    return [item.label for item in run(comparing(planned.plan, path), {MODEL: source}) if not item.equal]


def test_what_was_written_is_what_is_encoded(written):
    tiny, planned, path = written
    assert labels(planned, path, tiny.source) == []


def test_one_changed_weight_is_the_only_one_named(written):
    tiny, planned, path = written
    name = "model.layers.1.self_attn.k_proj.weight"
    other = MemorySource({**tiny.source.tensors, name: tiny.source.tensors[name] + 0.5})
    assert labels(planned, path, other) == [name]


def test_the_last_bits_of_a_float_do_not_count_and_the_next_do(written):
    tiny, planned, path = written
    name = "model.norm.weight"
    for factor, wrong in ((1 + 2**-22, []), (1 + 2**-12, [name])):
        other = MemorySource({**tiny.source.tensors, name: tiny.source.tensors[name].float() * factor})
        assert labels(planned, path, other) == wrong


def test_changed_codes_in_the_file_are_found(written):
    tiny, planned, path = written
    offset = next(place(planned.plan.outputs)[0][spec.name] for spec in planned.plan.outputs if spec.name.startswith("layers.0.down"))
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(64))
    assert labels(planned, path, tiny.source) == ["model.layers.0.mlp.down_proj.weight"]


def test_calibrated_codes_are_held_to_a_distance(written):
    tiny, planned, path = written
    decoders = {}
    for matrix in planned.layout.matrices():
        for spec in matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns):
            decoders[spec.name] = lambda parts, matrix=matrix: matrix.format.decode(matrix.name, parts, matrix.columns, looked_up=False)
    found = run(comparing(planned.plan, path, decoders), {MODEL: tiny.source})
    assert all(item.equal for item in found) and any(item.by_distance for item in found) and not all(item.by_distance for item in found)
    far = MemorySource({name: tensor * 1.5 if "up_proj" in name else tensor for name, tensor in tiny.source.tensors.items()})
    assert {item.label.rpartition(".mlp.")[2] for item in run(comparing(planned.plan, path, decoders), {MODEL: far}) if not item.equal} == {"up_proj.weight"}


def test_a_tensor_without_rows_is_compared_too(tmp_path):
    from qlora_tools.engine.plan import Outcome, Plan, Unit, Write
    from qlora_tools.specs import TensorSpec

    plan = Plan((TensorSpec("s", "F32", (1,)),), (Unit("s", (), (Write("s"),), lambda: Outcome({"s": torch.ones(1)})),))
    with ExternalWriter(tmp_path / "data", plan.outputs) as writer:
        run(plan, {}, writer)
    assert [item.differing for item in run(comparing(plan, tmp_path / "data"), {})] == [0]
