"""A manifest is read as it was written, and one from a stranger is refused with the place of what is wrong, before anybody acts on it."""

from __future__ import annotations

import json

import pytest

from qlora_tools.errors import CorruptError
from qlora_tools.manifest import FILE_NAME, Manifest, misfit, read_manifest, strict_json

HASH = "ab" * 32
WRITTEN = Manifest(
    "export",
    {"verb": "export", "scheme": "int8", "device": "cpu", "compute": "F32", "standard": False, "target": None, "kept": ["code"], "adapters": {"adapter": {"use": "merged", "weight": 0.5}}},
    inputs={"base": {"name": "base", "path": "../base", "content_sha256": HASH}, "adapter": {"name": "a", "hub": "org/a@main", "sha256": HASH}},
    base_tensors={"w": HASH},
    source_tensors={"w": HASH},
    report={
        "parity": None,
        "rows": [{"name": "w", "shape": [8, 8], "certificate": {"rank": 2, "error": 0.1, "optimum": 0.1}}, {"module": "m", "cut": {"rank": 2, "error": 0, "optimum": 0}}],
        "tensors": [{"name": "w", "retention": 0.9}],
        "branch": {"name": "b", "path": "../b"},
    },
    files={"model.onnx": {"sha256": HASH, "bytes": 3}, "plots/a.png": {"sha256": HASH, "bytes": 0}},
)  # fmt: skip


def read(folder, content):
    (folder / FILE_NAME).write_bytes(content)
    return read_manifest(folder)


def changed(change):
    value = json.loads(WRITTEN.to_json())
    change(value)
    return json.dumps(value).encode()


def test_what_is_written_is_read_byte_for_byte(tmp_path):
    assert read(tmp_path, WRITTEN.to_json()).to_json() == WRITTEN.to_json()


def test_a_folder_without_a_manifest_has_none(tmp_path):
    assert read_manifest(tmp_path) is None


def test_fields_may_be_missing_and_unknown_ones_are_passed_over(tmp_path):
    found = read(tmp_path, b'{"schema": "qlt.manifest/1", "kind": "bench", "inputs": null, "novelty": 1}')
    assert (found.kind, dict(found.command), dict(found.inputs), dict(found.files)) == ("bench", {}, {}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema=["x"]), "schema is"),
        (lambda v: v.pop("kind"), "`kind` is 'None', expected text"),
        (lambda v: v.update(command=[]), "`command` is .* expected an object"),
        (lambda v: v.update(inputs={"base": "x"}), "`inputs.base` is 'x', expected an object"),
        (lambda v: v["inputs"]["base"].update(path=3), "`inputs.base.path` is '3', expected text"),
        (lambda v: v.update(files={"a": 3}), "`files.a` is '3', expected an object"),
        (lambda v: v["files"]["model.onnx"].pop("bytes"), "`files.model.onnx.bytes` is 'None', expected a whole number"),
        (lambda v: v["files"]["model.onnx"].update(bytes=True), "`files.model.onnx.bytes` is 'True'"),
        (lambda v: v["files"].update({"../x": {"sha256": HASH, "bytes": 1}}), r"'../x', expected a path inside"),
        (lambda v: v["files"].update({"/etc/passwd": {"sha256": HASH, "bytes": 1}}), r"'/etc/passwd', expected a path inside"),
        (lambda v: v["files"].update({"a/../../x": {"sha256": HASH, "bytes": 1}}), "expected a path inside"),
        (lambda v: v.update(base_tensors={"w": 1}), "`base_tensors.w` is '1', expected text"),
        (lambda v: v.update(source_tensors=[]), "`source_tensors`"),
        (lambda v: v.update(versions={"torch": {}}), "`versions.torch`"),
        (lambda v: v.update(report=3), "`report` is '3'"),
        (lambda v: v["report"].update(rows=[3]), r"`report.rows\[0\]` is '3'"),
        (lambda v: v["report"]["rows"][0].pop("certificate"), r"`report.rows\[0\].certificate` is 'None'"),
        (lambda v: v["report"].update(tensors=[{"name": "w", "retention": "x"}]), r"`report.tensors\[0\].retention`"),
        (lambda v: v["report"].update(branch={"name": 3}), "`report.branch.name` is '3'"),
        (lambda v: v["command"].update(adapters=[]), "`command.adapters` is .* expected an object"),
        (lambda v: v["command"]["adapters"]["adapter"].pop("weight"), "`command.adapters.adapter.weight` is 'None', expected a number"),
        (lambda v: v["command"]["adapters"]["adapter"].update(use="worn"), "`command.adapters.adapter.use` is 'worn', expected one of merged, kept, fixed"),
        (lambda v: v["inputs"].pop("adapter"), "names 'adapter', which `inputs` does not"),
        (lambda v: v["command"].update(scheme=["int8"]), "`command.scheme`"),
        (lambda v: v["command"].update(standard="no"), "`command.standard` is 'no', expected true or false"),
    ],
)
def test_what_no_verb_writes_is_refused_with_its_place(tmp_path, change, message):
    with pytest.raises(CorruptError, match=message) as refused:
        read(tmp_path, changed(change))
    assert FILE_NAME in str(refused.value) and refused.value.hint


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"schema": "qlt.manifest/1", "kind": "export", "report": {"x": NaN}}', b'{"a": ' * 500 + b"1" + b"}" * 500],
)
def test_what_is_no_json_that_can_be_used_is_corrupt(tmp_path, content):
    with pytest.raises(CorruptError, match=FILE_NAME):
        read(tmp_path, content)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400", "-1e101", "9" * 30, "1" * 5000, "[" * 66 + "]" * 66, "[" * 100_000, "{"])
def test_json_that_would_fail_later_fails_at_once(text):
    with pytest.raises(ValueError):
        strict_json(f"[{text}]")


def test_json_that_can_be_used_is_what_it_says():
    assert strict_json(b'{"a": [1, -2.5, 9007199254740993, null, true, "x"]}') == {"a": [1, -2.5, 9007199254740993, None, True, "x"]}


def test_a_misfit_is_named_with_its_place_and_a_fit_is_not():
    shape = {"a": int, "b": ([{str: float}], None), "c": (str, None), "d": object}
    assert misfit({"a": 1, "b": [{"x": 1, "y": 2.5}], "d": [], "more": 1}, shape) is None
    assert misfit({"a": 1.0}, shape) == "`a` is '1.0', expected a whole number"
    assert misfit({"a": 1, "b": [{}, {"x": "1"}]}, shape, "in") == "`in.b[1].x` is '1', expected a number"
    assert misfit([], shape, "in") == "`in` is '[]', expected an object" and misfit(True, float) and misfit(True, bool) is None
