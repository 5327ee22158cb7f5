"""Which schedule is faster now: the cost model's word, corrected by the times of rounds that ran.

Drafts are the same by either, so rounds of k drafts are compared by their times. Each schedule has a correction of its
own on the model's terms (`schedule_times`), so that rounds of different loads can be compared. The schedule that does
not run is tried now and then. Pure host code; knows nothing of forwards. Invariants: a schedule that is expected to be
faster by less than MARGIN is not changed to; what trying costs stays near EXPLORE_SHARE of all time; a change is made
when what it would have saved so far exceeds what it costs, so a load that changes quickly cannot make it expensive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.config import SCHEDULES
from sglang_sparsespec.speculation.round_times import TimesByBatch
from sglang_sparsespec.speculation.schedule_times import ScheduleTimes

if TYPE_CHECKING:
    from sglang_sparsespec.speculation.cost_model import RoundTerms, ServerCost

CHOICES = SCHEDULES[:2]
"""lockstep, unified."""
# rounds of one try; the first behind a change verifies short chains, and is not timed
TRY_ROUNDS = 8
SETTLE_ROUNDS = 1
# rounds' worth of drafts that a change to the unified schedule costs: its first round verifies 0 to k of them. A change
# to lockstep costs nothing: the drafts that are dropped are those that this round was short of
RESTART_ROUNDS = 0.5
# what a change must have been worth before it is made, in rounds; and the gain below which it is worth nothing
CHANGE_ROUNDS = 0.75
MARGIN = 0.01
# time that may be lost by trying, as a share of all; and rounds' worth of it that may be saved up
EXPLORE_SHARE = 0.01
MAX_CREDIT_ROUNDS = 12
# rounds after which the other schedule is worth another try with a batch of this size
STALE_ROUNDS = 150
# what was never measured anywhere is tried this soon, whatever it costs; ever later, where no round can be timed
FIRST_LOOK = 8
MAX_FIRST_LOOKS = 7


class ScheduleStatus(NamedTuple):
    """What an operator sees."""

    schedule: str
    reason: str
    predicted: float | None
    """A unified round's time over a lockstep one's at the last load, by the cost model alone; None before any round."""
    measured: float | None
    """The same, corrected by the times of rounds; None until rounds of both were timed."""
    round_ms: dict[str, float]
    """Decayed mean of the rounds of each schedule that were timed, whatever their load."""


class ScheduleChoice:
    """Chooses between lockstep and unified, round by round.

    Args:
        cost: the model's word.
        num_steps: k of the rounds that are chosen for.
    """

    def __init__(self, cost: ServerCost, num_steps: int) -> None:
        self.current: str | None = None
        """The schedule that is kept, tries aside; None before the first round."""
        self._cost, self._num_steps = cost, num_steps
        self._times = {schedule: ScheduleTimes() for schedule in CHOICES}
        self._now = 0
        self._left_to_try = 0
        self._next_try = FIRST_LOOK
        self._first_looks = 0
        self._credit = 0.0
        self._lead = 0.0
        self._ran: str | None = None
        self._settling = 0
        self._load = (0, 0)

    @property
    def status(self) -> ScheduleStatus:
        round_ms = {name: times.mean_ms for name, times in self._times.items() if times.mean_ms is not None}
        predicted = measured = None
        if self.current is not None:
            lockstep, unified = (self._terms(schedule, *self._load).total for schedule in CHOICES)
            predicted = unified / lockstep
            if len(round_ms) == len(CHOICES):
                expected = self._expected(*self._load)
                measured = expected["unified"] / expected["lockstep"]
        return ScheduleStatus(self.current or CHOICES[0], self._reason(), predicted, measured, round_ms)

    def _reason(self) -> str:
        if self.current is None:
            return "no round yet"
        if not all(times.is_measured for times in self._times.values()):
            return "the faster by the cost model; not both measured yet"
        expected = self._expected(*self._load)
        if expected[self.current] <= expected[_other(self.current)]:
            return "the faster by measured times"
        return "the other is not faster by enough, or not for long"

    # Choose

    def choose(self, num_reqs: int, pool_tokens: int) -> str:
        """The schedule of the next round, of `num_reqs` requests with `pool_tokens` of KV."""
        self._now += 1
        self._load = (num_reqs, pool_tokens)
        expected = self._expected(num_reqs, pool_tokens)
        if self.current is None:
            self.current = min(CHOICES, key=expected.__getitem__)
        if self._left_to_try == 0:
            self._follow(expected)
            if self._may_try(TimesByBatch.bucket(num_reqs), expected):
                self._left_to_try = TRY_ROUNDS
                self._credit -= RESTART_ROUNDS * expected["unified"]
        if self._left_to_try == 0:
            return self.current
        self._left_to_try -= 1
        other = _other(self.current)
        self._credit -= max(0.0, expected[other] - expected[self.current])
        return other

    def is_try(self, schedule: str) -> bool:
        """Whether a round by `schedule` is not by the one that is kept."""
        return schedule != self.current

    def _follow(self, expected: dict[str, float]) -> None:
        """Change to the other schedule once that would have been worth its price."""
        assert self.current is not None
        other = _other(self.current)
        gain = 1 - expected[other] / expected[self.current] - MARGIN
        self._lead = max(0.0, self._lead + gain)
        if gain > 0 and self._lead > CHANGE_ROUNDS:
            self.current, self._lead = other, 0.0

    def _may_try(self, bucket: int, expected: dict[str, float]) -> bool:
        """Whether a try of the other schedule begins: nobody knows what it takes now, and it can be paid for."""
        assert self.current is not None
        other = _other(self.current)
        times = self._times[other]
        if self._now < self._next_try or not self._times[self.current].is_measured:
            return False
        price = TRY_ROUNDS * max(0.0, expected[other] - expected[self.current]) + RESTART_ROUNDS * expected["unified"]
        if times.is_measured:
            age = times.age(bucket, self._now)
            if price > self._credit or (age is not None and age < STALE_ROUNDS):
                return False
        else:
            self._next_try = self._now + (FIRST_LOOK << self._first_looks)
            self._first_looks = min(self._first_looks + 1, MAX_FIRST_LOOKS)
        self._next_try = max(self._next_try, self._now + 2 * TRY_ROUNDS)
        return True

    # Learn

    def observe(self, schedule: str, num_reqs: int, pool_tokens: int, round_ms: float | None) -> None:
        """A round by `schedule` took so long; None: it took something else as well, and does not count."""
        if schedule != self._ran:
            self._ran, self._settling = schedule, SETTLE_ROUNDS
        is_settled = self._settling == 0
        self._settling -= not is_settled
        if round_ms is None:
            return
        self._credit = min(self._credit + EXPLORE_SHARE * round_ms, MAX_CREDIT_ROUNDS * round_ms)
        if not is_settled:
            return
        terms = self._terms(schedule, num_reqs, pool_tokens)
        self._times[schedule].add(TimesByBatch.bucket(num_reqs), terms, round_ms, self._now)

    def _terms(self, schedule: str, num_reqs: int, pool_tokens: int) -> RoundTerms:
        return self._cost.terms(schedule, num_reqs, pool_tokens, self._num_steps)

    def _expected(self, num_reqs: int, pool_tokens: int) -> dict[str, float]:
        """Milliseconds of a round by each schedule; in the model's own before anything was measured."""
        bucket = TimesByBatch.bucket(num_reqs)
        terms = {schedule: self._terms(schedule, num_reqs, pool_tokens) for schedule in CHOICES}
        found = {}
        for schedule, times in self._times.items():
            # a machine that the model does not know is as slow by the one as by the other, until that is measured
            scale = self._times[_other(schedule)].scale(bucket, len(terms[schedule]))
            found[schedule] = times.expect(bucket, terms[schedule], scale or 1.0)
        return found


def _other(schedule: str) -> str:
    return CHOICES[1 - CHOICES.index(schedule)]
