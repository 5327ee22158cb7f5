"""Ground truth of page_bounds: one page at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def page_bounds_reference(
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    page_size: int,
    max_len: int,
) -> torch.Tensor:
    num_pages = -(-max_len // page_size)
    bounds = k_cache.new_zeros(len(kv_lens), k_cache.shape[1], num_pages, 2, k_cache.shape[2])
    for r, kv_len in enumerate(kv_lens.tolist()):
        for page in range(-(-kv_len // page_size)):
            first = page * page_size
            slots = req_to_token[int(req_pool_indices[r]), first : min(first + page_size, kv_len)].long()
            bounds[r, :, page, 0] = k_cache[slots].amax(dim=0)
            bounds[r, :, page, 1] = k_cache[slots].amin(dim=0)
    return bounds
