"""What less draft effort would be worth: requests that stop early, and a budget that follows the load.

Recorded rounds give acceptance, `speculation.cost_model` gives time; nothing is timed here. What is chosen (k,
threshold, budget) is chosen on one half of the texts and judged on the other, both ways round. Requests of a batch are
independent.
Invariant: plain decoding, speed-up 1, is among the choices of everybody.
"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from sglang_sparsespec.acceptance.traces import SIGNALS
from sglang_sparsespec.speculation.cost_model import RoundCost, accept_length, speedup, steps_of_batch, verify_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sglang_sparsespec.acceptance.traces import Trace

Choice = TypeVar("Choice")

WAYS: Final = ("gather", "steps", "rows", "unified", "unified-moving")
"""What stopping spares. `gather`: a request that has stopped reads no KV, all shapes stay. `steps`: and the loop ends,
and the verify narrows, with the last request. `rows`: and a verify has no rows but those of drafts that were made.
`unified`: as `gather`, in that schedule. `unified-moving`: and a request is verified in the forward after it stops."""


class Machine(NamedTuple):
    """A model on a card."""

    weights_ms: float
    """W."""
    kv_ns: float
    """A by the token."""
    row_us: float
    """Of one row of a verify, where arithmetic is the limit."""
    gather_efficiency: float
    capture_share: float

    def cost(self, pool_tokens: float) -> RoundCost:
        return RoundCost(
            weights_ms=self.weights_ms,
            attention_ms=self.kv_ns * pool_tokens / 1e6,
            gather_efficiency=self.gather_efficiency,
            capture_share=self.capture_share,
            # in a trace there is no gap between the replays of steps
            overhead_ms=0.0,
        )

    def verify_ms(self, rows: float) -> float:
        return verify_ms(rows, self.weights_ms, self.row_us / 1e3)


class Load(NamedTuple):
    """Requests of one length."""

    batch: int
    context: int
    read_share: float


class Stop(NamedTuple):
    """Up to `num_steps` drafts, none behind one whose `signal` is below `threshold`; no drafts: plain decoding."""

    num_steps: int
    signal: str = "top1"
    threshold: float = 0.0


class Rounds(NamedTuple):
    """A request's rounds under some rule of stopping."""

    tokens: float
    """Mean, the bonus counted."""
    drafts: float
    """Mean."""
    stopped_by: list[float]
    """Entry j: share of the rounds with at most j drafts, j = 0 .. k."""


def rounds_of(trace: Trace, stop: Stop) -> Rounds:
    """Rounds of `trace`, each as likely as any other."""
    made = trace.drafts_made(stop.signal, stop.threshold, stop.num_steps)
    stopped_by = [float((made <= j).double().mean()) for j in range(stop.num_steps + 1)]
    return Rounds(float(trace.accept_lens(made).mean()), float(made.double().mean()), stopped_by)


def stop_speedup(way: str, machine: Machine, load: Load, rounds: Rounds) -> float:
    """Over plain decoding, of a batch of requests that have such rounds; way: one of WAYS."""
    cost = machine.cost(load.batch * load.context)
    plain_ms = cost.weights_ms + cost.attention_ms
    num_steps = len(rounds.stopped_by) - 1
    if way.startswith("unified"):
        forwards = rounds.drafts + 1 if way == "unified-moving" else num_steps + 1
        return speedup(rounds.tokens, cost.unified_round_ms(forwards, load.read_share, rounds.drafts), plain_ms)
    ends_at = steps_of_batch(rounds.stopped_by, load.batch)
    if way == "gather":
        ends_at = [0.0] * num_steps + [1.0]
    steps = sum(j * share for j, share in enumerate(ends_at))
    if way == "rows":
        # of the mean: at most the mean over batches, so in favour of stopping
        products = machine.verify_ms(load.batch * (rounds.drafts + 1))
    else:
        products = sum(share * machine.verify_ms(load.batch * (j + 1)) for j, share in enumerate(ends_at))
    # attention and draft steps of the formula, beside the products of this verify
    without = cost.round_ms(steps, load.read_share, rounds.drafts) - cost.weights_ms
    return speedup(rounds.tokens, without + products, plain_ms)


def stops(thresholds: Sequence[float], max_steps: int) -> list[Stop]:
    """Every rule: the signals crossed with the thresholds and with each k up to `max_steps`; a fixed k once."""
    crossed = itertools.product(range(1, max_steps + 1), SIGNALS, [t for t in thresholds if t > 0])
    return fixed(max_steps) + [Stop(*rule) for rule in crossed]


def fixed(max_steps: int) -> list[Stop]:
    """Rules that never stop, plain decoding first."""
    return [Stop(num_steps) for num_steps in range(max_steps + 1)]


class Gain(NamedTuple):
    """A choice against another set of choices."""

    base_speedup: float
    """Over plain, the best of the base's choices; of both numbers the mean over halves, judged on the other half."""
    speedup: float
    gain: float
    """Mean over halves of the ratio of both, less 1."""
    standard_error: float
    """Of the gain, over texts, each judged alone by what was chosen on the other half."""
    best_of_all: float
    """The same gain, chosen and judged on all texts: too good by what choosing among noisy values brings."""
    chosen: tuple[object, ...]
    """What was chosen on each half."""


def halves(texts: Iterable[int]) -> tuple[list[int], list[int]]:
    """Texts in pairs by turns: of two kinds that alternate, both halves have both."""
    ordered = sorted(set(texts))
    first = [text for i, text in enumerate(ordered) if i // 2 % 2 == 0]
    return first, [text for text in ordered if text not in first]


def gain(
    base: Sequence[Choice], choices: Sequence[Choice], texts: Iterable[int], judge: Callable[[Choice, list[int]], float]
) -> Gain:
    """How much better the best of `choices` is than the best of `base`.

    Args:
        judge: speed-up of a choice on some texts.

    Raises:
        ValueError: for a single pair of texts, which has no halves.
    """
    both = halves(texts)
    if not all(both):
        raise ValueError("choosing on one half and judging on the other takes at least three texts.")

    def best(among: Sequence[Choice], on: list[int]) -> Choice:
        return max(among, key=lambda choice: judge(choice, on))

    found, bases, chosen, by_text = [], [], [], []
    for seen, unseen in (both, both[::-1]):
        mine, theirs = best(choices, seen), best(base, seen)
        chosen.append(mine)
        found.append(judge(mine, unseen))
        bases.append(judge(theirs, unseen))
        by_text += [judge(mine, [text]) / judge(theirs, [text]) for text in unseen]
    everything = [*both[0], *both[1]]
    top, base_top = (judge(best(among, everything), everything) for among in (choices, base))
    return Gain(
        statistics.fmean(bases),
        statistics.fmean(found),
        statistics.fmean(mine / theirs for mine, theirs in zip(found, bases, strict=True)) - 1,
        statistics.stdev(by_text) / len(by_text) ** 0.5,
        top / base_top - 1,
        tuple(chosen),
    )


class StopStudy:
    """Every rule of stopping on one trace.

    Args:
        trace: of at least three texts.
        thresholds: of each signal.
        max_steps: largest k; None: that of the trace.
    """

    def __init__(self, trace: Trace, thresholds: Sequence[float], max_steps: int | None = None) -> None:
        self.trace = trace
        self.max_steps = max_steps or trace.survival.shape[1]
        self.rules = stops(thresholds, self.max_steps)
        self._rounds: dict[tuple[Stop, tuple[int, ...]], Rounds] = {}

    def gain(self, way: str, machine: Machine, load: Load) -> Gain:
        """Over the best fixed k in the same schedule."""

        def judge(stop: Stop, texts: list[int]) -> float:
            return 1.0 if stop.num_steps == 0 else stop_speedup(way, machine, load, self._of(stop, texts))

        return gain(fixed(self.max_steps), self.rules, self.trace.texts.tolist(), judge)

    def _of(self, stop: Stop, texts: list[int]) -> Rounds:
        key = (stop, tuple(texts))
        if key not in self._rounds:
            self._rounds[key] = rounds_of(self.trace.of_texts(texts), stop)
        return self._rounds[key]


def budget_gain(
    cost: RoundCost, traces: Mapping[float, Trace], default: float, shares: Sequence[float] | None = None
) -> Gain:
    """Of the best budget and k over the best k at the default budget.

    Args:
        cost: of the load.
        traces: by share of the KV cache that drafts read, of the same texts.
        default: one of the shares.
        shares: those to choose among; None: all, the budget that follows the load. One: a fixed budget.
    """
    by_half: dict[tuple[float, tuple[int, ...]], list[float]] = {}

    def judge(choice: tuple[float, int], texts: list[int]) -> float:
        share, num_steps = choice
        if num_steps == 0:
            return 1.0
        key = (share, tuple(texts))
        if key not in by_half:
            by_half[key] = traces[share].of_texts(texts).survival.mean(dim=0).tolist()
        return cost.speedup(num_steps, share, accept_length(by_half[key], num_steps))

    steps = range(traces[default].survival.shape[1] + 1)
    texts = traces[default].texts.tolist()
    choices = [(share, num_steps) for share in shares or list(traces) for num_steps in steps]
    return gain([(default, num_steps) for num_steps in steps], choices, texts, judge)
