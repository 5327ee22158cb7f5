"""page_bounds in vectorised torch: some pages of all requests at a time, so that what is gathered stays bounded."""

from __future__ import annotations

import math

import torch

from sglang_sparsespec.ops._paged import CPU_STEP_BYTES, DEVICE_STEP_BYTES, gather_heads


def page_bounds_torch(
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    page_size: int,
    max_len: int,
) -> torch.Tensor:
    num_reqs, num_pages = len(req_pool_indices), -(-max_len // page_size)
    num_kv_heads, head_dim = k_cache.shape[1:]
    bounds = k_cache.new_zeros(num_reqs, num_kv_heads, num_pages, 2, head_dim)
    if bounds.numel() == 0:
        return bounds
    step_bytes = CPU_STEP_BYTES if k_cache.device.type == "cpu" else DEVICE_STEP_BYTES
    # a gathered page and its two masked copies
    page_bytes = 3 * num_reqs * page_size * num_kv_heads * head_dim * k_cache.element_size()
    page_step = max(1, step_bytes // page_bytes)
    table = req_to_token[:, :max_len].index_select(0, req_pool_indices)
    for first in range(0, num_pages, page_step):
        last = min(first + page_step, num_pages)
        position = torch.arange(first * page_size, last * page_size, device=k_cache.device)
        is_valid = position < kv_lens[:, None]
        # an entry past a length may be anything; slot 0 is read in its place, and masked
        slots = table[:, position.clamp(max=max_len - 1)].masked_fill(~is_valid, 0)
        k = gather_heads(k_cache, slots, range(num_kv_heads)).unflatten(2, (last - first, page_size))
        hidden = ~is_valid.view(num_reqs, 1, last - first, page_size, 1)
        has_none = hidden.all(dim=3)
        for side, fill, reduce in ((0, -math.inf, torch.amax), (1, math.inf, torch.amin)):
            bound = reduce(k.masked_fill(hidden, fill), dim=3)
            bounds[:, :, first:last, side] = bound.masked_fill_(has_none, 0.0)
    return bounds
