"""Rows of the KV pool, gathered into one flat block and scattered back: what makes one large copy of a request's KV.

Knows nothing of host memory or of streams. Invariant: a row that `slots` does not name is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.ops._checks import check_device, check_dtype, check_index, check_shape
from sglang_sparsespec.ops.kv_blocks.torch_impl import gather_block_torch, scatter_block_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["BlockLayout", "gather_block", "scatter_block"]


class BlockLayout(NamedTuple):
    """How tokens lie in a flat block: one buffer after the other, each [block_tokens, width]."""

    widths: tuple[int, ...]
    """Elements per token of each buffer of the pool."""
    block_tokens: int

    @property
    def numel(self) -> int:
        return self.block_tokens * sum(self.widths)

    def views(self, block: torch.Tensor) -> list[torch.Tensor]:
        """[block_tokens, width] per buffer, views of a flat block."""
        views, start = [], 0
        for width in self.widths:
            end = start + width * self.block_tokens
            views.append(block[start:end].view(self.block_tokens, width))
            start = end
        return views


def gather_block(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    """``views(block)[b][first + t] = buffers[b][slots[t]]`` for every buffer b and token t.

    Args:
        buffers: each [num_slots, ...], contiguous; all of one dtype.
        slots: [num_tokens], int64 or int32.
        block: [layout.numel], dtype and device of the buffers; rows before `first` and after the last are left alone.
        layout: of the block; its widths are those of the buffers.
        first: row of the block that takes the first token.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, or tokens that do not fit into the block.

    Not checked: that slots are in the pool.
    Reference: `kv_blocks.reference`.
    """
    _check(buffers, slots, block, layout, first)
    if block.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.kv_blocks.triton_impl import gather_block_triton

        gather_block_triton(buffers, slots, block, layout, first)
    else:
        gather_block_torch(buffers, slots, block, layout, first)


def scatter_block(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    """``buffers[b][slots[t]] = views(block)[b][first + t]`` for every buffer b and token t; see `gather_block`.

    Not checked: that slots are in the pool and differ from each other.
    """
    _check(buffers, slots, block, layout, first)
    if block.is_cuda:
        from sglang_sparsespec.ops.kv_blocks.triton_impl import scatter_block_triton

        scatter_block_triton(buffers, slots, block, layout, first)
    else:
        scatter_block_torch(buffers, slots, block, layout, first)


def _check(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int
) -> None:
    check_shape("block", block, (layout.numel,))
    check_index("slots", slots, (None,), block.device)
    if len(buffers) != len(layout.widths):
        raise ValueError(f"buffers: expected {len(layout.widths)}, as many as the layout has, got {len(buffers)}.")
    if not 0 <= first <= layout.block_tokens - slots.shape[0]:
        raise ValueError(f"first: {slots.shape[0]} tokens from row {first} do not fit {layout.block_tokens} rows.")
    dtype, device = block.dtype, block.device
    for index, (buffer, width) in enumerate(zip(buffers, layout.widths, strict=True)):
        # dozens of buffers for every block: the named checks run only where one of them fails
        if buffer.dtype == dtype and buffer.device == device and buffer.stride(0) == width and buffer.is_contiguous():
            continue
        name = f"buffers[{index}]"
        check_dtype(name, buffer, (dtype,))
        check_device(name, buffer, device)
        raise ValueError(f"{name}: expected contiguous rows of {width} elements, got {list(buffer.shape)}.")
