"""Plans of quantization: what is stored how, with and without statistics, and what stays dense."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.engine.run import run
from qlora_tools.errors import NonFiniteError
from qlora_tools.models.family import family_of
from qlora_tools.quant.gptq import output_error
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.quantize import QuantizeReport, plan_quantize, quantization_config, quantized_names
from tests.quant.test_gptq import moments, weight
from tests.stages.test_merge import Memory, Sink

LLAMA, GPT2 = family_of({"model_type": "llama"}), family_of({"model_type": "gpt2"})
Q, K, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"


class Heard(Memory):
    """Statistics in memory: the moments of ``shared`` inputs, judged by ``held_out.*`` where there are any."""

    def __init__(self, tensors, shared=None):
        super().__init__(tensors)
        self.shared = shared or {}

    def name_of(self, kind, name):
        found = f"{kind}.{self.shared.get(name, name)}"
        return found if found in self.specs else None


@pytest.fixture
def model():
    return Memory({Q: weight(32, 64), K: weight(16, 64, 5), NORM: torch.ones(64)})


def quantized(model, codec, statistics=None, family=LLAMA, keep=()):
    plan, sink = plan_quantize(model, family, codec, statistics=statistics, keep=keep), Sink()
    reports = run(plan, {"model": model, **({"statistics": statistics} if statistics else {})}, sink, workers=1)
    return sink, {report.name: report for report in reports if isinstance(report, QuantizeReport)}


@pytest.mark.parametrize("codec", [NF4(), Int8()], ids=str)
def test_weights_with_moments_lose_less_of_their_output_and_others_are_stored_as_without(model, codec):
    heard = Heard({f"input.{Q}": moments(64), f"held_out.{Q}": moments(64)})
    plain, _ = quantized(model, codec)
    stored, reports = quantized(model, codec, heard)
    assert stored.keys() == plain.keys() and all(torch.equal(stored[name], plain[name]) for name in plain if not name.startswith(Q[:-7]))
    assert reports[Q].method != "plain" and reports[K].method == "" and not reports[K].output_errors
    spec = TensorSpec(Q, "F32", (32, 64))
    errors = [output_error(model.tensors[Q] - codec.decode(spec, parts), heard.tensors[f"input.{Q}"]) for parts in (plain, stored)]
    assert errors[1] < 0.7 * errors[0]
    assert reports[Q].output_errors[reports[Q].method] == pytest.approx(errors[1] / output_error(model.tensors[Q], heard.tensors[f"input.{Q}"]), rel=1e-4)


def test_the_judging_moments_decide(model):
    heard = Heard({f"input.{Q}": moments(64), f"held_out.{Q}": torch.eye(64)})
    _, reports = quantized(model, NF4(), heard)
    assert reports[Q].method in ("plain", "search")


def test_moments_are_shared_under_the_name_of_one_weight(model):
    _, reports = quantized(model, NF4(), Heard({f"input.{Q}": moments(64)}, shared={K: Q}))
    assert all(report.output_errors for report in reports.values())


def test_weights_of_conv1d_are_turned_before_their_moments_are_used():
    name = "transformer.h.0.mlp.c_fc.weight"
    w_OI = weight(48, 64)
    sink, reports = quantized(Memory({name: w_OI.T.contiguous()}), NF4(), Heard({f"input.{name}": moments(64)}), GPT2)
    decoded = NF4().decode(TensorSpec(name, "F32", (48, 64)), sink)
    assert reports[name].method.startswith("search") and float((decoded - w_OI).norm() / w_OI.norm()) < 0.35


def test_what_is_kept_stays_dense_and_is_listed_for_transformers(model):
    sink, reports = quantized(model, NF4(), keep=[K])
    assert torch.equal(sink[K], model.tensors[K]) and set(reports) == {Q}
    assert quantized_names(model, LLAMA, NF4(), [K]) == [Q]
    config = quantization_config(NF4(), model, LLAMA, [K])
    assert K.removesuffix(".weight") in config["llm_int8_skip_modules"] and Q.removesuffix(".weight") not in config["llm_int8_skip_modules"]


def test_nan_in_a_weight_is_refused_by_name(model):
    model.tensors[Q][3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="q_proj"):
        quantized(model, NF4(), Heard({f"input.{Q}": moments(64)}))


def test_results_do_not_depend_on_the_number_of_workers(model):
    heard = Heard({f"input.{Q}": moments(64)}, shared={K: Q})
    plan = plan_quantize(model, LLAMA, NF4(), statistics=heard)
    one, two = Sink(), Sink()
    run(plan, {"model": model, "statistics": heard}, one, workers=1)
    run(plan, {"model": model, "statistics": heard}, two, workers=2)
    assert all(torch.equal(one[name], two[name]) for name in one)
