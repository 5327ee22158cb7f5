"""Ground truth of select_positions: a sort per request and score row, in Python."""

from __future__ import annotations

import functools
import math

import torch


def pooled_scores_reference(scores: torch.Tensor, pooling: int) -> torch.Tensor:
    """score(p) + mean(score(p - pooling .. p)), zeros before the start; the scores themselves for pooling 0."""
    if pooling == 0:
        return scores
    pooled = torch.empty_like(scores)
    for p in range(scores.shape[-1]):
        pooled[..., p] = scores[..., p] + scores[..., max(0, p - pooling) : p + 1].sum(-1) / (pooling + 1)
    return pooled


def select_positions_reference(
    scores: torch.Tensor,
    kv_lens: torch.Tensor,
    budgets: torch.Tensor,
    *,
    max_budget: int,
    sink: int,
    recent_window: int,
    pooling: int,
    granularity: int,
    share_heads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if scores.dim() == 4:
        run = functools.partial(
            select_positions_reference,
            max_budget=max_budget,
            sink=sink,
            recent_window=recent_window,
            pooling=pooling,
            granularity=granularity,
            share_heads=share_heads,
        )
        layers = [run(layer, kv_lens, budgets) for layer in scores]
        return torch.stack([positions for positions, _ in layers]), layers[0][1]
    if share_heads:
        scores = scores.mean(dim=1, keepdim=True)
    num_reqs, num_rows, num_positions = scores.shape
    g = granularity
    positions = torch.full((num_reqs, num_rows, max_budget), -1, dtype=torch.int32, device=scores.device)
    num_selected = torch.zeros(num_reqs, dtype=torch.int32, device=scores.device)
    pooled = pooled_scores_reference(scores, pooling)
    for r in range(num_reqs):
        num_blocks = min(int(kv_lens[r]), num_positions) // g
        num_kept = min(int(budgets[r]), max_budget) // g
        num_kept = min(num_kept, num_blocks)
        num_selected[r] = num_kept * g
        for h in range(num_rows):

            def rank(b: int, r: int = r, h: int = h, num_blocks: int = num_blocks) -> tuple[int, float]:
                if b * g < sink:
                    return (0, b)
                if (b + 1) * g > num_blocks * g - recent_window:
                    return (1, -b)
                score = float(pooled[r, h, b * g : (b + 1) * g].sum())
                return (2, math.inf if math.isnan(score) else -score)

            kept = sorted(range(num_blocks), key=rank)[:num_kept]
            for i, b in enumerate(kept):
                positions[r, h, i * g : (i + 1) * g] = torch.arange(b * g, (b + 1) * g)
    return positions, num_selected
