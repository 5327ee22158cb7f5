# mypy: allow-untyped-defs
"""row_stats in two launches: a program per tile of a row, then one per row that merges the tiles.

One tile per program, not a loop: few rows then fill the device as many do, and nothing is rescaled on the way.
Invariant: the logits are read once, and no address at or past the vocabulary is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._rows import RowStats
from sglang_sparsespec.ops._triton import LOG2_E, clamped_step, exp_mass

# logits of a tile, tokens of a program; not measured
_BLOCK = 4096
_TOKEN_BLOCK = 128


@triton.jit
def _tile_kernel(
    logits_ptr,
    temperatures_ptr,
    steps_ptr,
    floors_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    stride_r,
    stride_w,
    vocab_size,
    width,
    num_tiles,
    HAS_STEPS: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Results are [rows, num_tiles]; rows are (request, row), or requests where HAS_STEPS."""
    program = tl.program_id(0).to(tl.int64)
    i_tile = program % num_tiles
    if HAS_STEPS:
        i_r = program // num_tiles
        i_w = clamped_step(steps_ptr, i_r, width)
    else:
        i_r = program // num_tiles // width
        i_w = program // num_tiles % width
    scale = LOG2_E / tl.load(temperatures_ptr + i_r)
    o_v = i_tile * BLOCK + tl.arange(0, BLOCK)
    p_row = logits_ptr + i_r * stride_r + i_w * stride_w
    b_logit = tl.load(p_row + o_v, mask=o_v < vocab_size, other=float("-inf")).to(tl.float32)
    if HAS_FLOORS:
        b_logit = tl.where(b_logit >= tl.load(floors_ptr + program // num_tiles), b_logit, float("-inf"))
    # the lowest index among ties
    top, i_best = tl.max(b_logit, axis=0, return_indices=True)
    # in a tile of -inf alone nothing can be subtracted
    mass = tl.sum(exp_mass(b_logit, tl.where(top > float("-inf"), top, 0.0), scale), axis=0)
    tl.store(best_ptr + program, (i_tile * BLOCK + i_best).to(tl.int32))
    tl.store(top_ptr + program, top)
    tl.store(mass_ptr + program, mass)


@triton.jit
def _merge_kernel(
    tile_best_ptr,
    tile_top_ptr,
    tile_mass_ptr,
    temperatures_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    vocab_size,
    rows_per_req,
    num_tiles,
    NUM_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = LOG2_E / tl.load(temperatures_ptr + row // rows_per_req)
    o_tile = tl.arange(0, NUM_TILES)
    m_tile = o_tile < num_tiles
    b_top = tl.load(tile_top_ptr + row * num_tiles + o_tile, mask=m_tile, other=float("-inf"))
    b_best = tl.load(tile_best_ptr + row * num_tiles + o_tile, mask=m_tile, other=0)
    b_mass = tl.load(tile_mass_ptr + row * num_tiles + o_tile, mask=m_tile, other=0.0)
    top = tl.max(b_top, axis=0)
    b_weight = tl.where(b_top > float("-inf"), exp_mass(b_top, top, scale), 0.0)
    # never past the vocabulary, not even in a row of NaN
    best = tl.min(tl.where(m_tile & (b_top == top), tl.minimum(b_best, vocab_size - 1), vocab_size - 1), axis=0)
    tl.store(best_ptr + row, best.to(tl.int64))
    tl.store(top_ptr + row, top)
    tl.store(mass_ptr + row, tl.sum(b_mass * b_weight, axis=0))


@triton.jit(do_not_specialize=["num_probs"])
def _token_kernel(
    logits_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    floors_ptr,
    temperatures_ptr,
    tokens_ptr,
    is_greedy_ptr,
    probs_ptr,
    stride_r,
    stride_w,
    stride_tokens_r,
    stride_tokens_k,
    width,
    num_tokens,
    num_probs,
    HAS_FLOORS: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_prob = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_prob = o_prob < num_probs
    o_r = o_prob // num_tokens
    o_w = o_prob % num_tokens
    o_row = o_r * width + o_w
    b_token = tl.load(tokens_ptr + o_r * stride_tokens_r + o_w * stride_tokens_k, mask=m_prob, other=0).to(tl.int64)
    b_logit = tl.load(logits_ptr + o_r * stride_r + o_w * stride_w + b_token, mask=m_prob, other=0.0).to(tl.float32)
    b_top = tl.load(top_ptr + o_row, mask=m_prob, other=0.0)
    b_scale = LOG2_E / tl.load(temperatures_ptr + o_r, mask=m_prob, other=1.0)
    b_prob = exp_mass(b_logit, b_top, b_scale) / tl.load(mass_ptr + o_row, mask=m_prob, other=1.0)
    if HAS_FLOORS:
        b_prob = tl.where(b_logit >= tl.load(floors_ptr + o_row, mask=m_prob, other=0.0), b_prob, 0.0)
    if HAS_GREEDY:
        b_is_greedy = tl.load(is_greedy_ptr + o_r, mask=m_prob, other=0) != 0
        b_best = tl.load(best_ptr + o_row, mask=m_prob, other=0)
        b_prob = tl.where(b_is_greedy, (b_token == b_best).to(tl.float32), b_prob)
    tl.store(probs_ptr + o_prob, b_prob, mask=m_prob)


def row_stats_triton(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    steps: torch.Tensor | None,
    floors: torch.Tensor | None = None,
    *,
    block: int = _BLOCK,
) -> RowStats:
    """Launch; `block`, a power of two, is for tests."""
    num_reqs, width, vocab_size = logits.shape
    rows_per_req = width if steps is None else 1
    num_tiles = triton.cdiv(vocab_size, block)
    shape = (num_reqs, width) if steps is None else (num_reqs,)
    best, top, mass = _empty_stats(shape, torch.int64, logits.device)
    stats = RowStats(best, top, mass, floors)
    num_rows = num_reqs * rows_per_req
    if num_rows == 0:
        return stats
    temperatures = temperatures.contiguous()
    tiles = _empty_stats((num_rows, num_tiles), torch.int32, logits.device)
    _tile_kernel[(num_rows * num_tiles,)](
        logits,
        temperatures,
        temperatures if steps is None else steps.contiguous(),
        temperatures if floors is None else floors,
        *tiles,
        logits.stride(0),
        logits.stride(1),
        vocab_size,
        width,
        num_tiles,
        HAS_STEPS=steps is not None,
        HAS_FLOORS=floors is not None,
        BLOCK=block,
        num_warps=4,
    )
    _merge_kernel[(num_rows,)](
        *tiles,
        temperatures,
        best,
        top,
        mass,
        vocab_size,
        rows_per_req,
        num_tiles,
        NUM_TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
    )
    return stats


def _empty_stats(shape: tuple[int, ...], best_dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """best, top and mass."""
    return (
        torch.empty(shape, dtype=best_dtype, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def token_probs_triton(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    tokens: torch.Tensor,
    is_greedy: torch.Tensor | None,
) -> torch.Tensor:
    """Launch."""
    probs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    if probs.numel() == 0:
        return probs
    _token_kernel[(triton.cdiv(probs.numel(), _TOKEN_BLOCK),)](
        logits,
        stats.best,
        stats.top,
        stats.mass,
        stats.top if stats.floor is None else stats.floor,
        temperatures.contiguous(),
        tokens,
        tokens if is_greedy is None else is_greedy.contiguous(),
        probs,
        logits.stride(0),
        logits.stride(1),
        tokens.stride(0),
        tokens.stride(1),
        logits.shape[1],
        tokens.shape[1],
        probs.numel(),
        HAS_FLOORS=stats.floor is not None,
        HAS_GREEDY=is_greedy is not None,
        BLOCK=_TOKEN_BLOCK,
        num_warps=4,
    )
    return probs
