"""Terms of the cost model out of made-up times, and acceptance out of made-up outcomes, checked by hand."""

from __future__ import annotations

import math
import random

import pytest

from sglang_sparsespec.speculation.acceptance_rates import AcceptanceRates
from sglang_sparsespec.speculation.cost_model import GatheredCost, RoundCost
from sglang_sparsespec.speculation.round_times import RoundTimes, TimesByBatch, guess

TRUE = GatheredCost(fixed_ms=3.0, step_ms=2.5, kv_ms=40e-6, step_kv_ms=3e-6)


def measured(
    steps: list[int], pools: list[int], *, cost: GatheredCost = TRUE, prior: GatheredCost | None = None
) -> RoundTimes:
    times = RoundTimes(prior)
    for now, (k, pool) in enumerate(zip(steps, pools, strict=True)):
        times.add(k, pool, cost.round_ms(k, pool), now)
    return times


def test_one_formula() -> None:
    """Two formulas would part one day."""
    cost = RoundCost(weights_ms=2.0, attention_ms=10.0, gather_efficiency=0.5, capture_share=0.2, overhead_ms=0.5)
    assert cost.gathered(0.05).round_ms(4, 1.0) == cost.round_ms(4, 0.05)


def test_finds_the_terms_that_made_the_times() -> None:
    """A swapped term predicts the rounds that ran and no other."""
    rng = random.Random(0)
    steps = [rng.choice([0, 1, 4, 8]) for _ in range(200)]
    times = measured(steps, [rng.randrange(10_000, 400_000) for _ in steps])
    for k in (0, 2, 8):
        for pool in (5_000, 300_000, 600_000):
            assert times.round_ms(k, pool) == pytest.approx(TRUE.round_ms(k, pool), rel=0.02)
    assert times.cost is not None
    assert times.cost.kv_ms == pytest.approx(TRUE.kv_ms, rel=0.05)


def test_two_k_at_one_fill_tell_the_step_from_the_rest() -> None:
    """As at a start: the k asked for, and one look at plain decoding."""
    times = measured([8, 8, 8, 0, 0, 0] * 3, [100_000] * 18)
    assert times.round_ms(4, 100_000) == pytest.approx(TRUE.round_ms(4, 100_000), rel=0.02)


def test_a_new_batch_starts_from_its_neighbour() -> None:
    """One round of a larger batch scales what is known of a smaller one, instead of starting from nothing."""
    by_batch = TimesByBatch()
    small = by_batch.of(32)
    for now, k in enumerate([0, 8] * 10):
        small.add(k, 100_000, TRUE.round_ms(k, 100_000), now)
    large = by_batch.of(64)
    assert large.round_ms(4, 100_000) == pytest.approx(TRUE.round_ms(4, 100_000), rel=0.03)
    # twice the time of everything, seen at one k
    for now in range(10):
        large.add(8, 100_000, 2 * TRUE.round_ms(8, 100_000), now)
    assert large.round_ms(8, 100_000) == pytest.approx(2 * TRUE.round_ms(8, 100_000), rel=0.02)
    assert 1.2 * TRUE.round_ms(0, 100_000) < large.round_ms(0, 100_000) < 2.1 * TRUE.round_ms(0, 100_000)
    assert by_batch.of(32) is small
    assert [by_batch.bucket(n) for n in (1, 2, 3, 4, 5, 64, 65, 128)] == [0, 1, 2, 2, 3, 6, 7, 7]


def test_a_term_that_was_nothing_comes_back() -> None:
    """A neighbour with short contexts says that KV costs nothing; a prior in its units would hold that for ever."""
    prior = GatheredCost(fixed_ms=3.0, step_ms=2.5, kv_ms=0.0, step_kv_ms=0.0)
    rng = random.Random(0)
    steps = [rng.choice([0, 8]) for _ in range(100)]
    times = measured(steps, [rng.randrange(50_000, 200_000) for _ in steps], prior=prior)
    assert times.round_ms(0, 400_000) == pytest.approx(TRUE.round_ms(0, 400_000), rel=0.1)


def test_what_surrounds_a_verify_is_told_from_what_drafts_read() -> None:
    """Rounds with drafts have a cost that plain ones lack; put down to KV it would grow with the pool."""
    true = GatheredCost(fixed_ms=1.2, step_ms=1.2, kv_ms=5e-6, step_kv_ms=0.3e-6, drafted_ms=2.5)
    rng = random.Random(0)
    # drafts ran while the pool was small, plain rounds since
    steps = [8] * 20 + [1] * 4 + [0] * 60
    pools = [35_000] * 20 + [50_000] * 4 + [rng.randrange(40_000, 110_000) for _ in range(60)]
    times = measured(steps, pools, cost=true)
    for pool in (35_000, 110_000):
        assert times.round_ms(0, pool) == pytest.approx(true.round_ms(0, pool), rel=0.05)
        assert times.round_ms(8, pool) == pytest.approx(true.round_ms(8, pool), rel=0.1)


def test_a_k_that_deviates_from_the_formula_keeps_its_own_time() -> None:
    """A verify that falls out of a tile is dearer than the line through its neighbours."""
    times = RoundTimes()
    for now in range(60):
        k = (0, 4, 8)[now % 3]
        times.add(k, 100_000, TRUE.round_ms(k, 100_000) * (1.2 if k == 4 else 1.0), now)
    assert times.round_ms(4, 100_000) == pytest.approx(1.2 * TRUE.round_ms(4, 100_000), rel=0.02)
    assert times.round_ms(8, 100_000) == pytest.approx(TRUE.round_ms(8, 100_000), rel=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_noise_never_makes_a_round_free(seed: int) -> None:
    """A plain round of 0 ms: the controller divides by it, and the scheduler ends."""
    rng = random.Random(seed)
    times = RoundTimes(GatheredCost(fixed_ms=20.0, step_ms=5.0, kv_ms=0.0, step_kv_ms=0.002))
    for now in range(300):
        k, pool = rng.choice([0, 1, 6]), rng.randrange(2_000, 4_000)
        times.add(k, pool, 20.0 * rng.lognormvariate(0.0, 1.5), now)
        assert times.cost is not None
        assert all(times.round_ms(steps, at) > 0 for steps in (0, 1, 6) for at in (0, 3_500))


def test_all_the_time_fitted_to_drafts() -> None:
    """As above, from six rounds that a busy machine made."""
    times = RoundTimes(GatheredCost(fixed_ms=21.37, step_ms=4.6, kv_ms=0.0, step_kv_ms=0.00206))
    for now, (k, pool, took) in enumerate([(6, 2_500, 302.5)] * 2 + [(1, 3_500, 17.2)] * 3):
        times.add(k, pool, took, now)
    assert times.round_ms(0, 3_500) > 0


def test_a_pause_is_not_a_change_and_a_change_is_not_a_pause() -> None:
    """One long round must not move the mean; a machine that has become slower must."""
    times = measured([8, 0] * 10, [100_000] * 20)
    times.add(8, 100_000, 50 * TRUE.round_ms(8, 100_000), 21)
    assert times.round_ms(8, 100_000) == pytest.approx(TRUE.round_ms(8, 100_000), rel=0.02)
    for now in range(22, 120):
        times.add(8, 100_000, 3 * TRUE.round_ms(8, 100_000), now)
    assert times.round_ms(8, 100_000) == pytest.approx(3 * TRUE.round_ms(8, 100_000), rel=0.1)


def test_a_pause_in_the_first_rounds_of_a_k_is_not_its_time() -> None:
    """There are three of them in a try: with one that something else held up, nobody would try that k again."""
    times = measured([8, 0] * 10, [100_000] * 20)
    expected = TRUE.round_ms(4, 100_000)
    assert not times.add(4, 100_000, 10 * expected, 21)
    assert times.round_ms(4, 100_000) == pytest.approx(expected, rel=0.05)
    # what comes again is no pause
    for now in range(22, 40):
        times.add(2, 100_000, 4 * TRUE.round_ms(2, 100_000), now)
    assert times.round_ms(2, 100_000) > 3 * TRUE.round_ms(2, 100_000)


def test_age_counts_rounds() -> None:
    """What is stale is looked at again."""
    times = measured([8, 0, 8], [1000] * 3)
    assert times.age(0, 10) == 9
    assert times.age(8, 10) == 8
    assert times.age(4, 10) == math.inf


def test_the_first_guess_fits_the_first_round() -> None:
    """A guess that does not would be taken for a deviation of that k."""
    for k in (0, 8):
        assert guess(k, 50_000, 20.0).round_ms(k, 50_000) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="no round was measured"):
        RoundTimes().round_ms(0, 1000)


def test_rates_by_position() -> None:
    """A draft behind a rejection was not tried; one that its request may not use was not either."""
    rates = AcceptanceRates(4)
    rates.add([4, 2, 0, 1], [4, 4, 4, 1], now=1)
    assert rates.trials == [4, 2, 2, 1]
    assert rates.correct == [3, 2, 1, 1]


def test_survival_follows_what_comes() -> None:
    """Old outcomes fade, positions that were never tried are like the rest."""
    rng = random.Random(1)

    def outcome(rate: float, num_steps: int) -> int:
        stood = 0
        while stood < num_steps and rng.random() < rate:
            stood += 1
        return stood

    rates = AcceptanceRates(8)
    for now in range(100):
        rates.add([outcome(0.9, 2) for _ in range(32)], [2] * 32, now)
    survival = rates.survival()
    assert survival == sorted(survival, reverse=True)
    assert survival[1] == pytest.approx(0.81, abs=0.04)
    assert survival[7] == pytest.approx(0.9**8, abs=0.08)
    for now in range(100, 200):
        rates.add([outcome(0.2, 2) for _ in range(32)], [2] * 32, now)
    assert rates.survival()[0] == pytest.approx(0.2, abs=0.08)
    # much later a few outcomes outweigh them all
    rates.add([1] * 30, [1] * 30, 4000)
    assert rates.survival()[0] > 0.7
