"""Experts of a mixture that a token does without: arXiv:2512.21911, MoE, and the simpler rival, a smaller top-k."""

from __future__ import annotations

import torch


def skipped_experts(weights: torch.Tensor, thresholds: tuple[float, ...]) -> torch.Tensor:
    """Which of a token's experts are skipped: up to m of those with the lowest weights.

    The j lowest are skipped, for the largest j <= m at which their summed weight, relative to that of the experts
    kept, is below beta_j. Calibration sets beta_j; the paper takes the median of that ratio over a text, which skips
    j experts for half of all tokens.

    Args:
        weights: [T, K], of the K experts of each token, in any order, at least 0.
        thresholds: beta_1 .. beta_m, each at least 0, m < K; empty: nothing is skipped.

    Returns:
        [T, K], bool.
    """
    num_tokens, num_experts = weights.shape
    ascending, order = weights.float().sort(dim=1, stable=True)
    below = ascending.cumsum(1)
    total = below[:, -1:]
    num_skipped = torch.zeros(num_tokens, dtype=torch.int64, device=weights.device)
    for j, threshold in enumerate(thresholds, start=1):
        low = below[:, j - 1]
        passes = low < threshold * (total[:, 0] - low)
        num_skipped = torch.where(passes, torch.full_like(num_skipped, j), num_skipped)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_experts, device=weights.device).expand_as(order))
    return rank < num_skipped[:, None]


def without_skipped(weights: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """Weights [T, K] with those of skipped experts at 0 and the rest grown to the same sum."""
    kept = weights.masked_fill(skipped, 0)
    return kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))


def smaller_top_k(weights: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Which experts a static top-k reduction skips: all but the `num_kept` heaviest of each token. [T, K], bool."""
    order = weights.float().sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(weights.shape[1], device=weights.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) >= num_kept
