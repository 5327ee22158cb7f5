"""capture_scores in two passes: split-K log-sum-exp, then probabilities averaged over queries and group.

K is read twice and nothing of size T x N is ever stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._paged_kernels import attend_paged_triton

if TYPE_CHECKING:
    import torch


def capture_scores_triton(
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
    num_splits: int | None = None,
) -> torch.Tensor:
    """Launch; `num_splits`, a power of two, is for tests."""
    _, scores = attend_paged_triton(
        q,
        k_cache,
        None,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        score_lens,
        scale=scale,
        max_len=max_len,
        logit_cap=logit_cap,
        num_splits=num_splits,
        query_step=query_step,
    )
    assert scores is not None
    return scores
