"""The file behind ``.onnx_adapter``: a flatbuffer that ONNX Runtime reads and writes, opened with doubt. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError, MissingError

_IDENTIFIER = b"TORT"


def open_adapter_file(path: Path) -> Any:
    """ONNX Runtime's ``AdapterFormat`` over ``path``. It owns the memory of the values that ``get_parameters`` gives.

    Raises:
        MissingError: no such file. CorruptError: not an adapter file, or sizes that the file cannot hold.
    """
    import onnxruntime

    if not path.is_file():
        raise MissingError(f"{path} is not a file")
    file_bytes = path.stat().st_size
    with path.open("rb") as start:
        if start.read(8)[4:] != _IDENTIFIER:
            raise CorruptError(f"{path} is not an .onnx_adapter file: its identifier `TORT` is missing")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path.resolve()))
        stated_bytes = sum(value.tensor_size_in_bytes() for value in file.get_parameters().values())
    except Exception as error:  # the runtime raises RuntimeError and its own classes
        raise CorruptError(f"{path} cannot be read as an .onnx_adapter file: {str(error).splitlines()[0]}", hint="fetch the file again") from error
    if stated_bytes > file_bytes:
        raise CorruptError(f"{path} states tensors larger than the file")
    return file
