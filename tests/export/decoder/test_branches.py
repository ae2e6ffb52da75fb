"""Adapters beside a graph's weights compute what PEFT's unmerged model computes on the weights the graph carries; what cannot be a branch is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qlora_tools.adapters.adapter import Adapter, BiasDelta, Delta, Part
from qlora_tools.errors import NonFiniteError, UnsupportedError
from qlora_tools.export.decoder.branches import Beside, _balanced, bind_branches, places_of
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.parity import check_parity
from qlora_tools.export.target import Target
from qlora_tools.specs import spec_of
from tests.export.adapters_run import Plain, bound, factors_in, logits_of, on_carried, peft_adapter
from tests.export.tiny_decoders import build, carry, relative_error, tokens

#: Activations are rounded to 8 bits in the quantized graphs; the fp32 graph is only off by fp16 factors.
BOUND = {"fp32": 2e-3, "int8": 0.03, "int4": 0.06}


def exported(tiny, folder, scheme, **beside):
    folder.mkdir(exist_ok=True)
    planned = plan_export(tiny.source, tiny.config, scheme, beside=Beside(**beside))
    write_graph(planned, tiny.source, folder)
    return planned


def part(tensor, key="x"):
    return Part(key, spec_of(key, tensor), lambda rows=None: tensor if rows is None else tensor[rows[0] : rows[1]])


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_each_adapter_of_a_graph_computes_what_peft_computes_on_the_same_base(scheme, tmp_path):
    tiny = build("llama")
    wide, a = peft_adapter(tiny, tmp_path / "a", rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    narrow, b = peft_adapter(tiny, tmp_path / "b", seed=1, r=1, target_modules=["q_proj", "v_proj"])
    planned = exported(tiny, tmp_path / "e", scheme, kept={"a": (bound(tiny, a), 1.0), "b": (bound(tiny, b), 1.0)})
    carried, ids, graph = carry(tiny, planned), tokens(tiny, 2, 9), Plain(tmp_path / "e")
    assert relative_error(graph.run(ids), carried.logits(ids)) < BOUND[scheme]
    for name, live in (("a", wide), ("b", narrow)):
        wanted = logits_of(on_carried(live, carried), ids)
        found = graph.run(ids, factors_in(tmp_path / "e" / f"{name}.onnx_adapter"))
        assert relative_error(found, wanted) < BOUND[scheme] < 0.2 < relative_error(wanted, carried.logits(ids))
        assert check_parity(planned, tiny.source, tiny.config, tmp_path / "e", adapter=name).error_carried < BOUND[scheme]
    check_parity(planned, tiny.source, tiny.config, tmp_path / "e")
    assert not list((tmp_path / "e").glob("parity*"))


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_without_an_adapter_the_graph_is_the_base_bit_for_bit(scheme, tmp_path):
    tiny = build("qwen3", head_dim=16)
    _, a = peft_adapter(tiny, tmp_path / "a")
    exported(tiny, tmp_path / "e", scheme, kept={"a": (bound(tiny, a), 1.0)})
    exported(tiny, tmp_path / "base", scheme)
    ids = tokens(tiny, 2, 9)
    assert np.array_equal(Plain(tmp_path / "e").run(ids), Plain(tmp_path / "base").run(ids))
    assert (tmp_path / "e" / "model.onnx.data").read_bytes() == (tmp_path / "base" / "model.onnx.data").read_bytes()


def test_only_matrices_that_an_adapter_changes_get_inputs(tmp_path):
    tiny = build("llama")
    _, a = peft_adapter(tiny, tmp_path / "a", target_modules=["k_proj"], layers_to_transform=[1])
    exported(tiny, tmp_path / "e", "int4", kept={"a": (bound(tiny, a), 1.0)})
    assert set(Plain(tmp_path / "e").factors) == {"layers.1.qkv.lora_A", "layers.1.qkv.lora_B"} == set(factors_in(tmp_path / "e" / "a.onnx_adapter"))


def test_packed_factors_are_block_diagonal_in_the_rows_of_the_matrix(tmp_path):
    tiny = build("llama")
    _, a = peft_adapter(tiny, tmp_path / "a", r=3, target_modules=["q_proj", "v_proj"])
    planned = plan_export(tiny.source, tiny.config, "int4", beside=Beside({"a": (bound(tiny, a), 0.5)}))
    factors = planned.branches.kept["a"]["layers.0.qkv"]
    query, key = planned.decoder.query_size, planned.decoder.kv_size
    assert factors.rank == 6 and factors.b_RO.shape == (6, query + 2 * key)
    assert not factors.b_RO[:3, query:].any() and not factors.b_RO[3:, : query + key].any()
    delta = bound(tiny, a).deltas["model.layers.0.self_attn.v_proj.weight"]
    wanted = 0.5 * delta.scale * delta.b.read().double() @ delta.a.read().double()
    found = (factors.a_IR.double() @ factors.b_RO.double()).T[query + key :]
    assert (found - wanted).norm() < 5e-4 * wanted.norm()


def test_an_adapter_of_the_head_alone_leaves_a_tied_embedding_as_it_is(tmp_path):
    tiny = build("llama", tie_word_embeddings=True)
    live, a = peft_adapter(tiny, tmp_path / "a", target_modules=["lm_head", "o_proj"])
    planned = exported(tiny, tmp_path / "e", "int8", kept={"a": (bound(tiny, a), 1.0)})
    ids = tokens(tiny, 1, 9)
    wanted = logits_of(on_carried(live, carry(tiny, planned)), ids)
    assert relative_error(Plain(tmp_path / "e").run(ids, factors_in(tmp_path / "e" / "a.onnx_adapter")), wanted) < BOUND["int8"]


def test_a_head_adapter_passes_parity_on_the_first_words_alone(tmp_path, monkeypatch):
    from qlora_tools.export.decoder import parity

    monkeypatch.setattr(parity, "_VOCAB", 50)
    monkeypatch.setattr(parity, "_LAYER_BYTES", 1)
    tiny = build("llama")
    _, a = peft_adapter(tiny, tmp_path / "a", target_modules=["q_proj", "down_proj", "lm_head"])
    pair = (bound(tiny, a), 1.0)
    planned = exported(tiny, tmp_path / "e", "int8", kept={"a": pair}, fixed=[pair])
    for adapter in (None, "a"):
        found = check_parity(planned, tiny.source, tiny.config, tmp_path / "e", adapter=adapter)
        assert found.layers == 1 and found.error_carried < 0.03


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_fixed_branches_add_up_and_are_always_on(scheme, tmp_path):
    tiny = build("llama")
    live, a = peft_adapter(tiny, tmp_path / "a")
    planned = exported(tiny, tmp_path / "e", scheme, fixed=[(bound(tiny, a), 0.25), (bound(tiny, a), 0.75)])
    assert planned.branches.fixed["layers.0.down"].rank == 8
    ids, carried, graph = tokens(tiny, 2, 9), carry(tiny, planned), Plain(tmp_path / "e")
    assert not graph.factors
    assert relative_error(graph.run(ids), logits_of(on_carried(live, carried), ids)) < BOUND[scheme]
    check_parity(planned, tiny.source, tiny.config, tmp_path / "e")


def test_a_kept_adapter_comes_on_top_of_a_fixed_branch(tmp_path):
    tiny = build("llama")
    _, a = peft_adapter(tiny, tmp_path / "a")
    _, b = peft_adapter(tiny, tmp_path / "b", seed=1)
    first, second = bound(tiny, a), bound(tiny, b)
    exported(tiny, tmp_path / "e", "fp32", fixed=[(first, 1.0)], kept={"b": (second, 1.0)})
    exported(tiny, tmp_path / "both", "fp32", fixed=[(first, 1.0), (second, 1.0)])
    ids = tokens(tiny, 1, 9)
    assert relative_error(Plain(tmp_path / "e").run(ids, factors_in(tmp_path / "e" / "b.onnx_adapter")), Plain(tmp_path / "both").run(ids)) < 1e-3


@pytest.mark.parametrize(
    ("options", "named"), [({"use_dora": True}, "DoRA on"), ({"modules_to_save": ["embed_tokens"]}, "a whole"), ({"bias": "lora_only"}, "bias")]
)
def test_what_is_no_branch_is_refused_by_name(options, named, tmp_path):
    tiny = build("qwen2")
    _, a = peft_adapter(tiny, tmp_path / "a", target_modules=["q_proj"], **options)
    with pytest.raises(UnsupportedError, match=named) as refused:
        plan_export(tiny.source, tiny.config, "int4", beside=Beside({"a": (bound(tiny, a), 1.0)}))
    assert "--merge" in refused.value.hint


def test_an_embedding_adapter_is_refused_by_name(tmp_path):
    tiny = build("llama")
    _, a = peft_adapter(tiny, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedError, match="LoRA on `model.embed_tokens.weight`, beside which a graph has no place"):
        plan_export(tiny.source, tiny.config, "int4", beside=Beside({"a": (bound(tiny, a), 1.0)}))


def adapter_of(a_RI, b_OR, scale=1.0, **more):
    delta = Delta(part(a_RI, "a"), part(b_OR, "b"), scale)
    return Adapter("x", None, {"model.layers.0.self_attn.o_proj.weight": delta}, **more)


def bind(tiny, adapter, target=None):
    planned = plan_export(tiny.source, tiny.config, "int8")
    return bind_branches(Beside({"x": (adapter, 1.0)}), planned.layout, planned.decoder, target or planned.target).kept["x"]["layers.0.output"]


def test_factors_beyond_the_range_of_fp16_are_balanced_first():
    tiny = build("llama")
    a_RI, b_OR = torch.randn(2, 64).bfloat16() * 2e6, torch.randn(64, 2).bfloat16() * 1e-7
    a_RI[1], b_OR[:, 1] = 0, 1
    found = bind(tiny, adapter_of(a_RI, b_OR))
    wanted = b_OR.double() @ a_RI.double()
    assert found.a_IR.dtype == torch.float16 and torch.allclose(
        (found.a_IR.double() @ found.b_RO.double()).T, wanted, rtol=2e-3, atol=1e-5 * wanted.abs().max()
    )


def test_balancing_changes_no_product():
    a_RI, b_RO = torch.randn(3, 5), torch.randn(3, 4) * 1e-6
    b_RO[2] = 0
    for left, right in zip(_balanced(a_RI, b_RO), (a_RI, b_RO), strict=True):
        assert torch.equal(left.frexp().mantissa, right.frexp().mantissa)
    a, b = _balanced(a_RI, b_RO)
    assert torch.equal(a.T @ b, a_RI.T @ b_RO)


def test_products_too_large_for_16_bits_and_nan_are_refused():
    tiny = build("llama")
    with pytest.raises(NonFiniteError, match=r"`layers.0.output` overflow in F16"):
        bind(tiny, adapter_of(torch.full((1, 64), 1e15), torch.full((64, 1), 1e15)))
    with pytest.raises(NonFiniteError, match="`b` holds NaN"):
        bind(tiny, adapter_of(torch.ones(1, 64), torch.full((64, 1), torch.nan)))


def test_cuda_graphs_take_factors_in_the_dtype_they_compute_in():
    tiny = build("llama")
    for compute, kind in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert bind(tiny, adapter_of(torch.ones(1, 64), torch.ones(64, 1)), Target("cuda", compute)).b_RO.dtype == kind


def test_every_linear_of_the_model_has_a_place():
    tiny = build("llama")
    for scheme in ("fp32", "int4"):
        planned = plan_export(tiny.source, tiny.config, scheme)
        linears = {name for name, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert set(places_of(planned.layout, planned.decoder)) == linears


@pytest.mark.parametrize(
    ("family", "modules", "changes"),
    [
        ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], {}),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("gemma2", ["q_proj", "k_proj", "down_proj"], {"head_dim": 16}),
        ("olmo2", ["v_proj", "up_proj"], {}),
        ("mixtral", ["q_proj", "o_proj"], {}),
    ],
)
def test_fused_and_transposed_linears_of_other_families_are_adapted_too(family, modules, changes, tmp_path):
    tiny = build(family, **changes)
    live, a = peft_adapter(tiny, tmp_path / "a", target_modules=modules)
    ids = tokens(tiny, 2, 9)
    for scheme in ("fp32", "int8"):  # int8 stores gate and up apart, where int4 and the checkpoint have them in one
        planned = exported(tiny, tmp_path / scheme, scheme, kept={"a": (bound(tiny, a), 1.0)})
        if scheme == "fp32":
            found = Plain(tmp_path / scheme).run(ids, factors_in(tmp_path / scheme / "a.onnx_adapter"))
            assert relative_error(found, logits_of(live, ids)) < 1e-3
        check_parity(planned, tiny.source, tiny.config, tmp_path / scheme, adapter="a")


def test_a_bias_change_is_refused_even_without_factors():
    tiny = build("llama")
    adapter = adapter_of(torch.ones(1, 64), torch.ones(64, 1), biases={"model.layers.0.self_attn.o_proj.bias": BiasDelta(part(torch.ones(64)), 1.0)})
    with pytest.raises(UnsupportedError, match="o_proj.bias"):
        bind(tiny, adapter)


def test_a_model_is_left_as_it_was_by_the_reference(tmp_path):
    tiny = build("llama")
    before = copy.deepcopy(tiny.model.state_dict())
    peft_adapter(tiny, tmp_path / "a")
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())
