"""What a round of speculation should take, term by term, in milliseconds: the model that measurements stand beside.

    round = k (W + s A / u + o) + V + v A (1 + c) + extra
    speed-up = (1 + accepted) (W + A) / round

W, A: weights and KV of one ordinary decode step. s: share of the KV that a draft reads. u: share of the bandwidth that
a gather of single tokens reaches. o: gap per draft step in which the device waits for the host. V: the products of
(k + 1) x batch rows. v: share of the KV that a verify reads, 1 unless it is lossy. c: score capture
relative to that. extra: sampling, top-k and whatever else comes once a round.
`accepted` does not count the bonus token. Pure functions; docs/benchmarks.md says where the defaults come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_sparsespec.speculation.cost_model import ROOFLINES, Roofline, roofline_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.shapes import ModelShape

__all__ = ["ROOFLINES", "Roofline", "roofline_of"]

MAX_VERIFY_SHARE = 1.5
"""Of a sparse verify that scores in every layer and then reads everything."""
DEVIATION_LIMIT = 0.2
"""A term that is off by more than this share of the model is flagged."""


@dataclass(frozen=True)
class Round:
    """The terms of one round, ms."""

    draft_weights: float
    draft_kv: float
    draft_gaps: float
    verify_products: float
    verify_kv: float
    capture: float
    extra: float

    @property
    def total(self) -> float:
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        return dict(vars(self))


def round_time(
    weights_ms: float,
    kv_ms: float,
    *,
    num_steps: int,
    kv_share: float,
    gather_efficiency: float = 0.75,
    gap_ms: float = 0.2,
    verify_ms: float,
    verify_share: float = 1.0,
    capture_share: float = 0.1,
    extra_ms: float = 0.0,
) -> Round:
    """The formula above: W, A, k, s, u, o, V, v, c, extra.

    Raises:
        ValueError: for a share or an efficiency outside (0, 1], or a negative time.
    """
    if not 0 < kv_share <= 1 or not 0 < gather_efficiency <= 1:
        raise ValueError(f"kv_share {kv_share} and gather_efficiency {gather_efficiency} must be in (0, 1].")
    if not 0 < verify_share <= MAX_VERIFY_SHARE:
        raise ValueError(f"verify_share {verify_share} must be in (0, {MAX_VERIFY_SHARE}].")
    if min(weights_ms, kv_ms, gap_ms, verify_ms, capture_share, extra_ms) < 0 or num_steps < 1:
        raise ValueError("times must not be negative, and a round has at least one draft step.")
    return Round(
        draft_weights=num_steps * weights_ms,
        draft_kv=num_steps * kv_share * kv_ms / gather_efficiency,
        draft_gaps=num_steps * gap_ms,
        verify_products=verify_ms,
        verify_kv=verify_share * kv_ms,
        capture=capture_share * verify_share * kv_ms,
        extra=extra_ms,
    )


def speedup(accept_length: float, weights_ms: float, kv_ms: float, round_ms: float) -> float:
    """Tokens per second over those of ordinary decoding; `accept_length` counts the bonus token."""
    return accept_length * (weights_ms + kv_ms) / round_ms


def budget_share(context: float, *, budget_ratio: float = 0.05, min_budget: int = 192) -> float:
    """s: the share of a context of so many tokens that drafts read; 1 for contexts below the floor."""
    return min(1.0, max(float(min_budget), budget_ratio * context) / context) if context > 0 else 1.0


def sparse_verify_share(
    context: float, *, ratio: float, dense_below: int, block_size: int, anchor_share: float
) -> float:
    """v of a verify with sparse attention: the blocks that it reads, and K of everything in layers that score.

    1 up to `dense_below`, where the dense verify runs. Above it v may exceed 1: what is scored is half of the KV, and
    may then be read all the same.

    Args:
        context: tokens of a request.
        ratio: rho.
        dense_below: L0, tokens.
        block_size: B, tokens.
        anchor_share: of the layers, those that score.
    """
    if context <= dense_below:
        return 1.0
    # imported where it is used: plans of lossless sets do without torch
    import torch

    from sglang_sparsespec.sparsity.attention import num_kept_blocks

    lengths = torch.tensor([round(context)])
    blocks = int(num_kept_blocks(lengths, ratio=ratio, dense_below=dense_below, block_size=block_size))
    return min(1.0, blocks * block_size / context) + 0.5 * anchor_share


def step_times(
    shape: ModelShape, roofline: Roofline, *, rows: int, pool_tokens: float, bytes_per_value: int
) -> tuple[float, float]:
    """(W, A) of an ordinary decode step on that device, ms, without any gap."""
    weights_s = products_s(shape, roofline, rows=rows, bytes_per_value=bytes_per_value)
    kv_s = pool_tokens * shape.kv_values_per_token * bytes_per_value / roofline.bandwidth
    return weights_s * 1e3, kv_s * 1e3


def products_s(shape: ModelShape, roofline: Roofline, *, rows: int, bytes_per_value: int) -> float:
    """Seconds for the weights of layers and lm_head: reading them, or multiplying `rows` rows, what takes longer.

    Of a mixture of experts a step reads those that its rows visit (`ModelShape.touched_experts`), and multiplies each
    row with its own. So W grows with the batch, and a verify of (k + 1) x batch rows reads more than a draft does.
    """
    read = shape.read_layer_params(rows) + shape.head_params
    active = shape.active_layer_params + shape.head_params
    return max(read * bytes_per_value / roofline.bandwidth, 2 * active * rows / roofline.flops)


def sampling_s(shape: ModelShape, roofline: Roofline, *, rows: int) -> float:
    """Seconds to write logits of `rows` rows in float32, and to read, normalise and read them again: four passes."""
    return 4 * rows * shape.vocab * 4 / roofline.bandwidth


def fit_step(pool_tokens: Sequence[float], step_ms: Sequence[float]) -> tuple[float, float] | None:
    """(W in ms, A in ms per pool token) of the line through measured steps; None for fewer than two distinct fills."""
    count = len(pool_tokens)
    mean_x = sum(pool_tokens) / count if count else 0.0
    mean_y = sum(step_ms) / count if count else 0.0
    spread = sum((x - mean_x) ** 2 for x in pool_tokens)
    if count < 2 or spread == 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(pool_tokens, step_ms, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def deviation(measured: float, model: float) -> float:
    """Share of the model by which a measurement exceeds it; negative where it is faster."""
    return measured / model - 1 if model else float("inf")


def is_off(measured: float, model: float, limit: float = DEVIATION_LIMIT) -> bool:
    return abs(deviation(measured, model)) > limit
