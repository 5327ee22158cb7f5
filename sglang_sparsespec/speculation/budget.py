"""Budget: how many KV tokens a draft step may read.

Integers only; which tokens these are is the selection's business.
Invariant: the tensor and the int version agree for every length, so graph capacity and device lengths never differ.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# int64 holds length * numerator for every int32 length
_MAX_DENOMINATOR = 10**9


@lru_cache(maxsize=64)
def _exact(ratio: float) -> tuple[int, int]:
    """The fraction that the user wrote: 0.07 means 7/100, although ceil(0.07 * 100) is 8 in floating point."""
    fraction = Fraction(ratio).limit_denominator(_MAX_DENOMINATOR)
    return fraction.numerator, fraction.denominator


def budget_tokens(n: int, *, ratio: float, min_budget: int) -> int:
    """max(min_budget, ceil(ratio * n)) tokens, in exact arithmetic; not clamped to `n`."""
    numerator, denominator = _exact(ratio)
    return max(min_budget, -(-n * numerator // denominator))


def max_budget(context_len: int, ratio: float, min_budget: int) -> int:
    """The largest budget that a request of at most `context_len` tokens can need; never above `context_len`."""
    return min(context_len, budget_tokens(context_len, ratio=ratio, min_budget=min_budget))


def budget_tensor(kv_lens: Tensor, *, ratio: float, min_budget: int, max_budget: int) -> Tensor:
    """`budget_tokens` of every row of `kv_lens` (int32 [num_reqs]), at most `max_budget`; int32 [num_reqs]."""
    numerator, denominator = _exact(ratio)
    scaled = kv_lens.to(torch.int64) * numerator + (denominator - 1)
    tokens = torch.div(scaled, denominator, rounding_mode="floor")
    return tokens.clamp(min=min_budget).clamp(max=max_budget).to(torch.int32)
