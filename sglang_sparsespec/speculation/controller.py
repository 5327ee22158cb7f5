"""Which k the next round should have: the one that the cost model expects the most tokens per time from.

Fed with rounds that ran, their outcomes and times; no tensors, no clock, no SGLang. It starts at the k that a guess of
the times prefers, or at the largest, looks at plain decoding (k = 0) and at drafts once, and from then on compares.
Invariants: a k that is expected to be better by less than
MARGIN is not changed to; what trying other k costs, by its measured time, stays near EXPLORE_SHARE of all time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.speculation.acceptance_rates import AcceptanceRates
from sglang_sparsespec.speculation.cost_model import accept_length, speedup
from sglang_sparsespec.speculation.round_times import TimesByBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# all arbitrary: rounds between two decisions, and the gain that a change must promise
DECIDE_EVERY = 8
MARGIN = 0.02
# time that may be lost by trying other k, as a share of all; and rounds' worth of it that may be saved up
EXPLORE_SHARE = 0.01
MAX_CREDIT_ROUNDS = 12
# rounds of one try, and those after which a k is worth another
BURST = 4
STALE_ROUNDS = 128
MIN_GAP = 16
# of the current k's speed, what one that is not next to it has to promise for a try
REACH = 0.9
# a k that was never measured anywhere is tried this soon, whatever it costs
FIRST_LOOK = 8
# of the measured speed-up, rounds
SPEEDUP_MEMORY = 64


class Round(NamedTuple):
    """A round as it was decided."""

    num_steps: int
    """k."""
    pool_tokens: int
    """KV tokens of its requests."""
    allowed: tuple[int, ...]
    """Drafts that may stand, by request; at most k."""
    is_try: bool = False
    """Whether it was made to learn."""
    follows_plain: bool = False
    """Whether its drafts saw a selection that a single query had made."""
    plain_steps: int = 1
    """Tokens that a round without drafts decodes, one after the other; with drafts it means nothing."""


class Status(NamedTuple):
    """What an operator sees."""

    num_steps: int
    reason: str
    predicted_speedup: float | None
    """Over plain decoding, by the model; None before anything was measured."""
    measured_speedup: float | None
    """Plain decoding's expected time for the tokens of the last rounds, over the time that they took."""


class Controller:
    """Chooses k.

    Args:
        choices: of k, ascending, 0 and the largest k among them.
        plain_steps: tokens that a round without drafts decodes, mostly.
        guess: milliseconds of a round of (k, requests, KV tokens), a token's for k = 0; asked until a round was
            measured, so that a server's first requests are not drafted for where that hardly pays.
    """

    def __init__(
        self,
        choices: Sequence[int],
        plain_steps: int = 1,
        guess: Callable[[int, int, int], float] | None = None,
    ) -> None:
        self.choices = tuple(choices)
        self.plain_steps = plain_steps
        self.guess = guess
        self.times = TimesByBatch()
        self.rates = AcceptanceRates(self.choices[-1])
        self._current = self.choices[-1]
        self._reason = "nothing measured yet"
        self._now = 0
        self._decided: tuple[int, int, int] | None = None
        self._burst: tuple[int, int] = (0, 0)
        self._last_burst = 0
        self._first_looks = 0
        self._credit = 0.0
        self._rivals: set[int] = set()
        self._last_steps = self.choices[-1]
        self._warm: set[tuple[int, int]] = set()
        self._plain_ms = self._spent_ms = 0.0
        self._predicted: float | None = None

    @property
    def status(self) -> Status:
        measured = self._plain_ms / self._spent_ms if self._spent_ms > 0 else None
        return Status(self._current, self._reason, self._predicted, measured)

    # Decide

    def choose(self, pool_tokens: int, limits: Sequence[int]) -> Round:
        """The next round.

        Args:
            pool_tokens: KV tokens of its requests, as the host knows them.
            limits: drafts of each request that may stand.
        """
        self._now += 1
        num_reqs, cap = len(limits), max(limits)
        usable = [k for k in self.choices if k <= cap]
        tried = self._next_try(num_reqs, pool_tokens, limits, usable)
        if tried is None:
            self._decide(num_reqs, pool_tokens, limits, usable)
        num_steps = self._held(usable) if tried is None else tried
        follows_plain = num_steps > 0 and self._last_steps == 0
        self._last_steps = num_steps
        allowed = tuple(min(limit, num_steps) for limit in limits)
        return Round(num_steps, pool_tokens, allowed, tried is not None, follows_plain)

    def deferred(self, chosen: Round) -> None:
        """The round that was chosen last makes no drafts after all: something has to run before they can be made."""
        self._last_steps = 0
        steps, left = self._burst
        if chosen.is_try:
            self._burst = (steps, left + 1)

    def _decide(self, num_reqs: int, pool_tokens: int, limits: Sequence[int], usable: list[int]) -> None:
        bucket, cap = self.times.bucket(num_reqs), usable[-1]
        if self._decided is not None and self._decided[:2] == (bucket, cap) and self._now < self._decided[2]:
            return
        self._decided = (bucket, cap, self._now + DECIDE_EVERY)
        if self.times.of(num_reqs).cost is None:
            if self.guess is not None:
                self._current = self._best_guess(num_reqs, pool_tokens, limits, usable)
                self._reason = "a first guess by the cost model"
            return
        held = self._held(usable)
        speeds = {k: self._speedup(k, num_reqs, pool_tokens, limits) for k in usable}
        best = max(usable, key=lambda k: speeds[k])
        if speeds[best] <= speeds[held] * (1 + MARGIN):
            best = held
        self._current, self._predicted = best, speeds[best]
        if best == 0:
            self._reason = "the requests take no drafts" if cap == 0 else "drafting does not pay"
        elif best == cap < self.choices[-1]:
            self._reason = "the requests take no more drafts"
        else:
            self._reason = "the fastest by the cost model"

    def _best_guess(self, num_reqs: int, pool_tokens: int, limits: Sequence[int], usable: list[int]) -> int:
        assert self.guess is not None
        ms = {k: self.guess(k, num_reqs, pool_tokens) for k in usable}
        return max(usable, key=lambda k: speedup(self._tokens(k, limits) / num_reqs, ms[k], ms[0]))

    def _speedup(self, num_steps: int, num_reqs: int, pool_tokens: float, limits: Sequence[int]) -> float:
        times = self.times.of(num_reqs)
        tokens = self._tokens(num_steps, limits) / num_reqs
        return speedup(tokens, times.round_ms(num_steps, pool_tokens), times.round_ms(0, pool_tokens))

    def _tokens(self, num_steps: int, limits: Sequence[int]) -> float:
        """That a round is expected to yield, all requests together."""
        survival = self.rates.survival()
        by_limit = [accept_length(survival, k) for k in range(num_steps + 1)]
        return sum(by_limit[min(limit, num_steps)] for limit in limits)

    # Try

    def _next_try(self, num_reqs: int, pool_tokens: int, limits: Sequence[int], usable: list[int]) -> int | None:
        """The k of a round that is made to learn, or None."""
        steps, left = self._burst
        if left > 0 and steps in usable:
            self._burst = (steps, left - 1)
            return steps
        self._burst = (0, 0)
        waited = self._now - self._last_burst
        times = self.times.of(num_reqs)
        if waited < FIRST_LOOK or times.cost is None:
            return None
        missing = next((k for k in (0, self._any_draft(usable)) if not self.times.has(k)), None)
        # ever later, where no round can be timed
        if missing is not None and waited >= FIRST_LOOK << self._first_looks:
            self._first_looks += 1
            return self._start(missing)
        if missing is not None or waited < MIN_GAP:
            return None
        if self._now % DECIDE_EVERY == 0:
            self._rivals = self._find_rivals(num_reqs, pool_tokens, limits, usable)
        worth_it = self._neighbours(usable) | self._rivals & set(usable)
        stale = [k for k in worth_it if times.age(k, self._now) > STALE_ROUNDS]
        if not stale:
            return None
        chosen = max(stale, key=lambda k: (times.age(k, self._now), -k))
        # what a round of that k is expected to lose against the current one
        held = self._held(usable)
        share = self._tokens(chosen, limits) / self._tokens(held, limits)
        loss = times.round_ms(chosen, pool_tokens) - share * times.round_ms(held, pool_tokens)
        if chosen == 0:
            loss *= self.plain_steps
        return None if BURST * loss > self._credit else self._start(chosen)

    def _held(self, usable: list[int]) -> int:
        """The current k, or the largest below it that the requests take."""
        return max(k for k in usable if k <= self._current)

    def _any_draft(self, usable: list[int]) -> int:
        """A k to compare plain decoding with, where it is all that was measured."""
        return next((k for k in usable if k > 0 and self.times.has(k)), usable[-1])

    def _start(self, steps: int) -> int:
        self._last_burst = self._now + BURST
        self._burst = (steps, BURST - 1)
        return steps

    def _neighbours(self, usable: list[int]) -> set[int]:
        held = self._held(usable)
        at = usable.index(held)
        return {*usable[max(0, at - 1) : at + 2], 0} - {held}

    def _find_rivals(self, num_reqs: int, pool_tokens: int, limits: Sequence[int], usable: list[int]) -> set[int]:
        """k that are expected to come near the current one; far from it they may lie behind worse ones."""
        held = self._held(usable)
        least = REACH * self._speedup(held, num_reqs, pool_tokens, limits)
        return {k for k in usable if k != held and self._speedup(k, num_reqs, pool_tokens, limits) >= least}

    # Learn

    def observe(self, done: Round, num_correct: Sequence[int], round_ms: float | None) -> None:
        """Take the outcome of a round in, whenever it arrives; rounds arrive in order.

        Args:
            done: as `choose` returned it.
            num_correct: drafts that stood, by request; none where none were made.
            round_ms: what it took; None where something else ran in between.
        """
        num_reqs = len(num_correct)
        if done.num_steps > 0 and max(done.allowed) > 0 and not done.follows_plain:
            self.rates.add(num_correct, done.allowed, self._now)
        if round_ms is None or not self._is_warm(num_reqs, done.num_steps):
            return
        plain_steps = 1 if done.num_steps > 0 else done.plain_steps
        times = self.times.of(num_reqs)
        if not times.add(done.num_steps, done.pool_tokens, round_ms / plain_steps, self._now):
            return
        tokens = sum(num_correct) + plain_steps * num_reqs
        self._account(done, num_reqs, tokens, round_ms)
        if not done.is_try:
            fade = 1 - 1 / SPEEDUP_MEMORY
            self._plain_ms = fade * self._plain_ms + tokens / num_reqs * times.round_ms(0, done.pool_tokens)
            self._spent_ms = fade * self._spent_ms + round_ms

    def _is_warm(self, num_reqs: int, num_steps: int) -> bool:
        """The first round of a kind loads kernels and allocates; its time says nothing."""
        kind = (self.times.bucket(num_reqs), num_steps)
        was_warm = kind in self._warm
        self._warm.add(kind)
        return was_warm

    def _account(self, done: Round, num_reqs: int, tokens: int, round_ms: float) -> None:
        self._credit += EXPLORE_SHARE * round_ms
        if done.is_try:
            limits = [max(limit, self._current) if limit == done.num_steps else limit for limit in done.allowed]
            times = self.times.of(num_reqs)
            usual = times.round_ms(self._current, done.pool_tokens) * tokens / self._tokens(self._current, limits)
            self._credit -= max(0.0, round_ms - usual)
        self._credit = min(self._credit, MAX_CREDIT_ROUNDS * round_ms)
