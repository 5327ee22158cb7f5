"""Rounds of a made-up server with two schedules: times from the cost model, off by what the model does not know.

SYNTHETIC: says how `auto` decides, nothing of how fast anything is. The model's constants are those of an H100 with the
Qwen3-1.7B or 8B shape. Results arrive a round late, as under the overlap scheduler.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_sparsespec.speculation.cost_model import ServerCost
from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice

if TYPE_CHECKING:
    from collections.abc import Callable

COSTS = {
    "1.7b": ServerCost(weights_ms=1.15, row_ms=0.005, kv_ms=38e-6, budget_ratio=0.05, min_budget=192),
    "8b": ServerCost(weights_ms=5.05, row_ms=0.022, kv_ms=49e-6, budget_ratio=0.05, min_budget=192),
}
NUM_STEPS = 8
# of a round's tokens that the first unified round after lockstep is short of
RESTART = 0.5


@dataclass
class Bias:
    """What a schedule's round takes over the model: by term, at all, and by how it bends with the batch."""

    terms: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bend: float = 0.0
    """Share that is added at 256 requests, and taken off at 16."""

    def of(self, terms: tuple[float, ...], num_reqs: int) -> float:
        bent = 1 + self.bend * ((num_reqs.bit_length() - 7) / 2)
        return bent * sum(factor * term for factor, term in zip(self.terms, terms, strict=True))


@dataclass
class ScheduleSimulator:
    """Times that are known, with noise; and what was lost."""

    cost: ServerCost
    bias: dict[str, Bias]
    load: Callable[[int], tuple[int, int]] = lambda now: (128, 360_000)
    """Requests and KV tokens at a round."""
    noise: float = 0.03
    seed: int = 1
    scale: float = 1.0
    """Of the machine over the model, all alike."""
    is_timed: bool = True
    runs_unified: bool = True
    """Whether a round that is wanted unified is one."""
    hiccup_every: int = 41
    spent_ms: float = 0.0
    """Of all rounds so far, with what restarts cost."""
    oracle_ms: float = 0.0
    """Of the faster schedule at each round, changes for nothing."""
    fixed_ms: dict[str, float] = field(default_factory=lambda: {"lockstep": 0.0, "unified": 0.0})
    """Of each schedule, had it run all rounds."""
    ran: list[str] = field(default_factory=list)
    trying_ms: float = 0.0
    """What rounds that were tries took over those of the schedule that was kept."""

    def __post_init__(self) -> None:
        self.choice = ScheduleChoice(self.cost, NUM_STEPS)
        self._rng = random.Random(self.seed)
        self._late: deque[tuple[str, int, int, float | None]] = deque()

    def true_ms(self, schedule: str, num_reqs: int, pool_tokens: int) -> float:
        terms = self.cost.terms(schedule, num_reqs, pool_tokens, NUM_STEPS)
        return self.scale * self.bias[schedule].of(terms, num_reqs)

    def run(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            load = self.load(len(self.ran))
            wanted = self.choice.choose(*load)
            schedule = wanted if self.runs_unified else "lockstep"
            ms = {name: self.true_ms(name, *load) for name in self.fixed_ms}
            restarts = schedule == "unified" and self.ran[-1:] == ["lockstep"]
            self.ran.append(schedule)
            self.spent_ms += ms[schedule] * (1 + RESTART * restarts)
            self.oracle_ms += min(ms.values())
            for name, time in ms.items():
                self.fixed_ms[name] += time
            if self.choice.is_try(wanted):
                assert self.choice.current is not None
                self.trying_ms += ms[schedule] * (1 + RESTART * restarts) - ms[self.choice.current]
            took = ms[schedule] * self._rng.lognormvariate(0.0, self.noise)
            if len(self.ran) % self.hiccup_every == 0:
                took *= 10
            self._late.append((schedule, *load, took if self.is_timed else None))
            if len(self._late) > 1:
                self.choice.observe(*self._late.popleft())

    def forget_costs(self) -> None:
        """What follows is counted from here."""
        self.spent_ms = self.oracle_ms = self.trying_ms = 0.0
        self.fixed_ms = dict.fromkeys(self.fixed_ms, 0.0)

    @property
    def over_better(self) -> float:
        """Share of time beyond that of the better schedule, had it run all the time."""
        return self.spent_ms / min(self.fixed_ms.values()) - 1

    @property
    def over_oracle(self) -> float:
        return self.spent_ms / self.oracle_ms - 1

    def shares(self) -> Counter[str]:
        return Counter(self.ran)
