"""The choice between schedules on made-up round times: SYNTHETIC, they say nothing of any GPU."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from sglang_sparsespec.speculation import schedule_choice
from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice


class Server:
    """Rounds whose times are known, with noise; results arrive a round late."""

    def __init__(self, lockstep_ms: float, unified_ms: float, noise: float = 0.03, growth: float = 0.0) -> None:
        self.choice = ScheduleChoice(("lockstep", "unified"))
        self.ms = {"lockstep": lockstep_ms, "unified": unified_ms}
        self._noise, self._growth = noise, growth
        self._rng = random.Random(1)
        self._late: deque[tuple[str, float | None]] = deque()
        self._rounds = 0
        self.num_reqs, self.pool_tokens = 100, 200_000
        self.is_timed = True

    def run(self, rounds: int) -> Counter[str]:
        ran: Counter[str] = Counter()
        for _ in range(rounds):
            schedule = self.choice.choose(self.num_reqs, self.pool_tokens)
            ran[schedule] += 1
            self._rounds += 1
            ms = self.ms[schedule] * self._rng.gauss(1, self._noise) * (1 + self._growth * self._rounds)
            # the host did something else
            if self._rounds % 41 == 0:
                ms *= 10
            self._late.append((schedule, ms if self.is_timed else None))
            if len(self._late) > 1:
                self.choice.observe(*self._late.popleft())
        return ran


@pytest.mark.parametrize("ratio", [0.7, 0.85, 0.95, 1.0, 1.1, 1.4])
def test_is_within_three_percent_of_the_better_one(ratio: float) -> None:
    """The promise of the option; whole rounds of trials are counted."""
    server = Server(100, 100 * ratio)
    server.run(200)
    ran = server.run(4000)
    mean_ms = sum(server.ms[schedule] * count for schedule, count in ran.items()) / ran.total()
    assert mean_ms < 1.03 * min(server.ms.values()), ran
    # and both are looked at again and again
    assert min(ran.values()) >= 4 * 2 * schedule_choice.QUARTER_ROUNDS


@pytest.mark.parametrize("growth", [-0.002, 0.002])
def test_growing_contexts_favour_nobody(growth: float) -> None:
    """Rounds get slower as outputs grow: what is tried later would seem slower."""
    server = Server(100, 100, noise=0.0, growth=growth)
    server.run(200)
    assert server.choice.current == "lockstep"
    assert server.choice.round_ms["unified"] == pytest.approx(server.choice.round_ms["lockstep"], rel=0.02)


def test_equal_schedules_are_not_swapped() -> None:
    """Each switch costs half a round of drafts."""
    server = Server(100, 99.5, noise=0.01)
    seen = set()
    for _ in range(20):
        server.run(400)
        seen.add(server.choice.current)
    assert seen == {"lockstep"}


def test_another_load_is_tried_sooner() -> None:
    """What was faster with 100 requests need not be with 10."""
    server = Server(100, 80)
    server.run(300)
    assert server.choice.current == "unified"
    server.num_reqs, server.pool_tokens = 10, 20_000
    server.ms = {"lockstep": 20, "unified": 30}
    server.run(schedule_choice.LEAST_HOLD_ROUNDS + 4 * schedule_choice.QUARTER_ROUNDS + 10)
    assert server.choice.current == "lockstep"
    assert server.choice.reason == "the faster in a trial"


def test_rounds_that_cannot_be_timed_change_nothing() -> None:
    """Prefills between all rounds: no time is a round's own."""
    server = Server(100, 50)
    server.is_timed = False
    server.run(500)
    assert server.choice.current == "lockstep"
    assert server.choice.reason == "too few rounds could be timed"
    server.is_timed = True
    server.run(schedule_choice.HOLD_ROUNDS + 100)
    assert server.choice.current == "unified"


def test_rounds_of_another_schedule_than_chosen_do_not_count() -> None:
    """A batch with a grammar runs in lockstep whatever was wanted."""
    choice = ScheduleChoice(("lockstep", "unified"))
    for _ in range(300):
        choice.choose(8, 1000)
        choice.observe("lockstep", 10.0)
    assert choice.current == "lockstep"
    assert choice.reason == "too few rounds could be timed"
