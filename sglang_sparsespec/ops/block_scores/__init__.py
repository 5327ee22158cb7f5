"""Scores of the KV blocks of a context for one query: by them a sparse verify chooses what it reads.

Source: arXiv:2512.21911, attention. Knows nothing of budgets.
Invariant: a position at or past a request's length has no part in any score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._checks import (
    FLOAT_DTYPES,
    check_dense_rows,
    check_dtype,
    check_index,
    check_kv_pool,
    check_shape,
)
from sglang_sparsespec.ops.block_scores.torch_impl import block_scores_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["block_scores"]


def block_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    block_size: int,
    max_len: int,
) -> torch.Tensor:
    """Mean of ``q . k`` over the tokens of each aligned block of positions and the query heads of each KV head.

    ``scores[r, h, b] = mean over p in block b, p < kv_lens[r], and g < G of q[r, h * G + g] . k[p, h]``. Unscaled and
    uncapped: only their order matters, which neither changes much, and the scale not at all. Sums are float32. On CUDA
    nothing waits for the device and the launch depends on shapes alone.

    Args:
        q: [R, HQ, D], float32, float16 or bfloat16; may be strided, the last dimension contiguous.
        k_cache: [num_slots, H, D], dtype of q; likewise.
        req_to_token: [pool_rows, max_context], int32; position -> slot.
        req_pool_indices: [R], int64 or int32; the row of `req_to_token` of each request.
        kv_lens: [R], int32 or int64, tokens; positions at and past it are not read.
        block_size: positions per block; blocks start at multiples of it.
        max_len: tokens, on the host; at least every `kv_lens`, may be loose.

    Returns:
        [R, H, ceil(max_len / block_size)], float32; 0 for a block without positions.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, a `block_size` below 1, or a `max_len` past the table.

    Not checked: values on the device (lengths within bounds, slots in the pool).
    Reference: arXiv:2512.21911, attention; `block_scores.reference`.
    """
    check_shape("q", q, (None, None, None))
    check_dtype("q", q, FLOAT_DTYPES)
    check_dense_rows("q", q)
    check_kv_pool("k_cache", k_cache, q)
    check_index("req_to_token", req_to_token, (None, None), q.device)
    check_dense_rows("req_to_token", req_to_token)
    check_index("req_pool_indices", req_pool_indices, (q.shape[0],), q.device)
    check_index("kv_lens", kv_lens, (q.shape[0],), q.device)
    if block_size < 1:
        raise ValueError(f"block_size: expected 1 or more positions, got {block_size}.")
    if not 0 <= max_len <= req_to_token.shape[1]:
        raise ValueError(f"max_len: expected 0 to {req_to_token.shape[1]}, the width of req_to_token, got {max_len}.")
    score: Callable[..., torch.Tensor] = block_scores_torch
    if q.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.block_scores.triton_impl import block_scores_triton

        score = block_scores_triton
    return score(q, k_cache, req_to_token, req_pool_indices, kv_lens, block_size=block_size, max_len=max_len)
