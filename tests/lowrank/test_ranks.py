from __future__ import annotations

import itertools

import pytest
import torch

from qlora_tools.lowrank.certificate import noise_edge
from qlora_tools.lowrank.ranks import Spectrum, rank_above_noise, rank_for_energy, ranks_for_bytes


def spectrum(*values: float, shape: tuple[int, int] = (8, 8), rest: float = 0.0, noise: float = 0.0) -> Spectrum:
    return Spectrum(shape, torch.tensor(values, dtype=torch.float64), sum(v * v for v in values) + rest, noise)


def test_energy_rank_is_the_smallest_that_reaches_the_share() -> None:
    found = spectrum(3.0, 2.0, 1.0)  # energies 9, 4, 1 of 14
    assert [rank_for_energy(found, share) for share in (0.5, 9 / 14, 0.65, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]


def test_energy_rank_stops_at_the_known_values() -> None:
    assert rank_for_energy(spectrum(3.0, 2.0, rest=100.0), 0.9) == 2


def test_energy_above_the_noise_needs_fewer() -> None:
    found = spectrum(3.0, 2.0, 1.0, noise=4.0)
    assert rank_for_energy(found, 0.9, above_noise=True) == 1
    assert rank_for_energy(spectrum(1.0, noise=5.0), 0.9, above_noise=True) == 0


def test_noise_rank_counts_what_exceeds_the_edge() -> None:
    edge = noise_edge(4.0, (8, 8))
    assert rank_above_noise(spectrum(edge * 2, edge * 1.01, edge * 0.99, noise=4.0)) == 2
    assert rank_above_noise(spectrum(1e-3, 1e-6)) == 2


def test_noise_rank_finds_a_planted_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    signal = (
        torch.linalg.qr(torch.randn(200, 5, generator=generator, dtype=torch.float64)).Q
        @ torch.linalg.qr(torch.randn(300, 5, generator=generator, dtype=torch.float64)).Q.T
        * 100
    )
    values = torch.linalg.svdvals(signal + noise)[:40]
    assert rank_above_noise(Spectrum((200, 300), values, 0.0, float(noise.square().sum()))) == 5


def test_byte_budget_is_optimal_among_all_allocations_of_its_size() -> None:
    spectra = [spectrum(5.0, 1.0, 0.5), spectrum(3.0, 2.9, 0.1), spectrum(4.0, 0.2, 0.1)]
    ranks = ranks_for_bytes(spectra, 16 * 2 * 5, 2)
    assert sum(ranks) == 5

    def kept(choice: tuple[int, ...]) -> float:
        return sum(float(s.singular_values[:rank].square().sum()) for s, rank in zip(spectra, choice, strict=True))

    assert kept(tuple(ranks)) == pytest.approx(max(kept(choice) for choice in itertools.product(range(4), repeat=3) if sum(choice) == 5))


def test_byte_budget_prefers_cheap_tensors_and_never_overspends() -> None:
    small, large = spectrum(1.0, 1.0, shape=(4, 4)), spectrum(1.1, 1.1, shape=(40, 40))
    assert ranks_for_bytes([large, small], 8 * 4 * 2, 4) == [0, 2]
    assert ranks_for_bytes([large, small], 8 * 4 - 1, 4) == [0, 0]
    assert ranks_for_bytes([large, small], 10**9, 4) == [2, 2]


def test_byte_budget_ties_go_to_the_earlier_tensor() -> None:
    assert ranks_for_bytes([spectrum(1.0), spectrum(1.0)], 16, 1) == [1, 0]
