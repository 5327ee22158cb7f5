# mypy: allow-untyped-defs
"""sample_rows in two launches: the mass of every tile of a row, then the tile that the coin hits, token by token.

A tile is computed by the same function in both, so a tile that has mass has a token with mass.
Invariant: no address at or past the vocabulary is read, and the token returned is never past it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._triton import LOG2_E, clamped_step, exp_mass

if TYPE_CHECKING:
    from sglang_sparsespec.ops._rows import RowStats

# logits of a tile; not measured
_BLOCK = 2048


@triton.jit
def _row_probs(p_row, o_v, vocab_size, top, mass, scale, best, p_floor, is_one_hot, HAS_FLOORS: tl.constexpr):
    """[BLOCK] float32, 0 past the vocabulary."""
    m_v = o_v < vocab_size
    b_logit = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    if HAS_FLOORS:
        b_logit = tl.where(b_logit >= tl.load(p_floor), b_logit, float("-inf"))
    # divided, not multiplied by 1 / mass: a product could be fused into the residual's subtraction without rounding,
    # and equal p and q would leave a residual
    b_prob = exp_mass(b_logit, top, scale) / mass
    b_prob = tl.where(is_one_hot, (o_v == best).to(tl.float32), b_prob)
    return tl.where(m_v, b_prob, 0.0)


@triton.jit
def _tile_masses(
    i_r,
    o_v,
    logits_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    floors_ptr,
    draft_logits_ptr,
    draft_best_ptr,
    draft_top_ptr,
    draft_mass_ptr,
    draft_floors_ptr,
    draft_tokens_ptr,
    temperatures_ptr,
    steps_ptr,
    draft_steps_ptr,
    is_greedy_ptr,
    stride_r,
    stride_w,
    stride_draft_r,
    stride_draft_k,
    stride_tokens_r,
    stride_tokens_k,
    vocab_size,
    width,
    num_drafts,
    HAS_STEPS: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    """p of some tokens, and what their draft leaves of it: both [BLOCK] float32, the same where none was rejected."""
    scale = LOG2_E / tl.load(temperatures_ptr + i_r)
    if HAS_GREEDY:
        is_one_hot = tl.load(is_greedy_ptr + i_r) != 0
    else:
        is_one_hot = False
    if HAS_STEPS:
        step = clamped_step(steps_ptr, i_r, width)
    else:
        step = i_r * 0
    row = i_r * width + step
    b_p = _row_probs(
        logits_ptr + i_r * stride_r + step * stride_w,
        o_v,
        vocab_size,
        tl.load(top_ptr + row),
        tl.load(mass_ptr + row),
        scale,
        tl.load(best_ptr + row),
        floors_ptr + row,
        is_one_hot,
        HAS_FLOORS,
    )
    b_left = b_p
    if DRAFTS != "none":
        draft_step = tl.maximum(tl.load(draft_steps_ptr + i_r).to(tl.int64), 0)
        if draft_step < num_drafts:
            if DRAFTS == "logits":
                b_q = _row_probs(
                    draft_logits_ptr + i_r * stride_draft_r + draft_step * stride_draft_k,
                    o_v,
                    vocab_size,
                    tl.load(draft_top_ptr + i_r),
                    tl.load(draft_mass_ptr + i_r),
                    scale,
                    tl.load(draft_best_ptr + i_r),
                    draft_floors_ptr + i_r,
                    is_one_hot,
                    HAS_FLOORS,
                )
            else:
                chosen = tl.load(draft_tokens_ptr + i_r * stride_tokens_r + draft_step * stride_tokens_k)
                b_q = (o_v == chosen).to(tl.float32)
            b_left = tl.maximum(b_p - b_q, 0.0)
    return b_p, b_left


@triton.jit
def _mass_kernel(
    p_masses_ptr,
    left_masses_ptr,
    num_tiles,
    logits_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    floors_ptr,
    draft_logits_ptr,
    draft_best_ptr,
    draft_top_ptr,
    draft_mass_ptr,
    draft_floors_ptr,
    draft_tokens_ptr,
    temperatures_ptr,
    steps_ptr,
    draft_steps_ptr,
    is_greedy_ptr,
    stride_r,
    stride_w,
    stride_draft_r,
    stride_draft_k,
    stride_tokens_r,
    stride_tokens_k,
    vocab_size,
    width,
    num_drafts,
    HAS_STEPS: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of a tile, [R, num_tiles] float64."""
    program = tl.program_id(0).to(tl.int64)
    o_v = program % num_tiles * BLOCK + tl.arange(0, BLOCK)
    b_p, b_left = _tile_masses(
        program // num_tiles,
        o_v,
        logits_ptr,
        best_ptr,
        top_ptr,
        mass_ptr,
        floors_ptr,
        draft_logits_ptr,
        draft_best_ptr,
        draft_top_ptr,
        draft_mass_ptr,
        draft_floors_ptr,
        draft_tokens_ptr,
        temperatures_ptr,
        steps_ptr,
        draft_steps_ptr,
        is_greedy_ptr,
        stride_r,
        stride_w,
        stride_draft_r,
        stride_draft_k,
        stride_tokens_r,
        stride_tokens_k,
        vocab_size,
        width,
        num_drafts,
        HAS_STEPS,
        HAS_FLOORS,
        HAS_GREEDY,
        DRAFTS,
    )
    tl.store(p_masses_ptr + program, tl.sum(b_p.to(tl.float64), axis=0))
    if DRAFTS != "none":
        tl.store(left_masses_ptr + program, tl.sum(b_left.to(tl.float64), axis=0))


@triton.jit
def _hit(b_mass, target, o_i, PAST: tl.constexpr):
    """The first entry with mass whose cumulative mass exceeds `target`, and the mass before it; the last entry with
    mass if rounding leaves none, and 0 if none has mass."""
    b_cdf = tl.cumsum(b_mass, axis=0)
    i_first = tl.min(tl.where((b_mass > 0) & (b_cdf > target), o_i, PAST), axis=0)
    i_last = tl.max(tl.where(b_mass > 0, o_i, 0), axis=0)
    i_hit = tl.where(i_first < PAST, i_first, i_last)
    return i_hit, tl.sum(tl.where(o_i == i_hit - 1, b_cdf, 0.0), axis=0)


@triton.jit
def _pick_kernel(
    coins_ptr,
    p_masses_ptr,
    left_masses_ptr,
    tokens_ptr,
    probs_ptr,
    num_tiles,
    logits_ptr,
    best_ptr,
    top_ptr,
    mass_ptr,
    floors_ptr,
    draft_logits_ptr,
    draft_best_ptr,
    draft_top_ptr,
    draft_mass_ptr,
    draft_floors_ptr,
    draft_tokens_ptr,
    temperatures_ptr,
    steps_ptr,
    draft_steps_ptr,
    is_greedy_ptr,
    stride_r,
    stride_w,
    stride_draft_r,
    stride_draft_k,
    stride_tokens_r,
    stride_tokens_k,
    vocab_size,
    width,
    num_drafts,
    HAS_STEPS: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_GREEDY: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, NUM_TILES)
    m_tile = o_tile < num_tiles
    b_tile = tl.load(p_masses_ptr + i_r * num_tiles + o_tile, mask=m_tile, other=0.0)
    takes_left = False
    if DRAFTS != "none":
        b_left_tile = tl.load(left_masses_ptr + i_r * num_tiles + o_tile, mask=m_tile, other=0.0)
        takes_left = tl.max(b_left_tile, axis=0) > 0
        b_tile = tl.where(takes_left, b_left_tile, b_tile)
    target = tl.load(coins_ptr + i_r).to(tl.float64) * tl.sum(b_tile, axis=0)
    i_tile, before = _hit(b_tile, target, o_tile, NUM_TILES)

    o_i = tl.arange(0, BLOCK)
    o_v = i_tile.to(tl.int64) * BLOCK + o_i
    b_p, b_left = _tile_masses(
        i_r,
        o_v,
        logits_ptr,
        best_ptr,
        top_ptr,
        mass_ptr,
        floors_ptr,
        draft_logits_ptr,
        draft_best_ptr,
        draft_top_ptr,
        draft_mass_ptr,
        draft_floors_ptr,
        draft_tokens_ptr,
        temperatures_ptr,
        steps_ptr,
        draft_steps_ptr,
        is_greedy_ptr,
        stride_r,
        stride_w,
        stride_draft_r,
        stride_draft_k,
        stride_tokens_r,
        stride_tokens_k,
        vocab_size,
        width,
        num_drafts,
        HAS_STEPS,
        HAS_FLOORS,
        HAS_GREEDY,
        DRAFTS,
    )
    b_mass = tl.where(takes_left, b_left, b_p) if DRAFTS != "none" else b_p
    i_token, _ = _hit(b_mass.to(tl.float64), target - before, o_i, BLOCK)
    tl.store(tokens_ptr + i_r, i_tile.to(tl.int64) * BLOCK + i_token)
    tl.store(probs_ptr + i_r, tl.sum(tl.where(o_i == i_token, b_p, 0.0), axis=0))


def sample_rows_triton(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    coins: torch.Tensor,
    *,
    steps: torch.Tensor | None = None,
    draft_steps: torch.Tensor | None = None,
    is_greedy: torch.Tensor | None = None,
    draft_logits: torch.Tensor | None = None,
    draft_stats: RowStats | None = None,
    draft_tokens: torch.Tensor | None = None,
    block: int = _BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; `block`, a power of two, is for tests."""
    num_reqs, width, vocab_size = logits.shape
    tokens = torch.empty(num_reqs, dtype=torch.int64, device=logits.device)
    probs = torch.empty(num_reqs, dtype=torch.float32, device=logits.device)
    if num_reqs == 0:
        return tokens, probs
    num_tiles = triton.cdiv(vocab_size, block)
    drafts = draft_tokens if draft_logits is None else draft_logits
    rejected = steps if draft_steps is None else draft_steps
    # what is not there is not read: any pointer will do
    rows = (
        logits,
        *_pointers(stats),
        logits if draft_logits is None else draft_logits,
        *_pointers(stats if draft_stats is None else draft_stats),
        tokens if draft_tokens is None else draft_tokens,
        temperatures.contiguous(),
        tokens if steps is None else steps.contiguous(),
        tokens if rejected is None else rejected.contiguous(),
        tokens if is_greedy is None else is_greedy.contiguous(),
        logits.stride(0),
        logits.stride(1),
        0 if draft_logits is None else draft_logits.stride(0),
        0 if draft_logits is None else draft_logits.stride(1),
        0 if draft_tokens is None else draft_tokens.stride(0),
        0 if draft_tokens is None else draft_tokens.stride(1),
        vocab_size,
        width,
        0 if drafts is None else drafts.shape[1],
    )
    options = {
        "HAS_STEPS": steps is not None,
        "HAS_FLOORS": stats.floor is not None,
        "HAS_GREEDY": is_greedy is not None,
        "DRAFTS": "none" if drafts is None else "tokens" if draft_logits is None else "logits",
        "BLOCK": block,
    }
    p_masses = torch.empty((num_reqs, num_tiles), dtype=torch.float64, device=logits.device)
    left_masses = p_masses if drafts is None else torch.empty_like(p_masses)
    _mass_kernel[(num_reqs * num_tiles,)](p_masses, left_masses, num_tiles, *rows, **options, num_warps=4)
    _pick_kernel[(num_reqs,)](
        coins.contiguous(),
        p_masses,
        left_masses,
        tokens,
        probs,
        num_tiles,
        *rows,
        **options,
        NUM_TILES=triton.next_power_of_2(num_tiles),
        num_warps=4,
    )
    return tokens, probs


def _pointers(stats: RowStats) -> tuple[torch.Tensor, ...]:
    """best, top, mass and floor; what is not there is not read."""
    return stats.best, stats.top, stats.mass, stats.top if stats.floor is None else stats.floor
