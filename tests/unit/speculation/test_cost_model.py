"""The cost of a round by hand, and the k that follows."""

from __future__ import annotations

import random

import pytest

from sglang_sparsespec.speculation.cost_model import ROOFLINES, RoundCost, ServerCost, steps_of_batch, verify_ms
from tests.support.model_shapes import QWEN3_8B

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


def test_a_request_that_stops_saves_its_gather_alone() -> None:
    """A step that still runs for others counted as saved makes every early stop pay."""
    full = COST.round_ms(4, 0.05)
    # per draft that is not made: s A / u
    assert full - COST.round_ms(4, 0.05, 2.5) == pytest.approx(1.5 * 0.05 * 10.0 / 0.5)
    assert COST.round_ms(4, 0.05, 4) == full
    # where the step loop ends for all, W and o as well
    assert full - COST.round_ms(3, 0.05) == pytest.approx(2.0 + 0.5 + 0.05 * 10.0 / 0.5)
    assert full > COST.round_ms(4, 0.05, 2.5) > COST.round_ms(2.5, 0.05)


def test_unified_round_has_no_wide_verify() -> None:
    """k + 1 forwards at a draft's weights; V of the lockstep verify counted as well would hide what it saves."""
    slow_verify = RoundCost(weights_ms=2.0, attention_ms=10.0, verify_ms=7.0, gather_efficiency=0.5, overhead_ms=0.5)
    by_hand = 5 * 2.5 + 4 * 0.05 * 10.0 / 0.5 + 10.0 * 1.1
    assert slow_verify.unified_round_ms(5, 0.05, 4) == pytest.approx(by_hand)
    # phases that stay: the forwards are run; phases that move: they are not
    assert slow_verify.unified_round_ms(5, 0.05, 2) == pytest.approx(by_hand - 2 * 0.05 * 10.0 / 0.5)
    assert slow_verify.unified_round_ms(3, 0.05, 2) == pytest.approx(by_hand - 2 * (0.05 * 10.0 / 0.5 + 2.5))


def test_verify_reads_weights_or_multiplies() -> None:
    """A narrow verify is not cheaper than the weights."""
    assert verify_ms(9, 8.0, 0.02) == 8.0
    assert verify_ms(1152, 8.0, 0.02) == pytest.approx(23.04)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_steps_of_a_batch_are_those_of_its_last_request(batch: int) -> None:
    """The mean of requests in the place of their maximum: a batch of 128 would look as free as one request."""
    shares = [0.1, 0.4, 0.2, 0.3]
    stopped_by = [sum(shares[: j + 1]) for j in range(4)]
    found = steps_of_batch(stopped_by, batch)
    assert sum(found) == pytest.approx(1.0)
    if batch == 1:
        assert found == pytest.approx(shares)
    rng = random.Random(batch)
    drawn = [max(rng.choices(range(4), shares, k=batch)) for _ in range(4000)]
    mean = sum(j * share for j, share in enumerate(found))
    assert sum(drawn) / len(drawn) == pytest.approx(mean, abs=0.06)


def test_server_cost_from_shapes() -> None:
    """Weights of the embedding read in every forward, or experts that nobody visits multiplied: by hand, Qwen3-8B."""
    card = ROOFLINES["H100"]
    cost = ServerCost.of(QWEN3_8B, card, budget_ratio=0.05, min_budget=192)
    params = 36 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288) + 151936 * 4096
    assert cost.weights_ms == pytest.approx(1e3 * params * 2 / 3.0e12)
    assert cost.row_ms == pytest.approx(1e3 * 2 * params / 6.9e14)
    assert cost.kv_ms == pytest.approx(1e3 * 2 * 36 * 8 * 128 * 2 / 3.0e12)
    experts = QWEN3_8B._replace(experts=64, experts_per_token=4, expert_size=768)
    mixture = ServerCost.of(experts, card, budget_ratio=0.05, min_budget=192)
    expert = 36 * 3 * 4096 * 768
    rest = params - 36 * 3 * 4096 * 12288
    assert mixture.weights_ms / cost.weights_ms == pytest.approx((rest + 64 * expert) / params)
    assert mixture.row_ms / cost.row_ms == pytest.approx((rest + 4 * expert) / params)
    # half of the heads, and of the head's rows
    rank = QWEN3_8B._replace(intermediate_size=6144, num_q_heads=16, num_kv_heads=4, num_ranks=2)
    assert ServerCost.of(rank, card, budget_ratio=0.05, min_budget=192).weights_ms == pytest.approx(cost.weights_ms / 2)


def test_terms_of_a_short_context_read_everything() -> None:
    """A budget that is larger than the context, taken for more than all of it."""
    cost = ServerCost(weights_ms=1.0, row_ms=0.01, kv_ms=1e-3, budget_ratio=0.05, min_budget=192)
    # 4 requests of 100 tokens, k = 2: A = 0.4; 4 rows and 12 rows read the weights
    lockstep, unified = (cost.terms(name, 4, 400, 2) for name in ("lockstep", "unified"))
    assert lockstep == pytest.approx((2 * 1.2 + 1.0, 0.4 * 1.1 + 2 * 0.4 / 0.75, 0.75))
    assert unified == pytest.approx((3 * 1.2, 0.4 * 1.1 + 2 * 0.4 / 0.75, 3 * 0.75))
