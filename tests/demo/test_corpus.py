from __future__ import annotations

import hashlib
import importlib

import pytest

from qlora_tools.demo import corpus
from qlora_tools.demo.corpus import Document, code_corpus, joined, prose_corpus
from qlora_tools.errors import MissingError
from qlora_tools.quality.corpus import python_reference


def write_library(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def small_is_enough(monkeypatch):
    monkeypatch.setattr(corpus, "_MIN_BYTES", {"code": 10, "prose": 10})


@pytest.fixture(scope="module")
def installed_prose():
    return prose_corpus()


def test_installed_library_gives_megabytes_of_code_and_no_tests():
    found = code_corpus()
    names = {document.name for document in found.train + found.heldout}
    assert found.train_bytes > 4_000_000 and found.heldout_bytes > 50_000
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "encodings/", "pydoc_data/"))]


def test_split_follows_the_name_and_not_the_content_or_the_neighbours(tmp_path, small_is_enough):
    names = [f"package/module{index}.py" for index in range(200)]
    one = code_corpus(write_library(tmp_path / "one", dict.fromkeys(names, "x = 1\n")))
    two = code_corpus(write_library(tmp_path / "two", dict.fromkeys(names[::2], "y = 2\n")))
    heldout = {document.name for document in one.heldout}
    assert 0 < len(heldout) < 40
    assert {document.name for document in two.heldout} == heldout & set(names[::2])
    assert not heldout & {document.name for document in one.train}


def test_documents_come_sorted_whatever_the_folder_listing(tmp_path, small_is_enough):
    found = code_corpus(write_library(tmp_path, {"b.py": "b = 1\n" * 9, "a/z.py": "z = 1\n", "a.py": "a = 1\n"}))
    names = [document.name for document in found.train]
    assert names == sorted(names)


def test_unreadable_and_empty_files_are_skipped_and_named(tmp_path, small_is_enough):
    found = code_corpus(write_library(tmp_path, {"good.py": "good = True\n" * 5, "latin.py": b"# \xe9\xff\n", "empty.py": "\n"}))
    assert found.skipped == ("latin.py",)
    assert "empty.py" not in {document.name for document in found.train + found.heldout}


@pytest.mark.parametrize("present", [True, False])
def test_python_without_source_is_refused_with_the_way_out(tmp_path, present):
    folder = write_library(tmp_path, {"lonely.py": "x = 1\n"}) if present else tmp_path / "python311.zip"
    with pytest.raises(MissingError, match="standard library is not in") as caught:
        code_corpus(folder)
    assert "--base" in caught.value.hint


def test_python_without_the_reference_is_refused(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingError, match="pydoc_data") as caught:
        prose_corpus()
    assert "--base" in caught.value.hint


def test_no_paragraph_of_held_out_prose_is_in_training(installed_prose):
    def paragraphs(documents):
        return {paragraph.strip() for document in documents for paragraph in document.text.split("\n\n")}

    assert not paragraphs(installed_prose.train) & paragraphs(installed_prose.heldout)


def test_held_out_prose_takes_its_share_however_uneven_the_topics(installed_prose):
    share = installed_prose.heldout_bytes / (installed_prose.heldout_bytes + installed_prose.train_bytes)
    assert 0.08 < share < 0.18


def test_prose_is_held_out_where_every_other_measurement_holds_it_out(installed_prose):
    held_out = python_reference("heldout").text
    assert all(paragraph.strip() in held_out for document in installed_prose.heldout for paragraph in document.text.split("\n\n"))


def test_a_topic_that_only_repeats_others_disappears(small_is_enough):
    found = prose_corpus({"long": "one\n\ntwo\n\nthree", "quote": "two"})
    assert [document.name for document in found.train + found.heldout] == ["long"]


def test_digest_sees_texts_and_sides():
    make = corpus.Corpus
    a, b = Document("a", "x"), Document("b", "y")
    digests = {
        make("code", (a,), (b,)).sha256(),
        make("code", (b,), (a,)).sha256(),
        make("code", (a,), ()).sha256(),
        make("code", (Document("a", "z"),), (b,)).sha256(),
    }
    assert len(digests) == 4
    assert make("code", (), ()).sha256() == hashlib.sha256().hexdigest()


def test_joined_documents_are_parted_by_one_blank_line():
    assert joined([Document("a", "x\n\n\n"), Document("b", "\ny")]) == "x\n\ny\n"
