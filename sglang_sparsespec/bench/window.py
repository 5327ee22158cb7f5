"""From the traces of streamed requests to a steady state: what is counted, and what is warm-up or drain.

A trace is when each chunk of a response came and how many tokens the response had by then. The steady state begins when
`batch` requests decode at the same time, plus a share of warm-up; it ends when one of them ends and no other takes its
place. Times in seconds on one clock. Pure functions.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WARMUP_SHARE = 0.05
"""Of the time in which the batch is full."""
PEAK_SHARE = 0.9
"""Of the most requests that ever decoded together: where the server decides how many that are, it is full from here."""


class NoSteadyStateError(RuntimeError):
    """The batch was never full, or not for long enough to measure; the message says which."""


@dataclass(frozen=True)
class Trace:
    """One request. `times` and `counts` are parallel: completion tokens that the client had at each chunk."""

    prompt_tokens: int
    sent: float
    times: tuple[float, ...]
    counts: tuple[int, ...]
    verify_ct: int = 0
    """Rounds that it took part in; 0 without speculation."""

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def end(self) -> float:
        return self.times[-1]

    def tokens_at(self, time: float) -> int:
        """Completion tokens that had arrived by `time`."""
        index = bisect_right(self.times, time)
        return self.counts[index - 1] if index else 0

    def pool_tokens_at(self, time: float) -> int:
        """KV tokens that the request holds: prompt and completion while it decodes, else none."""
        return self.prompt_tokens + self.tokens_at(time) if self.first <= time < self.end else 0


@dataclass(frozen=True)
class Slice:
    """A part of the steady state."""

    seconds: float
    tokens: int
    pool_tokens: float
    """KV tokens of the running requests, mean of the two ends."""
    running: float
    """Decoding requests, mean of the two ends."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def round_ms(self, accept_length: float) -> float:
        """One round of speculation, or one decode step (accept length 1), as the running requests lived it."""
        return 1e3 * self.seconds * self.running * accept_length / self.tokens


def steady_state(
    traces: Sequence[Trace], batch: int, *, is_full: bool = True, warmup_share: float = WARMUP_SHARE
) -> tuple[float, float]:
    """(begin, end) of the time in which the batch decodes and warm-up is over.

    Args:
        is_full: the batch is `batch` requests. Else it is as many as the server's pool admits, at most `batch`: answers
            that end by themselves have no length that a pool could be made for.

    Raises:
        NoSteadyStateError: if there is none.
    """
    if any(not trace.times for trace in traces):
        raise NoSteadyStateError("a response had no tokens")
    events = sorted([(trace.first, 1) for trace in traces] + [(trace.end, -1) for trace in traces])
    last_sent = max(trace.sent for trace in traces)
    if not is_full:
        peak = max(itertools.accumulate(change for _, change in events))
        batch = max(1, min(batch, math.ceil(PEAK_SHARE * peak)))
    running, begin, end = 0, None, None
    for time, change in events:
        running += change
        if begin is None and running >= batch:
            begin = time
        elif begin is not None and change < 0 and running < batch and time >= last_sent:
            # a request that is sent now has yet to be prefilled: only the last ends leave a gap for good
            if any(trace.first > time for trace in traces):
                continue
            end = time
            break
    if begin is None:
        raise NoSteadyStateError(f"never {batch} requests decoded at the same time")
    assert end is not None, "every request ends"
    return begin + warmup_share * (end - begin), end


def slices(traces: Sequence[Trace], begin: float, end: float, count: int = 1) -> list[Slice]:
    """The steady state in `count` parts of equal time; parts without a token are left out."""
    edges = [begin + (end - begin) * i / count for i in range(count + 1)]
    parts = []
    for low, high in itertools.pairwise(edges):
        tokens = sum(trace.tokens_at(high) - trace.tokens_at(low) for trace in traces)
        # just before the edge, for at the last one a request has ended
        marks = (low, math.nextafter(high, low))
        if tokens:
            parts.append(
                Slice(
                    seconds=high - low,
                    tokens=tokens,
                    pool_tokens=statistics.fmean(sum(t.pool_tokens_at(mark) for t in traces) for mark in marks),
                    running=statistics.fmean(sum(t.first <= mark < t.end for t in traces) for mark in marks),
                )
            )
    if not parts:
        raise NoSteadyStateError("no token arrived in the steady state")
    return parts


def gaps(traces: Iterable[Trace], begin: float, end: float) -> tuple[list[float], list[float]]:
    """(per token, per chunk) seconds between a chunk and the one before it, for chunks that came in the steady state.

    Per token is what sglang.bench_serving calls ITL: the gap shared among the chunk's tokens, one entry each.

    Raises:
        NoSteadyStateError: if there is no such chunk.
    """
    per_token, per_chunk = [], []
    for trace in traces:
        pairs = list(zip(trace.times, trace.counts, strict=True))
        for (before, had), (now, has) in itertools.pairwise(pairs):
            if begin < now <= end and has > had:
                per_chunk.append(now - before)
                per_token += [(now - before) / (has - had)] * (has - had)
    if not per_chunk:
        raise NoSteadyStateError("no request streamed two chunks in the steady state")
    return per_token, per_chunk


def accept_length(traces: Iterable[Trace]) -> float | None:
    """Tokens per verify, bonus counted, the prefill's token not; None without speculation."""
    counted = [trace for trace in traces if trace.verify_ct]
    verifies = sum(trace.verify_ct for trace in counted)
    return sum(trace.counts[-1] - 1 for trace in counted) / verifies if verifies else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> float:
    """Half the range over the median: 0.02 says that every value lies within about 2 % of the middle."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0
