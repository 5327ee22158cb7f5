"""Ground truth of block_scores: one block of one head at a time, one dot product per token and query head."""

from __future__ import annotations

import torch


def block_scores_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    block_size: int,
    max_len: int,
) -> torch.Tensor:
    num_kv_heads = k_cache.shape[1]
    group = q.shape[1] // num_kv_heads
    scores = torch.zeros(len(kv_lens), num_kv_heads, -(-max_len // block_size), device=q.device)
    for r, kv_len in enumerate(kv_lens.tolist()):
        for block in range(-(-kv_len // block_size)):
            first = block * block_size
            slots = req_to_token[int(req_pool_indices[r]), first : min(first + block_size, kv_len)].long()
            for h in range(num_kv_heads):
                dots = k_cache[slots, h].float() @ q[r, h * group : (h + 1) * group].float().T
                scores[r, h, block] = dots.mean()
    return scores
