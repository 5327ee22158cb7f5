"""Steady state, gaps and accept length, on traces with known answers."""

from __future__ import annotations

import pytest

from sglang_sparsespec.bench import window
from sglang_sparsespec.bench.window import NoSteadyStateError, Trace


def steady(first: float, step: float, count: int, *, tokens: int = 1, prompt: int = 100, sent: float = 0.0) -> Trace:
    """`count` chunks of `tokens` tokens, the first chunk with one."""
    times = tuple(first + step * i for i in range(count))
    return Trace(prompt, sent, times, tuple(1 + tokens * i for i in range(count)), verify_ct=count - 1)


def test_steady_state_is_where_the_whole_batch_decodes() -> None:
    """Prefill of the second request, or the tail after the first has ended, would water the rate down."""
    early, late = steady(1.0, 0.1, 31), steady(2.0, 0.1, 41)
    begin, end = window.steady_state([early, late], 2, warmup_share=0.1)
    assert begin == pytest.approx(2.2)
    assert end == pytest.approx(4.0)
    [whole] = window.slices([early, late], begin, end)
    assert whole.tokens_per_s == pytest.approx(20, rel=0.06)
    assert whole.round_ms(1.0) == pytest.approx(100, rel=0.06)
    assert whole.running == 2


def test_steady_state_goes_on_while_ended_requests_are_replaced() -> None:
    """In a closed loop the batch dips whenever a request ends; only the last dip is the drain."""
    traces = [steady(0.0, 0.1, 11), steady(0.0, 0.1, 31), steady(1.2, 0.1, 31, sent=1.0)]
    begin, end = window.steady_state(traces, 2, warmup_share=0.0)
    assert (begin, end) == (0.0, pytest.approx(3.0))


def test_steady_state_of_a_pool_that_admits_fewer() -> None:
    """Long answers fill the pool before the batch is full; what the server does run is its steady state."""
    traces = [steady(0.0, 0.1, 21), steady(0.5, 0.1, 31), steady(2.1, 0.1, 31, sent=0.0)]
    with pytest.raises(NoSteadyStateError):
        window.steady_state(traces, 3)
    assert window.steady_state(traces, 3, is_full=False, warmup_share=0.0) == (0.5, pytest.approx(3.5))


@pytest.mark.parametrize(
    ("traces", "reason"),
    [
        ([steady(0.0, 0.1, 5), steady(1.0, 0.1, 5)], "never 2 requests"),
        ([steady(0.0, 0.1, 5), Trace(3, 0.0, (), ())], "no tokens"),
    ],
    ids=["one_after_another", "empty"],
)
def test_steady_state_refuses_a_batch_that_never_was(traces: list[Trace], reason: str) -> None:
    """A rate over such a run would be one of another batch."""
    with pytest.raises(NoSteadyStateError, match=reason):
        window.steady_state(traces, 2)


def test_slices_give_speed_over_pool_fill() -> None:
    """A run that slows down as the pool fills: the curve is the point of it."""
    times = [0.0]
    for i in range(100):
        times.append(times[-1] + 0.01 + 0.0001 * i)
    trace = Trace(50, 0.0, tuple(times), tuple(range(1, 102)))
    parts = window.slices([trace], 0.0, times[-1], 4)
    fills, speeds = [part.pool_tokens for part in parts], [part.tokens_per_s for part in parts]
    assert fills == sorted(fills)
    assert speeds == sorted(speeds, reverse=True)
    assert fills[0] > 50
    assert fills[-1] < 151
    assert sum(part.tokens for part in parts) == 100


def test_gaps_share_a_chunk_among_its_tokens() -> None:
    """A round of 4 tokens every 80 ms is 20 ms per token for a meter and 80 ms for a reader; both are reported."""
    per_token, per_chunk = window.gaps([steady(0.0, 0.08, 11, tokens=4)], 0.0, 10.0)
    assert per_chunk == pytest.approx([0.08] * 10)
    assert per_token == pytest.approx([0.02] * 40)
    inside, _ = window.gaps([steady(0.0, 0.08, 11, tokens=4)], 0.4, 10.0)
    assert len(inside) == 4 * 5


def test_accept_length_counts_the_bonus_and_not_the_prefill() -> None:
    """SGLang's own figure counts the prefill's token, which flatters short answers."""
    assert window.accept_length([steady(0.0, 0.1, 11, tokens=4)]) == 4.0
    assert window.accept_length([Trace(3, 0.0, (1.0, 2.0), (1, 2))]) is None


def test_percentile_and_spread() -> None:
    """An index off by one reports the maximum as p99, or the median as something between."""
    values = [float(i) for i in range(1, 101)]
    assert [window.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert window.percentile([3.0], 0.5) == 3.0
    assert window.spread([95.0, 100.0, 105.0]) == pytest.approx(0.05)
    assert window.spread([100.0]) == 0.0
