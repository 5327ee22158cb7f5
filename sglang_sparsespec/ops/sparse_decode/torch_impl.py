"""sparse_decode in vectorised torch: gather the listed KV, then one fused attention per group of similar lengths."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sglang_sparsespec.ops._paged import Group, capped, gather_heads, group_requests, put_rows, take_rows


def sparse_decode_torch(
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
    num_reqs, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if kv_rows is not None:
        kv_slots = kv_slots[kv_rows.long()]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out.zero_()
    if q.device.type == "cpu":
        lens = kv_lens.tolist()
        groups = group_requests([int(length > 0) for length in lens], lens)
    else:
        lens = None
        groups = [Group(list(range(num_reqs)), 1, kv_slots.shape[2])] if num_reqs * kv_slots.shape[2] else []
    for group in groups:
        rows = group.rows
        # [R, 1, S]
        is_listed = torch.arange(group.kv_len, device=q.device) < take_rows(kv_lens, rows)[:, None, None]
        needs_mask = lens is None or min(lens[r] for r in rows) < group.kv_len
        slots = take_rows(kv_slots, rows)[:, :, : group.kv_len]
        if needs_mask:
            # padding reads the request's own first entry; a request without entries reads slot 0 and is zeroed below
            first = slots[:, :, :1].where(is_listed[..., :1], 0)
            slots = slots.where(is_listed, first)
        k = gather_heads(k_cache, slots, range(num_kv_heads))
        v = gather_heads(v_cache, slots, range(num_kv_heads))
        grouped_q = take_rows(q, rows).reshape(len(rows), num_kv_heads, -1, head_dim)
        # position 0 stays visible: a row that sees nothing would be NaN
        hidden = ~is_listed[:, None]
        hidden[..., 0] = False
        if logit_cap > 0.0:
            logits = capped(grouped_q.float() * scale @ k.float().transpose(2, 3), logit_cap)
            probs = torch.softmax(logits.masked_fill_(hidden, -math.inf), dim=-1)
            value = probs.to(v.dtype) @ v
        else:
            mask = None
            if needs_mask:
                mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -math.inf)
            value = F.scaled_dot_product_attention(grouped_q, k, v, attn_mask=mask, scale=scale)
        value = value.reshape(len(rows), num_q_heads, head_dim)
        if lens is None:
            value = value.masked_fill(~is_listed[:, :, 0, None], 0.0)
        put_rows(out, rows, value)
    return out
