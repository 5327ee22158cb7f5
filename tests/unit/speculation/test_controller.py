"""The controller against made-up servers whose best k is known (tests/support/round_simulator.py): SYNTHETIC times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest

from sglang_sparsespec.speculation.controller import Controller, Round
from tests.support.round_simulator import Simulator

CHOICES = (0, 1, 2, 4, 8)
# rounds in which it must have settled; at 20 ms a round a few seconds
SETTLED = 400


def run(num_rounds: int = 1200, **settings: Any) -> tuple[Simulator, Controller]:
    server, controller = Simulator(**settings), Controller(CHOICES)
    server.run(controller, num_rounds)
    return server, controller


def constant(value: Any) -> Any:
    return lambda now: value


def lost_share(server: Simulator, controller: Controller, num_rounds: int) -> float:
    """Of the time of further rounds, what the best k would not have needed for the same tokens."""
    start, lost, total = len(server.steps), server.lost_ms, server.total_ms
    server.run(controller, num_rounds, start=start)
    return (server.lost_ms - lost) / (server.total_ms - total)


CELLS = [(num_reqs, context, rate) for num_reqs in (1, 16, 128) for context in (256, 4096) for rate in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize("bend", [0.0, 0.1], ids=["linear", "bent"])
@pytest.mark.parametrize(("num_reqs", "context", "rate"), CELLS)
def test_settles_near_the_best_k(num_reqs: int, context: int, rate: float, bend: float) -> None:
    """A term of the model taken for another, or a rate for its position's: the wrong k for good."""
    settings = {
        "num_reqs": constant(num_reqs),
        "pool_tokens": constant(num_reqs * context),
        "rates": constant([rate] * 8),
        "bend": bend,
    }
    server, controller = run(SETTLED, **settings)
    # the way there costs something, but not much more than the first looks
    assert server.lost_ms < 0.15 * server.total_ms
    assert lost_share(server, controller, 800) < 0.03
    settled = server.steps[SETTLED:]
    most = max(CHOICES, key=settled.count)
    assert server.speed(most, 0) > 0.98 * server.speed(server.best(CHOICES, 0), 0)
    # what remains is looking around
    assert sum(first != second for first, second in pairwise(settled)) < 0.06 * len(settled)


def test_cells_have_different_bests() -> None:
    """Without it, a controller that never moves could pass the test above."""
    bests = {
        Simulator(num_reqs=constant(n), pool_tokens=constant(n * context), rates=constant([rate] * 8)).best(CHOICES, 0)
        for n, context, rate in CELLS
    }
    assert {0, 8} < bests


def test_does_not_flap_between_equals() -> None:
    """Two k within a percent of each other, and noisy times: changing is not free where a k has to be warm."""
    server, controller = run(400, rates=constant([0.75] * 8), noise=0.08, pool_tokens=constant(400_000))
    speeds = sorted((server.speed(k, 0) for k in CHOICES), reverse=True)
    assert speeds[1] > 0.985 * speeds[0]
    decided = set()
    for _ in range(40):
        server.run(controller, 50, start=len(server.steps))
        decided.add((len(server.steps), controller.status.num_steps))
    held = [steps for _, steps in sorted(decided)]
    assert sum(first != second for first, second in pairwise(held)) <= 4
    assert lost_share(server, controller, 500) < 0.03


def test_turns_itself_off_and_comes_back() -> None:
    """Where drafts are worthless it must stop, and it must notice when they are not any more."""
    good, bad = [0.95] * 8, [0.05] * 8
    pool = constant(400_000)
    server, controller = run(600, rates=lambda now: bad if 600 <= now < 1600 else good, pool_tokens=pool)
    assert controller.status.num_steps == 8
    server.run(controller, 200, start=600)
    assert controller.status.num_steps == 0
    assert controller.status.reason == "drafting does not pay"
    server.run(controller, 800, start=800)
    off = server.steps[800:1600]
    assert off.count(0) > 0.9 * len(off)
    server.run(controller, 1200, start=1600)
    assert controller.status.num_steps == 8
    assert server.steps[-300:].count(8) > 250


@pytest.mark.parametrize("num_reqs", [1, 32])
def test_follows_a_pool_that_fills(num_reqs: int) -> None:
    """Contexts grow while requests run: from the terms it must see that drafting pays, before it has tried."""
    server, _ = run(
        2000, num_reqs=constant(num_reqs), pool_tokens=lambda now: int(10_000 + 300_000 * max(0, now - 200) / 1800)
    )
    assert server.best(CHOICES, 0) == 0
    assert server.best(CHOICES, 1999) == 4
    assert server.steps[60:160].count(0) > 80
    assert server.steps[-200:].count(4) > 180
    assert server.lost_ms < 0.05 * server.total_ms


def test_load_that_rises_and_falls() -> None:
    """Batches change bucket all the time; what was learnt in one must serve in the next."""

    def num_reqs(now: int) -> int:
        wave = now % 800
        return 1 + 127 * min(wave, 800 - wave) // 400

    server, _ = run(4000, num_reqs=num_reqs, pool_tokens=lambda now: 3000 * num_reqs(now))
    assert server.lost_ms < 0.03 * server.total_ms
    fixed = {k: sum(server.round_ms(k, num_reqs(n), 3000 * num_reqs(n)) for n in range(4000)) for k in CHOICES}
    made = {k: sum(server.tokens(k, n) * num_reqs(n) for n in range(4000)) for k in CHOICES}
    best_fixed = max(made[k] / fixed[k] for k in CHOICES)
    assert server.total_tokens / server.total_ms > best_fixed


class SmallModel(Simulator):
    """Times near SmolLM2's at 128 requests on an H200: up to some 60K pool tokens plain rounds are best, then k = 8."""

    TIMES_MS: ClassVar = {0: 1.2, 1: 4.75, 2: 5.9, 4: 7.5, 8: 13.3}

    def round_ms(self, num_steps: int, num_reqs: int, pool_tokens: int) -> float:
        return self.TIMES_MS[num_steps] + 5.3e-6 * pool_tokens


@pytest.mark.parametrize("seed", range(1, 5))
def test_follows_loads_in_which_the_best_k_changes(seed: int) -> None:
    """Requests grow from short to long while they run: what was measured with little KV must be known with much."""
    server = SmallModel(
        rates=constant([0.994] * 8),
        num_reqs=constant(128),
        pool_tokens=lambda now: 33_000 + 77_000 * (now % 150) // 150,
        seed=seed,
    )
    assert (server.best(CHOICES, 0), server.best(CHOICES, 149)) == (0, 8)
    controller = Controller(CHOICES)
    server.run(controller, 600)
    assert lost_share(server, controller, 2400) < 0.03


class Valley(Simulator):
    """Rounds of k = 1 and 2 are poor beside plain ones and long drafts, as with a small model that waits for its host;
    long drafts are slow when they first run."""

    TIMES_MS: ClassVar = {0: 1.7, 1: 4.9, 2: 5.9, 4: 7.7, 8: 13.5}
    COLD_ROUNDS, COLD = 60, 1.15

    def round_ms(self, num_steps: int, num_reqs: int, pool_tokens: int) -> float:
        is_cold = num_steps >= 4 and len(self.steps) < self.COLD_ROUNDS
        return self.TIMES_MS[num_steps] * (self.COLD if is_cold else 1.0)


def test_finds_a_k_behind_a_valley() -> None:
    """Next to the current k all are worse, and the good one was measured on a bad day: nothing asks for it again."""
    server, controller = Valley(rates=constant([0.99] * 8), num_reqs=constant(128)), Controller(CHOICES)
    server.run(controller, Valley.COLD_ROUNDS)
    assert controller.status.num_steps == 0
    server.run(controller, 2400, start=Valley.COLD_ROUNDS)
    assert server.best(CHOICES, 0) in (4, 8)
    assert sum(server.steps[-400:].count(k) for k in (4, 8)) > 350
    assert lost_share(server, controller, 800) < 0.03


def test_tries_cost_a_bounded_share() -> None:
    """Where every other k is bad, looking at them must not eat what the good one earns."""
    # worthless drafts, and a batch so large that verifies are dear
    server, controller = run(600, rates=constant([0.0] * 8), num_reqs=constant(128), row_ms=0.02)
    assert controller.status.num_steps == 0
    assert lost_share(server, controller, 4000) < 0.02


def test_limits_of_requests_count() -> None:
    """Drafts that seven eighths of a batch may not use are worth an eighth."""
    half = {"rates": constant([0.8] * 8), "pool_tokens": constant(200_000)}
    free, _ = run(600, **half)
    assert max(CHOICES, key=free.steps[300:].count) >= 2
    limited, controller = run(600, **half, limits=lambda now, n: [0] * (n - n // 8) + [8] * (n // 8))
    assert max(CHOICES, key=limited.steps[300:].count) == 0
    assert controller.status.num_steps == 0


@pytest.mark.parametrize(("limit", "allowed"), [(0, {0}), (1, {0, 1}), (3, {0, 1, 2}), (7, {0, 1, 2, 4})])
def test_no_round_drafts_more_than_its_requests_take(limit: int, allowed: set[int]) -> None:
    """A look around that ignores the limit, or a k between the ones that graphs were captured for."""
    pool = constant(400_000)
    server, controller = run(600, limits=lambda now, n: [limit] * n, rates=constant([0.95] * 8), pool_tokens=pool)
    assert set(server.steps) <= allowed
    wanted = "the requests take no drafts" if limit == 0 else "the requests take no more drafts"
    assert controller.status.reason == wanted
    server.limits = None
    server.run(controller, 300, start=600)
    assert controller.status.num_steps == 8


@pytest.mark.parametrize(("context", "best"), [(256, 0), (8192, 8)])
def test_begins_with_what_the_cost_model_prefers(context: int, best: int) -> None:
    """The first requests of a server; without a guess they all pay for k = K until something was measured."""
    settings = {"num_reqs": constant(16), "pool_tokens": constant(16 * context), "rates": constant([0.85] * 8)}
    server = Simulator(**settings)
    # off by a third, and in its proportions too
    controller = Controller(CHOICES, guess=lambda k, n, pool: 1.3 * server.round_ms(k, n, pool) + 0.2 * k)
    first = controller.choose(16 * context, [8] * 16)
    assert (first.num_steps == 0) == (best == 0)
    assert controller.status.reason == "a first guess by the cost model"
    assert controller.choose(16 * context, [1] * 16).num_steps <= 1

    def lost_ms(guess: Any) -> float:
        server = Simulator(**settings)
        server.run(Controller(CHOICES, guess=guess), 100)
        return server.lost_ms

    assert lost_ms(controller.guess) <= lost_ms(None)
    # a guess that is wrong costs no more than a start at K does where that is wrong
    assert lost_ms(lambda k, n, pool: 1.0 + (0 if best else 99) * k) < 0.1 * server.round_ms(8, 16, 16 * context) * 100


def test_rounds_without_times_leave_k_alone() -> None:
    """A server that prefills between all rounds cannot be timed; a guess is worse than the k that was asked for."""
    controller = Controller(CHOICES)
    for _ in range(300):
        chosen = controller.choose(1000, [8] * 4)
        assert chosen.num_steps == 8
        controller.observe(chosen, [0] * 4, None)
    assert controller.status.num_steps == 8
    assert controller.status.predicted_speedup is None
    assert controller.status.measured_speedup is None


def test_says_what_speculation_is_worth() -> None:
    """A speed-up over itself, or without the bonus token, is a number that looks right."""
    server, controller = run(800)
    status = controller.status
    true = server.speed(status.num_steps, 0) / server.speed(0, 0)
    assert true > 1.2
    assert status.predicted_speedup == pytest.approx(true, rel=0.05)
    assert status.measured_speedup == pytest.approx(true, rel=0.05)


def test_drafts_after_a_plain_decode_say_nothing_of_the_rest() -> None:
    """Their selection came from one query; taken as the rule, they would keep drafting off."""
    controller = Controller(CHOICES)
    poor = Round(8, 1000, (8, 8), follows_plain=True)
    before = controller.rates.survival()
    controller.observe(poor, [0, 0], 5.0)
    assert controller.rates.survival() == before
    controller.observe(poor._replace(follows_plain=False), [0, 0], 5.0)
    assert controller.rates.survival()[0] < before[0]
