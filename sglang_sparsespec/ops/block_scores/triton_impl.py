# mypy: allow-untyped-defs
"""block_scores as one pass over K: a program scores a share of a context's blocks for one KV head.

A block is summed in tiles, so its size need not be a power of two. Lengths stay on the device and the grid follows from
shapes. Invariant: no pointer is formed from a table entry at or past the length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._triton import load_rows

# blocks per program; arbitrary, it has not been measured
BLOCKS_PER_PROGRAM = 8
# positions per tile, at most; likewise
MAX_TILE = 64


@triton.jit(do_not_specialize=["num_blocks", "block_size"])
def _block_scores_kernel(
    q_ptr,
    k_ptr,
    req_to_token_ptr,
    pool_rows_ptr,
    lens_ptr,
    scores_ptr,
    stride_q_r,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_table,
    num_kv_heads,
    num_blocks,
    block_size,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    i_rh = tl.program_id(0).to(tl.int64)
    i_r = i_rh // num_kv_heads
    i_h = i_rh % num_kv_heads
    kv_len = tl.load(lens_ptr + i_r).to(tl.int32)
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    # the mean query of the group: [BD]
    b_q = tl.zeros([BD], dtype=tl.float32)
    for g in range(G):
        p_q = q_ptr + i_r * stride_q_r + (i_h * G + g) * stride_q_h + o_d
        b_q += tl.load(p_q, mask=o_d < D, other=0.0).to(tl.float32)
    b_q = b_q / G
    p_table = req_to_token_ptr + tl.load(pool_rows_ptr + i_r).to(tl.int64) * stride_table
    first_block = tl.program_id(1) * PER_PROGRAM
    for i_block in range(first_block, tl.minimum(first_block + PER_PROGRAM, num_blocks)):
        lo = i_block * block_size
        hi = tl.minimum(lo + block_size, kv_len)
        b_sum = tl.zeros([BN], dtype=tl.float32)
        for start in range(lo, hi, BN):
            m_n = start + o_n < hi
            b_slot = tl.load(p_table + start + o_n, mask=m_n, other=0).to(tl.int64)
            # [BN, BD]
            b_k = load_rows(k_ptr + i_h * stride_k_h, b_slot, stride_k_s, m_n, o_d, D)
            b_sum += tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1)
        count = tl.maximum(hi - lo, 1).to(tl.float32)
        tl.store(scores_ptr + i_rh * num_blocks + i_block, tl.sum(b_sum, axis=0) / count)


def block_scores_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    block_size: int,
    max_len: int,
) -> torch.Tensor:
    num_reqs, num_q_heads, head_dim = q.shape
    num_kv_heads, num_blocks = k_cache.shape[1], -(-max_len // block_size)
    scores = torch.empty((num_reqs, num_kv_heads, num_blocks), dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    _block_scores_kernel[(num_reqs * num_kv_heads, triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM))](
        q,
        k_cache,
        req_to_token,
        req_pool_indices,
        kv_lens,
        scores,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        req_to_token.stride(0),
        num_kv_heads,
        num_blocks,
        block_size,
        G=num_q_heads // num_kv_heads,
        D=head_dim,
        BD=max(16, triton.next_power_of_2(head_dim)),
        BN=min(MAX_TILE, max(16, triton.next_power_of_2(block_size))),
        PER_PROGRAM=BLOCKS_PER_PROGRAM,
        num_warps=1,
    )
    return scores
