"""Calibrated encoding: never worse on the judging text, the same parts, and the codes that ONNX Runtime then multiplies with."""

import numpy as np
import pytest
import torch

from qlora_tools.engine import plan as plans
from qlora_tools.errors import IncompatibleError, NonFiniteError
from qlora_tools.export.calibrated import Choice, Factors, encode_calibrated, gain_of, row_errors
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.parity import check_parity
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from qlora_tools.export.formats.format import Moments
from qlora_tools.quant.gptq import feedback, output_error
from tests.export.formats_run import run_format
from tests.export.tiny_decoders import MemorySource, build

FORMATS = {
    "int4": Blocks(4),
    "int8": Blocks(8),
    "int8 zeros": Blocks(8, zeros=True),
    "digits": Digits(),
    "digits in groups": Digits(longest_group=64),
    "one digit": Digits(digits=1),
}
SHAPES = [(8, 64), (33, 96), (7, 75), (130, 200), (5, 17), (1, 1)]


def inputs(columns, seed, tokens=400):
    """[T, I] of a spiky spectrum, the same for every seed but for the draw."""
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -1.5, columns)
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ mix.T


def moments(columns, learn=1, judge=2):
    learn_II, judge_II = (x.T @ x / len(x) for x in (inputs(columns, learn), inputs(columns, judge)))
    return Moments(learn_II, judge_II, feedback(learn_II))


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class Given:
    """A format whose encoding is given."""

    def __init__(self, form, parts):
        self.form, self.given = form, parts

    def encode(self, name, w_OI):
        return self.given

    def __getattr__(self, name):
        return getattr(self.form, name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_candidate_fills_the_parts_of_its_format(name):
    for rows, columns in SHAPES:
        form, w = FORMATS[name], gaussian(rows, columns)
        specs = {spec.name: (spec.torch_dtype, spec.shape) for spec in form.parts("w", rows, columns)}
        found = dict(form.candidates("w", w, moments(columns)))
        assert next(iter(found)) == "plain" and "feedback" in found
        assert all(torch.equal(found["plain"][part], tensor) for part, tensor in form.encode("w", w).items())
        for parts in found.values():
            assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == specs


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_is_worse_on_the_judging_text_and_the_whole_is_much_better(name):
    form, w, seen = FORMATS[name], gaussian(96, 192), moments(192)
    parts, choice = encode_calibrated(form, "w", "a.weight", w, seen)
    plain_O, chosen_O = (row_errors(w - form.decode("w", found, 192), seen.judge_II) for found in (form.encode("w", w), parts))
    assert bool((chosen_O <= plain_O).all())
    assert choice.plain_error == pytest.approx(float(plain_O.sum())) and choice.error == pytest.approx(float(chosen_O.sum()))
    assert choice.error < 0.5 * choice.plain_error and sum(choice.rows.values()) == 96


def test_fresh_inputs_confirm_what_the_judge_saw():
    form, w, x = FORMATS["int4"], gaussian(96, 192), inputs(192, seed=7).double()
    parts, _ = encode_calibrated(form, "w", "w", w, moments(192))
    plain, chosen = (float((x @ (w - form.decode("w", found, 192)).double().T).square().sum()) for found in (form.encode("w", w), parts))
    assert chosen < 0.5 * plain


@pytest.mark.parametrize("name", FORMATS)
def test_onnxruntime_multiplies_with_the_calibrated_weight(name, tmp_path):
    for number, (rows, columns) in enumerate([(33, 96), (7, 75), (130, 200)]):
        form, w = FORMATS[name], gaussian(rows, columns)
        parts, _ = encode_calibrated(form, "w", "w", w, moments(columns))
        x = inputs(columns, seed=number, tokens=5).numpy()
        found, carried = run_format(tmp_path / str(number), Given(form, parts), w, x_TI=x)
        wanted = x.astype(np.float64) @ carried.numpy().astype(np.float64).T
        assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)
        assert not torch.equal(carried, form.decode("w", form.encode("w", w), columns))


@pytest.mark.parametrize("form", [Dense(), Dense(stored="BF16"), Digits(remainder=True)], ids=str)
def test_what_cannot_gain_has_the_plain_candidate_only(form):
    assert [label for label, _ in form.candidates("w", gaussian(4, 64), moments(64))] == ["plain"]


def test_moments_that_judge_otherwise_keep_the_plain_rows():
    """Learnt from inputs that live in the first half, judged by such as live in the second."""
    first, second = torch.eye(64) * 1e-6, torch.eye(64) * 1e-6
    x = inputs(32, 1)
    first[:32, :32] += x.T @ x / len(x)
    second[32:, 32:] += torch.eye(32)
    w = gaussian(50, 64)
    _, choice = encode_calibrated(Blocks(4), "w", "w", w, Moments(first, second, feedback(first)))
    _, kept = encode_calibrated(Blocks(4), "w", "w", w, Moments(first, torch.zeros(64, 64), feedback(first)))
    assert choice.error <= choice.plain_error and kept.rows == {"plain": 50}


def test_row_errors_are_the_trace_split_by_rows():
    lost, seen = gaussian(2000, 24), moments(24)
    found = row_errors(lost, seen.judge_II)
    exact = torch.stack([row.double() @ seen.judge_II.double() @ row.double() for row in lost[:50]])
    torch.testing.assert_close(found[:50], exact, rtol=1e-12, atol=0)
    assert float(found.sum()) == pytest.approx(output_error(lost, seen.judge_II), rel=1e-7)


def test_rows_encode_alone_as_they_encode_together():
    form, w, seen = Blocks(4), gaussian(12, 96), moments(96)
    whole, _ = encode_calibrated(form, "w", "w", w, seen)
    upper, lower = (encode_calibrated(form, "w", "w", piece, seen)[0] for piece in (w[:5], w[5:]))
    assert all(torch.equal(tensor, torch.cat([upper[part], lower[part]])) for part, tensor in whole.items())


def test_a_factor_serves_until_other_moments_come():
    factors, seen = Factors(), moments(16)
    one = factors.of("a", seen.learn_II)
    assert factors.of("a", seen.learn_II) is one and factors.of("b", seen.judge_II) is not one


def test_tiles_of_a_weight_count_once():
    choices = [Choice("a", {"plain": 1}, 1.0, 0.5), Choice("a", {"feedback": 3}, 3.0, 0.5), Choice("b", {"feedback": 2}, 0.0, 0.0)]
    found = gain_of(choices)
    assert found.weights == 2 and found.share == pytest.approx((0.25 + 1) / 2) and found.rows == {"feedback": 5, "plain": 1}


class Statistics(MemorySource):
    """Moments in memory under the names of a file of statistics, which belongs to a model's folder."""

    path = "statistics"

    def name_of(self, kind, weight):
        return name if (name := f"{kind}.{weight}") in self.tensors else None


def statistics_of(tiny):
    found = {}
    for name, spec in tiny.source.specs.items():
        if len(spec.shape) == 2 and ("_proj" in name or name == "lm_head.weight"):
            seen = moments(spec.shape[1])
            found |= {f"input.{name}": seen.learn_II, f"held_out.{name}": seen.judge_II}
    return Statistics(found)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_calibrated_export_passes_parity_and_reports_its_gain(scheme, family, tmp_path):
    tiny = build(family)
    planned = plan_export(tiny.source, tiny.config, scheme, statistics=statistics_of(tiny))
    gain = write_graph(planned, tiny.source, tmp_path)
    assert gain.weights == 15 and gain.share < 0.6 and gain.rows["feedback"] > 0
    parity = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert parity.error_carried < 0.05


def test_parity_reads_the_codes_that_were_stored(tmp_path):
    """Other bytes in the file make other references, so the carried error stays small while the dense one grows."""
    tiny = build("llama")
    planned = plan_export(tiny.source, tiny.config, "int8", statistics=statistics_of(tiny))
    write_graph(planned, tiny.source, tmp_path)
    before = check_parity(planned, tiny.source, tiny.config, tmp_path)
    from qlora_tools.export.external import place

    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    at = place(planned.plan.outputs)[0]["layers.1.down"]
    for offset in range(at, at + 300, 2):
        data[offset] ^= 16
    (tmp_path / "model.onnx.data").write_bytes(data)
    after = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert after.error_dense > 1.1 * before.error_dense and after.error_carried < 1.5 * before.error_carried


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_tiles_do_not_change_the_bytes(scheme, tmp_path, monkeypatch):
    tiny = build("llama")
    statistics = statistics_of(tiny)
    contents = []
    for tile_bytes in (1 << 30, 10_000):
        monkeypatch.setattr(plans.row_tiles, "__defaults__", (tile_bytes, 1))
        planned = plan_export(tiny.source, tiny.config, scheme, statistics=statistics)
        folder = tmp_path / str(tile_bytes)
        folder.mkdir()
        write_graph(planned, tiny.source, folder)
        contents.append((folder / "model.onnx.data").read_bytes())
    assert contents[0] == contents[1]


def test_statistics_without_any_layer_of_the_model_are_refused():
    tiny = build("llama")
    with pytest.raises(IncompatibleError, match="describes no layer"):
        plan_export(tiny.source, tiny.config, "int4", statistics=Statistics({"input.other.weight": torch.eye(4)}))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_nan_and_infinity_are_refused_under_calibration_too(scheme):
    tiny = build("llama")
    statistics = statistics_of(tiny)
    planned = plan_export(tiny.source, tiny.config, scheme, statistics=statistics)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        unit = next(unit for unit in planned.plan.units if unit.reads and unit.reads[0].name == name)
        seen = [statistics.read(read.name) for read in unit.reads[1:]]
        for wrong in (torch.nan, torch.inf):
            tensor = tiny.source.tensors[name].clone()
            tensor.view(-1)[5] = wrong
            with pytest.raises(NonFiniteError, match=name):
                unit.apply(tensor, *seen)
