"""gather_block and scatter_block as loops over buffers and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sglang_sparsespec.ops.kv_blocks import BlockLayout


def gather_block_reference(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    start = 0
    for buffer, width in zip(buffers, layout.widths, strict=True):
        for token, slot in enumerate(slots.tolist()):
            at = start + (first + token) * width
            block[at : at + width] = buffer[slot].flatten()
        start += layout.block_tokens * width


def scatter_block_reference(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    start = 0
    for buffer, width in zip(buffers, layout.widths, strict=True):
        for token, slot in enumerate(slots.tolist()):
            at = start + (first + token) * width
            buffer[slot] = block[at : at + width].view(buffer.shape[1:])
        start += layout.block_tokens * width
