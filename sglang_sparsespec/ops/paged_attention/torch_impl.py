"""paged_attention in vectorised torch.

Without scores and without a cap it is torch's fused attention over gathered KV; otherwise logits and softmax stand in
float32. Invariant: what is gathered or held at a time is bounded, whatever the context.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.ops._paged import PagedProblem


def paged_attention_torch(
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
    problem = PagedProblem(
        q,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        score_lens if anchored_scores is None else query_starts,
        scale,
        max_len,
        logit_cap,
        is_anchored=anchored_scores is not None,
        out=out,
    )
    attended, scores = problem.run()
    assert attended is not None
    if anchored_scores is None:
        return attended, scores
    assert scores is not None
    assert score_starts is not None
    num_columns = anchored_scores.shape[1]
    position = torch.arange(max_len, device=q.device)
    is_scored = position < query_starts.masked_fill(query_lens == 0, 0)[:, None]
    # what is not scored goes to a column of its own, so that nothing waits for the device to count
    column = (score_starts[:, None] + position).where(is_scored, num_columns).flatten()
    padded = torch.nn.functional.pad(anchored_scores, (0, 1))
    padded[:, column] = scores.transpose(0, 1).flatten(1)
    anchored_scores.copy_(padded[:, :num_columns])
    return attended, None
