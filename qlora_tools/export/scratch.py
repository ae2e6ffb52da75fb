"""A file that lies in an export for as long as a check runs.

ONNX Runtime reads external data only below the folder of the graph, so a graph over the bytes of an export has to lie in that folder, which is the user's.
The system makes up the name: whatever lies there already stays as it is, and no link is followed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tools.errors import StorageError


@contextmanager
def scratch_file(folder: Path, suffix: str) -> Iterator[Path]:
    """An empty file ``.qlt-parity-...`` in ``folder``, removed on the way out. ``suffix`` begins with a dot.

    Raises:
        StorageError: the folder takes no new file.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=".qlt-parity-", suffix=suffix, dir=folder)
    except OSError as error:
        raise StorageError(
            f"{folder} takes no new file, and the graph of the check has to lie beside the weights: {error.strerror or error}",
            hint="make the folder writable, or copy it to where it is",
        ) from error
    os.close(descriptor)
    path = Path(name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
