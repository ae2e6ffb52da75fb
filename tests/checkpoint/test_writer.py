"""Written files equal what the reference library reads, byte for byte the same on every run, and are never half there."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_tools.checkpoint.reader import CheckpointReader
from qlora_tools.checkpoint.writer import CheckpointWriter, SafetensorsWriter, write_tensors
from qlora_tools.errors import StorageError
from qlora_tools.specs import TensorSpec, spec_of

TENSORS = {f"layers.{i}.weight": torch.randn(5, 3 + i).to(torch.bfloat16) for i in range(12)} | {
    "step": torch.tensor(3),
    "absmax": torch.arange(7, dtype=torch.uint8),
}


def write(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, [spec_of(name, tensor) for name, tensor in tensors.items()], **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_the_reference_library_reads_what_was_written(tmp_path):
    write(tmp_path, TENSORS)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}


def test_tensors_are_aligned_for_their_dtype(tmp_path):
    write(tmp_path, TENSORS)
    for entry in CheckpointReader(tmp_path)._files[0].entries.values():
        assert entry.offset % entry.spec.torch_dtype.itemsize == 0


def test_order_threads_and_pieces_do_not_change_the_bytes(tmp_path):
    write(tmp_path / "a", TENSORS)
    backwards = dict(reversed(TENSORS.items()))
    write(tmp_path / "b", backwards)
    (tmp_path / "c").mkdir()
    with CheckpointWriter(tmp_path / "c", [spec_of(name, tensor) for name, tensor in TENSORS.items()]) as writer, ThreadPoolExecutor(4) as pool:
        for name, tensor in TENSORS.items():
            pieces = [(row, tensor[row : row + 1]) for row in range(tensor.shape[0])] if tensor.ndim else [(0, tensor)]
            for row, piece in reversed(pieces):
                pool.submit(writer.write, name, piece, row)
    first = (tmp_path / "a/model.safetensors").read_bytes()
    assert first == (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


def test_a_sharded_checkpoint_carries_an_index_that_the_reader_accepts(tmp_path):
    write(tmp_path, TENSORS, max_shard_bytes=120)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    reader = CheckpointReader(tmp_path)
    assert len(set(index["weight_map"].values())) > 2 and all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_that_was_not_written_is_noticed_at_close(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))])
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="not written.*b"):
        writer.close()


@pytest.mark.parametrize("piece", [torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(4, 2)])
def test_a_piece_that_does_not_fit_its_plan_is_refused(tmp_path, piece):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", [TensorSpec("a", "F32", (3, 2))])
    with pytest.raises(AssertionError, match="planned"):
        writer.write("a", piece)
    writer.abort()


def test_tensors_at_hand_are_written_in_one_call_and_the_file_is_closed_whatever_happens(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"format": "pt", "kind": "small"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "small"} and all(torch.equal(file.get_tensor(name), TENSORS[name]) for name in TENSORS)
    aborted = []
    monkeypatch.setattr(SafetensorsWriter, "write", lambda *_: 1 / 0)
    monkeypatch.setattr(SafetensorsWriter, "abort", lambda self, abort=SafetensorsWriter.abort: aborted.append(self._descriptor) or abort(self))
    with pytest.raises(ZeroDivisionError):
        write_tensors(tmp_path / "b.safetensors", TENSORS)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(aborted[0])


def test_a_disk_without_room_is_noticed_before_the_first_tensor(tmp_path):
    with pytest.raises(StorageError, match=r"needs \d+ bytes, \d+ are free") as caught:
        CheckpointWriter(tmp_path, [TensorSpec("a", "F32", (1 << 44,))], max_shard_bytes=1 << 60)
    assert caught.value.hint
