# mypy: allow-untyped-defs
"""Triton kernels over paged KV: split-K attention with log-sum-exp, its reduction, and two ways to scores.

The exact scores (`mean`) need the log-sum-exp of a whole row, so a second kernel reads K once more. The `anchored` ones
come out of the attention pass: each row is normalised by what it pays to a few anchor positions, which every program
can work out for itself before its first tile.

The T * G query rows that share a KV head stand together as the M dimension, query-major: row t * G + g.
Lengths stay on the device and grids follow from shapes. Invariant: no position at or past a request's end is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._launch import (
    MIN_BLOCK_ROWS,
    block_rows,
    choose_verify_splits,
    is_small_tile,
    num_multiprocessors,
    num_row_tiles,
    verify_resident,
)
from sglang_sparsespec.ops._paged import NUM_ANCHORS, NUM_FIRST_ANCHORS
from sglang_sparsespec.ops._triton import (
    LOG2_E,
    dot_precision,
    hide_unseen,
    load_rows,
    merge_splits,
    softcap,
    split_bounds,
)


# a number of splits or of requests must not cost a compilation
@triton.jit(do_not_specialize=["num_splits", "max_len"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    req_to_token_ptr,
    pool_rows_ptr,
    starts_ptr,
    lens_ptr,
    part_ptr,
    lse_ptr,
    scores_ptr,
    score_starts_ptr,
    stride_q_r,
    stride_q_t,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    stride_table,
    stride_scores_m,
    stride_scores_h,
    scale,
    logit_cap,
    num_kv_heads,
    num_rows,
    max_len,
    query_step,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK_EVERY_TILE: tl.constexpr,
    NUM_ANCHORS: tl.constexpr = 0,
    NUM_FIRST: tl.constexpr = 0,
):
    """One share of one request's positions for one KV head; with NUM_ANCHORS also the anchored scores of the share."""
    i_rh = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(2)
    i_r = i_rh // num_kv_heads
    i_h = i_rh % num_kv_heads
    query_start = tl.load(starts_ptr + i_r).to(tl.int32)
    query_len = tl.load(lens_ptr + i_r).to(tl.int32)

    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    # a tile without a valid query has nothing to attend
    end = tl.minimum(query_start + (query_len - 1) * query_step + 1, max_len)
    kv_len = tl.where(tl.program_id(1) * BM < query_len * G, end, 0)
    lo, hi = split_bounds(kv_len, i_split, num_splits, BN)
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_t = o_m // G
    m_out = (o_m < num_rows)[:, None] & (o_d < D)[None, :]
    # partial results: [R, H, num_splits, M, D] and [R, H, num_splits, M]
    o_row = (i_rh * num_splits + i_split) * num_rows + o_m
    # the output itself: [R, T, HQ, D]
    o_out = ((i_r * (num_rows // G) + o_t) * num_kv_heads + i_h) * G + o_m % G
    if lo >= hi:
        tl.store(lse_ptr + o_row, tl.full([BM], float("-inf"), dtype=tl.float32), mask=o_m < num_rows)
        if HAS_VALUE and not IS_SPLIT:
            b_none = tl.zeros([BM, BD], dtype=part_ptr.dtype.element_ty)
            tl.store(part_ptr + o_out[:, None] * D + o_d[None, :], b_none, mask=m_out)
        return

    m_q = (o_m < query_len * G)[:, None] & (o_d < D)[None, :]
    # [BM, BD]
    p_q = q_ptr + i_r * stride_q_r + o_t[:, None] * stride_q_t + (i_h * G + o_m % G)[:, None] * stride_q_h
    b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    p_table = req_to_token_ptr + tl.load(pool_rows_ptr + i_r).to(tl.int64) * stride_table
    # what is left to multiply a logit with, in the maximum and in the exponent
    to_log2 = 1.0 if MASK_EVERY_TILE else LOG2_E if HAS_CAP else scale * LOG2_E
    seen_by_all = tl.minimum(query_start + 1, hi)
    if NUM_ANCHORS > 0:
        # what each row pays to the anchors, as a log-sum-exp: [BM]
        b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
        b_anchor = tl.zeros([BM], dtype=tl.float32)
        for first in tl.static_range(0, NUM_ANCHORS, BN):
            o_a = first + o_n
            # all positions where there are too few, else the first ones and the newest
            o_a = tl.where((o_a < NUM_FIRST) | (query_start < NUM_ANCHORS), o_a, query_start - NUM_ANCHORS + o_a)
            m_a = o_a < tl.minimum(query_start, max_len)
            b_slot = tl.load(p_table + o_a, mask=m_a, other=0).to(tl.int64)
            b_k = load_rows(k_ptr + i_h * stride_k_h, b_slot, stride_k_s, m_a, o_d, D)
            b_logit = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            if HAS_CAP:
                b_logit = softcap(b_logit, logit_cap)
            b_logit = tl.where(m_a[None, :], b_logit * LOG2_E, float("-inf"))
            b_new_top = tl.maximum(b_top, tl.max(b_logit, axis=1))
            b_base = tl.where(b_new_top > float("-inf"), b_new_top, 0.0)
            b_anchor = b_anchor * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_logit - b_base[:, None]), axis=1)
            b_top = b_new_top
        # without anchors nothing is selectable, and any number serves
        b_anchor_lse = tl.where(b_anchor > 0.0, b_top + tl.log2(b_anchor), 0.0)
        m_row = o_m < query_len * G
        # of a mean over the rows
        row_share = 1.0 / (query_len * G)
        score_end = tl.minimum(tl.minimum(query_start, hi), max_len)
        p_scores = scores_ptr + tl.program_id(1).to(tl.int64) * stride_scores_m + i_h * stride_scores_h
        p_scores += tl.load(score_starts_ptr + i_r).to(tl.int64)
    for start in range(lo, hi, BN):
        o_p = start + o_n
        m_n = o_p < hi
        b_slot = tl.load(p_table + o_p, mask=m_n, other=0).to(tl.int64)
        # [BN, BD]
        b_k = load_rows(k_ptr + i_h * stride_k_h, b_slot, stride_k_s, m_n, o_d, D)
        # [BM, BN], base-2 logits once multiplied
        b_logit = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if HAS_CAP or MASK_EVERY_TILE:
            b_logit = b_logit * scale
        if HAS_CAP:
            b_logit = softcap(b_logit, logit_cap)
        # nearly every tile is one that all queries see, but telling costs more with MASK_EVERY_TILE (docs/kernels.md)
        if MASK_EVERY_TILE:
            b_logit = hide_unseen(b_logit * LOG2_E, m_n, o_p, query_start + o_t * query_step)
        elif start + BN > seen_by_all:
            b_logit = hide_unseen(b_logit, m_n, o_p, query_start + o_t * query_step)
        # early queries may see nothing of a late tile
        b_new_max = tl.maximum(b_max, tl.max(b_logit, axis=1) * to_log2)
        b_base = tl.where(b_new_max > float("-inf"), b_new_max, 0.0)
        b_decay = tl.exp2(b_max - b_base)
        b_p = tl.exp2(b_logit * to_log2 - b_base[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        if NUM_ANCHORS > 0:
            # exp2(logit - anchors) from the exponential at hand; the bounds keep it finite
            b_weight = tl.where(m_row, tl.exp2(tl.minimum(b_base - b_anchor_lse, 126.0)), 0.0) * row_share
            b_score = tl.sum(tl.minimum(b_p * b_weight[:, None], row_share), axis=0)
            tl.store(p_scores + o_p, b_score.to(scores_ptr.dtype.element_ty), mask=o_p < score_end)
        if HAS_VALUE:
            b_v = load_rows(v_ptr + i_h * stride_v_h, b_slot, stride_v_s, m_n, o_d, D)
            b_acc = b_acc * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new_max

    m_used = b_sum > 0.0
    b_sum = tl.where(m_used, b_sum, 1.0)
    tl.store(lse_ptr + o_row, tl.where(m_used, b_max + tl.log2(b_sum), float("-inf")), mask=o_m < num_rows)
    if HAS_VALUE and IS_SPLIT:
        tl.store(part_ptr + o_row[:, None] * D + o_d[None, :], b_acc / b_sum[:, None], mask=m_q)
    elif HAS_VALUE:
        # rows of invalid queries saw tokens too, with a query of zeros
        b_out = tl.where(m_q, b_acc / b_sum[:, None], 0.0)
        tl.store(part_ptr + o_out[:, None] * D + o_d[None, :], b_out.to(part_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _reduce_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lens_ptr,
    num_kv_heads,
    num_rows,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One query row of out [R, T, HQ, D], contiguous."""
    i_rh = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1)
    i_r = i_rh // num_kv_heads
    i_h = i_rh % num_kv_heads
    o_d = tl.arange(0, BD)
    o_out = ((i_r * (num_rows // G) + i_m // G) * num_kv_heads + i_h) * G + i_m % G
    p_out = out_ptr + o_out * D + o_d
    if i_m >= tl.load(lens_ptr + i_r).to(tl.int32) * G:
        tl.store(p_out, tl.zeros([BD], dtype=out_ptr.dtype.element_ty), mask=o_d < D)
        return
    b_out = merge_splits(part_ptr, part_lse_ptr, i_rh * NUM_SPLITS * num_rows + i_m, num_rows, o_d, D, NUM_SPLITS)
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def _scores_kernel(
    q_ptr,
    k_ptr,
    req_to_token_ptr,
    pool_rows_ptr,
    starts_ptr,
    lens_ptr,
    score_lens_ptr,
    part_lse_ptr,
    scores_ptr,
    stride_q_r,
    stride_q_t,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_table,
    scale,
    logit_cap,
    num_kv_heads,
    num_rows,
    max_len,
    query_step,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Probabilities of one tile of positions, averaged over the valid rows: scores [R, H, max_len], contiguous."""
    i_rh = tl.program_id(0).to(tl.int64)
    i_r = i_rh // num_kv_heads
    i_h = i_rh % num_kv_heads
    o_p = tl.program_id(1) * BN + tl.arange(0, BN)
    query_start = tl.load(starts_ptr + i_r).to(tl.int32)
    query_len = tl.load(lens_ptr + i_r).to(tl.int32)
    kv_len = query_start + (query_len - 1) * query_step + 1
    end = tl.minimum(tl.minimum(kv_len, tl.load(score_lens_ptr + i_r).to(tl.int32)), max_len)
    end = tl.where(query_len > 0, end, 0)
    p_scores = scores_ptr + i_rh * max_len + o_p
    if tl.program_id(1) * BN >= end:
        tl.store(p_scores, tl.zeros([BN], dtype=tl.float32), mask=o_p < max_len)
        return

    o_d = tl.arange(0, BD)
    m_n = o_p < end
    p_table = req_to_token_ptr + tl.load(pool_rows_ptr + i_r).to(tl.int64) * stride_table
    b_slot = tl.load(p_table + o_p, mask=m_n, other=0).to(tl.int64)
    # [BD, BN]
    b_k = tl.trans(load_rows(k_ptr + i_h * stride_k_h, b_slot, stride_k_s, m_n, o_d, D))
    b_total = tl.zeros([BN], dtype=tl.float32)
    o_split = tl.arange(0, NUM_SPLITS)
    for first in range(0, query_len * G, BM):
        o_m = first + tl.arange(0, BM)
        o_t = o_m // G
        m_m = o_m < query_len * G
        # [BM, NUM_SPLITS] -> [BM]
        p_lse = part_lse_ptr + (i_rh * NUM_SPLITS + o_split[None, :]) * num_rows + o_m[:, None]
        b_lse = tl.load(p_lse, mask=m_m[:, None], other=0.0)
        b_top = tl.max(b_lse, axis=1)
        b_lse = b_top + tl.log2(tl.sum(tl.exp2(b_lse - b_top[:, None]), axis=1))
        # [BM, BD]
        p_q = q_ptr + i_r * stride_q_r + o_t[:, None] * stride_q_t + (i_h * G + o_m % G)[:, None] * stride_q_h
        b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
        b_logit = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        if HAS_CAP:
            b_logit = softcap(b_logit, logit_cap)
        m_seen = m_m[:, None] & (o_p[None, :] <= query_start + o_t[:, None] * query_step)
        b_total += tl.sum(tl.where(m_seen, tl.exp2(b_logit * LOG2_E - b_lse[:, None]), 0.0), axis=0)
    b_total = tl.where(m_n, b_total / (query_len * G), 0.0)
    tl.store(p_scores, b_total, mask=o_p < max_len)


def choose_tiles(num_rows: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and positions per tile, and how many warps and loads in flight a program has (docs/kernels.md)."""
    num_block_rows = block_rows(num_rows)
    if head_dim > 128 or dtype == torch.float32:
        block, warps, stages = 32, 8 if num_block_rows == 64 else 4, 2
    elif is_small_tile(num_rows, head_dim):
        block, warps, stages = 128, 4, 3
    elif num_rows <= MIN_BLOCK_ROWS:
        block, warps, stages = 64, 4, 2
    elif head_dim > 64 and num_block_rows < 64:
        block, warps, stages = 128, 4, 2
    else:
        block, warps, stages = 64, 4, 3
    return {
        "BM": num_block_rows,
        "BN": block,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": warps,
        "num_stages": stages,
    }


def attend_paged_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    score_lens: torch.Tensor | None,
    *,
    scale: float,
    max_len: int,
    logit_cap: float,
    num_splits: int | None,
    out: torch.Tensor | None = None,
    anchored_scores: torch.Tensor | None = None,
    score_starts: torch.Tensor | None = None,
    query_step: int = 1,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The output where there is a v_cache, the mean scores where there are score_lens, anchored ones where there is
    a buffer for them. `out` is where to write, with a v_cache."""
    num_reqs, num_queries, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_q_heads // num_kv_heads
    num_rows = num_queries * group
    scores = None
    if v_cache is not None and out is None:
        out = torch.empty((num_reqs, num_queries, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    if score_lens is not None:
        scores = torch.empty((num_reqs, num_kv_heads, max_len), dtype=torch.float32, device=q.device)
    if num_reqs * num_rows * max_len == 0:
        return None if out is None else out.zero_(), None if scores is None else scores.zero_()

    tiles = choose_tiles(num_rows, head_dim, q.dtype)
    block = tiles["BN"]
    row_tiles = num_row_tiles(num_rows)
    if num_splits is None:
        num_programs = num_reqs * num_kv_heads * row_tiles
        resident = verify_resident(num_rows, head_dim)
        num_splits = choose_verify_splits(num_programs, max_len, block, num_multiprocessors(q.device), resident)
    part_lse = torch.empty((num_reqs, num_kv_heads, num_splits, num_rows), dtype=torch.float32, device=q.device)
    part = part_lse
    planes = anchored_scores
    if anchored_scores is not None and row_tiles > 1:
        # each tile of rows sums for itself; added up below, so that the result does not depend on an order.
        # Zeros, because a tile without a valid query writes nothing
        planes = torch.zeros((row_tiles, *anchored_scores.shape), dtype=torch.float32, device=q.device)
    is_split = num_splits > 1
    if out is not None:
        part = out
        if is_split:
            part = torch.empty((*part_lse.shape, head_dim), dtype=torch.float32, device=q.device)
    constants = {
        **tiles,
        "G": group,
        "D": head_dim,
        "HAS_CAP": logit_cap > 0.0,
        "PRECISION": dot_precision(q.dtype),
    }
    table = (req_to_token, req_pool_indices, query_starts, query_lens)
    q_strides = (q.stride(0), q.stride(1), q.stride(2))
    k_strides = (k_cache.stride(0), k_cache.stride(1))
    v_strides = k_strides if v_cache is None else (v_cache.stride(0), v_cache.stride(1))
    sizes = (scale, logit_cap, num_kv_heads, num_rows, max_len, query_step)
    _attend_kernel[(num_reqs * num_kv_heads, row_tiles, num_splits)](
        q,
        k_cache,
        k_cache if v_cache is None else v_cache,
        *table,
        part,
        part_lse,
        part_lse if planes is None else planes,
        query_starts if score_starts is None else score_starts,
        *q_strides,
        *k_strides,
        *v_strides,
        req_to_token.stride(0),
        planes.stride(0) if planes is not None and row_tiles > 1 else 0,
        0 if planes is None else planes.stride(-2),
        *sizes,
        num_splits,
        IS_SPLIT=is_split,
        NUM_ANCHORS=0 if planes is None else NUM_ANCHORS,
        NUM_FIRST=NUM_FIRST_ANCHORS,
        HAS_VALUE=v_cache is not None,
        MASK_EVERY_TILE=planes is None and num_rows <= MIN_BLOCK_ROWS and not is_small_tile(num_rows, head_dim),
        **constants,
    )
    if out is not None and is_split:
        _reduce_kernel[(num_reqs * num_kv_heads, num_rows)](
            part,
            part_lse,
            out,
            query_lens,
            num_kv_heads,
            num_rows,
            G=group,
            D=head_dim,
            BD=tiles["BD"],
            NUM_SPLITS=num_splits,
            num_warps=1,
        )
    if anchored_scores is not None and row_tiles > 1:
        assert planes is not None
        torch.sum(planes, dim=0, out=anchored_scores)
    if scores is not None:
        _scores_kernel[(num_reqs * num_kv_heads, triton.cdiv(max_len, block))](
            q,
            k_cache,
            *table,
            score_lens,
            part_lse,
            scores,
            *q_strides,
            *k_strides,
            req_to_token.stride(0),
            *sizes,
            NUM_SPLITS=num_splits,
            **{**constants, "num_stages": 2},
        )
    return out, scores
