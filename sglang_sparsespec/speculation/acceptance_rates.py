"""How often drafts stand, by their position in a round, from outcomes as they arrive; older ones fade.

A draft is tried if all before it stood and its request may use it; whether it stands then is one trial of its position.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# requests' rounds and rounds that a rate remembers; arbitrary
MEMORY_REQS = 1024
MEMORY_ROUNDS = (32, 256)
FRESH_ROUNDS = 512
# trials that the mean of all positions, and a first guess, are worth
_POOLED_TRIALS = 8.0
_GUESS, _GUESS_TRIALS = 0.7, 2.0


class AcceptanceRates:
    """Rates of the positions 1 to `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        self.trials = [0.0] * num_steps
        self.correct = [0.0] * num_steps
        self._last: int | None = None

    def add(self, num_correct: Sequence[int], allowed: Sequence[int], now: int) -> None:
        """Note a round.

        Args:
            num_correct: drafts that stood, by request.
            allowed: drafts that could have, by request.
            now: counts rounds.
        """
        memory = min(max(MEMORY_REQS / len(num_correct), MEMORY_ROUNDS[0]), MEMORY_ROUNDS[1])
        gap = 0 if self._last is None else now - self._last
        fade = (1 - 1 / memory) * math.exp(-gap / FRESH_ROUNDS)
        self.trials = [fade * value for value in self.trials]
        self.correct = [fade * value for value in self.correct]
        self._last = now
        for (stood, could), count in Counter(zip(num_correct, allowed, strict=True)).items():
            for position in range(min(stood + 1, could)):
                self.trials[position] += count
                self.correct[position] += count * (position < stood)

    def survival(self) -> list[float]:
        """Probability that draft j and all before it stand, j = 1 ..; a position without trials is like the rest."""
        mean = (sum(self.correct) + _GUESS * _GUESS_TRIALS) / (sum(self.trials) + _GUESS_TRIALS)
        alive, survival = 1.0, []
        for correct, trials in zip(self.correct, self.trials, strict=True):
            alive *= (correct + mean * _POOLED_TRIALS) / (trials + _POOLED_TRIALS)
            survival.append(alive)
        return survival
