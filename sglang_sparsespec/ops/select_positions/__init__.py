"""Which positions a draft may read: top-k of scores with sinks, a recent window, pooling and blocks.

One rule for every policy that can write its wish as a score (SparseSpec, arXiv:2512.01278, PillarAttn).
Invariant: the kept positions stand first in a row, whole blocks, -1 after them.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_sparsespec.ops._checks import check_dtype, check_index, check_shape
from sglang_sparsespec.ops.select_positions.torch_impl import select_positions_torch, unravel

__all__ = ["GRANULARITIES", "select_positions"]

GRANULARITIES = (1, 4, 8, 16)


def select_positions(
    scores: torch.Tensor,
    kv_lens: torch.Tensor,
    budgets: torch.Tensor,
    *,
    max_budget: int,
    sink: int,
    recent_window: int,
    pooling: int,
    granularity: int,
    share_heads: bool = False,
    score_starts: torch.Tensor | None = None,
    max_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the highest-scoring blocks of positions of each request, within its budget, for one layer or many.

    A position's score is ``scores[p] + mean(scores[p - pooling .. p])``, zeros before position 0, or ``scores[p]`` with
    pooling 0; a block ``[b * g, (b + 1) * g)`` has the sum of its positions'. Selectable are the whole blocks below the
    length: with ``n_g = kv_lens // g * g`` the caller attends ``[n_g, kv_lens)`` anyway. Blocks that touch the first
    `sink` positions are kept first (the foremost first), then those that touch the last `recent_window` of ``[0, n_g)``
    (the hindmost first), then the highest scores; all of them inside the budget. Nothing waits for the device.

    Args:
        scores: [R, HS, N] or, for L layers, [L, R, HS, N], float32; higher means keep. Entries at or past `kv_lens` may
            hold anything. With `score_starts`: [L, HS, C], as `paged_attention` leaves anchored scores.
        kv_lens: [R], int32 or int64, tokens; the selectable length, at most N.
        budgets: [R], int32 or int64, tokens; in [0, max_budget].
        max_budget: tokens, on the host; the width of the result. May exceed N.
        sink: tokens; first positions that are always kept.
        recent_window: tokens; last selectable positions that are always kept.
        pooling: tokens; how far a score reaches forward. 0 is the paper's rule.
        granularity: tokens per block; 1, 4, 8 or 16.
        share_heads: one selection for all score rows of a request, by their mean.
        score_starts: [R], int32 or int64; position p of request r scores ``scores[:, :, score_starts[r] + p]``.
        max_len: tokens, on the host, with `score_starts`: the bound N of `kv_lens`.

    Returns:
        positions: [(L,) R, HS or 1, max_budget], int32; `num_selected` positions first, then -1. Whole blocks, which
            ascend within and stand in any order.
        num_selected: [R], int32, tokens; ``min(budgets // g * g, n_g)``.

    Raises:
        ValueError: on a wrong shape, dtype or device, a negative size, or another granularity.

    Not checked: that scores are finite (NaN counts as the lowest score), lengths at most N and budgets at most
    `max_budget` (both are clamped). Ties between scores may fall either way.
    Reference: SparseSpec (arXiv:2512.01278), PillarAttn. Deviation: sinks, recent window, forward pooling and blocks;
    all can be switched off.
    """
    if scores.dim() != 4:
        check_shape("scores", scores, (None, None, None))
    check_dtype("scores", scores, (torch.float32,))
    num_reqs = scores.shape[-3] if score_starts is None else score_starts.shape[0]
    check_index("kv_lens", kv_lens, (num_reqs,), scores.device)
    check_index("budgets", budgets, (num_reqs,), scores.device)
    sizes = {"max_budget": max_budget, "sink": sink, "recent_window": recent_window, "pooling": pooling}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more tokens, got {size}.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {GRANULARITIES}, got {granularity}.")
    if score_starts is not None:
        check_shape("scores", scores, (None, None, None))
        check_index("score_starts", score_starts, (num_reqs,), scores.device)
        if max_len is None or max_len < 0:
            raise ValueError(f"max_len: expected 0 or more tokens together with score_starts, got {max_len}.")
    options: dict[str, Any] = {
        "max_budget": max_budget,
        "sink": sink,
        "recent_window": recent_window,
        "pooling": pooling,
        "granularity": granularity,
        "share_heads": share_heads,
    }
    if scores.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.select_positions.triton_impl import select_positions_triton

        return select_positions_triton(scores, kv_lens, budgets, score_starts, max_len=max_len, **options)
    if score_starts is not None:
        assert max_len is not None
        scores = unravel(scores, score_starts, max_len)
    return select_positions_torch(scores, kv_lens, budgets, **options)
