"""gather_block and scatter_block, a torch call per buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.ops.kv_blocks import BlockLayout


def gather_block_torch(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    rows = slice(first, first + slots.shape[0])
    for view, buffer in zip(layout.views(block), buffers, strict=True):
        torch.index_select(buffer.flatten(1), 0, slots, out=view[rows])


def scatter_block_torch(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    rows = slice(first, first + slots.shape[0])
    for view, buffer in zip(layout.views(block), buffers, strict=True):
        buffer.flatten(1).index_copy_(0, slots.long(), view[rows])
