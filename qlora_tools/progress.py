"""Progress is reported to whoever listens; the library itself never draws.

``Progress.task`` opens one bar's worth of work. The command line passes an implementation that draws with
rich; everything else defaults to :data:`SILENT`. Eight lines make a bar of it::

    class Bars:
        @contextmanager
        def task(self, title, total=None, unit=""):
            with tqdm(total=total, desc=title, unit=unit) as bar:
                yield SimpleNamespace(advance=lambda amount=1, label="": bar.update(amount))

        def note(self, message):
            print(message, file=sys.stderr)

Implementations must be callable from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    def advance(self, amount: float = 1, label: str = "") -> None:
        """``amount`` more of the task's total is done; ``label`` names the piece that was finished."""


class Progress(Protocol):
    def task(self, title: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]:
        """Open a task of ``total`` pieces (``None``: unknown) counted in ``unit`` ("tensors", "B", "steps")."""

    def note(self, message: str) -> None:
        """One line that the user should see even though nothing went wrong."""


class _Nothing:
    def advance(self, amount: float = 1, label: str = "") -> None:
        pass


class Silent:
    """Hears everything, says nothing."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield _Nothing()

    def note(self, message: str) -> None:
        pass


SILENT = Silent()
