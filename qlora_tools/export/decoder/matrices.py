"""The records of stored weights: one matrix, a feed-forward of two or three, a mixture of many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.models.decoder import Piece
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True)
class Matrix:
    """One stored weight: the ``pieces`` of checkpoint weights one below the other. ``biased`` says which of them have a bias."""

    name: str
    format: WeightFormat
    pieces: tuple[Piece, ...]
    columns: int
    biased: tuple[bool, ...]
    compute: str = "F32"
    """dtype of the stored bias."""
    woven: bool = False
    """Pieces go two by two, of equal size, their rows alternating."""
    joint: bool = False
    """One node multiplies by this matrix and others at once: nothing can be added to its product."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The module of each piece."""
        return tuple(piece.module for piece in self.pieces)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each piece."""
        return tuple(piece.rows for piece in self.pieces)

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    def placed(self) -> Iterator[tuple[Piece, int]]:
        """Each piece with the row of this matrix where it begins; its rows are :attr:`step` apart."""
        row = 0
        for number, piece in enumerate(self.pieces):
            yield piece, row
            row += piece.rows if not self.woven else 1 if number % 2 == 0 else 2 * piece.rows - 1

    @property
    def step(self) -> int:
        """From one row of a piece to its next."""
        return 2 if self.woven else 1

    @property
    def bias(self) -> str | None:
        """Name of the stored bias, where any module has one."""
        return f"{self.name}.bias" if any(self.biased) else None

    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored: the format's parts, then the bias."""
        parts = self.format.parts(self.name, self.total_rows, self.columns)
        return (*parts, TensorSpec(self.bias, self.compute, (self.total_rows,))) if self.bias else parts


@dataclass(frozen=True)
class Feed:
    """A feed-forward. ``into``: ``gate`` and ``up``, those of all experts in one (``gate_up``), or ``up`` alone where nothing is gated."""

    into: tuple[Matrix, ...]
    down: Matrix

    def matrices(self) -> tuple[Matrix, ...]:
        return *self.into, self.down


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: one joint feed that holds all of them, or a feed for each; the shared expert and the gate that scales it."""

    router: Matrix
    experts: tuple[Feed, ...]
    shared: Feed | None = None
    shared_scale: Matrix | None = None

    @property
    def together(self) -> bool:
        """Whether one node holds all experts."""
        return self.experts[0].down.joint

    def matrices(self) -> tuple[Matrix, ...]:
        feeds = self.experts if self.shared is None else (*self.experts, self.shared)
        scale = () if self.shared_scale is None else (self.shared_scale,)
        return self.router, *(matrix for feed in feeds for matrix in feed.matrices()), *scale
