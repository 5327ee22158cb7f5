"""Tokens of the KV pool, gathered into rows that hold all layers, and scattered back: what makes one copy of many.

Knows nothing of host memory or of streams. Invariant: a slot that is not named is not touched.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.ops._checks import check_device, check_dtype, check_index, check_shape
from sglang_sparsespec.ops.kv_tokens.torch_impl import gather_tokens_torch, scatter_tokens_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KvBuffers", "gather_tokens", "scatter_tokens"]


class KvBuffers:
    """The buffers of a pool (K of every layer, V of every layer), checked once for all launches of a move.

    Args:
        buffers: each [num_slots, ...], contiguous; all of one dtype, on one device; at least one.

    Raises:
        ValueError: on no buffer, a wrong dtype, device or stride.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        if not buffers:
            raise ValueError("buffers: expected at least one.")
        self.buffers = tuple(buffers)
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        for index, buffer in enumerate(buffers):
            name = f"buffers[{index}]"
            check_dtype(name, buffer, (self.dtype,))
            check_device(name, buffer, self.device)
            if not buffer.is_contiguous():
                raise ValueError(f"{name}: expected contiguous rows, got strides {list(buffer.stride())}.")
        self.widths = tuple(math.prod(buffer.shape[1:]) for buffer in buffers)
        """Elements per token of each buffer."""
        self.width = sum(self.widths)
        """Elements per token of all buffers: the length of a row."""
        sizes = (*(buffer.data_ptr() for buffer in buffers), *(width * self.dtype.itemsize for width in self.widths))
        self.word_bytes = math.gcd(8, *sizes)
        """The largest word, up to 8 bytes, of which all addresses and rows are multiples."""
        self._tables: dict[int, torch.Tensor] = {}

    def table(self, word_bytes: int) -> torch.Tensor:
        """[3, num_buffers], int64, on the device: addresses, words per token, and where the buffer begins in a row.

        Made once for each size of word, and known to be right as long as the buffers live.
        """
        if word_bytes not in self._tables:
            words = [width * self.dtype.itemsize // word_bytes for width in self.widths]
            columns = [[buffer.data_ptr() for buffer in self.buffers], words, [0, *accumulate(words[:-1])]]
            self._tables[word_bytes] = torch.tensor(columns, dtype=torch.int64, device=self.device)
        return self._tables[word_bytes]


def gather_tokens(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``rows[t]`` becomes ``concat(b[slots[t]].flatten() for b in pool.buffers)`` for every token t.

    Args:
        pool: where the tokens are.
        slots: [num_tokens], int64 or int32.
        rows: [num_tokens, pool.width], contiguous, dtype and device of the pool.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.

    Not checked: that slots are in the pool.
    Reference: `kv_tokens.reference`.
    """
    _check(pool, slots, rows)
    if rows.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.kv_tokens.triton_impl import gather_tokens_triton

        gather_tokens_triton(pool, slots, rows)
    else:
        gather_tokens_torch(pool, slots, rows)


def scatter_tokens(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """The way back: ``b[slots[t]]`` becomes the part of ``rows[t]`` that is b's; see `gather_tokens`.

    Not checked: that slots are in the pool and differ from each other.
    """
    _check(pool, slots, rows)
    if rows.is_cuda:
        from sglang_sparsespec.ops.kv_tokens.triton_impl import scatter_tokens_triton

        scatter_tokens_triton(pool, slots, rows)
    else:
        scatter_tokens_torch(pool, slots, rows)


def _check(pool: KvBuffers, slots: torch.Tensor, rows: torch.Tensor) -> None:
    check_index("slots", slots, (None,), pool.device)
    check_shape("rows", rows, (slots.shape[0], pool.width))
    check_dtype("rows", rows, (pool.dtype,))
    check_device("rows", rows, pool.device)
    if not rows.is_contiguous():
        raise ValueError(f"rows: expected contiguous rows, got strides {list(rows.stride())}.")
