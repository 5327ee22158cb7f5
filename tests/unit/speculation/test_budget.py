from __future__ import annotations

import math

import pytest
import torch

from sglang_sparsespec.speculation.budget import budget_tensor, budget_tokens, max_budget

RATIOS = [0.05, 0.07, 0.1, 1 / 3, 0.15, 0.999, 1.0, 1e-6]


@pytest.mark.parametrize("ratio", [0.05, 0.07, 1 / 3])
def test_budget_tensor_equals_budget_tokens_at_every_length(ratio: float) -> None:
    """Without it, a float32 product could be a token off the int version: a draft reads past its captured capacity."""
    lens = torch.arange(1_000_001, dtype=torch.int32)
    tokens = budget_tensor(lens, ratio=ratio, min_budget=64, max_budget=1 << 30)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [budget_tokens(n, ratio=ratio, min_budget=64) for n in range(1_000_001)]


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [(100, 0.07, 7), (101, 0.07, 8), (3, 0.1, 1), (30, 0.1, 3), (20, 0.05, 1), (21, 0.05, 2), (0, 0.5, 0)],
)
def test_budget_tokens_rounds_the_ratio_as_written_up(n: int, ratio: float, expected: int) -> None:
    """Without it, 0.07 * 100 == 7.000000000000001 would round up to 8."""
    assert budget_tokens(n, ratio=ratio, min_budget=0) == expected


@pytest.mark.parametrize("ratio", RATIOS)
def test_budget_tokens_is_within_one_of_the_float_formula(ratio: float) -> None:
    """Without it, the rational approximation of the ratio could drift from the ratio at long contexts."""
    for n in (1, 7, 1000, 131_072, 1_000_000):
        assert abs(budget_tokens(n, ratio=ratio, min_budget=0) - math.ceil(ratio * n)) <= 1


def test_budget_tokens_keeps_the_floor_and_does_not_clamp_to_the_length() -> None:
    """Without it, a short request could get fewer slots than the selection's sink and window need."""
    assert budget_tokens(10, ratio=0.1, min_budget=64) == 64
    assert budget_tokens(0, ratio=0.1, min_budget=64) == 64


def test_budget_tensor_clamps_to_the_capacity() -> None:
    """Without it, a floor above the capacity could win over the capacity."""
    lens = torch.tensor([0, 10, 10_000], dtype=torch.int32)
    assert budget_tensor(lens, ratio=0.5, min_budget=64, max_budget=32).tolist() == [32, 32, 32]
    assert budget_tensor(lens, ratio=0.5, min_budget=4, max_budget=32).tolist() == [4, 5, 32]


@pytest.mark.parametrize(("context_len", "expected"), [(1000, 100), (32, 32), (64, 64), (65, 64)])
def test_max_budget_never_exceeds_the_context(context_len: int, expected: int) -> None:
    """Without it, buffers of a short-context model would be sized by the floor instead of the context."""
    assert max_budget(context_len, 0.1, 64) == expected
