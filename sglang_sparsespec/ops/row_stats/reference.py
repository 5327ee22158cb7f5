"""Ground truth of row_stats and token_probs, in float64."""

from __future__ import annotations

import torch

from sglang_sparsespec.ops._rows import RowStats


def rows_at(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """[R, W, ...] -> [R, ...], the row of each request at its step, or its last one."""
    reqs = torch.arange(rows.shape[0], device=rows.device)
    return rows[reqs, steps.to(torch.int64).clamp(max=rows.shape[1] - 1)]


def row_stats_reference(logits: torch.Tensor, temperatures: torch.Tensor, steps: torch.Tensor | None) -> RowStats:
    if steps is not None:
        stats = row_stats_reference(rows_at(logits, steps).unsqueeze(1), temperatures, None)
        return RowStats(*(values.squeeze(1) for values in stats))
    rows = logits.double()
    vocab_size = rows.shape[2]
    tops = rows.amax(dim=2, keepdim=True)
    # torch promises no order among ties
    tokens = torch.arange(vocab_size, device=rows.device)
    best = torch.where(rows == tops, tokens, vocab_size - 1).amin(dim=2)
    mass = ((rows - tops) / temperatures.double()[:, None, None]).exp().sum(dim=2)
    return RowStats(best, tops.squeeze(2).float(), mass.float())


def token_probs_reference(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    tokens: torch.Tensor,
    is_greedy: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens = tokens.shape[1]
    best, tops, mass = (values[:, :num_tokens] for values in stats)
    chosen = logits[:, :num_tokens].gather(2, tokens.to(torch.int64).unsqueeze(2)).squeeze(2).double()
    probs = ((chosen - tops) / temperatures.double().unsqueeze(1)).exp() / mass
    if is_greedy is not None:
        probs = torch.where(is_greedy.unsqueeze(1), (tokens == best).double(), probs)
    return probs.float()
