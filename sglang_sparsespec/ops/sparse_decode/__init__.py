"""One decode step of attention over listed KV entries (SparseSpec, arXiv:2512.01278: the drafts' sparse attention).

Knows lists of slots, not why they were chosen. Invariant: an entry at or past the length is never dereferenced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.ops._checks import (
    FLOAT_DTYPES,
    check_dense_rows,
    check_device,
    check_dtype,
    check_index,
    check_kv_pool,
    check_logit_cap,
    check_shape,
)
from sglang_sparsespec.ops.sparse_decode.torch_impl import sparse_decode_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["sparse_decode"]


def sparse_decode(
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
) -> torch.Tensor:
    """Attend one query token per request over the KV entries listed for it.

    ``out[r, hq] = sum_i softmax_i(cap(scale * q[r, hq] . k_cache[s_i, h])) * v_cache[s_i, h]`` with ``h = hq // G`` and
    ``s_i = kv_slots[kv_rows[r], h, i]`` for ``i < kv_lens[r]``; ``cap(x) = logit_cap * tanh(x / logit_cap)``, off at 0.
    Sums are float32. On CUDA nothing waits for the device and the launch depends on shapes alone, so the call can stand
    in a CUDA graph.

    Args:
        q: [R, HQ, D], float32, float16 or bfloat16.
        k_cache: [num_slots, H, D], dtype of q; may be strided, the last dimension contiguous.
        v_cache: [num_slots, H, D], dtype of q; likewise.
        kv_slots: [R, HS, S], or [any, HS, S] with `kv_rows`, int32; HS is H (a list per KV head) or 1 (one list for all
            heads). Entries at or past `kv_lens` may hold anything.
        kv_lens: [R], int32 or int64, entries; in [0, S]. A length of 0 gives a row of zeros.
        scale: factor on the logits, before the cap.
        logit_cap: soft cap of the logits; 0 is off.
        kv_rows: [R], int64 or int32; the row of `kv_slots` of each request. None: its own number.
        out: [R, HQ, D], dtype of q; written and returned when given. Must not overlap q.

    Returns:
        [R, HQ, D], dtype of q.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, or a negative cap.

    Not checked: that lengths lie in [0, S], rows in `kv_slots` and listed slots in the pool (all would wait for the
    device).
    Reference: SparseSpec (arXiv:2512.01278), PillarAttn; `sparse_decode.reference`.
    """
    num_reqs, num_q_heads, head_dim = q.shape if q.dim() == 3 else (None, None, None)
    check_shape("q", q, (num_reqs, num_q_heads, head_dim))
    check_dtype("q", q, FLOAT_DTYPES)
    check_dense_rows("q", q)
    num_kv_heads = check_kv_pool("k_cache", k_cache, q)
    check_kv_pool("v_cache", v_cache, q)
    check_shape("v_cache", v_cache, k_cache.shape)
    check_index("kv_slots", kv_slots, (num_reqs if kv_rows is None else None, None, None), q.device)
    if kv_rows is not None:
        check_index("kv_rows", kv_rows, (num_reqs,), q.device)
    if kv_slots.shape[1] not in (1, num_kv_heads):
        raise ValueError(f"kv_slots: expected 1 or {num_kv_heads} lists per request, got {kv_slots.shape[1]}.")
    check_index("kv_lens", kv_lens, (num_reqs,), q.device)
    check_logit_cap(logit_cap)
    if out is not None:
        check_shape("out", out, q.shape)
        check_dtype("out", out, (q.dtype,))
        check_device("out", out, q.device)
        check_dense_rows("out", out)
    attend: Callable[..., torch.Tensor] = sparse_decode_torch
    if q.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.sparse_decode.triton_impl import sparse_decode_triton

        attend = sparse_decode_triton
    return attend(q, k_cache, v_cache, kv_slots, kv_lens, scale=scale, logit_cap=logit_cap, kv_rows=kv_rows, out=out)
