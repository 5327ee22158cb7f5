"""paged_attention as split-K flash attention.

Mean scores take the log-sum-exp of that pass and read K once more; anchored scores come out of the pass itself.

For few queries (a verify or a decode step): the rows of all queries and of a GQA group share each load of KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._paged_kernels import attend_paged_triton

if TYPE_CHECKING:
    import torch


def paged_attention_triton(
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
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch; `num_splits`, a power of two, is for tests."""
    attended, scores = attend_paged_triton(
        q,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        query_starts,
        query_lens,
        score_lens,
        scale=scale,
        max_len=max_len,
        logit_cap=logit_cap,
        out=out,
        num_splits=num_splits,
        anchored_scores=anchored_scores,
        score_starts=score_starts,
    )
    assert attended is not None
    return attended, scores
