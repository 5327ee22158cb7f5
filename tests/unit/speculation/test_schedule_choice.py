"""The choice between schedules on made-up rounds (tests/support/schedule_simulator.py): SYNTHETIC times."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from sglang_sparsespec.speculation import schedule_choice
from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice
from tests.support.schedule_simulator import COSTS, NUM_STEPS, Bias, ScheduleSimulator

if TYPE_CHECKING:
    from collections.abc import Callable

# what the option promises
BOUND = 0.03


def constant(num_reqs: int, pool_tokens: int) -> Callable[[int], tuple[int, int]]:
    return lambda now: (num_reqs, pool_tokens)


def switching(period: int, low: int, high: int) -> Callable[[int], tuple[int, int]]:
    def load(now: int) -> tuple[int, int]:
        num_reqs = low if now // period % 2 else high
        return num_reqs, 2000 * num_reqs

    return load


def wandering(longest: int) -> Callable[[int], tuple[int, int]]:
    """16 to 128 requests, another number after at most so many rounds."""
    rng, loads = random.Random(5), list[tuple[int, int]]()

    def load(now: int) -> tuple[int, int]:
        while len(loads) <= now:
            num_reqs = rng.randint(16, 128)
            loads.extend([(num_reqs, 2000 * num_reqs)] * rng.randint(1, longest))
        return loads[now]

    return load


LOADS = {
    "steady": lambda: constant(128, 360_000),
    "small": lambda: constant(8, 65_000),
    "every round": lambda: wandering(1),
    "every 20": lambda: wandering(40),
    "20 of 64, 20 of 128": lambda: switching(20, 64, 128),
    "110 of 64, 110 of 128": lambda: switching(110, 64, 128),
    "60 of 16, 60 of 256": lambda: switching(60, 16, 256),
    "growing": lambda: lambda now: (100, 100 * (500 + 2 * (now % 2000))),
}
# what the model does not know: of all of a unified round, of its terms, and by the batch
BIASES = {
    "0.75": {"lockstep": Bias(), "unified": Bias((0.75, 0.75, 0.75))},
    "0.95": {"lockstep": Bias(), "unified": Bias((0.95, 0.95, 0.95))},
    "1.02": {"lockstep": Bias(), "unified": Bias((1.02, 1.02, 1.02))},
    "1.28": {"lockstep": Bias(), "unified": Bias((1.28, 1.28, 1.28))},
    "terms": {"lockstep": Bias((1.2, 0.9, 1.0)), "unified": Bias((0.9, 1.4, 1.5))},
    # each is the faster at one end
    "bent": {"lockstep": Bias(bend=0.15), "unified": Bias(bend=-0.15)},
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("load", LOADS)
def test_is_within_three_percent_of_the_better_one(load: str, bias: str) -> None:
    """The promise of the option, under loads that move: tries, changes and late changes are counted."""
    server = ScheduleSimulator(COSTS["8b"], BIASES[bias], LOADS[load]())
    server.run(300)
    server.forget_costs()
    server.run(1500)
    assert server.over_better < BOUND, (server.fixed_ms, server.shares())
    # what is not tried is not known
    assert min(server.shares().values()) > 2 * schedule_choice.TRY_ROUNDS


@pytest.mark.parametrize("load", ["60 of 16, 60 of 256", "every 20"])
def test_is_better_than_either_where_each_has_its_loads(load: str) -> None:
    """One correction for all loads, or a change that is never made: as good as the better one, and no better."""
    server = ScheduleSimulator(COSTS["8b"], BIASES["bent"], LOADS[load]())
    server.run(300)
    server.forget_costs()
    server.run(1500)
    assert server.over_better < -0.01
    assert min(server.shares().values()) > 300


@pytest.mark.parametrize("scale", [0.6, 20.0])
def test_a_machine_that_the_model_does_not_know(scale: float) -> None:
    """Only proportions count: a slow machine is no reason for the schedule that has not been measured yet."""
    server = ScheduleSimulator(COSTS["1.7b"], BIASES["1.02"], constant(64, 300_000), scale=scale)
    server.run(40)
    tried = [schedule for schedule in server.ran if schedule == "unified"]
    assert len(tried) == schedule_choice.TRY_ROUNDS
    server.run(300)
    assert server.choice.current == "lockstep"
    assert server.choice.status.round_ms["lockstep"] > 10 * scale


@pytest.mark.parametrize("bias", ["0.75", "1.28"])
@pytest.mark.parametrize("load", ["steady", "every 20"])
def test_tries_cost_one_percent(load: str, bias: str) -> None:
    """Of what rounds took over those of the schedule that was kept; restarts are counted."""
    server = ScheduleSimulator(COSTS["8b"], BIASES[bias], LOADS[load]())
    server.run(300)
    server.forget_costs()
    server.run(4000)
    assert 0.002 < server.trying_ms / server.spent_ms < 1.35 * schedule_choice.EXPLORE_SHARE


def test_begins_with_what_the_model_says() -> None:
    """Nothing measured: the first round is a guess all the same, and not always the same one."""
    cheap = COSTS["8b"]
    free = type(cheap)(**{**vars(cheap), "between_ms": 0.0})
    for cost, expected in ((cheap, "lockstep"), (free, "unified")):
        choice = ScheduleChoice(cost, NUM_STEPS)
        lockstep, unified = (cost.terms(name, 32, 260_000, NUM_STEPS).total for name in ("lockstep", "unified"))
        assert choice.choose(32, 260_000) == expected == ("lockstep" if lockstep < unified else "unified")
        assert choice.status.reason == "the faster by the cost model; not both measured yet"
        assert choice.status.predicted == pytest.approx(unified / lockstep)
        assert choice.status.measured is None


def test_the_status_says_what_was_measured() -> None:
    """A ratio of two means that were taken at different loads says nothing."""
    server = ScheduleSimulator(COSTS["8b"], BIASES["1.28"], LOADS["every 20"]())
    server.run(2000)
    status = server.choice.status
    lockstep, unified = (server.true_ms(name, *server.load(1999)) for name in ("lockstep", "unified"))
    assert status.schedule == "lockstep"
    assert status.reason == "the faster by measured times"
    assert status.measured == pytest.approx(unified / lockstep, rel=0.04)
    assert status.predicted == pytest.approx(unified / lockstep / 1.28, rel=0.01)
    assert set(status.round_ms) == {"lockstep", "unified"}


def test_equal_schedules_are_not_swapped() -> None:
    """Each change to the unified one costs half a round of drafts."""
    cost = COSTS["8b"]
    lockstep, unified = (cost.terms(name, 128, 360_000, NUM_STEPS).total for name in ("lockstep", "unified"))
    share = 0.995 * lockstep / unified
    bias = {"lockstep": Bias(), "unified": Bias((share, share, share))}
    server = ScheduleSimulator(cost, bias, noise=0.01)
    server.run(100)
    kept = server.choice.current
    for _ in range(20):
        server.run(100)
        assert server.choice.current == kept


def test_a_machine_that_changes_is_noticed() -> None:
    """Times from before count for ever."""
    server = ScheduleSimulator(COSTS["8b"], BIASES["0.75"])
    server.run(400)
    assert server.choice.current == "unified"
    server.bias = BIASES["1.28"]
    server.run(150)
    assert server.choice.current == "lockstep"


def test_rounds_that_cannot_be_timed_change_nothing() -> None:
    """Prefills between all rounds: no time is a round's own, and nothing is tried for its sake."""
    server = ScheduleSimulator(COSTS["1.7b"], BIASES["0.75"], constant(32, 260_000), is_timed=False)
    server.run(500)
    assert server.shares() == {"lockstep": 500}
    server.is_timed = True
    server.run(300)
    assert server.choice.current == "unified"


def test_rounds_of_another_schedule_than_chosen_do_not_count() -> None:
    """A batch with a grammar runs in lockstep whatever was wanted; it is asked for ever more rarely."""
    server = ScheduleSimulator(COSTS["1.7b"], BIASES["0.75"], constant(32, 260_000), runs_unified=False)
    wanted = []
    choose = server.choice.choose
    server.choice.choose = lambda *load: wanted.append(choose(*load)) or wanted[-1]  # type: ignore[method-assign,func-returns-value]
    server.run(2000)
    assert server.choice.current == "lockstep"
    assert server.choice.status.measured is None
    assert wanted.count("unified") <= (schedule_choice.MAX_FIRST_LOOKS + 2) * schedule_choice.TRY_ROUNDS


@pytest.mark.parametrize("seed", [*range(40), 53, 338, 546])
def test_no_noise_ends_the_scheduler(seed: int) -> None:
    """All of a time fitted to KV, and then a batch without any: a round of 0 ms, and a division by it.

    Loads jump, and times have nothing to do with them. The last three seeds made such a round once.
    """
    rng, num_reqs = random.Random(seed), 8
    choice, sigma = ScheduleChoice(COSTS[rng.choice(list(COSTS))], NUM_STEPS), rng.choice([0.1, 0.5, 1.5, 3])
    late: list[tuple[str, int, int, float | None]] = []
    for _ in range(400):
        if rng.random() < 0.05:
            num_reqs = rng.choice([1, 2, 3, 8, 16, 100, 128, 256])
        pool = rng.choice([0, 1, num_reqs * 10, num_reqs * 1_000, num_reqs * 30_000])
        schedule = choice.choose(num_reqs, pool)
        if rng.random() >= 0.9:
            schedule = "lockstep"
        took = None
        if rng.random() >= 0.1:
            took = 5 * rng.lognormvariate(0, sigma) * (1_000 if rng.random() < 0.02 else 1)
            took *= 1e-6 if rng.random() < 0.01 else 1
        late.append((schedule, num_reqs, pool, took))
        if len(late) > rng.choice([0, 1, 2]):
            choice.observe(*late.pop(0))
        measured = choice.status.measured
        assert measured is None or measured > 0
