"""What studies of the controller make of rounds that a server wrote down (study_server.py). Pure functions."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sglang_sparsespec.bench.server import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# the bounds that are asked for
OVER_PLAIN, OVER_BEST = 0.98, 0.97
# plain steps whose mean is one sample of a step's time
SLICE_STEPS = 8


class RoundLine(NamedTuple):
    """A round, or a plain decode step, as the server wrote it down."""

    time: float
    num_reqs: int
    num_steps: int
    pool_tokens: int
    round_ms: float | None
    num_correct: list[int]
    """Drafts that stood, by request."""
    label: str
    plain_steps: int = 1
    """Tokens that each request decoded, of a round without drafts."""

    @property
    def tokens(self) -> int:
        return self.num_reqs * self.plain_steps + sum(self.num_correct)

    def expected_tokens(self, rates: Sequence[float]) -> float:
        """Of a request."""
        return expected_tokens(rates, self.num_steps) if self.num_steps > 0 else self.plain_steps


class LinesFile:
    """JSON lines of a file that grows, each read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> list[Any]:
        """Whole lines that were written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class RoundsFile(LinesFile):
    """The same of rounds."""

    def new(self) -> list[RoundLine]:
        return [RoundLine(*line) for line in super().new()]


def expected_tokens(rates: Sequence[float], num_steps: int) -> float:
    """That a request's round yields, bonus token counted, where draft j stands with `rates[j]` if all before it do."""
    alive, tokens = 1.0, 1.0
    for j in range(num_steps):
        alive *= rates[min(j, len(rates) - 1)]
        tokens += alive
    return tokens


def pooled_rates(rounds: Sequence[RoundLine], num_steps: int) -> list[float]:
    """How often draft j = 1 .. `num_steps` stood where all before it did, over rounds of every k; 0 where none came."""
    trials, stood = [0] * num_steps, [0] * num_steps
    for line in rounds:
        for count in line.num_correct:
            for j in range(min(count + 1, line.num_steps)):
                trials[j] += 1
                stood[j] += j < count
    return [correct / tried if tried else 0.0 for correct, tried in zip(stood, trials, strict=True)]


@dataclass(frozen=True)
class Plain:
    """Milliseconds of a plain decode step over tokens in the pool, measured before something and after it.

    Each point is (tokens in the pool, ms) at one length of the same prompts, by ascending length; at least one.
    """

    before: tuple[tuple[float, float], ...]
    after: tuple[tuple[float, float], ...]

    def step_ms(self, pool_tokens: float) -> float:
        """By one straight line through all points, weights plus KV; level outside of them.

        Turns of different k lie at different pools. From point to point the noise of a single one, up to 30 % where
        plain decoding waits for its host, would be read as a difference between k.
        """
        points = np.array([*self.before, *self.after])
        pools, times = points[:, 0], points[:, 1]
        spread = float(np.var(pools))
        slope = float(np.mean((pools - pools.mean()) * (times - times.mean()))) / spread if spread > 0 else 0.0
        within = min(max(pool_tokens, float(pools.min())), float(pools.max()))
        # more KV never makes a step shorter
        return float(times.mean()) + max(0.0, slope) * (within - float(pools.mean()))

    @property
    def drift(self) -> float:
        """Of times after over before, the median less 1."""
        return statistics.median(b / a for (_, a), (_, b) in zip(self.before, self.after, strict=True)) - 1


def plain_point(rounds: Sequence[RoundLine]) -> tuple[float, float]:
    """(mean pool, ms of a step): the median over slices of a few steps, so that one hiccup is not the measure.

    Raises:
        ServerError: fewer timed steps than one slice.
    """
    timed = [line for line in rounds if line.round_ms is not None]
    slices = [timed[i : i + SLICE_STEPS] for i in range(0, len(timed) - SLICE_STEPS + 1, SLICE_STEPS)]
    if not slices:
        raise ServerError(f"{len(timed)} plain decode steps of a full batch could be timed, {SLICE_STEPS} are needed")
    step_ms = statistics.median(statistics.fmean(line.round_ms or 0.0 for line in part) for part in slices)
    return statistics.fmean(line.pool_tokens for line in timed), step_ms


def speed(rounds: Sequence[RoundLine], rates: Sequence[float]) -> tuple[float, float]:
    """Expected tokens per second of some rounds, and their mean pool; rounds without a time do not count.

    Raises:
        ServerError: none has one.
    """
    timed = [line for line in rounds if line.round_ms is not None]
    if not timed:
        raise ServerError("no round of a turn could be timed")
    tokens = sum(line.num_reqs * line.expected_tokens(rates) for line in timed)
    seconds = sum(line.round_ms or 0.0 for line in timed) / 1e3
    return tokens / seconds, statistics.fmean(line.pool_tokens for line in timed)


def over_plain(rounds: Sequence[RoundLine], rates: Sequence[float], plain: Plain) -> float:
    """Speed of some rounds over plain decoding's at the same pool and number of requests."""
    tokens_per_s, pool = speed(rounds, rates)
    num_reqs = statistics.fmean(line.num_reqs for line in rounds)
    return tokens_per_s / (1e3 * num_reqs / plain.step_ms(pool))


def rounds_to_settle(ratios: Sequence[float], tolerance: float = 0.03) -> int | None:
    """How many windows go by until all further ones are within `tolerance` of their median; None: the last is not."""
    middle = statistics.median(ratios[len(ratios) // 2 :])
    settled = len(ratios)
    for i in reversed(range(len(ratios))):
        if abs(ratios[i] / middle - 1) > tolerance:
            break
        settled = i
    return settled if settled < len(ratios) else None


def verdict(own: Sequence[float], fixed: dict[int, list[float]]) -> dict[str, Any]:
    """Ratios of one cell: of paired turns, medians with their range.

    Args:
        own: the controller's speed over plain SGLang's, turn by turn.
        fixed: the same of each fixed k, in the turns beside them.
    """
    best = max(fixed, key=lambda k: statistics.median(fixed[k]))
    # a server could be no faster than this, plain decoding outside of it included
    paired = [mine / theirs for mine, theirs in zip(own, fixed[best], strict=True)]
    result: dict[str, Any] = {
        "over_plain": round(statistics.median(own), 4),
        "over_plain_range": [round(min(own), 4), round(max(own), 4)],
        "best_k": best,
        "best_over_plain": round(statistics.median(fixed[best]), 4),
        "over_best": round(statistics.median(paired), 4),
        "over_best_range": [round(min(paired), 4), round(max(paired), 4)],
        "fixed_over_plain": {str(k): round(statistics.median(values), 4) for k, values in fixed.items()},
        "turns": len(own),
    }
    result["met"] = result["over_plain"] >= OVER_PLAIN and result["over_best"] >= OVER_BEST
    return result
