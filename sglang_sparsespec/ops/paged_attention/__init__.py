"""Dense causal attention over paged KV: verify, plain decode and prefill (SparseSpec, arXiv:2512.01278).

Scores of positions come out of the same call where they are asked for: the exact ones of `score_capture`, or anchored
ones, which need no second pass over K.
Invariant: the output does not depend on padding, neither of queries nor of other requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.ops._checks import (
    check_dense_rows,
    check_device,
    check_dtype,
    check_index,
    check_kv_pool,
    check_paged_query,
    check_shape,
)
from sglang_sparsespec.ops.paged_attention.torch_impl import paged_attention_torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["paged_attention"]

# more queries than this are a prefill, which torch's fused attention serves better
MAX_TRITON_QUERIES = 16


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    scale: float,
    max_len: int,
    score_lens: torch.Tensor | None = None,
    anchored_scores: torch.Tensor | None = None,
    score_starts: torch.Tensor | None = None,
    logit_cap: float = 0.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention of some query tokens per request over its whole context, the queries' own KV included.

    ``out[r, t, hq] = sum_p softmax_p(cap(scale * q[r, t, hq] . k[p, h])) * v[p, h]`` over ``p <= query_starts[r] + t``,
    with ``h = hq // G`` and k, v at slot ``req_to_token[req_pool_indices[r], p]``. Sums are float32.

    Anchored scores rank positions as probabilities do, but each query row is relative to what it pays to its anchors
    (the first 16 and the last 48 positions below `query_starts`, or all of them if there are fewer than 64), and
    so needs no second look: ``scores[h, score_starts[r] + p] = mean over t < query_lens[r], g < G of
    min(1, exp(l[p]) / sum over anchors a of exp(l[a]))`` with l the capped logits of the row.

    Args:
        q: [R, T, HQ, D], float32, float16 or bfloat16; query t of request r is valid where ``t < query_lens[r]``,
            the rest may hold anything.
        k_cache: [num_slots, H, D], dtype of q; may be strided, the last dimension contiguous. Holds the queries'
            own KV as well.
        v_cache: [num_slots, H, D], dtype of q; likewise.
        req_to_token: [pool_rows, max_context], int32; position -> slot.
        req_pool_indices: [R], int64 or int32; the row of `req_to_token` of each request.
        query_starts: [R], int32 or int64, tokens; the position of query 0.
        query_lens: [R], int32 or int64, tokens; in [0, T].
        scale: factor on the logits, before the cap; above 0.
        max_len: tokens, on the host; at least every ``query_starts + query_lens``, may be loose.
        score_lens: [R], int32 or int64, tokens; asks for scores, exactly 0 from these positions on.
        anchored_scores: [H, C], float32, may be strided; asks for anchored scores: those of request r's positions
            [0, query_starts[r]) are written to the columns from ``score_starts[r]`` on. Every other column is
            undefined afterwards. Not together with `score_lens`.
        score_starts: [R], int32 or int64; where the requests' columns begin. They must not overlap.
        logit_cap: soft cap of the logits; 0 is off.
        out: [R, T, HQ, D], dtype of q, contiguous; written and returned when given. Must not overlap q.

    Returns:
        out: [R, T, HQ, D], dtype of q; zeros in the rows of invalid queries.
        scores: [R, H, max_len], float32, as `capture_scores` gives them; None without `score_lens`.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, a scale that is not above 0, or a negative cap; on CPU
            also if `max_len` is too small.

    Not checked: values on the device (lengths within bounds, slots in the pool, columns in the buffer).
    Reference: SparseSpec (arXiv:2512.01278), dense verification; `paged_attention.reference`.
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
    check_kv_pool("v_cache", v_cache, q)
    check_shape("v_cache", v_cache, k_cache.shape)
    if score_lens is not None:
        check_index("score_lens", score_lens, (q.shape[0],), q.device)
    if anchored_scores is not None:
        _check_anchored_scores(anchored_scores, score_starts, q, k_cache.shape[1])
        if score_lens is not None:
            raise ValueError("score_lens: expected None together with anchored_scores, which end at query_starts.")
    if out is not None:
        check_shape("out", out, q.shape)
        check_dtype("out", out, (q.dtype,))
        check_device("out", out, q.device)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {tuple(out.stride())}.")
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = paged_attention_torch
    if q.is_cuda and q.shape[1] <= MAX_TRITON_QUERIES:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.paged_attention.triton_impl import paged_attention_triton

        attend = paged_attention_triton
    return attend(
        q,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        scale=scale,
        max_len=max_len,
        score_lens=score_lens,
        anchored_scores=anchored_scores,
        score_starts=score_starts,
        logit_cap=logit_cap,
        out=out,
    )


def _check_anchored_scores(
    scores: torch.Tensor, starts: torch.Tensor | None, q: torch.Tensor, num_kv_heads: int
) -> None:
    check_shape("anchored_scores", scores, (num_kv_heads, None))
    check_dtype("anchored_scores", scores, (torch.float32,))
    check_device("anchored_scores", scores, q.device)
    check_dense_rows("anchored_scores", scores)
    if starts is None:
        raise ValueError("score_starts: expected the requests' first columns together with anchored_scores, got None.")
    check_index("score_starts", starts, (q.shape[0],), q.device)
