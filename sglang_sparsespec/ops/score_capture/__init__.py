"""Scores of KV positions: the attention that a verify's queries pay to each (SparseSpec, arXiv:2512.01278, PillarAttn).

Computes probabilities only; what is selected from them is `select_positions`' business.
Invariant: a score is exactly 0 at and past its request's score length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._checks import check_index, check_paged_query
from sglang_sparsespec.ops.score_capture.torch_impl import capture_scores_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["capture_scores"]


def capture_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    score_lens: torch.Tensor,
    *,
    scale: float,
    max_len: int,
    logit_cap: float = 0.0,
    query_step: int = 1,
) -> torch.Tensor:
    """Attention probability of each position, averaged over a request's queries and the heads of a GQA group.

    ``scores[r, h, p] = mean over t < query_lens[r], g < G of softmax_p(cap(scale * q[r, t, h * G + g] . k[p, h]))``
    where query t stands at position ``query_starts[r] + t * query_step`` and sees the positions up to its own.

    Args:
        q: [R, T, HQ, D], float32, float16 or bfloat16; query t of request r is valid where ``t < query_lens[r]``,
            the rest may hold anything.
        k_cache: [num_slots, H, D], dtype of q; may be strided, the last dimension contiguous.
        req_to_token: [pool_rows, max_context], int32; position -> slot.
        req_pool_indices: [R], int64 or int32; the row of `req_to_token` of each request.
        query_starts: [R], int32 or int64, tokens; the position of query 0.
        query_lens: [R], int32 or int64, tokens; in [0, T].
        score_lens: [R], int32 or int64, tokens; positions from here on score exactly 0.
        scale: factor on the logits, before the cap; above 0.
        max_len: tokens, on the host; at least one more than the position of every valid query, may be loose.
        logit_cap: soft cap of the logits; 0 is off.
        query_step: tokens from one query to the next; above 1 where only some of a verify's queries are captured.

    Returns:
        [R, H, max_len], float32; a row of zeros where `query_lens` is 0.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, a scale that is not above 0, a negative cap, or a step
            below 1; on CPU also if `max_len` is too small.

    Not checked: values on the device (lengths within bounds, slots in the pool).
    Reference: SparseSpec (arXiv:2512.01278), PillarAttn; `score_capture.reference`.
    """
    check_paged_query(
        q,
        k_cache,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        scale=scale,
        max_len=max_len,
        logit_cap=logit_cap,
    )
    check_index("score_lens", score_lens, (q.shape[0],), q.device)
    if query_step < 1:
        raise ValueError(f"query_step: expected 1 or more tokens, got {query_step}.")
    capture: Callable[..., torch.Tensor] = capture_scores_torch
    if q.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.score_capture.triton_impl import capture_scores_triton

        capture = capture_scores_triton
    return capture(
        q,
        k_cache,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        score_lens,
        scale=scale,
        max_len=max_len,
        logit_cap=logit_cap,
        query_step=query_step,
    )
