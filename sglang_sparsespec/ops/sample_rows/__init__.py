"""One token per request from a row of logits, or from what a rejected draft leaves of it.

The residual is that of chain rejection sampling (Leviathan et al. 2023, arXiv:2211.17192). Knows where a request
stopped, not why. Invariant: a token of probability 0 is never returned, whatever the coin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.ops._checks import check_device, check_dtype, check_index, check_shape
from sglang_sparsespec.ops._rows import RowStats, check_of_requests, check_rows, check_stats
from sglang_sparsespec.ops.sample_rows.reference import sample_rows_reference

if TYPE_CHECKING:
    from typing import Any

__all__ = ["sample_rows"]


def sample_rows(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    coins: torch.Tensor,
    *,
    steps: torch.Tensor | None = None,
    draft_steps: torch.Tensor | None = None,
    is_greedy: torch.Tensor | None = None,
    draft_logits: torch.Tensor | None = None,
    draft_stats: RowStats | None = None,
    draft_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token at which the cumulative mass of a request's row exceeds ``coins[r] * total``, in index order.

    With ``p = softmax(logits[r, steps[r]] / T)`` the mass is p, or, where there are K drafts and ``d = draft_steps[r]``
    is below K, ``max(p - q, 0)``, where q is what the rejected draft d was sampled from: ``softmax(draft_logits[r, d] /
    T)``, or one-hot at ``draft_tokens[r, d]`` for a draft that was chosen. If that is 0 everywhere, the mass is p.
    Probabilities are float32, their sums float64. On CUDA nothing waits for the device.

    Args:
        logits: [R, W, V], float32, float16 or bfloat16; may be strided, the last dimension contiguous; W at least 1.
        stats: of them, each [R, W], as `row_stats` returned them; p is 0 below their floors, if they have any.
        temperatures: [R], float32, positive.
        coins: [R], float64 or float32, in [0, 1).
        steps: [R], int32 or int64, in [0, W); larger ones count as W - 1. None: row 0.
        draft_steps: [R], int32 or int64, not negative: the draft that was rejected; K or more: none was. None: as
            `steps`.
        is_greedy: [R], bool: p and the q of `draft_logits` are one-hot at the argmax.
        draft_logits: [R, K, V], floating, likewise.
        draft_stats: with `draft_logits`, each [R]: ``row_stats(draft_logits, temperatures, steps=draft_steps)``.
        draft_tokens: [R, K], int32 or int64, in the place of `draft_logits`.

    Returns:
        tokens: [R], int64; in [0, V) even where the logits are NaN.
        probs: [R], float32, p of them.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, logits and tokens of drafts together, or drafts without
            `steps`.

    Not checked: the ranges of temperatures, coins, steps and draft tokens.
    Deviation from Leviathan et al.: p in the place of a residual of 0, which rounding can make.
    """
    check_rows("logits", logits)
    num_reqs, width, vocab_size = logits.shape
    if width == 0:
        raise ValueError(f"logits: expected at least one row per request, got shape {list(logits.shape)}.")
    check_of_requests(logits, temperatures, steps=steps, is_greedy=is_greedy)
    check_stats("stats", stats, (num_reqs, width), logits.device)
    check_shape("coins", coins, (num_reqs,))
    check_dtype("coins", coins, (torch.float64, torch.float32))
    check_device("coins", coins, logits.device)
    drafts = draft_tokens if draft_logits is None else draft_logits
    if drafts is not None:
        if steps is None:
            raise ValueError("steps: expected a tensor together with drafts, got None.")
        draft_steps = steps if draft_steps is None else draft_steps
        check_index("draft_steps", draft_steps, (num_reqs,), logits.device)
        if drafts.dim() > 1 and drafts.shape[1] == 0:
            raise ValueError(f"drafts: expected None or at least one per request, got shape {list(drafts.shape)}.")
    if (draft_logits is None) != (draft_stats is None):
        raise ValueError("draft_stats: expected exactly where draft_logits are given.")
    if draft_logits is not None and draft_stats is not None:
        if draft_tokens is not None:
            raise ValueError("draft_tokens: expected None together with draft_logits, got a tensor.")
        check_rows("draft_logits", draft_logits, num_reqs)
        check_shape("draft_logits", draft_logits, (num_reqs, None, vocab_size))
        check_device("draft_logits", draft_logits, logits.device)
        check_stats("draft_stats", draft_stats, (num_reqs,), logits.device)
        if (stats.floor is None) != (draft_stats.floor is None):
            raise ValueError("draft_stats.floor: expected exactly where stats has floors.")
    if draft_tokens is not None:
        check_index("draft_tokens", draft_tokens, (num_reqs, None), logits.device)
    options: dict[str, Any] = {
        "steps": steps,
        "draft_steps": draft_steps,
        "is_greedy": is_greedy,
        "draft_logits": draft_logits,
        "draft_stats": draft_stats,
        "draft_tokens": draft_tokens,
    }
    if logits.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.sample_rows.triton_impl import sample_rows_triton

        return sample_rows_triton(logits, stats, temperatures, coins, **options)
    return sample_rows_reference(logits, stats, temperatures, coins, **options)
