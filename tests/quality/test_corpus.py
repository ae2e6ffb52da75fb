import hashlib
import importlib

import numpy as np
import pytest

from qlora_tools.errors import CorruptError, MissingError, UsageError
from qlora_tools.quality.corpus import Corpus, Method, python_reference, read_corpus, tokenize, windows


def scored(found):
    return [token for window in found for token in window.targets.tolist()]


def test_disjoint_windows_score_all_but_their_first_token():
    found = windows(list(range(11)), Method(context=4))
    assert [window.ids.tolist() for window in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scored(found) == [1, 2, 3, 5, 6, 7]


def test_sliding_windows_score_every_token_once():
    found = windows(list(range(10)), Method(context=4, stride=2))
    assert scored(found) == list(range(1, 10))
    assert [window.n_scored for window in found] == [3, 2, 2, 2]


def test_a_bos_lets_the_first_token_be_scored_and_leads_every_window():
    found = windows([5, 6, 7, 8], Method(context=2, bos=1))
    assert [window.ids.tolist() for window in found] == [[1, 5, 6], [1, 7, 8]]
    assert scored(found) == [5, 6, 7, 8]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("bos", [None, 99])
def test_no_token_is_scored_twice_whatever_the_stride(stride, bos):
    found = scored(windows(list(range(23)), Method(context=5, stride=stride, bos=bos)))
    assert len(found) == len(set(found))
    assert found == sorted(found)


def test_max_tokens_keeps_whole_windows_and_at_least_one():
    assert len(windows(np.arange(100), Method(context=10, max_tokens=27))) == 3
    assert len(windows(np.arange(100), Method(context=10, max_tokens=1))) == 1


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UsageError, match="fewer than one window of 8"):
        windows([1, 2, 3], Method(context=8))


@pytest.mark.parametrize("arguments", [{"context": 1}, {"context": 8, "stride": 9}, {"context": 8, "stride": 0}, {"max_tokens": 0}])
def test_impossible_methods_are_refused(arguments):
    with pytest.raises(UsageError):
        Method(**arguments)


def test_the_reference_text_is_split_without_shared_paragraphs():
    train, held_out, whole = (python_reference(part).text for part in ("train", "heldout", "all"))
    assert python_reference().text == held_out
    assert 0.05 < len(held_out) / len(whole) < 0.2
    paragraphs = [{" ".join(p.split()) for p in text.split("\n\n") if len(" ".join(p.split())) >= 80} for text in (train, held_out)]
    assert len(paragraphs[1]) > 50
    assert not paragraphs[0] & paragraphs[1]


def test_a_python_without_the_reference_is_refused(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingError, match=r"pydoc_data\.topics"):
        python_reference()


def test_an_unknown_part_is_refused():
    with pytest.raises(UsageError, match="heldout"):
        python_reference("test")


def test_a_corpus_carries_the_hash_of_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("h\u00e9\r\nllo".encode())
    corpus = read_corpus(tmp_path / "a.txt")
    assert corpus == Corpus("a.txt", "h\u00e9\nllo")
    assert corpus.sha256 == hashlib.sha256("h\u00e9\nllo".encode()).hexdigest()


def test_text_files_that_are_missing_or_binary_are_named(tmp_path):
    (tmp_path / "b.bin").write_bytes(b"ab\xff\xfe")
    with pytest.raises(CorruptError, match=r"b\.bin is not UTF-8 text \(byte 2\)"):
        read_corpus(tmp_path / "b.bin")
    with pytest.raises(MissingError):
        read_corpus(tmp_path / "none.txt")


def test_tokenize_goes_through_the_callable():
    found = tokenize(Corpus("x", "abcdef"), lambda text: [ord(c) for c in text], Method(context=3))
    assert found[1].ids.tolist() == [100, 101, 102]
