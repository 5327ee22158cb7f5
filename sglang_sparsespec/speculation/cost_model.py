"""What a round costs by either schedule, from a few measured times; which k is worth it.

A plain decode step costs W + A: reading the weights, and the KV cache of all running requests. Knows nothing of how
acceptance came about. Reference: SparseSpec (arXiv:2512.01278), section 3. The formula stands once, in
`GatheredCost.round_ms`; `RoundCost` derives its terms from what a card does, `round_times` from rounds that ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.speculation.phases import load_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.speculation.memory import ModelShape


@dataclass(frozen=True, kw_only=True)
class GatheredCost:
    """``k (W + s A / u + o) + V + A (1 + c)``, its terms gathered by what they grow with. Milliseconds."""

    fixed_ms: float
    """V of a round without drafts: a decode step without attention."""
    step_ms: float
    """Of one draft without attention: W + o, and what its row adds to V."""
    kv_ms: float
    """Of one token in the pool: A (1 + c) by the token, full attention with capture."""
    step_kv_ms: float
    """Of one token in the pool and one draft: s A / u by the token, sparse attention."""
    drafted_ms: float = 0.0
    """Of a round with drafts, however many: what surrounds a verify and not a plain decode. Measured, and not in the
    formula; a small model's short rounds are half of it."""

    def round_ms(self, num_steps: float, pool_tokens: float, drafts_made: float | None = None) -> float:
        """`num_steps` drafts (0: a plain decode through the verify) and one verify, over so much KV in use.

        Args:
            num_steps: draft steps that run for the batch; a mean may be given, for the formula is linear in it.
            drafts_made: mean over requests, where some stop before the batch does: a step that runs without a request
                saves its gather and nothing else. None: all go on to the end.
        """
        drafts = num_steps if drafts_made is None else drafts_made
        fixed_ms = self.fixed_ms + (self.drafted_ms if num_steps > 0 else 0.0)
        return fixed_ms + num_steps * self.step_ms + pool_tokens * (self.kv_ms + drafts * self.step_kv_ms)


def accept_length(survival: Sequence[float], num_steps: int) -> float:
    """Tokens that a round yields, bonus token counted; `survival[j - 1]`: that draft j and all before it stand."""
    return 1.0 + sum(survival[:num_steps])


def verify_ms(rows: float, weights_ms: float, row_ms: float) -> float:
    """V of a verify of so many rows, all requests together: reading the weights, or arithmetic, what takes longer."""
    return max(weights_ms, rows * row_ms)


def steps_of_batch(stopped_by: Sequence[float], batch: int) -> list[float]:
    """Probability that a batch of independent requests drafts on for exactly j steps, until its last one has stopped.

    Args:
        stopped_by: entry j: probability that a request makes at most j drafts, j = 0 .. k; the last is 1.
    """
    all_stopped = [share**batch for share in stopped_by]
    return [now - before for now, before in zip(all_stopped, [0.0, *all_stopped[:-1]], strict=True)]


def speedup(accept_length: float, round_ms: float, plain_ms: float) -> float:
    """Tokens per time over plain decoding's; `accept_length` counts the bonus token."""
    return accept_length * plain_ms / round_ms


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    """Times of one batch on one machine, in milliseconds. The defaults of the shares are guesses to be measured."""

    weights_ms: float
    """W: a decode step without attention."""
    attention_ms: float
    """A: the attention of a decode step over the whole KV cache in use."""
    verify_ms: float | None = None
    """V: a verify without attention, k + 1 rows a request. None: W, as long as reading weights fills the time."""
    gather_efficiency: float = 0.75
    """u: bandwidth of sparse attention as a share of dense attention's."""
    capture_share: float = 0.1
    """c: capture and selection as a share of A."""
    overhead_ms: float = 0.2
    """o: host and launch gap of a draft step."""

    def gathered(self, read_share: float) -> GatheredCost:
        """The terms of rounds whose drafts read `read_share` of the KV cache; the cache in use is the unit of KV."""
        return GatheredCost(
            fixed_ms=self.weights_ms if self.verify_ms is None else self.verify_ms,
            step_ms=self.weights_ms + self.overhead_ms,
            kv_ms=self.attention_ms * (1.0 + self.capture_share),
            step_kv_ms=read_share * self.attention_ms / self.gather_efficiency,
        )

    def round_ms(self, num_steps: float, read_share: float, drafts_made: float | None = None) -> float:
        """k drafts that read `read_share` of the KV cache each, one verify with capture; `GatheredCost.round_ms`."""
        return self.gathered(read_share).round_ms(num_steps, 1.0, drafts_made)

    def unified_round_ms(self, num_forwards: float, read_share: float, drafts_made: float) -> float:
        """A request's round in the unified schedule: mixed forwards that cost a draft's weights each.

        Args:
            num_forwards: from one verify of a request to its next; k + 1 where phases are fixed, one more than it
                drafted where it could be verified as soon as it stops.
            read_share: share of the KV cache that a draft reads.
            drafts_made: mean over requests.
        """
        mixed = replace(self, verify_ms=self.weights_ms + self.overhead_ms)
        return mixed.round_ms(num_forwards - 1, read_share, drafts_made)

    def speedup(self, num_steps: int, read_share: float, accept_length: float) -> float:
        """Tokens per time over plain decoding's; `accept_length` counts the bonus token."""
        return speedup(accept_length, self.round_ms(num_steps, read_share), self.weights_ms + self.attention_ms)

    def best_num_steps(self, survival: Sequence[float], read_share: float) -> tuple[int, float]:
        """The k with the largest speed-up, and that speed-up.

        Args:
            survival: probability that draft j and all before it are correct, j = 1 .. the largest k.
            read_share: share of the KV cache that a draft step reads.
        """
        speedups = [
            (self.speedup(num_steps, read_share, accept_length(survival, num_steps)), -num_steps)
            for num_steps in range(1, len(survival) + 1)
        ]
        best, num_steps = max(speedups, default=(0.0, -1))
        return -num_steps, best


@dataclass(frozen=True)
class Roofline:
    """What a device reaches, not what its data sheet says: `bandwidth` in bytes/s, `flops` of dense products per s."""

    bandwidth: float
    flops: float

    def times(self, ranks: int) -> Roofline:
        """Of so many cards that share the work; what they say to each other is not counted."""
        return Roofline(ranks * self.bandwidth, ranks * self.flops)


# H100: dense decode attention and weights, 3.0 to 3.1 TB/s measured (docs/benchmarks.md); products at
# 70 % of the peak of 989 TFLOP/s in bf16. H200: the same shares of its own data sheet; plain decoding read KV at 3.9
# (Qwen3-1.7B shape) and 4.4 TB/s (8B) there.
ROOFLINES = {"H100": Roofline(3.0e12, 6.9e14), "H200": Roofline(4.3e12, 6.9e14)}


def roofline_of(machine: str) -> Roofline | None:
    """For a card's name; None for a card or a CPU that nobody measured."""
    return next((roofline for name, roofline in ROOFLINES.items() if name in machine), None)


class RoundTerms(NamedTuple):
    """A round's time by what it is spent on, milliseconds."""

    products: float
    """Of all forwards, with the gap of each."""
    kv: float
    """Attention, capture and selection."""
    between: float
    """What stands between two forwards where somebody has verified: acceptance, layout of lists."""

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class ServerCost:
    """One model on one machine, for any batch; what a schedule's round takes before anything was measured."""

    weights_ms: float
    """Reading all weights of a forward once."""
    row_ms: float
    """Multiplying one row with them."""
    kv_ms: float
    """Reading the KV of one pool token, all layers."""
    budget_ratio: float
    min_budget: int
    between_ms: float = 0.75
    """After each forward in which somebody verifies: what a unified round took beyond its terms, over its forwards, on
    an H100 with the Qwen3-1.7B shape (docs/results.md, 2026-11-23)."""

    @classmethod
    def of(cls, shape: ModelShape, roofline: Roofline, *, budget_ratio: float, min_budget: int) -> ServerCost:
        """From shapes alone. A mixture of experts counts as if every forward read all experts, as large batches do.

        Args:
            shape: the model as one rank sees it.
            roofline: of that rank's card.
            budget_ratio, min_budget: of drafts.
        """
        attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_q_heads + shape.num_kv_heads)
        expert = 3 * shape.hidden_size * (shape.expert_size or shape.intermediate_size)
        head = shape.vocab_size * shape.hidden_size // shape.num_ranks
        read = shape.num_layers * (attention + max(1, shape.experts) * expert) + head
        active = shape.num_layers * (attention + max(1, shape.experts_per_token) * expert) + head
        kv_values = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        return cls(
            weights_ms=1e3 * read * shape.dtype_bytes / roofline.bandwidth,
            row_ms=1e3 * 2 * active / roofline.flops,
            kv_ms=1e3 * kv_values * shape.dtype_bytes / roofline.bandwidth,
            budget_ratio=budget_ratio,
            min_budget=min_budget,
        )

    def round_ms(self, num_steps: int, num_reqs: int, pool_tokens: int) -> float:
        """Of a lockstep round; without drafts, of a verify of one token."""
        return self.terms("lockstep", num_reqs, pool_tokens, num_steps).total

    def terms(self, schedule: str, num_reqs: int, pool_tokens: int, num_steps: int) -> RoundTerms:
        """Of a round of `num_steps` drafts by `schedule`, lockstep or unified, of requests with so much KV in all."""
        context = max(1, pool_tokens // num_reqs)
        share = min(1.0, max(self.min_budget, self.budget_ratio * context) / context)
        is_unified = schedule == "unified"
        rows = load_of(num_reqs, num_steps).num_tokens if is_unified else num_reqs
        cost = RoundCost(
            weights_ms=verify_ms(rows, self.weights_ms, self.row_ms),
            attention_ms=self.kv_ms * pool_tokens,
            verify_ms=verify_ms(num_reqs * (num_steps + 1), self.weights_ms, self.row_ms),
        )
        total = (
            cost.unified_round_ms(num_steps + 1, share, num_steps) if is_unified else cost.round_ms(num_steps, share)
        )
        gathered = cost.gathered(share)
        kv = gathered.kv_ms + num_steps * gathered.step_kv_ms
        return RoundTerms(total - kv, kv, self.between_ms * (num_steps + 1 if is_unified else 1))
