"""The reader accepts what the format's own library writes and refuses everything the format forbids."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_tools.checkpoint.safetensors_file import SafetensorsFile, parse_header
from qlora_tools.errors import CorruptError, MissingError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.zeros(0, 5),
    "d": torch.arange(10).to(torch.bfloat16).reshape(5, 2, 1),
    "e": torch.arange(7, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def header(entries, data=0, **extra):
    return parse_header("x.safetensors", json.dumps({**entries, **extra}).encode(), data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_tensor_reads_as_the_reference_library_reads_it(file):
    with SafetensorsFile(file) as opened:
        expected = load_file(file)
        assert opened.specs.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(opened.read(name), tensor) and opened.read(name).dtype == tensor.dtype
        assert opened.metadata == {"format": "pt"}


def test_row_ranges_read_as_slices(file):
    with SafetensorsFile(file) as opened:
        assert torch.equal(opened.read("a.weight", (1, 3)), TENSORS["a.weight"][1:3])
        assert torch.equal(opened.read("d", (0, 5)), TENSORS["d"])
        assert opened.read("d", (2, 2)).shape == (0, 2, 1)


def test_a_tensor_read_twice_is_two_tensors(file):
    with SafetensorsFile(file) as opened:
        opened.read("a.weight").zero_()
        assert torch.equal(opened.read("a.weight"), TENSORS["a.weight"])


def test_every_truncation_is_refused(file, tmp_path):
    content = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CorruptError):
            SafetensorsFile(cut)


def test_trailing_bytes_are_refused(file):
    with file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CorruptError, match="the file holds"):
        SafetensorsFile(file)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": entry(), "b": entry(offsets=(0, 4))}, 4, "overlap or leave a gap"),
        ({"a": entry(offsets=(4, 8))}, 8, "overlap or leave a gap"),
        ({"a": entry(shape=(2,))}, 4, "needs 8 bytes, its offsets span 4"),
        ({"a": entry(shape=(-1,))}, 4, "shape"),
        ({"a": entry(shape=(1.0,))}, 4, "shape"),
        ({"a": entry(shape=(True,))}, 4, "shape"),
        ({"a": entry(shape=(1 << 40, 1 << 40))}, 4, "needs"),
        ({"a": entry(offsets=(4, 0))}, 4, "needs 4 bytes"),
        ({"a": entry(dtype="F4")}, 4, "dtype 'F4'"),
        ({"a": entry(dtype=[])}, 4, "dtype '\\[\\]'"),
        ({"a": entry(dtype={"F32": 1})}, 4, "dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "does not hold"),
        ({"a": []}, 4, "does not hold"),
        ({"": entry()}, 4, "named"),
        ({"a\nb": entry()}, 4, "named"),
        ({"__metadata__": {"format": 1}}, 0, "map of strings"),
        ({"__metadata__": []}, 0, "map of strings"),
    ],
)
def test_a_lying_header_is_refused_with_its_reason(entries, data, message):
    with pytest.raises(CorruptError, match=message):
        header(entries, data)


@pytest.mark.parametrize("raw", [b"", b"[]", b' {"a":1}', b"{", b'{"a":NaN}', b"\xff\xfe", b'{"a":1,"a":2}', b"{" * 100_000])
def test_text_that_is_not_one_plain_object_is_refused(raw):
    with pytest.raises(CorruptError):
        parse_header("x", raw, 0)


def test_a_header_length_beyond_the_file_is_refused(tmp_path):
    bomb = tmp_path / "bomb.safetensors"
    bomb.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptError, match="header length"):
        SafetensorsFile(bomb)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(MissingError):
        SafetensorsFile(tmp_path / "none.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos here")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CorruptError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_mutated_headers_raise_only_declared_errors(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + length], len(content) - 8 - length
    generator = random.Random(0)
    refused = 0
    for _ in range(20_000):
        mutant = bytearray(raw)
        for _ in range(generator.randint(1, 3)):
            mutant[generator.randrange(length)] = generator.randrange(256)
        try:
            parse_header("mutant", bytes(mutant), data)
        except CorruptError:
            refused += 1
    assert refused > 10_000


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abcdef.", min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=4), max_size=6))
def test_any_set_of_shapes_survives_a_round_trip(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("shapes") / "x.safetensors"
    tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
    save_file(tensors, path)
    with SafetensorsFile(path) as opened:
        for name, tensor in tensors.items():
            assert torch.equal(opened.read(name), tensor)
