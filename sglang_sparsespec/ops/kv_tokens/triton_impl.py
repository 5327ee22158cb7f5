# mypy: allow-untyped-defs
"""gather_tokens and scatter_tokens in one launch for all layers.

A launch per buffer would keep the scheduler's thread busy for about as long as the copy over PCIe takes: 72 of them for
a model of 36 layers. The kernel finds the buffers through a table of addresses that is made once.
Invariant: elements are moved as words of up to 8 bytes and never interpreted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from sglang_sparsespec.ops.kv_tokens import KvBuffers

# tokens of a program, and words of a row that it moves at a time; arbitrary, measure before changing
BLOCK_TOKENS = 8
BLOCK_WORDS = 256
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


# slots may begin anywhere in a request's list; neither that nor a length may cost a compilation while serving
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr"])
def _move_kernel(
    table_ptr,
    slots_ptr,
    rows_ptr,
    num_tokens,
    row_words,
    num_buffers,
    IS_GATHER: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """The table is KvBuffers.table's."""
    i_buffer = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_tokens
    address = tl.load(table_ptr + i_buffer)
    width = tl.load(table_ptr + num_buffers + i_buffer)
    start = tl.load(table_ptr + 2 * num_buffers + i_buffer)
    p_buffer = address.to(tl.pointer_type(rows_ptr.dtype.element_ty))
    b_slot = tl.load(slots_ptr + o_t, mask=m_t, other=0).to(tl.int64)
    o_row = start + o_t.to(tl.int64) * row_words
    for i_word in range(0, width, BW):
        o_w = i_word + tl.arange(0, BW)
        mask = m_t[:, None] & (o_w < width)[None, :]
        p_pool = p_buffer + b_slot[:, None] * width + o_w[None, :]
        p_row = rows_ptr + o_row[:, None] + o_w[None, :]
        if IS_GATHER:
            tl.store(p_row, tl.load(p_pool, mask=mask, other=0), mask=mask)
        else:
            tl.store(p_pool, tl.load(p_row, mask=mask, other=0), mask=mask)


def _move(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor, is_gather: bool) -> None:
    num_tokens, num_buffers = slots.shape[0], len(pool.buffers)
    if num_tokens == 0:
        return
    word_bytes = math.gcd(pool.word_bytes, rows.data_ptr())
    _move_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_buffers)](
        pool.table(word_bytes),
        slots,
        rows.view(torch.uint8).view(_WORDS[word_bytes]),
        num_tokens,
        pool.width * rows.element_size() // word_bytes,
        num_buffers,
        IS_GATHER=is_gather,
        BT=BLOCK_TOKENS,
        BW=BLOCK_WORDS,
        num_warps=4,
    )


def gather_tokens_triton(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    _move(pool, slots, rows, is_gather=True)


def scatter_tokens_triton(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    _move(pool, slots, rows, is_gather=False)
