"""Ground truth of sparse_decode: one softmax per request and query head, in float32."""

from __future__ import annotations

import torch


def sparse_decode_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    kv_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    num_reqs, num_q_heads, head_dim = q.shape
    group = num_q_heads // k_cache.shape[1]
    out = torch.zeros(num_reqs, num_q_heads, head_dim, dtype=torch.float32, device=q.device)
    for r in range(num_reqs):
        kv_len = int(kv_lens[r])
        if kv_len == 0:
            continue
        row = r if kv_rows is None else int(kv_rows[r])
        for hq in range(num_q_heads):
            h = hq // group
            slots = kv_slots[row, h if kv_slots.shape[1] > 1 else 0, :kv_len].long()
            logits = k_cache[slots, h].float() @ q[r, hq].float() * scale
            if logit_cap > 0.0:
                logits = logit_cap * torch.tanh(logits / logit_cap)
            out[r, hq] = torch.softmax(logits, dim=0) @ v_cache[slots, h].float()
    return out.to(q.dtype)
