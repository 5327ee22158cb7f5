"""gather_tokens and scatter_tokens as loops over tokens and buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sglang_sparsespec.ops.kv_tokens import KvBuffers


def gather_tokens_reference(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        at = 0
        for buffer, width in zip(pool.buffers, pool.widths, strict=True):
            rows[token, at : at + width] = buffer[slot].flatten()
            at += width


def scatter_tokens_reference(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        at = 0
        for buffer, width in zip(pool.buffers, pool.widths, strict=True):
            buffer[slot] = rows[token, at : at + width].view(buffer.shape[1:])
            at += width
