"""Which schedule is faster now: both are run near each other in time, and the faster one is kept for a while.

Drafts are the same by either, so rounds of k drafts are compared by their times. What a round takes grows with the KV
in use, so a trial runs the schedules in the order B A A B, in which a steady growth weighs on both alike. Pure host
code; knows nothing of forwards. Invariant: a trial ends after a bounded number of rounds, whether or not times arrive.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# rounds of each quarter of a trial; the first ones behind a switch, which verify short chains, are not counted
QUARTER_ROUNDS = 8
SETTLE_ROUNDS = 3
# rounds between two trials, and the fewest where the load has changed
HOLD_ROUNDS = 800
LEAST_HOLD_ROUNDS = 100
LOAD_CHANGE = 1.5
# by how much the other schedule has to be faster; and with fewer times than this nothing is known
MARGIN = 0.02
LEAST_TIMES = 4


class ScheduleChoice:
    """Chooses between two schedules, round by round.

    Args:
        schedules: two names; the first is used until there is reason for the other.
    """

    def __init__(self, schedules: Sequence[str]) -> None:
        self.current, self._other = schedules
        self.reason = "nothing measured yet"
        self.round_ms: dict[str, float] = {}
        """Medians of the last trial."""
        self._trial: list[str] = []
        self._times: dict[str, list[float]] = {}
        self._since = LEAST_HOLD_ROUNDS
        self._load: tuple[int, int] | None = None
        self._last: str | None = None
        self._settling = 0

    def choose(self, num_reqs: int, pool_tokens: int) -> str:
        """The schedule of the next round, of `num_reqs` requests with `pool_tokens` of KV."""
        if self._trial:
            chosen = self._trial.pop()
            if not self._trial:
                self._since = 0
                self._load = (num_reqs, pool_tokens)
            return chosen
        if self._times and self._since >= SETTLE_ROUNDS:
            # the results of the last rounds of a trial arrive behind it
            self._decide()
        self._since += 1
        if self._since > HOLD_ROUNDS or (
            self._since > LEAST_HOLD_ROUNDS and self._is_other_load(num_reqs, pool_tokens)
        ):
            quarters = (self._other, self.current, self.current, self._other)
            # taken from the end
            self._trial = [schedule for schedule in quarters for _ in range(QUARTER_ROUNDS)]
            self._times = {self.current: [], self._other: []}
            return self._trial.pop()
        return self.current

    def observe(self, schedule: str, round_ms: float | None) -> None:
        """A round by `schedule` took so long; None: it took something else as well, and does not count."""
        self._settling = SETTLE_ROUNDS if schedule != self._last else self._settling - 1
        self._last = schedule
        if round_ms is not None and self._settling <= 0 and schedule in self._times:
            self._times[schedule].append(round_ms)

    def _is_other_load(self, num_reqs: int, pool_tokens: int) -> bool:
        if self._load is None:
            return True
        pairs = zip((num_reqs, pool_tokens), self._load, strict=True)
        return any(max(now, before) > LOAD_CHANGE * max(1, min(now, before)) for now, before in pairs)

    def _decide(self) -> None:
        times, self._times = self._times, {}
        if min(map(len, times.values())) < LEAST_TIMES:
            self.reason = "too few rounds could be timed"
            return
        self.round_ms = {schedule: median(values) for schedule, values in times.items()}
        if self.round_ms[self._other] < (1 - MARGIN) * self.round_ms[self.current]:
            self.current, self._other = self._other, self.current
            self.reason = "the faster in a trial"
        else:
            self.reason = "not slower in a trial"
