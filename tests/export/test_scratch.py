"""Files that a check leaves in a user's folder for a moment."""

import tempfile

import pytest

from qlora_tools.errors import StorageError
from qlora_tools.export.scratch import scratch_file


def test_every_name_is_new_and_gone_afterwards_even_after_a_failure(tmp_path):
    with scratch_file(tmp_path, ".onnx") as one, scratch_file(tmp_path, ".onnx") as other:
        assert one != other and one.is_file() and one.name.startswith(".qlt-parity-") and one.suffix == ".onnx"
    with pytest.raises(ZeroDivisionError), scratch_file(tmp_path, ".onnx"):
        1 / 0
    with scratch_file(tmp_path, ".onnx") as path:
        path.unlink()  # by somebody else
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_named_with_the_way_out(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(StorageError, match="takes no new file, .*Permission denied") as raised, scratch_file(tmp_path, ".onnx"):
        pass
    assert "writable" in raised.value.hint
