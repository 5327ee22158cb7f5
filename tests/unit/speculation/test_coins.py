from __future__ import annotations

import pytest
import torch
from scipy import stats

from sglang_sparsespec.speculation.coins import UNSEEDED, Stream, draw, mixed, seeded

# below this p-value a coin stream is called broken; seeds are fixed, so a pass stays a pass
THRESHOLD = 1e-6
WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def _pair_pvalue(left: torch.Tensor, right: torch.Tensor, cells: int = 8) -> float:
    """Chi-square p-value of (left, right) against independent uniforms on a cells x cells grid."""
    cell = (left * cells).long() * cells + (right * cells).long()
    return float(stats.chisquare(torch.bincount(cell.flatten(), minlength=cells * cells).numpy()).pvalue)


def _bits(coins: torch.Tensor) -> torch.Tensor:
    return (coins.double() * 2**24).long()


def test_seeded_equals_splitmix64_in_python_integers() -> None:
    """Without it, a sign-extending shift or a saturating product would pass as long as it looked random."""

    def mix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        return state ^ (state >> 31)

    def coin(seed: int, position: int, column: int, stream: int) -> int:
        key = mix((seed + (stream + 1) * GAMMA) & WORD)
        key = mix((key + (position + 1) * GAMMA) & WORD)
        return mix((key + (column + 1) * GAMMA) & WORD)

    seeds = [0, 1, 42, (1 << 63) - 1, -(1 << 63), -2]
    positions = [0, 1, 131_072, (1 << 31) + 5, 7, 8]
    for stream in Stream:
        coins = seeded(torch.tensor(seeds), torch.tensor(positions), 3, stream=stream)
        fine = seeded(torch.tensor(seeds), torch.tensor(positions), 3, stream=stream, dtype=torch.float64)
        for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
            for column in range(3):
                bits = coin(seed & WORD, position, column, stream)
                assert coins[row, column].item() == (bits >> 40) * 2.0**-24
                assert fine[row, column].item() == (bits >> 11) * 2.0**-53


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeded_is_uniform_below_one(dtype: torch.dtype) -> None:
    """Without it, a coin of 1.0 or a lopsided hash would skew every seeded request."""
    coins = seeded(torch.arange(1000), torch.arange(1000) * 3, 100, dtype=dtype)
    assert coins.dtype == dtype
    assert coins.min() >= 0
    assert coins.max() < 1
    counts = torch.bincount((coins * 256).long().flatten(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > THRESHOLD
    low_bits = torch.bincount((_bits(coins) & 255).flatten(), minlength=256)
    assert stats.chisquare(low_bits.numpy()).pvalue > THRESHOLD


def _neighbours(axis: str) -> tuple[torch.Tensor, torch.Tensor]:
    seeds, positions = torch.arange(20_000) % 100, torch.arange(20_000) // 100
    here = seeded(seeds, positions, 4)
    if axis == "seed":
        return here, seeded(seeds + 1, positions, 4)
    if axis == "position":
        return here, seeded(seeds, positions + 1, 4)
    if axis == "column":
        return here[:, :3], here[:, 1:]
    if axis == "position against column":
        return here[:, 1:], seeded(seeds, positions + 1, 3)
    if axis == "seed against position":
        return seeded(seeds + 1, positions, 4), seeded(seeds, positions + 1, 4)
    return here, seeded(seeds, positions, 4, stream=1)


@pytest.mark.parametrize(
    "axis", ["seed", "position", "column", "position against column", "seed against position", "stream"]
)
def test_seeded_neighbours_are_independent(axis: str) -> None:
    """Without it, the coin that accepts a draft could repeat the coin that sampled it, and the output be biased."""
    left, right = _neighbours(axis)
    assert (left == right).double().mean() < 1e-4
    assert _pair_pvalue(left, right) > THRESHOLD


def test_the_independence_test_rejects_an_additive_hash() -> None:
    """Power: without it, the test above could be blind to coins that march in step."""
    left = seeded(torch.arange(20_000) % 100, torch.arange(20_000) // 100, 4)
    assert _pair_pvalue(left, (left + 0.618) % 1.0) < THRESHOLD


@pytest.mark.parametrize("key", ["seed", "position"])
def test_seeded_avalanches(key: str) -> None:
    """Without it, seeds or positions that differ in one high bit could share the leading bits of their coins."""
    torch.manual_seed(0)
    seeds, positions = torch.randint(0, 1 << 40, (2000,)), torch.randint(0, 1 << 30, (2000,))
    here = _bits(seeded(seeds, positions, 1))
    for bit in range(40 if key == "seed" else 30):
        flip = 1 << bit
        there = seeded(seeds ^ flip, positions, 1) if key == "seed" else seeded(seeds, positions ^ flip, 1)
        changed = here ^ _bits(there)
        rates = torch.stack([(changed >> i & 1).double().mean() for i in range(24)])
        # 2000 fair flips: standard deviation 0.011
        assert (rates - 0.5).abs().max() < 0.07


def test_seeded_does_not_depend_on_the_batch() -> None:
    """Without it, a request's output could change with its neighbours."""
    seeds, positions = torch.tensor([7, 8, 9]), torch.tensor([5, 6, 7])
    together = seeded(seeds, positions, 4)
    assert torch.equal(seeded(seeds[1:2], positions[1:2], 4), together[1:2])
    assert torch.equal(seeded(seeds, positions, 2), together[:, :2])


def test_mixed_takes_seeded_coins_only_for_seeded_rows() -> None:
    """Without it, unseeded requests could all share the coins of seed -1, or seeded ones lose their seed."""
    seeds, positions = torch.tensor([7, UNSEEDED, 0, UNSEEDED]), torch.tensor([5, 5, 5, 5])
    generator = torch.Generator().manual_seed(0)
    first = mixed(seeds, positions, 3, stream=Stream.ACCEPT, generator=generator)
    second = mixed(seeds, positions, 3, stream=Stream.ACCEPT, generator=generator)
    expected = seeded(seeds, positions, 3, stream=Stream.ACCEPT)
    for row in (0, 2):
        assert torch.equal(first[row], expected[row])
        assert torch.equal(second[row], expected[row])
    assert not torch.equal(first[1], first[3])
    assert not torch.equal(first[1], second[1])


def test_draw_follows_its_generator() -> None:
    """Without it, draws could come from the global generator and not repeat under a fixed one."""
    first = draw((5, 2), device="cpu", generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, draw((5, 2), device="cpu", generator=torch.Generator().manual_seed(3)))
    assert first.dtype == torch.float32
