"""How many singular values each tensor keeps.

Four rules, all deterministic: the same rank everywhere; the smallest rank that keeps a share of the energy; everything
above the rounding noise of the checkpoint; one byte budget over all tensors. The budget is solved by one threshold:
component i of a tensor O x I removes s_i^2 of error for O + I stored numbers, and since the s_i fall, taking components
in the order of s_i^2 / (O + I) until the budget is full is optimal up to the last component.

Axes: O rows, I columns.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_tools.lowrank.certificate import noise_edge


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What rank choice needs to know of a tensor: its shape, leading singular values (descending), ||D||_F^2 and noise energy."""

    shape: tuple[int, int]
    singular_values: torch.Tensor
    energy: float
    noise: float = 0.0

    @property
    def known(self) -> int:
        return int(self.singular_values.numel())


def rank_for_energy(spectrum: Spectrum, share: float, *, above_noise: bool = False) -> int:
    """The smallest rank whose kept energy is at least ``share`` of ||D||^2 (``above_noise``: of what exceeds the noise floor).

    Returns the number of known singular values when even all of them keep less.
    """
    assert 0.0 < share <= 1.0
    wanted = share * (max(0.0, spectrum.energy - spectrum.noise) if above_noise else spectrum.energy)
    kept = spectrum.singular_values.double().square().cumsum(0)
    return min(spectrum.known, int(torch.searchsorted(kept, torch.tensor(wanted, dtype=torch.float64))) + 1) if wanted > 0 else 0


def rank_above_noise(spectrum: Spectrum) -> int:
    """How many known singular values exceed the Marchenko-Pastur edge of the rounding noise."""
    return int((spectrum.singular_values.double() > noise_edge(spectrum.noise, spectrum.shape)).sum())


def ranks_for_bytes(spectra: Sequence[Spectrum], max_bytes: int, bytes_per_number: int) -> list[int]:
    """Ranks that minimise the summed squared error within ``max_bytes`` of factors; see the module's docstring.

    Stops at the first component that does not fit, so that one threshold separates kept from dropped; ties go to the
    earlier tensor.
    """
    ranks = [0] * len(spectra)
    heap = [(-_worth(spectrum, 0), position) for position, spectrum in enumerate(spectra) if spectrum.known]
    heapq.heapify(heap)
    left = max_bytes
    while heap:
        worth, position = heapq.heappop(heap)
        spectrum = spectra[position]
        price = sum(spectrum.shape) * bytes_per_number
        if price > left or worth == 0.0:
            break
        left -= price
        ranks[position] += 1
        if ranks[position] < spectrum.known:
            heapq.heappush(heap, (-_worth(spectrum, ranks[position]), position))
    return ranks


def _worth(spectrum: Spectrum, component: int) -> float:
    """Squared error removed per stored number."""
    return float(spectrum.singular_values[component]) ** 2 / sum(spectrum.shape)
