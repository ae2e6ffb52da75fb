"""Reading training data: every form, every alias, and every way that a file can be bad."""

from __future__ import annotations

import json
import sys

import pytest

from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, StorageError, UnsupportedError, UsageError
from qlora_tools.training import examples
from qlora_tools.training.examples import read_records


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_file_is_one_stream(tmp_path):
    path = tmp_path / "all.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    records = read_records(path)
    assert (records.kind, records.rows, records.lines) == ("stream", ({"text": "one\ntwo\n"},), (1,))
    assert len(records.sha256) == 64


@pytest.mark.parametrize(
    ("row", "kind", "normal"),
    [
        ({"text": "a", "id": 3}, "text", {"text": "a"}),
        ({"prompt": "p", "completion": "c"}, "completion", {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "response": "c"}, "completion", {"prompt": "p", "completion": "c"}),
        ({"text": "a", "label": "good"}, "labelled", {"text": "a", "label": "good"}),
        ({"sentence": "a", "label": 1}, "labelled", {"text": "a", "label": 1}),
        ({"messages": [{"role": "user", "content": "q", "extra": 1}]}, "messages", {"messages": [{"role": "user", "content": "q"}]}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "messages",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ),
        (
            {"instruction": "i", "input": "x", "output": "o", "text": "all of it"},
            "messages",
            {"messages": [{"role": "user", "content": "i\n\nx"}, {"role": "assistant", "content": "o"}]},
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "messages", {"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]}),
        ({"question": "i", "answer": "o"}, "messages", {"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]}),
        ({"prompt": "p", "messages": [{"role": "user", "content": "q"}]}, "messages", {"messages": [{"role": "user", "content": "q"}]}),
    ],
)
def test_keys_tell_the_kind(tmp_path, row, kind, normal):
    records = read_records(jsonl(tmp_path / "d.jsonl", row))
    assert (records.kind, records.rows) == (kind, (normal,))


def test_tools_and_tool_calls_are_kept_for_the_template(tmp_path):
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    records = read_records(jsonl(tmp_path / "d.jsonl", {"messages": [turn], "tools": [{"type": "function"}]}))
    assert records.rows[0] == {"messages": [{**turn, "content": ""}], "tools": [{"type": "function"}]}


def test_bom_crlf_blank_lines_and_unicode_separators_are_ordinary(tmp_path):
    """U+2028, U+0085 and a form feed inside JSON strings end no line."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b\u0085c\x0c"}\r\n\r\n{"text": "é"}'.replace("\x0c", "\\f").encode())
    records = read_records(path)
    assert [row["text"] for row in records.rows] == ["a\u2028b\u0085c\x0c", "é"]
    assert records.lines == (1, 3)
    assert records.where(1) == f"{path}:3"


def test_blank_texts_are_left_out_and_counted(tmp_path):
    records = read_records(jsonl(tmp_path / "d.jsonl", {"text": ""}, {"text": "a"}, {"text": " \n"}))
    assert (len(records), records.lines, records.blank) == (1, (2,), 2)


def test_a_json_list_names_entries(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    records = read_records(path)
    assert (records.kind, records.lines, records.where(1)) == ("text", (1, 2), f"{path}, entry 2")
    path.write_text(json.dumps([{"text": "a"}, 7]))
    with pytest.raises(CorruptError, match=r"d\.json, entry 2: found int 7, expected one of"):
        read_records(path)
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(CorruptError, match="expected a list of records"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'text': 1}", "not JSON"),
        ('{"text": "a"', "not JSON"),
        ("[1]", r"found list \[1\], expected one of \{text\}"),
        ('"text"', "found str"),
        ("null", "found NoneType"),
        ('{"txt": "a", "b": 1}', "keys b, txt, expected"),
        ("{}", "keys none"),
        ('{"text": 5}', "text is int 5, expected a string"),
        ('{"text": null}', "text is NoneType None"),
        ('{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
        ('{"prompt": "a", "completion": ["b"]}', "completion is list"),
        ('{"prompt": "a"}', "keys prompt, expected"),
        ('{"text": "a", "label": null}', "label is NoneType None, expected a name or a class number"),
        ('{"text": "a", "label": 0.5}', "label is float 0.5"),
        ('{"text": "a", "label": true}', "label is bool True"),
        ('{"messages": "hi"}', "messages is str 'hi', expected a list"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": ["hi"]}', r"messages\[1\]: found str 'hi'"),
        ('{"messages": [{"content": "x"}]}', r"messages\[1\]: found keys content, expected role and content"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', r"messages\[1\]: content is list"),
        ('{"messages": [{"role": "user", "content": null}]}', "content is NoneType"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_what_was_found(tmp_path, line, says):
    path = jsonl(tmp_path / "d.jsonl", "", line)
    with pytest.raises(CorruptError, match=says) as caught:
        read_records(path)
    assert f"{path}:2" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_later_bad_line_is_named_too(tmp_path):
    with pytest.raises(CorruptError, match=r"d\.jsonl:3: found list"):
        read_records(jsonl(tmp_path / "d.jsonl", {"text": "a"}, {"text": "b"}, "[]"))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CorruptError, match=r"d\.jsonl:2 is not UTF-8"):
        read_records(path)
    path.with_suffix(".txt").write_bytes(b"ab\xff")
    with pytest.raises(CorruptError, match=r"d\.txt is not UTF-8 text \(byte 2\)"):
        read_records(path.with_suffix(".txt"))


def test_mixed_kinds_name_both_lines(tmp_path):
    with pytest.raises(IncompatibleError, match=r"d\.jsonl:3 is a completion record, but .*d\.jsonl:1 is a text record"):
        read_records(jsonl(tmp_path / "d.jsonl", {"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}))


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n \n")
    with pytest.raises(UsageError, match="holds no"):
        read_records(tmp_path / name)


def test_only_blank_texts_are_no_records(tmp_path):
    with pytest.raises(UsageError, match="only 2 blank texts"):
        read_records(jsonl(tmp_path / "d.jsonl", {"text": " "}, {"text": ""}))


def test_missing_unknown_and_unreadable_files(tmp_path):
    with pytest.raises(MissingError):
        read_records(tmp_path / "no.jsonl")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(UnsupportedError, match=r"found '\.csv'"):
        read_records(tmp_path / "d.csv")
    with pytest.raises(UnsupportedError, match="not a datasets folder"):
        read_records(tmp_path)
    with pytest.raises(UsageError, match="only datasets folders have splits"):
        read_records(jsonl(tmp_path / "d.jsonl", {"text": "a"}), split="train")


def test_an_input_error_is_a_storage_error(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "d.jsonl", {"text": "a"})

    def fail(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", fail)
    with pytest.raises(StorageError, match="Permission denied"):
        read_records(path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "d.jsonl", {"text": "a" * 100}, {"text": "b"})
    monkeypatch.setattr(examples, "_MAX_LINE_BYTES", 50)
    with pytest.raises(CorruptError, match=r"d\.jsonl:1 has 112 bytes, above 50"):
        read_records(path)
    monkeypatch.setattr(examples, "_MAX_LINE_BYTES", 500)
    monkeypatch.setattr(examples, "_MAX_RECORDS", 1)
    with pytest.raises(UnsupportedError, match="more than 1 records"):
        read_records(path)
    monkeypatch.setattr(examples, "_MAX_FILE_BYTES", 50)
    with pytest.raises(UnsupportedError, match="above the 50"):
        read_records(path)


def test_taking_rows_keeps_their_lines(tmp_path):
    records = read_records(jsonl(tmp_path / "d.jsonl", *({"text": str(number)} for number in range(4))))
    taken = records.take([3, 1])
    assert ([row["text"] for row in taken.rows], taken.lines, taken.sha256) == (["3", "1"], (4, 2), records.sha256)


def test_content_changes_the_hash(tmp_path):
    first = read_records(jsonl(tmp_path / "a.jsonl", {"text": "a"})).sha256
    assert first == read_records(jsonl(tmp_path / "b.jsonl", {"text": "a"})).sha256
    assert first != read_records(jsonl(tmp_path / "c.jsonl", {"text": "b"})).sha256


class TestDatasetsFolder:
    def test_rows_and_splits(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        one = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}])
        one.save_to_disk(str(tmp_path / "plain"))
        datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "parts"))
        plain = read_records(tmp_path / "plain")
        assert (plain.kind, plain.lines, plain.rows[1]) == ("completion", (1, 2), {"prompt": "q", "completion": "d"})
        assert plain.where(0).endswith("plain, row 1")
        assert read_records(tmp_path / "parts").sha256 == plain.sha256
        assert len(read_records(tmp_path / "parts", split="test")) == 1
        with pytest.raises(UsageError, match="no split 'dev'; it has test, train"):
            read_records(tmp_path / "parts", split="dev")
        with pytest.raises(UsageError, match="has no splits"):
            read_records(tmp_path / "plain", split="train")

    def test_messages_survive_arrow(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        datasets.Dataset.from_list([{"messages": turns}]).save_to_disk(str(tmp_path / "d"))
        assert read_records(tmp_path / "d").rows == ({"messages": turns},)

    def test_a_damaged_folder_is_an_error_of_ours(self, tmp_path):
        pytest.importorskip("datasets")
        (tmp_path / "state.json").write_text("{")
        (tmp_path / "dataset_info.json").write_text("{")
        with pytest.raises(CorruptError, match="cannot be opened"):
            read_records(tmp_path)

    def test_without_the_package_the_way_out_is_told(self, tmp_path, monkeypatch):
        (tmp_path / "dataset_info.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UnsupportedError, match="datasets package") as caught:
            read_records(tmp_path)
        assert "pip install datasets" in caught.value.hint
