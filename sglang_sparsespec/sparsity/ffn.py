"""Channels of a gated feed-forward layer that are too small to matter: arXiv:2512.21911, FFN."""

from __future__ import annotations

import torch


def drop_channels(hidden: torch.Tensor, threshold: float) -> torch.Tensor:
    """The gated activation with every |channel| below tau set to 0, as the down projection then sees it.

    Args:
        hidden: [..., intermediate_size], act(gate) * up.
        threshold: tau, at least 0; 0 drops nothing.
    """
    return hidden if threshold == 0 else torch.where(hidden.abs() < threshold, torch.zeros_like(hidden), hidden)


def dropped_share(hidden: torch.Tensor, threshold: float) -> float:
    """Share of channels that `drop_channels` sets to 0 (the paper's sparsity factor)."""
    return (hidden.abs() < threshold).double().mean().item() if hidden.numel() else 0.0
