"""The plan of an export: packing, tiles, and what it refuses."""

import pytest
import torch

from qlora_tools.engine import plan as plans
from qlora_tools.errors import NonFiniteError
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.external import place
from qlora_tools.finite import is_finite
from tests.export.tiny_decoders import build


def test_query_key_and_value_lie_one_below_the_other(tmp_path):
    tiny = build("qwen2")
    planned = plan_export(tiny.source, tiny.config, "fp32")
    write_graph(planned, tiny.source, tmp_path)
    data, offsets = (tmp_path / "model.onnx.data").read_bytes(), place(planned.plan.outputs)[0]
    prefix = "model.layers.1.self_attn"
    for kind, shape in (("weight", (-1, 64)), ("bias", (-1,))):
        name = "layers.1.qkv" + (".bias" if kind == "bias" else "")
        spec = next(spec for spec in planned.plan.outputs if spec.name == name)
        stored = torch.frombuffer(bytearray(data[offsets[name] : offsets[name] + spec.nbytes]), dtype=torch.float32).reshape(shape)
        parts = [tiny.source.tensors[f"{prefix}.{part}_proj.{kind}"].float() for part in "qkv"]
        assert torch.equal(stored, torch.cat(parts))


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_tiles_change_neither_the_bytes_nor_the_peak(scheme, tmp_path, monkeypatch):
    tiny = build("llama", vocab_size=601, tie_word_embeddings=True)
    contents = []
    for tile_bytes in (1 << 30, 10_000):
        monkeypatch.setattr(plans.row_tiles, "__defaults__", (tile_bytes, 1))
        planned = plan_export(tiny.source, tiny.config, scheme)
        folder = tmp_path / str(tile_bytes)
        folder.mkdir()
        write_graph(planned, tiny.source, folder)
        contents.append((folder / "model.onnx.data").read_bytes())
        reads = [read for unit in planned.plan.units for read in unit.reads if read.name == "model.embed_tokens.weight"]
        assert len(reads) == (1 if tile_bytes > 10_000 else 16)
    assert contents[0] == contents[1]


def test_every_tensor_of_the_decoder_is_read_once_and_nothing_else():
    tiny = build("qwen3", head_dim=16)
    planned = plan_export(tiny.source, tiny.config, "int8")
    read = [read.name for unit in planned.plan.units for read in unit.reads]
    assert sorted(read) == sorted(tiny.source.tensors)


def test_values_whose_sum_overflows_are_finite_and_nan_and_infinity_are_not():
    for dtype in (torch.float32, torch.bfloat16):
        huge = torch.full((1000,), 3e38, dtype=dtype)
        assert is_finite(huge)
        for wrong in (torch.nan, torch.inf, -torch.inf):
            huge[7] = wrong
            assert not is_finite(huge)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_nan_and_infinity_are_refused_wherever_they_stand(wrong, scheme, tmp_path):
    tiny = build("qwen2", hidden_size=576, intermediate_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1)
    planned = plan_export(tiny.source, tiny.config, scheme)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    ):
        unit = next(unit for unit in planned.plan.units if unit.reads and unit.reads[0].name == name)
        tensor = tiny.source.tensors[name].clone()
        tensor.view(-1)[5] = wrong
        with pytest.raises(NonFiniteError, match=name):
            unit.apply(tensor)
        unit.apply(tiny.source.tensors[name])
