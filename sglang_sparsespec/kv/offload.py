"""Host memory for KV, and the copies both ways.

Why not the host's own `MHATokenToKVPoolHost`: its copies are CUDA kernels and have no form for a CPU, where this
package is tested; it refuses to start unless 10 GB of RAM stay free beside it; and its layouts scatter a request over
the pool token by token, where whole blocks make one large copy each.

A block holds `block_tokens` tokens of one request in all layers, K and V. On CUDA the slots of a block are gathered on
the device, then the block crosses PCIe in one asynchronous copy from or to pinned memory, on a stream of its own. On a
CPU the same calls copy at once.
Invariant: a block is free or belongs to one request; nothing here waits for the device except `Transfer.wait`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

BLOCK_TOKENS = 256
"""Tokens of a host block: 36 MiB for a model of 36 layers, 8 KV heads of 128, bf16: large enough for PCIe to run at
full speed; half a block per request is lost to rounding."""


class HostPool:
    """Blocks of host memory.

    Args:
        widths: elements per token of each device buffer, in the order of the buffers (K of every layer, V of every
            layer).
        dtype: element type of all of them.
        num_bytes: budget; rounded down to whole blocks.
        is_pinned: register the memory with CUDA.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dtype: torch.dtype,
        num_bytes: int,
        *,
        block_tokens: int = BLOCK_TOKENS,
        is_pinned: bool = False,
    ) -> None:
        self.widths = tuple(widths)
        self.block_tokens = block_tokens
        self.bytes_per_token = sum(widths) * dtype.itemsize
        self.num_blocks = num_bytes // (block_tokens * self.bytes_per_token)
        # untouched pages cost nothing on a CPU; registering commits them
        self._memory = torch.empty(self.num_blocks, block_tokens * sum(widths), dtype=dtype)
        if is_pinned and self.num_blocks > 0:
            _register(self._memory)
        self.free_blocks = list(range(self.num_blocks))

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_tokens * self.bytes_per_token

    @property
    def used_bytes(self) -> int:
        return (self.num_blocks - len(self.free_blocks)) * self.block_tokens * self.bytes_per_token

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def alloc(self, num_tokens: int) -> list[int] | None:
        """Blocks for a request, or None where the memory is full."""
        count = self.blocks_for(num_tokens)
        if count > len(self.free_blocks):
            return None
        blocks, self.free_blocks = self.free_blocks[:count], self.free_blocks[count:]
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        self.free_blocks.extend(blocks)

    def flat(self, block: int) -> Tensor:
        """[block_tokens * sum(widths)]: the whole block, as it crosses the bus."""
        return self._memory[block]

    def views(self, flat: Tensor) -> list[Tensor]:
        """[block_tokens, width] per device buffer, views of a flat block."""
        views, start = [], 0
        for width in self.widths:
            end = start + width * self.block_tokens
            views.append(flat[start:end].view(self.block_tokens, width))
            start = end
        return views


class Transfer:
    """One copy under way."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._span: tuple[Any, Any] | None = None
        self._keep_alive: list[Any] = []
        self._start_s = self._end_s = 0.0

    def is_done(self) -> bool:
        return self._span is None or self._span[1].query()

    def wait(self) -> None:
        """Block the host until the copy is done."""
        if self._span is not None:
            self._span[1].synchronize()

    def seconds(self) -> float:
        """What the copy took; valid once it is done."""
        if self._span is None:
            return self._end_s - self._start_s
        return 1e-3 * self._span[0].elapsed_time(self._span[1])


class Mover:
    """Copies the KV of a request between slots of the device pool and blocks of host memory.

    Args:
        host: where to.
        buffers: returns the device buffers, each [num_slots, ...]; asked at every copy, since the host may replace
            them after it has captured its graphs.
        device: of the buffers.
    """

    def __init__(self, host: HostPool, buffers: Callable[[], Sequence[Tensor]], device: str) -> None:
        self._host = host
        self._buffers = buffers
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    @contextmanager
    def transfer(self, num_tokens: int) -> Iterator[Transfer]:
        """What is enqueued inside is one transfer; it starts after what the caller has enqueued so far."""
        transfer = Transfer(num_tokens * self._host.bytes_per_token)
        if self._stream is None:
            transfer._start_s = time.perf_counter()
            yield transfer
            transfer._end_s = time.perf_counter()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            start.record()
            yield transfer
            end.record()
        transfer._span = (start, end)

    def wait_for(self, stream: Any) -> None:
        """What follows in this transfer starts after what is enqueued on `stream` now."""
        if self._stream is not None:
            self._stream.wait_stream(stream)

    def copy_out(self, transfer: Transfer, slots: Tensor, blocks: Sequence[int]) -> None:
        """Device to host.

        Args:
            slots: [num_tokens], int64, in the order of positions.
            blocks: of the same request.
        """
        # memory that the caching allocator must not hand out before the copy has read it
        transfer._keep_alive.append(slots)
        buffers = self._buffers()
        for block, part in zip(blocks, slots.split(self._host.block_tokens), strict=True):
            target = self._host.flat(block)
            staging = target if self._stream is None else torch.empty_like(target, device=slots.device)
            for view, buffer in zip(self._host.views(staging), buffers, strict=True):
                torch.index_select(buffer.flatten(1), 0, part, out=view[: len(part)])
            if staging is not target:
                target.copy_(staging, non_blocking=True)

    def copy_in(self, transfer: Transfer, slots: Tensor, blocks: Sequence[int], start: int = 0) -> None:
        """Host to device.

        Args:
            slots: [num_tokens - start], int64: where positions `start` and later go.
            blocks: of the whole request.
            start: positions before it are on the device already.
        """
        transfer._keep_alive.append(slots)
        buffers = self._buffers()
        size, end = self._host.block_tokens, start + len(slots)
        for index in range(start // size, self._host.blocks_for(end)):
            first, last = max(start, index * size), min(end, (index + 1) * size)
            source = self._host.flat(blocks[index])
            if self._stream is not None:
                source = source.to(slots.device, non_blocking=True)
            part = slots[first - start : last - start]
            for view, buffer in zip(self._host.views(source), buffers, strict=True):
                buffer.flatten(1).index_copy_(0, part, view[first - index * size : last - index * size])


def to_host(tensor: Tensor) -> Tensor:
    """A host copy, made without waiting: from a CUDA device it is valid once the stream has got there."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _register(memory: Tensor) -> None:
    # not `pin_memory=True`: torch's allocator rounds pinned memory up to a power of two
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not pin {memory.numel() * memory.element_size() / 1e9:.1f} GB (code {code}).")
