"""Every error this package raises on purpose.

Each class also inherits the builtin that a caller would have expected in its place, so library users may
catch either. ``exit_code`` is what ``qlt`` exits with; the numbers are part of the command's interface and
are listed in the README. A message names the file, the tensor, what was found and what was expected; the
``hint`` says what to do about it.

To add a class: inherit :class:`QltError` and one builtin, take an exit code that is free or that means the
same to a script, and add a line to the table in the README.
"""

from __future__ import annotations

from pathlib import Path


class QltError(Exception):
    """Base of all deliberate errors. ``hint`` is one sentence that tells the way out, or ``None``."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckFailed(QltError, RuntimeError):
    """A measurement missed its bound: parity after export, a failed doctor check, a quality gate."""

    exit_code = 1


class UsageError(QltError, ValueError):
    """The words given do not make sense together or a value is out of range."""

    exit_code = 2


class IncompatibleError(QltError, ValueError):
    """Two inputs, each fine alone, do not belong together (shapes, wrong base, keys that match nothing)."""

    exit_code = 3


class CorruptError(QltError, ValueError):
    """A file does not hold what its format promises, or would be unsafe to read."""

    exit_code = 4


class StorageError(QltError, OSError):
    """The file system refused: disk full, no permission, an I/O error."""

    exit_code = 5


class NonFiniteError(QltError, ArithmeticError):
    """NaN or infinity where weights were expected."""

    exit_code = 6


class OutputExistsError(QltError, FileExistsError):
    """The output is already there, or another process won the race for it."""

    exit_code = 7


class UnsupportedError(QltError, NotImplementedError):
    """A model, layer or configuration this version does not know how to handle faithfully."""

    exit_code = 8


class MissingError(QltError, FileNotFoundError):
    """An input folder, file, shard, tensor or hub repository is not there."""

    exit_code = 9


class OutOfMemory(QltError, MemoryError):
    """More memory is needed than there is; the hint lists what would need less."""

    exit_code = 10


class Interrupted(QltError, InterruptedError):
    """A run was stopped by Ctrl-C or SIGTERM after saving; the hint is the command that continues it. ``folder``: where it lies."""

    exit_code = 130

    def __init__(self, message: str, *, hint: str | None = None, folder: Path | None = None) -> None:
        super().__init__(message, hint=hint)
        self.folder = folder
