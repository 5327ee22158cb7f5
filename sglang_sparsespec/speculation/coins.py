"""Coins: the uniform random numbers of a round, reproducible for requests that carry a seed.

A seeded coin is a hash of (seed, position, column, stream) and of nothing else, so it does not depend on the batch, on
the phase, or on what was drawn before. Knows nothing of distributions.
Invariant: two coins that one output token depends on never share all four keys.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

UNSEEDED = -1


class Stream(IntEnum):
    """What a coin is spent on; coins of different streams are independent at the same position."""

    DRAFT = 0
    """sampling a draft token"""
    ACCEPT = 1
    """accepting or rejecting a draft"""
    BONUS = 2
    """sampling the bonus token of a verify"""
    DECODE = 3
    """sampling a token without drafts"""


def _signed(constant: int) -> int:
    """The int64 with the bits of a uint64: torch has no arithmetic on uint64, and int64 products wrap the same way."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


# splitmix64 (Steele, Lea, Flood 2014): increment and finaliser
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def draw(
    shape: tuple[int, ...],
    *,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coins in [0, 1) from the device's generator, for rows without a seed."""
    return torch.rand(shape, device=device, generator=generator, dtype=dtype)


def seeded(
    seeds: Tensor, positions: Tensor, columns: int, *, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Coins in [0, 1) that are a pure function of seed, position, column and stream.

    Args:
        seeds: [num_reqs], int64, any value.
        positions: [num_reqs], int64; the logical position of column 0, or of the round. Column c of position p is not
            column 0 of position p + c.
        columns: coins per request.
        stream: see `Stream`.
        dtype: float32 carries 24 random bits, float64 carries 53.

    Returns:
        [num_reqs, columns] of `dtype`; the same on every device.
    """
    keys = _mix(seeds.to(torch.int64) + _signed((stream + 1) * 0x9E3779B97F4A7C15 % (1 << 64)))
    keys = _mix(keys + (positions.to(torch.int64) + 1) * _GAMMA)
    counters = torch.arange(1, columns + 1, dtype=torch.int64, device=seeds.device)
    bits = _mix(keys.unsqueeze(1) + counters * _GAMMA)
    num_bits = 53 if dtype == torch.float64 else 24
    return _shift_right(bits, 64 - num_bits).to(dtype) * 2.0**-num_bits


def mixed(
    seeds: Tensor,
    positions: Tensor,
    columns: int,
    *,
    stream: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`seeded` coins for rows with a seed, `draw` for rows whose seed is `UNSEEDED`; [num_reqs, columns]."""
    random = draw((seeds.shape[0], columns), device=seeds.device, generator=generator, dtype=dtype)
    is_unseeded = (seeds == UNSEEDED).unsqueeze(1)
    return torch.where(is_unseeded, random, seeded(seeds, positions, columns, stream=stream, dtype=dtype))


def _mix(state: Tensor) -> Tensor:
    """The splitmix64 finaliser: every input bit flips every output bit with probability near 1/2."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, num_bits: int) -> Tensor:
    """Logical shift; torch's own shift of an int64 drags the sign along."""
    return (state >> num_bits) & ((1 << (64 - num_bits)) - 1)
