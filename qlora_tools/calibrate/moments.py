"""Sums of x x' and of x over many tokens: products in float32, a call at a time, sums in float64.

The matrix is symmetric, so only row tiles from the diagonal rightwards are kept and computed: half the memory and half the work, and no
temporary larger than a tile. Axes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_TILE_ROWS = 1024


class Moments:
    """A running sum over ``size`` inputs. ``tokens`` counts what went in."""

    def __init__(self, size: int, device: str | torch.device = "cpu", *, with_mean: bool = True) -> None:
        self.size, self.tokens = size, 0
        self._starts = range(0, size, _TILE_ROWS)
        self._tiles = [torch.zeros(min(_TILE_ROWS, size - start), size - start, dtype=torch.float64, device=device) for start in self._starts]
        self._sum_I = torch.zeros(size, dtype=torch.float64, device=device) if with_mean else None

    def add(self, x_TI: torch.Tensor) -> None:
        """Take in rows, of any float dtype."""
        x_TI = x_TI.float()
        for start, tile in zip(self._starts, self._tiles, strict=True):
            tile.add_(x_TI[:, start : start + len(tile)].T @ x_TI[:, start:])
        if self._sum_I is not None:
            self._sum_I.add_(x_TI.sum(0, dtype=torch.float64))
        self.tokens += len(x_TI)

    def rows(self) -> Iterator[torch.Tensor]:
        """E[x x'] as float32 row tiles from the top, on the CPU: exactly symmetric."""
        for number, (start, tile) in enumerate(zip(self._starts, self._tiles, strict=True)):
            height = len(tile)
            row = torch.empty(height, self.size, dtype=torch.float32)
            for before, other in zip(self._starts[:number], self._tiles[:number], strict=True):
                row[:, before : before + len(other)] = self._scaled(other[:, start - before : start - before + height].T)
            square = tile[:, :height].triu()
            row[:, start : start + height] = self._scaled(square + square.triu(1).T)
            row[:, start + height :] = self._scaled(tile[:, height:])
            yield row

    def diagonal(self) -> torch.Tensor:
        """E[x_i^2], float64 [I] on the CPU."""
        return torch.cat([tile.diagonal().cpu() for tile in self._tiles]) / max(1, self.tokens)

    def mean(self) -> torch.Tensor:
        """E[x], float32 [I] on the CPU."""
        assert self._sum_I is not None
        return self._scaled(self._sum_I)

    def effective_rank(self) -> float:
        """(trace R)^2 / ||R||_F^2: how many directions share the energy, were they equally strong; 0 where there is none."""
        trace = float(self.diagonal().sum()) * self.tokens
        squares = 0.0
        for tile in self._tiles:
            square = tile[:, : len(tile)].triu()
            squares += float((tile[:, len(tile) :] ** 2).sum()) * 2 + 2 * float((square**2).sum()) - float((square.diagonal() ** 2).sum())
        return trace**2 / squares if squares > 0 else 0.0

    def _scaled(self, part: torch.Tensor) -> torch.Tensor:
        return (part / max(1, self.tokens)).float().cpu()
