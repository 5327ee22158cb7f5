"""Host memory for KV, and the copies both ways.

A block holds `block_tokens` tokens of one request in all layers, K and V. On CUDA one kernel gathers the slots of a
block into a staging block on the device, which then crosses PCIe in one asynchronous copy to pinned memory; the way
back is the same in reverse. All of it is on queues of its own, so rounds go on meanwhile.

What of SGLang's own fits, and what does not: its `MHATokenToKVPoolHost` refuses to start unless 10 GB of RAM stay free
beside it and scatters a request over the pool token by token; its transfer kernels write host memory from the
multiprocessors that rounds need, where a copy engine moves whole blocks; and neither has a form for a CPU, where this
package is tested.
Invariant: a block is free or belongs to one request; nothing here waits for the device except `Transfer.wait`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.ops.kv_blocks import BlockLayout, gather_block, scatter_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sglang_sparsespec.kv.queues import Mark, Queue, Queues

BLOCK_TOKENS = 128
"""Tokens of a host block: 18 MiB for a model of 36 layers, 8 KV heads of 128, bf16: large enough for PCIe to run at
full speed; half a block per request is lost to rounding, in memory and on the bus."""


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
        self.layout = BlockLayout(tuple(widths), block_tokens)
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
        """[layout.numel]: the whole block, as it crosses the bus."""
        return self._memory[block]


class Transfer:
    """One copy under way, between two marks of its queue."""

    def __init__(self, num_bytes: int, start: Mark, end: Mark, keep_alive: Sequence[Tensor]) -> None:
        self.num_bytes = num_bytes
        self._start, self._end = start, end
        # the allocator must not hand this memory out before the copy has read it
        self._keep_alive = keep_alive

    def is_done(self) -> bool:
        return self._end.query()

    def wait(self) -> None:
        """Block the host until the copy is done."""
        self._end.synchronize()

    def seconds(self) -> float:
        """What the copy took; valid once it is done."""
        return 1e-3 * self._start.elapsed_time(self._end)


class Mover:
    """Copies the KV of a request between slots of the device pool and blocks of host memory.

    Args:
        host: where to.
        buffers: returns the device buffers, each [num_slots, ...]; asked at every copy, since the host may replace
            them after it has captured its graphs.
        queues: of the device.
        is_staged: gather into a block on the device first, because the host's memory is across a bus.
    """

    def __init__(
        self, host: HostPool, buffers: Callable[[], Sequence[Tensor]], queues: Queues, *, is_staged: bool
    ) -> None:
        self._host = host
        self._buffers = buffers
        self._queues = queues
        self._is_staged = is_staged

    def warm_up(self) -> None:
        """Have kernels compiled before anybody waits for them: slot 0 of the pool goes into a block and back."""
        buffers = self._buffers()
        slots = torch.zeros(1, dtype=torch.int64, device=buffers[0].device)
        block = torch.empty(self._host.layout.numel, dtype=buffers[0].dtype, device=buffers[0].device)
        gather_block(buffers, slots, block, self._host.layout)
        scatter_block(buffers, slots, block, self._host.layout)

    def copy_out(self, slots: Tensor, blocks: Sequence[int]) -> Transfer:
        """Device to host, beside the round in flight, which must not write these slots.

        Args:
            slots: [num_tokens], int64, in the order of positions; made on the scheduler's queue.
            blocks: of the same request.
        """
        buffers = self._buffers()
        # the scheduler may just have written the page table that `slots` was read from
        return self._transfer(
            slots,
            [self._queues.schedule()],
            [
                partial(self._gather, buffers, part, block)
                for block, part in zip(blocks, slots.split(self._host.block_tokens), strict=True)
            ],
        )

    def copy_in(self, slots: Tensor, blocks: Sequence[int], start: int = 0) -> Transfer:
        """Host to device, after the round in flight: it may still write drafts into slots that it has lost.

        Args:
            slots: [num_tokens - start], int64: where positions `start` and later go; made on the scheduler's queue.
            blocks: of the whole request.
            start: positions before it are on the device already.
        """
        buffers = self._buffers()
        size, end = self._host.block_tokens, start + len(slots)
        work = []
        for index in range(start // size, self._host.blocks_for(end)):
            first, last = max(start, index * size), min(end, (index + 1) * size)
            part = slots[first - start : last - start]
            work.append(partial(self._scatter, buffers, part, blocks[index], first - index * size))
        return self._transfer(slots, [self._queues.schedule(), self._queues.rounds], work)

    def _transfer(self, slots: Tensor, after: Sequence[Queue], blocks: Sequence[Callable[[], None]]) -> Transfer:
        """Copy blocks, every other one on the second queue: its kernel and its crossing take turns with the first's."""
        first, second = self._queues.copies
        for queue in after:
            first.wait_for(queue)
        begin = first.mark()
        second.wait_for(first)
        for index, work in enumerate(blocks):
            (second if index % 2 else first).run(work)
        first.wait_for(second)
        return Transfer(len(slots) * self._host.bytes_per_token, begin, first.mark(), [slots])

    def _gather(self, buffers: Sequence[Tensor], slots: Tensor, block: int) -> None:
        target = self._host.flat(block)
        staging = torch.empty_like(target, device=slots.device) if self._is_staged else target
        gather_block(buffers, slots, staging, self._host.layout)
        if staging is not target:
            target.copy_(staging, non_blocking=True)

    def _scatter(self, buffers: Sequence[Tensor], slots: Tensor, block: int, first: int) -> None:
        source = self._host.flat(block)
        if self._is_staged:
            source = source.to(slots.device, non_blocking=True, copy=True)
        scatter_block(buffers, slots, source, self._host.layout, first)


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
