"""Channels of feed-forward layers that drafts go without, and how many of them no row of a batch would have needed.

A product that leaves channels out reads their weights unless every row of the batch leaves them out. So beside the
share that is dropped of one row (arXiv:2512.21911 calls it the sparsity factor) stands the share dropped by all rows of
a batch. Invariant: modules are as they were outside `applied()`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from sglang_sparsespec.sparsity.ffn import drop_channels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BATCH_SIZES: Final = (1, 8, 32, 128)
MAX_ROWS: Final = 512
"""Rows that are remembered, of the first drafts."""
_DRAWS = 32


class ChannelShares(NamedTuple):
    """Of the channels of a layer, mean over layers."""

    dropped: float
    """By one row, mean over all rows of drafts."""
    by_all: dict[int, float]
    """By every one of so many rows, drawn at random from those that are remembered; without sizes beyond these."""


class ChannelDrop:
    """Drops the small channels of some forwards, and counts.

    Args:
        down_projections: by layer; their input is the gated activation.
        threshold: tau; 0 drops nothing and counts nothing.
    """

    def __init__(self, down_projections: Sequence[torch.nn.Module], threshold: float) -> None:
        self._modules, self._threshold = list(down_projections), threshold
        self._dropped = [0] * len(self._modules)
        self._channels = [0] * len(self._modules)
        # by layer: [rows, intermediate_size], bool
        self._masks: list[list[torch.Tensor]] = [[] for _ in self._modules]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Every forward inside goes without small channels."""
        handles = []
        if self._threshold > 0:
            for layer, module in enumerate(self._modules):
                handles.append(module.register_forward_pre_hook(self._hook(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Any:
        def drop(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            (hidden,) = args
            self._count(layer, hidden.flatten(0, -2))
            return drop_channels(hidden, self._threshold)

        return drop

    def _count(self, layer: int, hidden: torch.Tensor) -> None:
        is_small = hidden.abs() < self._threshold
        self._dropped[layer] += int(is_small.sum())
        self._channels[layer] += is_small.numel()
        room = MAX_ROWS - sum(map(len, self._masks[layer]))
        if room > 0:
            self._masks[layer].append(is_small[:room].cpu())

    def shares(self) -> ChannelShares | None:
        """Of what was dropped so far; None where nothing could be."""
        if self._threshold == 0 or not all(self._channels):
            return None
        dropped = sum(small / count for small, count in zip(self._dropped, self._channels, strict=True))
        by_layer = [torch.cat(masks) for masks in self._masks]
        num_rows = len(by_layer[0])
        generator = torch.Generator().manual_seed(0)
        by_all = {}
        for size in BATCH_SIZES:
            if size > num_rows:
                continue
            draws = [torch.randperm(num_rows, generator=generator)[:size] for _ in range(_DRAWS)]
            found = [mask[rows].all(0).double().mean() for mask in by_layer for rows in draws]
            by_all[size] = float(torch.stack(found).mean())
        return ChannelShares(dropped / len(self._modules), by_all)
