"""Rounds of a made-up server: their times from a formula with noise, their acceptance from seeded coins.

SYNTHETIC: says how the controller decides, nothing of how fast anything is. Results arrive a round late, as under the
overlap scheduler. The numbers that tests use are near what was measured on an H100 for a Qwen3-1.7B shape.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.speculation.controller import Controller, Round


@dataclass
class Simulator:
    """A server whose true times and rates are known."""

    weights_ms: float = 2.7
    kv_ms: float = 38e-6
    """Of one pool token, full attention."""
    read_share: float = 0.08
    gap_ms: float = 0.2
    row_ms: float = 0.004
    """What a row of a verify adds to it, past the first of each request."""
    bend: float = 0.0
    """How far a verify is from linear in its width: its share at half of the largest k."""
    rates: Callable[[int], list[float]] = lambda now: [0.8] * 8
    """Per-position acceptance at a round."""
    num_reqs: Callable[[int], int] = lambda now: 64
    pool_tokens: Callable[[int], int] = lambda now: 200_000
    limits: Callable[[int, int], list[int]] | None = None
    noise: float = 0.03
    seed: int = 1
    hiccup_every: int = 97
    """A round that takes ten times as long, as when the host does something else."""
    steps: list[int] = field(default_factory=list)
    total_ms: float = 0.0
    total_tokens: float = 0.0
    lost_ms: float = 0.0
    """Time beyond what the best k would have taken for the same tokens."""

    def round_ms(self, num_steps: int, num_reqs: int, pool_tokens: int) -> float:
        """True time without noise."""
        draft = self.weights_ms + self.gap_ms + self.read_share * self.kv_ms * pool_tokens
        bent = 1 + self.bend * (num_steps * (8 - num_steps)) / 16
        verify = self.weights_ms + self.row_ms * num_reqs * num_steps
        return (num_steps * draft + verify + 1.1 * self.kv_ms * pool_tokens) * bent

    def tokens(self, num_steps: int, now: int) -> float:
        """Expected, of one request."""
        alive, total = 1.0, 1.0
        for rate in self.rates(now)[:num_steps]:
            alive *= rate
            total += alive
        return total

    def speed(self, num_steps: int, now: int) -> float:
        """Expected tokens of one request per ms."""
        return self.tokens(num_steps, now) / self.round_ms(num_steps, self.num_reqs(now), self.pool_tokens(now))

    def best(self, choices: tuple[int, ...], now: int) -> int:
        return max(choices, key=lambda k: self.speed(k, now))

    def run(self, controller: Controller, num_rounds: int, start: int = 0) -> None:
        """Let the controller choose `num_rounds` rounds."""
        rng = random.Random(self.seed + start)
        late: deque[tuple[Round, list[int], float]] = deque()
        for now in range(start, start + num_rounds):
            num_reqs, pool_tokens = self.num_reqs(now), self.pool_tokens(now)
            limits = [controller.choices[-1]] * num_reqs if self.limits is None else self.limits(now, num_reqs)
            chosen = controller.choose(pool_tokens, limits)
            rates = self.rates(now)
            num_correct = []
            for allowed in chosen.allowed:
                stood = 0
                while stood < allowed and rng.random() < rates[stood]:
                    stood += 1
                num_correct.append(stood)
            true_ms = self.round_ms(chosen.num_steps, num_reqs, pool_tokens)
            self.steps.append(chosen.num_steps)
            self.total_ms += true_ms
            self.total_tokens += num_reqs * self.tokens(chosen.num_steps, now)
            best = self.best(controller.choices, now)
            self.lost_ms += true_ms - self.tokens(chosen.num_steps, now) / self.speed(best, now)
            took = true_ms * rng.lognormvariate(0.0, self.noise) * (10 if now % self.hiccup_every == 96 else 1)
            late.append((chosen, num_correct, took))
            if len(late) > 1:
                controller.observe(*late.popleft())
