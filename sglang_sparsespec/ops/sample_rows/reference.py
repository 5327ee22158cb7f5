"""Ground truth of sample_rows: whole distributions from float64, one cumulative sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.ops.row_stats.reference import rows_at, stats_at

if TYPE_CHECKING:
    from sglang_sparsespec.ops._rows import RowStats


def sample_rows_reference(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    coins: torch.Tensor,
    *,
    steps: torch.Tensor | None,
    draft_steps: torch.Tensor | None,
    is_greedy: torch.Tensor | None,
    draft_logits: torch.Tensor | None,
    draft_stats: RowStats | None,
    draft_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if steps is None:
        steps = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    p = _probs(rows_at(logits, steps), stats_at(stats, steps), temperatures, is_greedy)
    mass = p
    drafts = draft_tokens if draft_logits is None else draft_logits
    if drafts is not None and draft_steps is not None:
        if draft_stats is not None:
            q = _probs(rows_at(drafts, draft_steps), draft_stats, temperatures, is_greedy)
        else:
            q = torch.zeros_like(p).scatter_(1, rows_at(drafts, draft_steps).to(torch.int64).unsqueeze(1), 1.0)
        residual = (p - q).clamp(min=0.0)
        was_rejected = draft_steps < drafts.shape[1]
        takes_residual = was_rejected & (residual.sum(dim=1) > 0)
        mass = torch.where(takes_residual.unsqueeze(1), residual, p)

    cdf = mass.double().cumsum(dim=1)
    tokens = torch.arange(mass.shape[1], device=mass.device)
    exceeds = (cdf > coins.double().unsqueeze(1) * cdf[:, -1:]) & (mass > 0)
    past = mass.shape[1]
    first = torch.where(exceeds, tokens, past).amin(dim=1)
    # only rounding lets a coin below 1 fall behind the last token
    last = torch.where(mass > 0, tokens, 0).amax(dim=1)
    drawn = torch.where(first < past, first, last)
    return drawn, p.gather(1, drawn.unsqueeze(1)).squeeze(1)


def _probs(
    rows: torch.Tensor, stats: RowStats, temperatures: torch.Tensor, is_greedy: torch.Tensor | None
) -> torch.Tensor:
    """[R, V] logits -> [R, V] float32."""
    scaled = (rows.double() - stats.top.unsqueeze(1)) / temperatures.double().unsqueeze(1)
    probs = (scaled.exp() / stats.mass.unsqueeze(1)).float()
    if stats.floor is not None:
        probs = probs * (rows >= stats.floor.unsqueeze(1))
    if is_greedy is not None:
        tokens = torch.arange(rows.shape[1], device=rows.device)
        probs = torch.where(is_greedy.unsqueeze(1), (tokens == stats.best.unsqueeze(1)).float(), probs)
    return probs
