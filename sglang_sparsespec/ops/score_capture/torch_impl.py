"""capture_scores in vectorised torch: requests of similar length together, logits in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._paged import PagedProblem

if TYPE_CHECKING:
    import torch


def capture_scores_torch(
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
    problem = PagedProblem(
        q,
        k_cache,
        None,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        score_lens,
        scale,
        max_len,
        logit_cap,
        query_step=query_step,
    )
    _, scores = problem.run()
    assert scores is not None
    return scores
