"""Ground truth of capture_scores: one softmax per query row, averaged, in float32."""

from __future__ import annotations

import torch


def capture_scores_reference(
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
    num_reqs, _, num_q_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_q_heads // num_kv_heads
    scores = torch.zeros(num_reqs, num_kv_heads, max_len, dtype=torch.float32, device=q.device)
    for r in range(num_reqs):
        query_len = int(query_lens[r])
        for t in range(query_len):
            kv_len = int(query_starts[r]) + t * query_step + 1
            slots = req_to_token[int(req_pool_indices[r]), :kv_len].long()
            for hq in range(num_q_heads):
                logits = k_cache[slots, hq // group].float() @ q[r, t, hq].float() * scale
                if logit_cap > 0.0:
                    logits = logit_cap * torch.tanh(logits / logit_cap)
                scores[r, hq // group, :kv_len] += torch.softmax(logits, dim=0) / (query_len * group)
        scores[r, :, int(score_lens[r]) :] = 0.0
    return scores
