"""gather_tokens and scatter_tokens, a torch call per buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sglang_sparsespec.ops.kv_tokens import KvBuffers


def gather_tokens_torch(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    for part, buffer in zip(rows.split(pool.widths, dim=1), pool.buffers, strict=True):
        part.copy_(buffer.flatten(1)[slots])


def scatter_tokens_torch(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    for part, buffer in zip(rows.split(pool.widths, dim=1), pool.buffers, strict=True):
        buffer.flatten(1).index_copy_(0, slots.long(), part)
