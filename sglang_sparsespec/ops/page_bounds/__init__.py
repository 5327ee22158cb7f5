"""Bounds of the keys in each page of a context (Quest, arXiv:2406.10774): what a query can score at most there.

Knows nothing of queries. Invariant: bounds hold for the positions below a request's length, and for no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._checks import FLOAT_DTYPES, check_dense_rows, check_dtype, check_index, check_shape
from sglang_sparsespec.ops.page_bounds.torch_impl import page_bounds_torch

if TYPE_CHECKING:
    import torch

__all__ = ["page_bounds"]


def page_bounds(
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    page_size: int,
    max_len: int,
) -> torch.Tensor:
    """The largest and the smallest value of each key channel in each page of consecutive positions.

    ``sum_d max(q[d] * upper[d], q[d] * lower[d])`` then bounds ``q . k[p]`` for every position p of the page.

    Args:
        k_cache: [num_slots, H, D], float32, float16 or bfloat16; may be strided, the last dimension contiguous.
        req_to_token: [pool_rows, max_context], int32; position -> slot.
        req_pool_indices: [R], int64 or int32; the row of `req_to_token` of each request.
        kv_lens: [R], int32 or int64, tokens; positions at and past it are not read.
        page_size: positions per page; pages start at multiples of it.
        max_len: tokens, on the host; at least every `kv_lens`, may be loose.

    Returns:
        [R, H, ceil(max_len / page_size), 2, D], dtype of k_cache: upper, then lower; 0 for a page without positions.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, a `page_size` below 1, or a `max_len` past the table.

    Not checked: values on the device (lengths within bounds, slots in the pool).
    Reference: Quest (arXiv:2406.10774), section 3.3; `page_bounds.reference`.
    """
    check_shape("k_cache", k_cache, (None, None, None))
    check_dtype("k_cache", k_cache, FLOAT_DTYPES)
    check_dense_rows("k_cache", k_cache)
    check_index("req_to_token", req_to_token, (None, None), k_cache.device)
    check_index("req_pool_indices", req_pool_indices, (None,), k_cache.device)
    check_index("kv_lens", kv_lens, (req_pool_indices.shape[0],), k_cache.device)
    if page_size < 1:
        raise ValueError(f"page_size: expected 1 or more positions, got {page_size}.")
    if not 0 <= max_len <= req_to_token.shape[1]:
        raise ValueError(f"max_len: expected 0 to {req_to_token.shape[1]}, the width of req_to_token, got {max_len}.")
    return page_bounds_torch(k_cache, req_to_token, req_pool_indices, kv_lens, page_size=page_size, max_len=max_len)
