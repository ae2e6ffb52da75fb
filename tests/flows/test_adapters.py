"""``qlt adapters``: several adapters beside one base, listed, chosen, added, shrunk, compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import build_llama
from tests.flows.conftest import files
from tests.flows.test_import_and_convert import FOLDER, edited, merged, peft_adapter


@pytest.fixture(scope="module")
def stocks(tmp_path_factory, llama) -> Path:
    """Two PEFT adapters of ``llama`` with different ranks, scales and targets; do not write into them."""
    folder = tmp_path_factory.mktemp("stocks")
    peft_adapter(llama, folder / "python", 1)
    peft_adapter(llama, folder / "sql", 2, r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def kept(qlt, here, llama, stocks) -> Path:
    """Both, imported into ``adapters/``."""
    for name in ("python", "sql"):
        assert qlt("import", stocks / name, "--base", llama).code == 0
    return here / "adapters"


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 7, 2, 60, 5]])).logits


def test_the_list_tells_rank_scale_targets_and_base(qlt, here, kept, llama, stocks, tmp_path):
    shutil.copytree(stocks / "python", kept / "stranger")
    edited(stocks / "python", kept / "broken", r="x")
    (kept / "not one").mkdir()
    found = {Path(item["path"]).name: item for item in qlt("adapters", "list", "--base", llama, "--json").json["adapters"]}
    assert found.keys() == {"python", "sql", "stranger", "broken"}
    assert (found["python"]["ranks"], found["python"]["scales"], found["python"]["targets"]) == ([4, 4], [1.5, 1.5], ["down_proj", "q_proj"])
    assert found["sql"]["fits_base"] is True and found["sql"]["made_by"] == "qlt import"
    assert found["stranger"]["fits_base"] is None and found["stranger"]["made_by"].startswith("peft ")
    assert "`r`" in found["broken"]["problem"]
    other = build_llama(tmp_path / "other", seed=9)
    assert {item["fits_base"] for item in qlt("adapters", "list", "--base", other, "--json").json["adapters"]} == {False, None}
    done = qlt("adapters", "list")
    assert done.code == 0 and "4 adapters" in done.out and "q_proj" in done.out and "broken" in done.err


def test_a_pickled_adapter_is_listed_with_its_problem(qlt, here, kept):
    (kept / "old").mkdir()
    (kept / "old/adapter_model.bin").write_bytes(b"x")
    assert "pickle" in next(item for item in qlt("adapters", "list", "--json").json["adapters"] if item["path"].endswith("old"))["problem"]


def test_a_missing_folder_is_named(qlt, here):
    assert qlt("adapters", "list").code == 9


def test_adapters_are_swapped_by_name(qlt, here, kept, llama):
    assert qlt("adapters", "use", "python").code == 0
    assert qlt("merge", "--base", llama, "-o", "a").code == 0
    assert qlt("adapters", "use", "sql=0.5").code == 0
    assert qlt("merge", "--base", llama, "-o", "b").code == 0
    expected = merged(qlt, here, llama, "adapters/sql=0.5", "c")
    ours = load_file(here / "b/model.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert qlt("adapters", "use", "nothing").code == 9


def test_a_sum_computes_what_merging_both_computes_and_stock_peft_loads_it(qlt, here, kept, llama):
    done = qlt("adapters", "sum", "python=0.7", "sql=-0.5", "--base", llama, "-o", "both")
    assert done.code == 0 and "exact" in done.out and files(here / "both") == FOLDER
    assert qlt("merge", "--base", llama, "--adapter", "adapters/python=0.7", "--adapter", "adapters/sql=-0.5", "-o", "m").code == 0
    expected = load_file(here / "m/model.safetensors")
    ours = merged(qlt, here, llama, "both", "n")
    assert all(torch.allclose(ours[name].float(), expected[name].float(), atol=1e-6, rtol=8e-3) for name in expected)
    torch.testing.assert_close(logits(llama, here / "both"), logits(here / "m", None), atol=5e-2, rtol=5e-2)
    manifest = json.loads((here / "both/qlt-manifest.json").read_text())
    assert manifest["command"] == {"verb": "adapters sum", "weights": [0.7, -0.5], "rank": None}
    assert json.loads((here / "both/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert len(manifest["base_tensors"]) == 6 and {"base", "adapter", "adapter1"} == manifest["inputs"].keys()


def test_one_adapter_with_weight_one_comes_back_bit_for_bit(qlt, here, kept):
    assert qlt("adapters", "sum", "python", "-o", "same").code == 0
    assert (here / "same/adapter_model.safetensors").read_bytes() == (kept / "python/adapter_model.safetensors").read_bytes()


def test_a_cut_sum_reports_the_error_that_comparing_finds(qlt, here, kept):
    qlt("adapters", "sum", "python", "sql", "-o", "exact")
    done = qlt("adapters", "sum", "python", "sql", "--rank", 4, "-o", "cut", "--json")
    total = done.json["total"]
    assert total["rank"] == 4 and 0 < total["optimum"] <= total["error"] < 1
    compared = qlt("adapters", "compare", "exact", "cut", "--json").json
    assert compared["ratio"] ** 2 == pytest.approx(total["kept_energy"], abs=1e-4)
    assert compared["cosine"] == pytest.approx(total["kept_energy"] ** 0.5, abs=1e-4)


def test_adapters_of_different_bases_are_not_added(qlt, here, kept, tmp_path):
    other = build_llama(tmp_path / "other", seed=9)
    assert qlt("import", peft_adapter(other, tmp_path / "foreign"), "--base", other).code == 0
    for verb in (["sum", "python", "foreign", "-o", "x"], ["compare", "python", "foreign"]):
        done = qlt("adapters", *verb)
        assert done.code == 3 and "different bases" in done.err and not (here / "x").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sum", "python=nan"], 2),
        (["sum", "python=x"], 2),
        (["sum", "python", "--rank", 0], 2),
        (["sum", "nowhere"], 9),
        (["resize", "python"], 2),
        (["resize", "python", "--rank", 0], 2),
        (["resize", "python", "--energy", 2], 2),
        (["resize", "python", "--rank", 2, "--energy", 0.5], 2),
        (["resize", "python", "--max-bytes", 10], 2),
        (["resize", "python", "--max-bytes", "ten"], 2),
        (["compare", "python", "nowhere"], 9),
    ],
)
def test_words_that_make_no_sense_are_refused_and_leave_nothing(qlt, here, kept, words, code):
    before = files(here)
    assert qlt("adapters", *words).code == code and files(here) == before


def test_dora_is_refused_by_name(qlt, here, llama, tmp_path):
    adapter = peft_adapter(llama, tmp_path / "dora", use_dora=True)
    for verb in (["sum", adapter, f"{adapter}=0.5"], ["resize", adapter, "--rank", 2]):
        done = qlt("adapters", *verb)
        assert done.code == 8 and "DoRA" in done.err and "qlt merge" in done.err and files(here) == set()


def test_resizing_keeps_most_for_its_bytes_and_peft_loads_it(qlt, here, kept, llama):
    done = qlt("adapters", "resize", "python", "--rank", 2, "--json")
    assert done.code == 0 and done.json["bytes_after"] * 2 == done.json["bytes_before"]
    config = json.loads((kept / "python-r2/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 and config["rank_pattern"] == {}
    assert logits(llama, kept / "python-r2").shape == (1, 5, 160)
    done = qlt("adapters", "resize", "python", "--max-bytes", 3000, "--json")
    assert done.code == 0 and done.json["bytes_after"] <= 3000
    assert {row["cut"]["rank"] for row in done.json["rows"]} != {2}
    compared = qlt("adapters", "compare", "python", "python-3000B", "--json").json
    assert compared["ratio"] ** 2 == pytest.approx(done.json["total"]["kept_energy"], abs=1e-4)


def test_what_was_dropped_counts_as_lost(qlt, here, kept, tmp_path):
    def quiet(tensors):
        return {name: value * 0.3 if "down_proj.lora_B" in name else value for name, value in tensors.items()}

    edited(kept / "python", tmp_path / "quiet", quiet)
    done = qlt("adapters", "resize", tmp_path / "quiet", "--max-bytes", 600, "-o", "small", "--json")
    assert done.code == 0 and done.json["dropped"]
    compared = qlt("adapters", "compare", tmp_path / "quiet", "small", "--json").json
    assert compared["ratio"] ** 2 == pytest.approx(done.json["total"]["kept_energy"], abs=1e-4) and len(compared["only_first"]) == len(done.json["dropped"])


def test_resizing_to_the_rank_it_has_changes_no_bit(qlt, here, kept):
    assert qlt("adapters", "resize", "python", "--rank", 4, "-o", "same").code == 0
    assert (here / "same/adapter_model.safetensors").read_bytes() == (kept / "python/adapter_model.safetensors").read_bytes()


def test_dry_runs_write_nothing(qlt, here, kept):
    before = files(here)
    for words in (["sum", "python", "sql", "-o", "x"], ["resize", "python", "--rank", 2]):
        done = qlt("adapters", *words, "--dry-run")
        assert done.code == 0 and "would write" in done.out and files(here) == before


def test_a_layer_of_zeros_is_dropped_by_energy_and_kept_by_rank(qlt, here, kept, tmp_path):
    def silence(tensors):
        return {name: torch.zeros_like(value) if "layers.0.mlp.down_proj.lora_B" in name else value for name, value in tensors.items()}

    silent = edited(kept / "python", tmp_path / "silent", silence)
    done = qlt("adapters", "resize", silent, "--energy", 0.9, "--json")
    assert done.code == 0 and done.json["dropped"] == ["model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj" not in str(load_file(here / "adapters/silent-energy0.9/adapter_model.safetensors").keys())
    assert qlt("adapters", "resize", silent, "--rank", 2, "--json").json["dropped"] == []


def test_comparing_an_adapter_with_itself_and_with_another(qlt, here, kept):
    same = qlt("adapters", "compare", "python", "python", "--json").json
    assert same["cosine"] == pytest.approx(1.0) and all(row["output_overlap"] == pytest.approx(1.0) for row in same["layers"])
    other = qlt("adapters", "compare", "python", "sql", "--json").json
    assert abs(other["cosine"]) < 0.5 and len(other["layers"]) == 2 and len(other["only_first"]) == len(other["only_second"]) == 2
    assert "cosine" in qlt("adapters", "compare", "python", "sql").out


def test_foreign_formats_are_summed_without_importing_first(qlt, here, kept, llama, tmp_path):
    qlt("convert", "adapters/python", "--to", "kohya", "--component", "text_encoder", "-o", "k")
    tensors = load_file(here / "k/adapter.safetensors")
    save_file(tensors, tmp_path / "python.safetensors")
    done = qlt("adapters", "sum", tmp_path / "python.safetensors", "adapters/python=-1", "--base", llama, "--rank", 1, "-o", "x", "--json")
    assert done.code == 0 and done.json["total"]["norm"] < 1e-5, done.err
