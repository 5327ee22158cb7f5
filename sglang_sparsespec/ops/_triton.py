# mypy: allow-untyped-defs
"""Device functions and launch arithmetic that the Triton kernels share.

Logits stand in base 2 from the moment they are masked, so that exp2 and log2 serve. A log-sum-exp of -inf marks an
empty share. Invariant: nothing here reads a device value from the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.ops._launch import choose_splits, num_multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)


def choose_num_splits(num_programs: int, max_kv_len: int, block: int, device: torch.device) -> int:
    """A power of two from shapes alone: enough programs to fill the device, at least two tiles in each."""
    return choose_splits(num_programs, max_kv_len, block, num_multiprocessors(device))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 inputs must not be rounded to tf32; the setting has no effect on the others."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def split_bounds(kv_len, i_split, num_splits, BLOCK: tl.constexpr):
    """Share i_split of [0, kv_len), in whole tiles; empty where lo >= hi."""
    share = tl.cdiv(tl.cdiv(kv_len, num_splits), BLOCK) * BLOCK
    lo = i_split * share
    return lo, tl.minimum(lo + share, kv_len)


@triton.jit
def softcap(logit, logit_cap):
    # tanh(x) = 2 * sigmoid(2 * x) - 1
    return logit_cap * (2.0 * tl.sigmoid(2.0 * logit / logit_cap) - 1.0)


@triton.jit
def hide_unseen(b_logit, m_n, o_p, last_seen):
    """-inf where a position is masked, or past the last that a row sees: [rows, positions]."""
    return tl.where(m_n[None, :] & (o_p[None, :] <= last_seen[:, None]), b_logit, float("-inf"))


@triton.jit
def load_rows(base, b_slot, stride, m_row, o_d, D: tl.constexpr):
    """Rows of D elements at base + slot * stride, zeros where masked: [rows, BD]; slots are int64."""
    return tl.load(base + b_slot[:, None] * stride + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def merge_splits(part_ptr, lse_ptr, row, step, o_d, D: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Combine the partial softmaxes in rows `row + i * step`: [BD], zeros where all are empty."""
    o_row = row + tl.arange(0, NUM_SPLITS) * step
    b_lse = tl.load(lse_ptr + o_row)
    m_used = b_lse > float("-inf")
    top = tl.max(b_lse, axis=0)
    b_weight = tl.where(m_used, tl.exp2(b_lse - tl.where(m_used, top, 0.0)), 0.0)
    total = tl.sum(b_weight, axis=0)
    # an empty share was never written
    b_part = tl.load(part_ptr + o_row[:, None] * D + o_d[None, :], mask=m_used[:, None] & (o_d < D)[None, :], other=0.0)
    return tl.sum(b_part * b_weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)


@triton.jit
def exp_mass(logit, top, scale):
    """exp((logit - top) / T) with scale = log2(e) / T; the difference first, which is exact where it matters."""
    return tl.exp2((logit - top) * scale)


@triton.jit
def clamped_step(steps_ptr, i_r, width):
    """The row of request i_r among `width` that its step asks for: the last one from there on, int64."""
    return tl.minimum(tl.maximum(tl.load(steps_ptr + i_r).to(tl.int64), 0), width - 1)
