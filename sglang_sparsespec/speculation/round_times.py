"""Times of rounds that ran, as terms of the cost model: by batch size, number of drafts and KV in use.

For each bucket of batch sizes and each k it keeps decayed sums, from which the five terms of the formula follow by
least squares; what a k deviates from the formula (a verify is not quite linear in its width) stays as a factor of that
k. Terms that no round has told apart yet stay near a prior: those of the nearest bucket, or a guess scaled to the first
round. Pure host arithmetic, some microseconds; knows no clock.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from sglang_sparsespec.speculation.cost_model import GatheredCost

# rounds that a mean remembers, and that it stays fresh for; arbitrary, a second or two of serving
MEMORY = 32
FRESH_ROUNDS = 512
# of a prior term, relative to its size, where a round's time is known to a few percent
_RIDGE = 2e-3
# rounds between two fits once that many squared are known: a fit takes longer than all the rest
_REFIT_EVERY = 4
# of a mean round, what a term of a prior counts for at least
_LEAST_TERM = 0.05
# of the quickest k's mean round, the least that a round takes whatever it does: noise can fit all of it to the drafts
_LEAST_FIXED = 0.01
# of the pool, in the terms of GatheredCost
_POOL_POWERS = np.array([0, 0, 1, 1, 0])
# a first guess: a draft costs this share of a plain decode, and half of a decode is KV
_GUESSED_STEP, _GUESSED_KV = 0.6, 0.5
# of the KV that a verify reads, what a draft does
_GUESSED_DRAFT_KV = 0.06


class Pauses:
    """Tells rounds that something else held up from rounds that take another time from now on.

    A time this far from the expected one does not count until it has come so often in a row.
    """

    FAR = 1.5
    # over the formula alone, where this k has hardly run: one bad round in its first three would stay with it
    NEW_FAR = 2.5
    MOST = 3

    def __init__(self) -> None:
        self.in_a_row = 0

    def is_one(self, ratio: float, far: float = FAR) -> bool:
        """Note a round's time over the expected one."""
        self.in_a_row = 0 if 1 / far < ratio < far else self.in_a_row + 1
        return 0 < self.in_a_row < self.MOST


@dataclass
class StepTimes:
    """Decayed sums over the rounds of one k."""

    weight: float = 0.0
    pool: float = 0.0
    pool_squared: float = 0.0
    time: float = 0.0
    time_pool: float = 0.0

    def fade(self, factor: float) -> None:
        self.weight *= factor
        self.pool *= factor
        self.pool_squared *= factor
        self.time *= factor
        self.time_pool *= factor

    def add(self, pool_tokens: float, round_ms: float) -> None:
        self.weight += 1.0
        self.pool += pool_tokens
        self.pool_squared += pool_tokens**2
        self.time += round_ms
        self.time_pool += round_ms * pool_tokens

    @property
    def mean_ms(self) -> float:
        return self.time / self.weight


class RoundTimes:
    """Of one bucket of batch sizes.

    Args:
        prior: terms to start from; None: guessed from the first round.
    """

    def __init__(self, prior: GatheredCost | None = None) -> None:
        self.steps: dict[int, StepTimes] = {}
        self._prior = prior
        self._cost: GatheredCost | None = None
        self._since_fit = 0
        self._last: dict[int, int] = {}
        self._pauses = Pauses()

    def age(self, num_steps: int, now: int) -> float:
        """Rounds since this k was measured here; infinite if never."""
        return now - self._last[num_steps] if num_steps in self._last else math.inf

    def add(self, num_steps: int, pool_tokens: float, round_ms: float, now: int) -> bool:
        """Note a round, unless something else must have taken that long; `now` counts rounds."""
        seen = self.steps.get(num_steps)
        if seen is not None and seen.weight > Pauses.MOST:
            if self._pauses.is_one(round_ms / self.round_ms(num_steps, pool_tokens)):
                return False
        elif self.cost is not None and self.steps:
            # too long only: what has not been told apart yet may make the formula expect far too much
            ratio = max(1.0, round_ms / self.cost.round_ms(num_steps, pool_tokens))
            if self._pauses.is_one(ratio, Pauses.NEW_FAR):
                return False
        if self._prior is None:
            self._prior = guess(num_steps, pool_tokens, round_ms)
        if seen is None:
            seen = self.steps[num_steps] = StepTimes()
        gap = now - self._last.get(num_steps, now)
        seen.fade((1 - 1 / MEMORY) * math.exp(-gap / FRESH_ROUNDS))
        seen.add(pool_tokens, round_ms)
        self._last[num_steps] = now
        self._since_fit += 1
        return True

    def restore(self, num_steps: int, seen: StepTimes) -> None:
        """Take over what another server measured."""
        self.steps[num_steps] = seen
        if self._prior is None:
            self._prior = guess(num_steps, seen.pool / seen.weight, seen.mean_ms)
        self._cost = None

    @property
    def cost(self) -> GatheredCost | None:
        """The terms; None before the first round."""
        known = sum(seen.weight for seen in self.steps.values())
        is_stale = self._since_fit > (known >= _REFIT_EVERY**2) * (_REFIT_EVERY - 1)
        if self._prior is not None and (self._cost is None or is_stale):
            self._cost, self._since_fit = fit(self.steps, self._prior), 0
        return self._cost

    def round_ms(self, num_steps: int, pool_tokens: float) -> float:
        """Expected time of a round.

        Raises:
            ValueError: nothing has been measured.
        """
        if self.cost is None:
            raise ValueError("no round was measured")
        return self.cost.round_ms(num_steps, pool_tokens) * self._deviation(num_steps)

    def _deviation(self, num_steps: int) -> float:
        """What rounds of this k took over what the formula says; between measured ones by their distance."""
        below = max((k for k in self.steps if k <= num_steps), default=None)
        above = min((k for k in self.steps if k >= num_steps), default=None)
        if below is None or above is None:
            return 1.0
        share = 0.0 if above == below else (num_steps - below) / (above - below)
        return (1 - share) * self._measured_deviation(below) + share * self._measured_deviation(above)

    def _measured_deviation(self, num_steps: int) -> float:
        seen = self.steps[num_steps]
        assert self._cost is not None
        expected = self._cost.round_ms(num_steps, seen.pool / seen.weight)
        return 1.0 + (seen.mean_ms / expected - 1.0) * seen.weight / (seen.weight + 2.0)


class TimesByBatch:
    """RoundTimes for each power of two of requests."""

    def __init__(self) -> None:
        self.buckets: dict[int, RoundTimes] = {}

    @staticmethod
    def bucket(num_reqs: int) -> int:
        """0 for one request, then 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ..."""
        return (num_reqs - 1).bit_length()

    def of(self, num_reqs: int) -> RoundTimes:
        """Those of the bucket of `num_reqs`; a new one starts from the nearest that has any."""
        bucket = self.bucket(num_reqs)
        if bucket not in self.buckets or not self.buckets[bucket].steps:
            known = [other for other, times in self.buckets.items() if times.steps]
            nearest = min(known, key=lambda other: abs(other - bucket), default=None)
            self.buckets[bucket] = RoundTimes(None if nearest is None else self.buckets[nearest].cost)
        return self.buckets[bucket]

    def has(self, num_steps: int) -> bool:
        """Whether any batch has run rounds of this k."""
        return any(num_steps in times.steps for times in self.buckets.values())


def guess(num_steps: int, pool_tokens: float, round_ms: float) -> GatheredCost:
    """Terms that give one measured round its time."""
    plain = round_ms / (1 + _GUESSED_STEP * num_steps)
    tokens = max(1.0, pool_tokens)
    return GatheredCost(
        fixed_ms=plain * (1 - _GUESSED_KV),
        step_ms=plain * _GUESSED_STEP * 0.95,
        kv_ms=plain * _GUESSED_KV / tokens,
        step_kv_ms=plain * _GUESSED_KV * _GUESSED_DRAFT_KV / tokens,
    )


def fit(steps: dict[int, StepTimes], prior: GatheredCost) -> GatheredCost:
    """Least squares of relative errors, held near the prior where rounds say nothing."""
    weight = sum(seen.weight for seen in steps.values())
    mean_ms = sum(seen.time for seen in steps.values()) / max(weight, 1e-9)
    tokens = max(1.0, sum(seen.pool for seen in steps.values()) / max(weight, 1e-9))
    least = _LEAST_TERM * mean_ms * np.array([1.0, 0.1, 1 / tokens, 0.1 / tokens, 1.0])
    normal, moments = np.zeros((5, 5)), np.zeros(5)
    for k, seen in steps.items():
        # a round's time is the sum of the terms times these, and times its pool where the power is 1
        factors = np.array([1.0, k, 1.0, k, k > 0])
        sums = np.array([seen.weight, seen.pool, seen.pool_squared])
        importance = 1 / seen.mean_ms**2
        normal += importance * np.outer(factors, factors) * sums[np.add.outer(_POOL_POWERS, _POOL_POWERS)]
        moments += importance * factors * np.array([seen.time, seen.time_pool])[_POOL_POWERS]
    expected = np.array(astuple(prior))
    for _ in range(2):
        # in units of the prior's terms, so that tokens and drafts weigh alike; a term that was 0 there may come back
        scale = np.maximum(np.maximum(expected, least), 1e-12)
        left = np.diag(np.full(5, _RIDGE)) + normal * np.outer(scale, scale)
        terms = np.maximum(np.linalg.solve(left, _RIDGE * expected / scale + moments * scale), 0.0) * scale
        # what a draft reads is a share of what a verify does, and that is told apart far sooner
        if prior.kv_ms > 0:
            expected[3] = min(1.0, prior.step_kv_ms / prior.kv_ms) * terms[2]
    fixed, step, kv, step_kv, drafted = map(float, terms)
    fixed = max(fixed, _LEAST_FIXED * min((seen.mean_ms for seen in steps.values()), default=0.0))
    return GatheredCost(fixed_ms=fixed, step_ms=step, kv_ms=kv, step_kv_ms=step_kv, drafted_ms=drafted)
