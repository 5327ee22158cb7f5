"""Ground truth of paged_attention: one softmax per query row, in float32; scores from capture_scores' reference.

Anchored scores are written out here once more, position by position.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.ops.score_capture.reference import capture_scores_reference


def paged_attention_reference(
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
    logit_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_reqs, _, num_q_heads, _ = q.shape
    group = num_q_heads // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for r in range(num_reqs):
        for t in range(int(query_lens[r])):
            slots = req_to_token[int(req_pool_indices[r]), : int(query_starts[r]) + t + 1].long()
            for hq in range(num_q_heads):
                logits = k_cache[slots, hq // group].float() @ q[r, t, hq].float() * scale
                if logit_cap > 0.0:
                    logits = logit_cap * torch.tanh(logits / logit_cap)
                out[r, t, hq] = torch.softmax(logits, dim=0) @ v_cache[slots, hq // group].float()
    scores = None
    if score_lens is not None:
        scores = capture_scores_reference(
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
        )
    return out.to(q.dtype), scores


def anchored_scores_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    scale: float,
    max_len: int,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """[R, H, max_len], float32; 0 from query_starts on and where there are no queries."""
    num_kv_heads = k_cache.shape[1]
    group = q.shape[2] // num_kv_heads
    scores = torch.zeros(q.shape[0], num_kv_heads, max_len, device=q.device)
    for r in range(q.shape[0]):
        start, query_len = int(query_starts[r]), int(query_lens[r])
        anchors = list(range(start)) if start < 64 else [*range(16), *range(start - 48, start)]
        slots = req_to_token[int(req_pool_indices[r]), :start].long()
        for t in range(query_len if start else 0):
            for hq in range(q.shape[2]):
                logits = k_cache[slots, hq // group].float() @ q[r, t, hq].float() * scale
                if logit_cap > 0.0:
                    logits = logit_cap * torch.tanh(logits / logit_cap)
                relative = torch.exp(logits - torch.logsumexp(logits[anchors], dim=0)).clamp(max=1.0)
                scores[r, hq // group, :start] += relative / (query_len * group)
    return scores
