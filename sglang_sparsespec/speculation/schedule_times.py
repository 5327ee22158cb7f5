"""What rounds of one schedule take, learnt as factors on the terms that the cost model predicts.

The model (`cost_model.ServerCost`) says how a round's time depends on the load; measured rounds say by how much each of
its terms is off, by least squares of relative errors. Rounds of a like batch count most. So a time that was measured at
one load says something of another, which a plain mean of milliseconds does not. Pure host arithmetic; knows no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang_sparsespec.speculation.round_times import Pauses

if TYPE_CHECKING:
    from collections.abc import Sequence

# rounds of a bucket of batch sizes that a fit remembers; arbitrary, a second or two of serving
MEMORY = 64
# what rounds count for whose batch is twice as large, or half as large; per doubling
NEIGHBOUR = 0.25
# squared relative noise of a round's time (3 %) over the squared error that the model's terms may have (20 %)
_RIDGE = 0.0225
# of what all terms take over the model, the least that one does: noise can fit all of the time to the others
_LEAST_FACTOR = 0.01
# rounds between two fits once a batch has its square of them
_REFIT_EVERY = 4


class _Sums:
    """Of one bucket: decayed sums of shares, terms over the measured time."""

    def __init__(self, num_terms: int) -> None:
        self.squares = np.zeros((num_terms, num_terms))
        self.shares = np.zeros(num_terms)
        self.weight = 0.0
        self.pauses = Pauses()


class ScheduleTimes:
    """Of one schedule, over all loads."""

    def __init__(self) -> None:
        self.mean_ms: float | None = None
        """Decayed mean of the times that counted, whatever the load."""
        self._buckets: dict[int, _Sums] = {}
        self._last: dict[int, int] = {}
        self._fitted: dict[int, tuple[float, list[float]]] = {}
        self._since_fit = 0

    @property
    def is_measured(self) -> bool:
        return bool(self._buckets)

    def age(self, bucket: int, now: int) -> int | None:
        """Rounds since a time was noted for this bucket of batch sizes; None if never."""
        return now - self._last[bucket] if bucket in self._last else None

    def add(self, bucket: int, terms: Sequence[float], round_ms: float, now: int) -> bool:
        """Note a round, unless something else must have taken that long; `now` counts rounds."""
        sums = self._buckets.get(bucket)
        if sums is not None and sums.weight > Pauses.MOST:
            ratio = round_ms / self.expect(bucket, terms)
            if sums.pauses.is_one(ratio):
                return False
            if sums.pauses.in_a_row:
                # not a pause: what was known of this batch holds no longer
                sums = None
        if sums is None:
            sums = self._buckets[bucket] = _Sums(len(terms))
        share, fade = np.asarray(terms) / round_ms, 1 - 1 / MEMORY
        sums.squares = fade * sums.squares + np.outer(share, share)
        sums.shares = fade * sums.shares + share
        sums.weight = fade * sums.weight + 1.0
        self._last[bucket] = now
        self._since_fit += 1
        if self._since_fit >= _REFIT_EVERY or sums.weight < _REFIT_EVERY**2:
            self._fitted.clear()
            self._since_fit = 0
        self.mean_ms = round_ms if self.mean_ms is None else fade * self.mean_ms + (1 - fade) * round_ms
        return True

    def expect(self, bucket: int, terms: Sequence[float], scale: float = 1.0) -> float:
        """What a round of these terms will take, milliseconds.

        Args:
            bucket: of its batch size.
            terms: as the cost model has them.
            scale: what the machine takes over the model, for all that is known from elsewhere.
        """
        if bucket not in self._fitted:
            self._fitted[bucket] = self._fit(bucket, len(terms))
        common, factors = self._fitted[bucket]
        if common == 0.0:
            return scale * sum(terms)
        return sum(factor * term for factor, term in zip(factors, terms, strict=True))

    def scale(self, bucket: int, num_terms: int) -> float | None:
        """What rounds took over the model, all terms alike; None if there were none."""
        if bucket not in self._fitted:
            self._fitted[bucket] = self._fit(bucket, num_terms)
        return self._fitted[bucket][0] or None

    def _near(self, bucket: int, num_terms: int) -> tuple[np.ndarray, np.ndarray]:
        """Sums over all buckets, as much as each says of this one."""
        squares, shares = np.zeros((num_terms, num_terms)), np.zeros(num_terms)
        for other, sums in self._buckets.items():
            weight = NEIGHBOUR ** abs(other - bucket)
            squares += weight * sums.squares
            shares += weight * sums.shares
        return squares, shares

    def _fit(self, bucket: int, num_terms: int) -> tuple[float, list[float]]:
        """What rounds took over the model, all terms alike, and each term's own factor, held near that one."""
        squares, shares = self._near(bucket, num_terms)
        total = squares.sum()
        if total == 0:
            return 0.0, []
        common = float(shares.sum() / total)
        left = squares * common**2 + _RIDGE * np.eye(num_terms)
        right = shares * common + _RIDGE
        return common, (common * np.maximum(np.linalg.solve(left, right), _LEAST_FACTOR)).tolist()
