"""The cost of a round by hand, and the k that follows."""

from __future__ import annotations

import pytest

from sglang_sparsespec.speculation.cost_model import RoundCost

COST = RoundCost(weights_ms=2.0, attention_ms=10.0, gather_efficiency=0.5, capture_share=0.2, overhead_ms=0.5)


def test_round_is_the_sum_of_its_terms() -> None:
    """A term left out, or a share applied to W, moves the best k and looks plausible."""
    # k (W + s A / u + o) + V + A (1 + c)
    assert COST.round_ms(4, 0.05) == pytest.approx(4 * (2.0 + 0.05 * 10.0 / 0.5 + 0.5) + 2.0 + 10.0 * 1.2)
    slow_verify = RoundCost(weights_ms=2.0, attention_ms=10.0, verify_ms=7.0, capture_share=0.0, overhead_ms=0.0)
    assert slow_verify.round_ms(1, 0.75) == pytest.approx(2.0 + 10.0 + 7.0 + 10.0)
    assert COST.speedup(4, 0.05, 5.0) == pytest.approx(5.0 * 12.0 / COST.round_ms(4, 0.05))


def test_best_k_weighs_acceptance_against_time() -> None:
    """Always the largest k, or always 1, would pass one of these."""
    assert COST.best_num_steps([1.0] * 8, 0.05)[0] == 8
    assert COST.best_num_steps([0.0] * 8, 0.05)[0] == 1
    survival = [0.9**j for j in range(1, 13)]
    best, speedup = COST.best_num_steps(survival, 0.05)
    by_hand = [COST.speedup(k, 0.05, 1.0 + sum(survival[:k])) for k in range(1, 13)]
    assert 1 < best < 12
    assert speedup == max(by_hand) == by_hand[best - 1]
    # where weights dominate, drafting with them does not pay
    assert RoundCost(weights_ms=10.0, attention_ms=0.1).best_num_steps(survival, 0.05)[1] < 1.0
