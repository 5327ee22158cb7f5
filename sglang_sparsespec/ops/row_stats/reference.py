"""Ground truth of row_stats and token_probs, in float64."""

from __future__ import annotations

import torch

from sglang_sparsespec.ops._rows import RowStats


def rows_at(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """[R, W, ...] -> [R, ...], the row of each request at its step, or its last one."""
    reqs = torch.arange(rows.shape[0], device=rows.device)
    return rows[reqs, steps.to(torch.int64).clamp(max=rows.shape[1] - 1)]


def stats_at(stats: RowStats, steps: torch.Tensor) -> RowStats:
    """Each [R, W] -> [R], like `rows_at`."""
    floor = None if stats.floor is None else rows_at(stats.floor, steps)
    return RowStats(rows_at(stats.best, steps), rows_at(stats.top, steps), rows_at(stats.mass, steps), floor)


def row_stats_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    steps: torch.Tensor | None,
    floors: torch.Tensor | None = None,
) -> RowStats:
    if steps is not None:
        row_floors = None if floors is None else floors.unsqueeze(1)
        stats = row_stats_reference(rows_at(logits, steps).unsqueeze(1), temperatures, None, row_floors)
        return stats_at(stats, torch.zeros_like(steps))
    rows = logits.double()
    if floors is not None:
        rows = rows.masked_fill(rows < floors.unsqueeze(2), -torch.inf)
    vocab_size = rows.shape[2]
    tops = rows.amax(dim=2, keepdim=True)
    # torch promises no order among ties
    tokens = torch.arange(vocab_size, device=rows.device)
    best = torch.where(rows == tops, tokens, vocab_size - 1).amin(dim=2)
    mass = ((rows - tops) / temperatures.double()[:, None, None]).exp().sum(dim=2)
    return RowStats(best, tops.squeeze(2).float(), mass.float(), floors)


def token_probs_reference(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    tokens: torch.Tensor,
    is_greedy: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens = tokens.shape[1]
    best, tops, mass = (values[:, :num_tokens] for values in (stats.best, stats.top, stats.mass))
    chosen = logits[:, :num_tokens].gather(2, tokens.to(torch.int64).unsqueeze(2)).squeeze(2).double()
    probs = ((chosen - tops) / temperatures.double().unsqueeze(1)).exp() / mass
    if stats.floor is not None:
        probs = probs * (chosen >= stats.floor[:, :num_tokens])
    if is_greedy is not None:
        probs = torch.where(is_greedy.unsqueeze(1), (tokens == best).double(), probs)
    return probs.float()
