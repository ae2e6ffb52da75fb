"""Which exports are of one model: as their manifests say, whatever their folders are called."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from qlora_tools import api
from qlora_tools.verbs.bench_reference import judges, of_one_model, places_beside


@pytest.fixture
def made(tmp_path, monkeypatch, llama, tuned):
    """fp32 and int8 exports of one model, and an fp32 export of another."""
    monkeypatch.chdir(tmp_path)
    for model, scheme, name in ((llama, "fp32", "m-fp32"), (llama, "int8", "m-int8"), (tuned, "fp32", "other-fp32")):
        api.export(model=model, scheme=scheme, verify=False, output=Path(name))
    return tmp_path


def test_only_an_fp32_export_of_the_same_values_judges(made):
    assert judges(Path("m-fp32"), Path("m-int8")) and of_one_model(Path("m-int8"), Path("m-fp32"))
    assert not judges(Path("other-fp32"), Path("m-int8")), "another model's"
    assert not judges(Path("m-int8"), Path("m-int8")), "not fp32"
    Path("named-fp32").mkdir()
    assert not judges(Path("named-fp32"), Path("m-int8")), "a name alone"


def test_an_export_of_an_older_state_does_not_judge(made):
    manifest = Path("m-int8/qlt-manifest.json")
    content = json.loads(manifest.read_text())
    content["inputs"]["model"]["content_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    assert not judges(Path("m-fp32"), Path("m-int8"))


def test_calibration_changes_the_rounding_and_not_the_model(made):
    manifest = Path("m-int8/qlt-manifest.json")
    content = json.loads(manifest.read_text())
    content["inputs"]["calibration"] = {"name": "text.txt", "sha256": "1" * 64}
    manifest.write_text(json.dumps(content))
    assert judges(Path("m-fp32"), Path("m-int8"))


def test_a_folder_without_a_manifest_is_of_no_model(made):
    shutil.copytree("m-int8", "bare")
    Path("bare/qlt-manifest.json").unlink()
    assert not of_one_model(Path("bare"), Path("m-int8")) and not judges(Path("m-fp32"), Path("bare"))


def test_the_reference_lies_beside_under_a_name_that_is_free():
    assert [str(path) for path in itertools.islice(places_beside(Path("e/m-int8"), "int8"), 3)] == ["e/m-fp32", "e/m-fp32-2", "e/m-fp32-3"]
