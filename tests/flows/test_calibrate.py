"""``qlt calibrate``: from a text, from the package's text, from the model itself; and statistics for the verbs that ask for them."""

from __future__ import annotations

import shutil

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.errors import IncompatibleError
from qlora_tools.verbs.calibrate import statistics_for
from tests.flows.conftest import files

SMALL = ("--tokens", "640", "--context", "32")


@pytest.fixture
def text(here):
    path = here / "text.txt"
    path.write_text("".join(f"line {number} of a text that repeats itself, {number * 37 % 101} times over\n" for number in range(200)))
    return path


def test_a_text_becomes_a_file_of_statistics(qlt, llama, here, text):
    done = qlt("calibrate", llama, "--data", text, "-o", "s.safetensors", *SMALL, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert result["windows"] == 20 and result["tokens"] == 16 * 32 and result["held_out_tokens"] == 4 * 32 and not result["fisher"]
    assert len(result["inputs"]) == 2 * 4 + 1 and result["weights"] == 2 * 7 + 1 and result["bytes"] == (here / "s.safetensors").stat().st_size
    assert {heard["readers"] for heard in result["inputs"]} == {1, 2, 3} and all(1 <= heard["effective_rank"] <= heard["size"] for heard in result["inputs"])
    statistics = Statistics(here / "s.safetensors")
    statistics.check(open_checkpoint(llama))
    assert statistics.origin.text == "text.txt" and not statistics.has_gradients
    again = qlt("calibrate", llama, "--data", text, "-o", "t.safetensors", *SMALL)
    assert again.code == 0 and "kept" in again.out and "effective rank" in again.out
    assert (here / "s.safetensors").read_bytes() == (here / "t.safetensors").read_bytes()


@pytest.mark.parametrize("data", ["self", "builtin"])
def test_no_text_is_needed(qlt, llama, here, data):
    done = qlt("calibrate", llama, "--data", data, *SMALL, "--fisher")
    assert done.code == 0, done.err
    statistics = Statistics(here / f"statistics/base-{data}.safetensors")
    assert statistics.has_gradients and statistics.origin.tokens == 16 * 32


def test_the_model_may_compute_in_bf16(qlt, llama, here, text):
    for dtype in ("fp32", "bf16"):
        assert qlt("calibrate", llama, "--data", text, "-o", f"{dtype}.safetensors", "--dtype", dtype, *SMALL).code == 0
    full, half = Statistics(here / "fp32.safetensors"), Statistics(here / "bf16.safetensors")
    for name in full.specs:
        assert 0 < float((full.read(name) - half.read(name)).norm() / full.read(name).norm()) < 0.05


def test_a_dry_run_writes_nothing_and_bounds_the_file(qlt, llama, here, text):
    planned = qlt("calibrate", llama, "--data", text, *SMALL, "--fisher", "--dry-run", "--json").json
    assert files(here) == {"text.txt"} and planned["dry_run"] and planned["tokens"] == 16 * 32 and planned["held_out_tokens"] == 4 * 32
    done = qlt("calibrate", llama, "--data", text, *SMALL, "--fisher", "--json").json
    assert done["windows"] == planned["windows"] and done["tokens"] == planned["tokens"] and done["bytes"] <= planned["bytes"] < 3 * done["bytes"]


def test_an_output_is_replaced_only_by_force_and_only_if_it_holds_statistics(qlt, llama, here, text):
    (here / "s.safetensors").write_text("mine")
    assert qlt("calibrate", llama, "--data", text, "-o", "s.safetensors", *SMALL).code == 7
    assert qlt("calibrate", llama, "--data", text, "-o", "s.safetensors", "--force", *SMALL).code == 7
    assert (here / "s.safetensors").read_text() == "mine"
    assert qlt("calibrate", llama, "--data", text, "-o", "t.safetensors", *SMALL).code == 0
    assert qlt("calibrate", llama, "--data", text, "-o", "t.safetensors", "--force", *SMALL).code == 0


def test_too_short_and_missing_texts_are_said_to_be(qlt, llama, here):
    (here / "short.txt").write_text("four words of text")
    assert qlt("calibrate", llama, "--data", "short.txt").code == 2
    missing = qlt("calibrate", llama, "--data", "none.txt")
    assert missing.code == 9 and "builtin" in missing.err
    assert files(here) == {"short.txt"}


def test_few_tokens_are_remarked_on(qlt, llama, text):
    done = qlt("calibrate", llama, "--data", text, "--tokens", "64", "--context", "16", "-o", "s.safetensors")
    assert done.code == 0 and "more --tokens" in done.err


def test_statistics_for_opens_a_file_or_makes_one_for_the_moment(llama, tuned, here, text):
    checkpoint = open_checkpoint(llama)
    with statistics_for(checkpoint, text, tokens=640, context=32, beside=here / "out" / "model") as made:
        name = made.name_of("input", "model.layers.0.self_attn.q_proj.weight")
        value, made_at = made.read(name), made.path
    assert not made_at.exists() and files(here) == {"text.txt"}
    shutil.copytree(llama, here / "copy")
    from qlora_tools import api

    api.calibrate(model=here / "copy", data=text, tokens=640, context=32, output=here / "s.safetensors", device="cpu")
    with statistics_for(checkpoint, here / "s.safetensors") as opened:
        assert torch.equal(opened.read(name), value)
    with pytest.raises(IncompatibleError, match="output gradients"), statistics_for(checkpoint, here / "s.safetensors", fisher=True):
        pass
    with pytest.raises(IncompatibleError, match="taken from"), statistics_for(open_checkpoint(tuned), here / "s.safetensors"):
        pass
    with statistics_for(open_checkpoint(tuned), here / "s.safetensors", also=[checkpoint]) as opened:
        assert opened.origin.model == "copy"
