"""sparse_decode as split-K flash decoding: a program attends one share of a list for one KV head and its group.

Lengths stay on the device and the grid follows from shapes, so a launch can be captured in a CUDA graph.
Invariant: no pointer is formed from an entry at or past the length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._triton import (
    LOG2_E,
    choose_num_splits,
    dot_precision,
    load_rows,
    merge_splits,
    softcap,
    split_bounds,
)


@triton.jit(do_not_specialize=["num_splits"])
def _sparse_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    lens_ptr,
    rows_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    stride_q_r,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    stride_slots_r,
    stride_slots_h,
    stride_slots_s,
    stride_out_r,
    stride_out_h,
    scale,
    logit_cap,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # heads first: neighbouring programs then read neighbouring addresses
    i_h = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    kv_len = tl.load(lens_ptr + i_r).to(tl.int32)
    lo, hi = split_bounds(kv_len, i_split, num_splits, BS)

    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, BD)
    o_s = tl.arange(0, BS)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    # [BG, BD]
    p_q = q_ptr + i_r * stride_q_r + (i_h * G + o_g)[:, None] * stride_q_h + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_max = tl.full([BG], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BG], dtype=tl.float32)
    b_acc = tl.zeros([BG, BD], dtype=tl.float32)
    i_list = tl.load(rows_ptr + i_r).to(tl.int64) if HAS_ROWS else i_r
    p_slots = slots_ptr + i_list * stride_slots_r + i_h * stride_slots_h
    for start in range(lo, hi, BS):
        m_s = start + o_s < hi
        b_slot = tl.load(p_slots + (start + o_s).to(tl.int64) * stride_slots_s, mask=m_s, other=0).to(tl.int64)
        # [BS, BD]
        b_k = load_rows(k_ptr + i_h * stride_k_h, b_slot, stride_k_s, m_s, o_d, D)
        # [BG, BS], base-2 logits
        b_logit = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if HAS_CAP:
            b_logit = softcap(b_logit, logit_cap)
        b_logit = tl.where(m_s[None, :], b_logit * LOG2_E, float("-inf"))
        # a tile holds at least one entry, so the new maximum is finite
        b_new_max = tl.maximum(b_max, tl.max(b_logit, axis=1))
        b_decay = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_logit - b_new_max[:, None])
        b_v = load_rows(v_ptr + i_h * stride_v_h, b_slot, stride_v_s, m_s, o_d, D)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new_max

    b_acc = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    if not IS_SPLIT:
        p_out = out_ptr + i_r * stride_out_r + (i_h * G + o_g)[:, None] * stride_out_h + o_d[None, :]
        tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_q)
    else:
        # partial results: [R, HQ, num_splits, D] and [R, HQ, num_splits]
        o_row = ((i_r * tl.num_programs(0) + i_h) * G + o_g) * num_splits + i_split
        if lo < hi:
            tl.store(part_ptr + o_row[:, None] * D + o_d[None, :], b_acc, mask=m_q)
        tl.store(lse_ptr + o_row, b_max + tl.log2(b_sum), mask=o_g < G)


@triton.jit
def _reduce_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    stride_out_r,
    stride_out_h,
    D: tl.constexpr,
    BD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_hq = tl.program_id(1)
    o_d = tl.arange(0, BD)
    row = i_r * tl.num_programs(1) + i_hq
    b_out = merge_splits(part_ptr, lse_ptr, row * NUM_SPLITS, 1, o_d, D, NUM_SPLITS)
    p_out = out_ptr + i_r * stride_out_r + i_hq * stride_out_h + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=o_d < D)


def choose_tiles(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Entries per tile, and how many warps and loads in flight a program has (docs/kernels.md).

    One warp: lists are short, and many small programs hide the gather's latency better than a few large ones.
    """
    is_large = head_dim > 128 or dtype == torch.float32
    return {
        "BS": 16 if is_large else 32,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": 1,
        "num_stages": 3,
    }


def sparse_decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    kv_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Launch; `num_splits`, a power of two, is for tests."""
    num_reqs, num_q_heads, head_dim = q.shape
    num_kv_heads, max_kv_len = k_cache.shape[1], kv_slots.shape[2]
    group = num_q_heads // num_kv_heads
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_reqs == 0:
        return out
    tiles = choose_tiles(head_dim, q.dtype)
    block, block_dim = tiles["BS"], tiles["BD"]
    if num_splits is None:
        num_splits = choose_num_splits(num_reqs * num_kv_heads, max_kv_len, block, q.device)
    part = lse = out
    if num_splits > 1:
        part = torch.empty((num_reqs, num_q_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_reqs, num_q_heads, num_splits), dtype=torch.float32, device=q.device)
    _sparse_attend_kernel[(num_kv_heads, num_reqs, num_splits)](
        q,
        k_cache,
        v_cache,
        kv_slots,
        kv_lens,
        kv_lens if kv_rows is None else kv_rows,
        out,
        part,
        lse,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        kv_slots.stride(0),
        0 if kv_slots.shape[1] == 1 else kv_slots.stride(1),
        kv_slots.stride(2),
        out.stride(0),
        out.stride(1),
        scale,
        logit_cap,
        num_splits,
        G=group,
        D=head_dim,
        BG=max(16, triton.next_power_of_2(group)),
        IS_SPLIT=num_splits > 1,
        HAS_ROWS=kv_rows is not None,
        HAS_CAP=logit_cap > 0.0,
        PRECISION=dot_precision(q.dtype),
        **tiles,
    )
    if num_splits > 1:
        _reduce_kernel[(num_reqs, num_q_heads)](
            part, lse, out, out.stride(0), out.stride(1), D=head_dim, BD=block_dim, NUM_SPLITS=num_splits, num_warps=4
        )
    return out
