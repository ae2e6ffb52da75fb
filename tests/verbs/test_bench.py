"""``bench`` and ``report`` as functions, with a stand-in for the processes that would be measured; and the names of settings and runs."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from qlora_tools import api
from qlora_tools.bench.record_file import read_record
from qlora_tools.errors import CorruptError, IncompatibleError, Interrupted, MissingError, OutputExistsError, UsageError
from qlora_tools.verbs import bench as verb
from qlora_tools.verbs.bench_layers import layers_of, layers_of_models
from qlora_tools.verbs.bench_names import interrupted_run, journal_of, next_run, short_labels, unique_names
from tests.conftest import build_llama, nudge
from tests.verbs.bench_stand_in import StandIn

FILES = {"bench.json", "report.html", "report.md", "plots", "qlt-manifest.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a tuned model, the adapter between them and its merge."""
    folder = tmp_path_factory.mktemp("models")
    build_llama(folder / "base", tokenizer=True)
    nudge(folder / "base", folder / "tuned")
    api.extract(base=folder / "base", tuned=folder / "tuned", config=api.ExtractConfig(rank=4), output=folder / "ad")
    api.merge(base=folder / "base", adapters=[(folder / "ad", 1.0)], scheme="int8", output=folder / "merged")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """No process is started, no plot is drawn, and the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_tools.verbs.report.write_plots", lambda record, folder: None)
    found = StandIn()
    monkeypatch.setattr(verb, "run_bench", found)
    return found


def run(models, *names, **words):
    words = {"workload": api.Workload(api.sweep(prompt=(8,), new=(4,), batch=(1,))), "text": models / "text.txt", "quality_tokens": 300, **words}
    return api.bench(models=[models / name for name in names], **words)


def names(function, *paths):
    return list(function([Path(path) for path in paths]).values())


def test_folders_are_called_by_their_last_part_where_that_is_enough():
    assert names(unique_names, "/x/a", "/y/b") == ["a", "b"]


def test_equal_last_parts_get_one_more_part():
    assert names(unique_names, "/run1/int8", "/run2/int8") == ["run1/int8", "run2/int8"]


def test_labels_drop_the_words_that_all_begin_with():
    assert short_labels(["base-r16-fp32", "base-r16-int8"]) == ["fp32", "int8"]
    assert short_labels(["base", "base-nf4"]) == ["base", "base-nf4"]
    assert short_labels(["base-nf4"]) == ["base-nf4"]


def test_runs_are_numbered_from_the_first_that_is_free_and_not_waiting(tmp_path):
    (tmp_path / "bench-001").mkdir()
    journal_of(tmp_path / "bench-002").write_text("kept")
    assert next_run(tmp_path) == tmp_path / "bench-003" and interrupted_run(tmp_path) == tmp_path / "bench-002"
    (tmp_path / "bench-002").mkdir()
    assert interrupted_run(tmp_path) is None


def test_a_benchmark_leaves_a_record_that_is_read_back_and_nothing_else(models, stand_in, tmp_path):
    result = run(models, "tuned", "base", reference=models / "tuned", untuned=models / "base")
    assert {path.name for path in result.output.iterdir()} == FILES and [path.name for path in (tmp_path / "runs").iterdir()] == ["bench-001"]
    record = read_record(result.output)
    kept = {item.setting: item.figures["retention"] for item in record.quality}
    assert kept["tuned"] == pytest.approx(1) and kept["base"] == 0 and (result.reference, result.settings) == ("tuned", ("tuned", "base"))
    assert record.comparisons[0]["metric"] == "kl" and result.picked is None and result.compared is None
    (call,) = stand_in.calls
    assert call["workload"].ids is not None and call["timeout_s"] == 600 and not call["limits"]


def test_choices_reach_the_measuring(models, stand_in):
    run(models, "base", rounds=7, threads=2, timeout_s=5.0, limits=True, quality=False)
    (call,) = stand_in.calls
    assert (call["rounds"], call["threads"], call["timeout_s"], call["limits"], call["quality"]) == (7, 2, 5.0, True, None)


def test_without_quality_the_record_says_that_it_was_not_asked_for(models, stand_in):
    assert run(models, "base", quality=False).record.notes[-1] == "Quality was not judged: it was not asked for."
    assert "no reference" in run(models, "base").record.notes[-1]


def test_a_setting_that_cannot_be_exported_keeps_its_row_beside_the_others(models, stand_in):
    result = run(models, "base", settings=["torch-fp32", "fp16"], device="cpu", reference=models / "base")
    rows = {row.setting: row for row in result.record.rows}
    assert rows["base-torch-fp32"].status == "ok" and rows["base-fp16"].status == "error" and "export failed" in rows["base-fp16"].reason


def test_an_interrupted_benchmark_is_gone_on_with(models, stand_in, tmp_path):
    stand_in.interrupted = True
    with pytest.raises(Interrupted) as stopped:
        run(models, "base", quality=False)
    journal = tmp_path / "runs/.bench-001.journal"
    assert "--resume" in stopped.value.hint and journal.exists() and not (tmp_path / "runs/bench-001").exists()
    stand_in.interrupted = False
    fresh = run(models, "base", quality=False)
    assert fresh.output.name == "bench-002" and journal.exists()
    resumed = run(models, "base", quality=False, resume=True)
    assert resumed.output == Path("runs/bench-001") and stand_in.calls[-1]["journal"] == Path("runs/.bench-001.journal") and not journal.exists()
    with pytest.raises(MissingError, match="no interrupted benchmark"):
        run(models, "base", quality=False, resume=True)


def test_what_an_unfinished_benchmark_measured_is_given_up_only_by_force(models, stand_in, tmp_path):
    journal_of(tmp_path / "out").write_text("of another time")
    with pytest.raises(OutputExistsError, match="unfinished benchmark") as refused:
        run(models, "base", quality=False, output=tmp_path / "out")
    assert "--resume" in refused.value.hint and journal_of(tmp_path / "out").read_text() == "of another time" and not stand_in.calls
    run(models, "base", quality=False, output=tmp_path / "out", force=True)
    assert not journal_of(tmp_path / "out").exists() and (tmp_path / "out/bench.json").exists()


def test_two_benchmarks_do_not_write_one_run(models, stand_in, tmp_path):
    journal_of(tmp_path / "out").write_text("of the one that is running")
    with journal_of(tmp_path / "out").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another benchmark is running"):
            run(models, "base", quality=False, output=tmp_path / "out", force=True)
    assert journal_of(tmp_path / "out").read_text() == "of the one that is running" and not stand_in.calls


def test_results_are_not_lost_to_a_name_that_was_taken_meanwhile(models, stand_in, tmp_path, monkeypatch):
    real = StandIn()

    def slow(*args, **words):
        (tmp_path / "runs/bench-001").mkdir(parents=True)
        (tmp_path / "runs/bench-001/other.txt").write_text("another's")
        return real(*args, **words)

    monkeypatch.setattr(verb, "run_bench", slow)
    assert run(models, "base", quality=False).output == Path("runs/bench-002")


def test_an_output_that_is_there_is_refused_before_anything_is_measured(models, stand_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        run(models, "base", output=tmp_path / "out")
    assert not stand_in.calls


@pytest.mark.parametrize(("words", "kind"), [({"pick": "kl<"}, UsageError), ({"compare": "nowhere"}, MissingError)])
def test_wishes_and_baselines_are_judged_before_anything_is_measured(models, stand_in, words, kind):
    with pytest.raises(kind):
        run(models, "base", **words)
    assert not stand_in.calls


def test_a_baseline_of_other_work_is_refused_before_anything_is_measured(models, stand_in):
    before = run(models, "base")
    calls = len(stand_in.calls)
    with pytest.raises(IncompatibleError, match="no case of this benchmark"):
        run(models, "base", workload=api.Workload(api.sweep(prompt=(9,), new=(4,), batch=(1,))), compare=before.output)
    assert len(stand_in.calls) == calls


def test_a_pick_and_a_comparison_come_with_the_result(models, stand_in):
    before = run(models, "tuned", "base", reference=models / "tuned")
    stand_in.step_s, stand_in.noise = {"base": 4e-3}, {"base": 0.4}
    after = run(models, "tuned", "base", reference=models / "tuned", compare=before.output, pick="kl<0.001")
    assert after.picked.setting == "tuned"
    assert {(change.setting, change.metric) for change in after.compared.worse} == {("base", "decode"), ("base", "prefill"), ("base", "KL")}
    assert after.compared.baseline == str(before.output)


def test_a_record_held_against_itself_has_no_change(models, stand_in):
    made = run(models, "tuned", "base", reference=models / "tuned")
    (found,) = api.report(runs=[made.output], compare=made.output).reports
    assert {change.verdict for change in found.compared.changes} == {"tie"}


def test_layers_have_ranks_and_singular_values_of_the_extraction_and_what_a_merge_keeps(models, stand_in):
    layers = layers_of(models / "ad")
    assert all(len(layer.singular_values) == layer.rank == 4 for layer in layers)
    assert all(list(layer.singular_values) == sorted(layer.singular_values, reverse=True) for layer in layers)
    for layer in layers:
        energy = sum(value**2 for value in layer.singular_values)
        total = json.loads((models / "ad/qlt-manifest.json").read_text())["report"]["rows"]
        norm = next(row["certificate"]["delta_norm"] for row in total if row["name"] == layer.name)
        assert energy / norm**2 == pytest.approx(1 - next(row["certificate"]["optimum"] for row in total if row["name"] == layer.name) ** 2, abs=2e-4)
    both = {layer.name: layer for layer in layers_of_models([models / "merged"], [models / "ad"])}
    assert all(0.5 < layer.retention <= 1.1 and layer.singular_values for layer in both.values())
    assert [layer.retention is None for layer in layers_of_models([models / "base"], [models / "ad"])] == [True] * len(layers)
    alone = layers_of_models([models / "merged"], [])
    assert len(alone) == len(layers) and all(layer.retention and layer.kept_energy is None for layer in alone)
    assert layers_of(models / "base") == [] and layers_of_models([models / "base"], []) == []


def test_an_export_of_a_merge_shows_the_merges_layers(models, stand_in):
    api.export(model=models / "merged", scheme="int8", verify=False, output=Path("e"))
    assert len(layers_of_models([Path("e")], [])) == 14


def test_a_resized_adapter_has_layers_too(models, stand_in):
    api.resize_adapter(adapter=models / "ad", rank=2, output=Path("small"))
    assert {layer.rank for layer in layers_of(Path("small"))} == {2}


def test_a_report_is_drawn_again_in_its_place_and_leaves_the_rest(models, stand_in):
    made = run(models, "base", quality=False)
    page, notes = made.output / "report.html", made.output / "notes.txt"
    before = page.read_bytes()
    page.unlink()
    notes.write_text("mine")
    (found,) = api.report().reports
    assert found.output == made.output == found.run and page.read_bytes() == before and notes.read_text() == "mine"
    assert found.record == made.record


def test_a_record_that_was_moved_is_drawn_where_it_is_told(models, stand_in, tmp_path):
    made = run(models, "base", quality=False)
    (tmp_path / "moved").mkdir()
    (made.output / "bench.json").rename(tmp_path / "moved/bench.json")
    for place in (tmp_path / "moved", tmp_path / "moved/bench.json"):
        assert api.report(runs=[place]).reports[0].output is None
    api.report(runs=[tmp_path / "moved"], output=tmp_path / "pages")
    assert {path.name for path in (tmp_path / "pages").iterdir()} == FILES and [path.name for path in (tmp_path / "moved").iterdir()] == ["bench.json"]
    with pytest.raises(OutputExistsError):
        api.report(runs=[tmp_path / "moved"], output=tmp_path / "pages")


def test_several_reports_go_into_one_folder_by_name(models, stand_in, tmp_path):
    made = [run(models, "base", quality=False).output for _ in range(2)]
    found = api.report(runs=made, output=tmp_path / "pages", dry_run=True)
    assert [item.output for item in found.reports] == [tmp_path / "pages/bench-001", tmp_path / "pages/bench-002"] and not (tmp_path / "pages").exists()


def test_the_latest_run_is_the_default_and_others_versions_do_not_hide_it(models, stand_in, tmp_path):
    with pytest.raises(MissingError, match="holds no benchmark"):
        api.report()
    run(models, "base", quality=False)
    latest = run(models, "base", quality=False).output
    (tmp_path / "runs/zzz").mkdir()
    (tmp_path / "runs/zzz/bench.json").write_text('{"schema": "qlt.bench/1"}')
    assert api.report(dry_run=True).reports[0].run == latest
    for path in (tmp_path / "runs").glob("bench-*/bench.json"):
        path.unlink()
    with pytest.raises(CorruptError, match=r"qlt.bench/1"):
        api.report()
