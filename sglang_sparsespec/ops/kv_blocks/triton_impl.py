# mypy: allow-untyped-defs
"""gather_block and scatter_block in one launch for all layers.

A launch per buffer would keep the scheduler's thread busy for about as long as the copy over PCIe takes: 72 of them for
each block of a model of 36 layers. The kernel finds the buffers through a table of addresses that is made once.
Invariant: elements are moved as words of up to 8 bytes and never interpreted.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.ops.kv_blocks import BlockLayout

# tokens of a program, and words of a row that it moves at a time; arbitrary, measure before changing
BLOCK_TOKENS = 8
BLOCK_WORDS = 256
_WORDS = ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))


# slots may begin anywhere in a request's list; neither that nor a length may cost a compilation while serving
@triton.jit(do_not_specialize=["num_tokens", "first"], do_not_specialize_on_alignment=["slots_ptr"])
def _move_kernel(
    table_ptr,
    slots_ptr,
    block_ptr,
    num_tokens,
    first,
    num_buffers,
    IS_GATHER: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """The table is [3, num_buffers] int64: addresses, words per token, where the buffer begins in the block."""
    i_buffer = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_tokens
    address = tl.load(table_ptr + i_buffer)
    width = tl.load(table_ptr + num_buffers + i_buffer)
    start = tl.load(table_ptr + 2 * num_buffers + i_buffer)
    p_buffer = address.to(tl.pointer_type(block_ptr.dtype.element_ty))
    b_slot = tl.load(slots_ptr + o_t, mask=m_t, other=0).to(tl.int64)
    o_row = start + (first + o_t).to(tl.int64) * width
    for i_word in range(0, width, BW):
        o_w = i_word + tl.arange(0, BW)
        mask = m_t[:, None] & (o_w < width)[None, :]
        p_pool = p_buffer + b_slot[:, None] * width + o_w[None, :]
        p_block = block_ptr + o_row[:, None] + o_w[None, :]
        if IS_GATHER:
            tl.store(p_block, tl.load(p_pool, mask=mask, other=0), mask=mask)
        else:
            tl.store(p_pool, tl.load(p_block, mask=mask, other=0), mask=mask)


@lru_cache(maxsize=8)
def _table(
    addresses: tuple[int, ...], widths: tuple[int, ...], block_tokens: int, device: torch.device
) -> torch.Tensor:
    """Made again when the host has replaced its buffers, which happens once or never."""
    starts = [block_tokens * sum(widths[:index]) for index in range(len(widths))]
    return torch.tensor([addresses, widths, starts], dtype=torch.int64, device=device)


def _move(
    buffers: Sequence[torch.Tensor],
    slots: torch.Tensor,
    block: torch.Tensor,
    layout: BlockLayout,
    first: int,
    is_gather: bool,
) -> None:
    num_tokens = slots.shape[0]
    if num_tokens == 0 or not buffers:
        return
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    row_bytes = tuple(width * block.element_size() for width in layout.widths)
    aligned = (*addresses, *row_bytes, block.data_ptr())
    dtype, size = next(word for word in _WORDS if all(number % word[1] == 0 for number in aligned))
    words = tuple(number // size for number in row_bytes)
    table = _table(addresses, words, layout.block_tokens, block.device)
    _move_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), len(buffers))](
        table,
        slots,
        block.view(torch.uint8).view(dtype),
        num_tokens,
        first,
        len(buffers),
        IS_GATHER=is_gather,
        BT=BLOCK_TOKENS,
        BW=BLOCK_WORDS,
        num_warps=4,
    )


def gather_block_triton(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    _move(buffers, slots, block, layout, first, is_gather=True)


def scatter_block_triton(
    buffers: Sequence[torch.Tensor], slots: torch.Tensor, block: torch.Tensor, layout: BlockLayout, first: int = 0
) -> None:
    _move(buffers, slots, block, layout, first, is_gather=False)
