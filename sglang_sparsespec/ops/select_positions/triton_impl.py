# mypy: allow-untyped-defs
"""select_positions in one launch for any number of layers: a program takes whole rows, one after the other.

A row's keys are written once to a scratch that stays in cache, the last kept key is found bit by bit, and the kept
blocks are written in ascending order, which is also the order that a gather likes.
Invariant: nothing at or past a row's length is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._launch import num_multiprocessors, num_select_programs

# keys of a block, highest first: sinks in (2e38, 3e38], recent in [1e38, 2e38), scored within +-3e37; as in torch_impl
SINK_KEY = tl.constexpr(3.0e38)
RECENT_KEY = tl.constexpr(1.0e38)
KEY_SPAN = tl.constexpr(0.9e38)
SCORE_BOUND = tl.constexpr(3.0e37)
# blocks that a program handles at a time
_BLOCK = 1024


@triton.jit
def _ordered(b_key):
    """float32 as int32 of the same order."""
    b_bits = b_key.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


# a number of requests must not cost a compilation
@triton.jit(do_not_specialize=["num_rows", "num_reqs", "num_lists", "max_len", "max_budget"])
def _select_kernel(
    scores_ptr,
    kv_lens_ptr,
    budgets_ptr,
    score_starts_ptr,
    scratch_ptr,
    positions_ptr,
    num_selected_ptr,
    stride_scores_l,
    stride_scores_h,
    num_rows,
    num_reqs,
    num_lists,
    num_heads,
    max_len,
    max_budget,
    sink,
    recent_window,
    POOLING: tl.constexpr,
    G: tl.constexpr,
    IS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows are (layer, request, list); a list is a score row, or all score rows of a request where IS_SHARED."""
    o_b = tl.arange(0, BLOCK)
    # of this program: the mean over heads, then the keys
    p_mean = scratch_ptr + tl.program_id(0).to(tl.int64) * 2 * max_len
    p_key = p_mean + max_len
    for i_row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = i_row + tl.zeros([], dtype=tl.int64)
        i_lr = row // num_lists
        i_list = row % num_lists
        i_l = i_lr // num_reqs
        i_r = i_lr % num_reqs
        kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + i_r).to(tl.int32), 0), max_len)
        budget = tl.minimum(tl.maximum(tl.load(budgets_ptr + i_r).to(tl.int32), 0), max_budget)
        num_blocks = kv_len // G
        num_kept = tl.minimum(budget // G, num_blocks)
        if row < num_reqs * num_lists and i_list == 0:
            tl.store(num_selected_ptr + i_r, num_kept * G)

        p_scores = scores_ptr + i_l * stride_scores_l + tl.load(score_starts_ptr + i_r).to(tl.int64)
        if IS_SHARED:
            for start in range(0, num_blocks * G, BLOCK):
                o_p = start + o_b
                b_total = tl.zeros([BLOCK], dtype=tl.float32)
                for head in range(0, num_heads):
                    b_total += tl.load(p_scores + head * stride_scores_h + o_p, mask=o_p < num_blocks * G, other=0.0)
                tl.store(p_mean + o_p, b_total / num_heads, mask=o_p < num_blocks * G)
            tl.debug_barrier()
            p_row = p_mean
        else:
            p_row = p_scores + i_list * stride_scores_h

        for start in range(0, num_blocks, BLOCK):
            o_block = start + o_b
            m_block = o_block < num_blocks
            b_key = tl.zeros([BLOCK], dtype=tl.float32)
            for i in tl.static_range(G):
                o_p = o_block * G + i
                b_score = tl.load(p_row + o_p, mask=m_block, other=0.0)
                if POOLING > 0:
                    b_window = b_score
                    for back in tl.static_range(1, POOLING + 1):
                        b_window += tl.load(p_row + o_p - back, mask=m_block & (o_p >= back), other=0.0)
                    b_score += b_window / (POOLING + 1)
                b_key += b_score
            # NaN is the lowest score
            b_key = tl.where(b_key == b_key, b_key, -SCORE_BOUND)
            b_key = tl.minimum(tl.maximum(b_key, -SCORE_BOUND), SCORE_BOUND)
            b_offset = tl.minimum(o_block, num_blocks).to(tl.float32) * (
                KEY_SPAN / tl.maximum(num_blocks, 1).to(tl.float32)
            )
            b_key = tl.where((o_block + 1) * G > num_blocks * G - recent_window, RECENT_KEY + b_offset, b_key)
            b_key = tl.where(o_block * G < sink, SINK_KEY - b_offset, b_key)
            tl.store(p_key + o_block, b_key, mask=m_block)
        tl.debug_barrier()

        # the highest key that at least num_kept blocks reach, from its highest bit down
        last_kept = tl.full([], -(2**31), dtype=tl.int64)
        for bit in range(0, 32):
            candidate = last_kept + (tl.full([], 1, dtype=tl.int64) << (31 - bit))
            b_count = tl.zeros([BLOCK], dtype=tl.int32)
            for start in range(0, num_blocks, BLOCK):
                m_block = start + o_b < num_blocks
                b_key = _ordered(tl.load(p_key + start + o_b, mask=m_block, other=0.0))
                b_count += (m_block & (b_key >= candidate.to(tl.int32))).to(tl.int32)
            last_kept = tl.where(tl.sum(b_count, axis=0) >= num_kept, candidate, last_kept)
        b_count = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, num_blocks, BLOCK):
            m_block = start + o_b < num_blocks
            b_key = _ordered(tl.load(p_key + start + o_b, mask=m_block, other=0.0))
            b_count += (m_block & (b_key > last_kept.to(tl.int32))).to(tl.int32)
        num_ties = num_kept - tl.sum(b_count, axis=0)

        p_positions = positions_ptr + row * max_budget
        num_written = 0
        num_tied = 0
        for start in range(0, num_blocks, BLOCK):
            o_block = start + o_b
            m_block = o_block < num_blocks
            b_key = _ordered(tl.load(p_key + o_block, mask=m_block, other=0.0))
            m_tied = m_block & (b_key == last_kept.to(tl.int32))
            b_tie = num_tied + tl.cumsum(m_tied.to(tl.int32), axis=0)
            m_kept = m_block & ((b_key > last_kept.to(tl.int32)) | (m_tied & (b_tie <= num_ties)))
            b_to = num_written + tl.cumsum(m_kept.to(tl.int32), axis=0) - 1
            for i in tl.static_range(G):
                tl.store(p_positions + b_to * G + i, o_block * G + i, mask=m_kept)
            num_written += tl.sum(m_kept.to(tl.int32), axis=0)
            num_tied += tl.sum(m_tied.to(tl.int32), axis=0)
        for start in range(num_kept * G, max_budget, BLOCK):
            tl.store(p_positions + start + o_b, tl.full([BLOCK], -1, dtype=tl.int32), mask=start + o_b < max_budget)
        # the next row writes to the scratch that slower threads may still read
        tl.debug_barrier()


def select_positions_triton(
    scores: torch.Tensor,
    kv_lens: torch.Tensor,
    budgets: torch.Tensor,
    score_starts: torch.Tensor | None,
    *,
    max_len: int | None,
    max_budget: int,
    sink: int,
    recent_window: int,
    pooling: int,
    granularity: int,
    share_heads: bool,
    block: int = _BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; scores in any form that `select_positions` takes. `block`, a power of two, is for tests."""
    num_reqs, num_heads = kv_lens.shape[0], scores.shape[-2]
    has_layers = scores.dim() == 4 or score_starts is not None
    num_layers = scores.shape[0] if has_layers else 1
    num_lists = 1 if share_heads else num_heads
    num_rows = num_layers * num_reqs * num_lists
    positions = torch.empty((num_layers, num_reqs, num_lists, max_budget), dtype=torch.int32, device=scores.device)
    num_selected = torch.empty(num_reqs, dtype=torch.int32, device=scores.device)
    shape = positions.shape if has_layers else positions.shape[1:]
    if score_starts is None:
        # a request's columns begin at its own row
        scores = scores.contiguous()
        max_len = scores.shape[-1]
        score_starts = torch.arange(num_reqs, device=scores.device) * (num_heads * max_len)
        stride_layer = num_reqs * num_heads * max_len
    else:
        stride_layer = scores.stride(0)
    assert max_len is not None
    if num_rows == 0:
        return positions.view(shape), num_selected.zero_()
    num_programs = num_select_programs(num_rows, max_len, num_multiprocessors(scores.device))
    scratch = torch.empty((num_programs, 2, max_len), dtype=torch.float32, device=scores.device)
    _select_kernel[(num_programs,)](
        scores,
        kv_lens,
        budgets,
        score_starts,
        scratch,
        positions,
        num_selected,
        stride_layer,
        scores.stride(-2),
        num_rows,
        num_reqs,
        num_lists,
        num_heads,
        max_len,
        max_budget,
        sink,
        recent_window,
        POOLING=pooling,
        G=granularity,
        IS_SHARED=share_heads and num_heads > 1,
        BLOCK=block,
        num_warps=4,
    )
    return positions.view(shape), num_selected
