"""block_scores in vectorised torch: some blocks of all requests at a time, so that what is gathered stays bounded."""

from __future__ import annotations

import torch

from sglang_sparsespec.ops._paged import CPU_STEP_BYTES, DEVICE_STEP_BYTES, gather_heads


def block_scores_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    block_size: int,
    max_len: int,
) -> torch.Tensor:
    num_reqs, num_kv_heads, head_dim = q.shape[0], k_cache.shape[1], q.shape[2]
    num_blocks = -(-max_len // block_size)
    scores = torch.zeros(num_reqs, num_kv_heads, num_blocks, device=q.device)
    if scores.numel() == 0:
        return scores
    # the mean over a group of q . k is the mean query's; [R, H, D, 1]
    mean_query = q.float().view(num_reqs, num_kv_heads, -1, head_dim).mean(2)[..., None]
    step_bytes = CPU_STEP_BYTES if q.device.type == "cpu" else DEVICE_STEP_BYTES
    # gathered keys, and the same in float32
    block_bytes = num_reqs * block_size * num_kv_heads * head_dim * (k_cache.element_size() + 4)
    block_step = max(1, step_bytes // block_bytes)
    table = req_to_token[:, :max_len].index_select(0, req_pool_indices)
    for first in range(0, num_blocks, block_step):
        last = min(first + block_step, num_blocks)
        position = torch.arange(first * block_size, last * block_size, device=q.device)
        is_valid = position < kv_lens[:, None]
        # an entry past a length may be anything; slot 0 is read in its place, and masked
        slots = table[:, position.clamp(max=max_len - 1)].masked_fill(~is_valid, 0)
        dots = gather_heads(k_cache, slots, range(num_kv_heads)).float().matmul(mean_query)[..., 0]
        dots = dots.masked_fill_(~is_valid[:, None], 0.0).unflatten(2, (last - first, block_size)).sum(-1)
        counts = is_valid.unflatten(1, (last - first, block_size)).sum(-1).clamp(min=1)
        scores[:, :, first:last] = dots / counts[:, None]
    return scores
