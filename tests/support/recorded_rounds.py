"""Rounds that a real server ran (scripts/bench/record_rounds.py), given to a controller in the k that it chooses."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_sparsespec.speculation.controller import Controller, Round


class Outcome(NamedTuple):
    """A round as it was recorded."""

    num_steps: int
    pool_tokens: int
    round_ms: float | None
    num_correct: list[int]
    """Drafts that stood, by request."""


class Recording:
    """Rounds of one batch, k switched from outside."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text())
        self.choices: tuple[int, ...] = tuple(document["choices"])
        self.rounds = [Outcome(*line) for line in document["rounds"]]
        self.num_reqs = len(self.rounds[0].num_correct)
        self._by_steps: defaultdict[int, list[Outcome]] = defaultdict(list)
        for outcome in self.rounds:
            self._by_steps[outcome.num_steps].append(outcome)

    def survival(self) -> list[float]:
        """How often draft j = 1 .. and all before it stood where a round made it: rounds of every k together."""
        found = []
        for j in range(1, self.choices[-1] + 1):
            made = [n for outcome in self.rounds if outcome.num_steps >= j for n in outcome.num_correct]
            found.append(statistics.fmean(n >= j for n in made))
        return found

    def speed(self, num_steps: int) -> float:
        """Tokens of one request per ms, by the pooled acceptance and the median time of rounds of this k."""
        times = [o.round_ms for o in self._by_steps[num_steps] if o.round_ms is not None]
        return (1 + sum(self.survival()[:num_steps])) / statistics.median(times)

    def best(self) -> int:
        return max(self.choices, key=self.speed)

    def replay(self, controller: Controller, num_rounds: int, start: int = 0) -> Counter[int]:
        """Let it choose so many rounds, each of which goes as the next recorded one of that k; k over rounds.

        Results arrive a round late, as under the overlap scheduler.

        Args:
            start: recorded round of each k that comes first.
        """
        at = Counter(dict.fromkeys(self.choices, start))
        chosen_steps: Counter[int] = Counter()
        late: deque[tuple[Round, list[int], float | None]] = deque()
        pool = self.rounds[0].pool_tokens
        for _ in range(num_rounds):
            chosen = controller.choose(pool, [self.choices[-1]] * self.num_reqs)
            known = self._by_steps[chosen.num_steps]
            outcome = known[at[chosen.num_steps] % len(known)]
            at[chosen.num_steps] += 1
            chosen_steps[chosen.num_steps] += 1
            pool = outcome.pool_tokens
            late.append((chosen._replace(pool_tokens=pool), outcome.num_correct, outcome.round_ms))
            if len(late) > 1:
                controller.observe(*late.popleft())
        return chosen_steps
