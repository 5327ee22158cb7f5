"""Host memory for KV, and the copies both ways.

On the host a token is one row: K and V of all its layers side by side, so that any run of tokens is one piece of
memory. A request holds whole blocks of `block_tokens` rows, neighbours where possible. On CUDA one kernel gathers the
slots of a chunk into rows on the device, which then cross PCIe in one asynchronous copy to pinned memory; the way back
is the same in reverse. All of it is on queues of its own, so rounds of decoding go on meanwhile.

What of SGLang's own fits, and what does not: its `MHATokenToKVPoolHost` refuses to start unless 10 GB of RAM stay free
beside it and scatters a request over the pool token by token; its transfer kernels write host memory from the
multiprocessors that rounds need, where a copy engine moves whole chunks; and neither has a form for a CPU, where this
package is tested.
Requests that share a prefix share its full blocks, each of which has crossed once.
Invariants: a block is free or has holders; what is in a block that has several does not change; transfers end in the
order in which they were started; nothing here waits for the device except `Transfer.wait`.
"""

from __future__ import annotations

import hashlib
import weakref
from array import array
from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.errors import PinError
from sglang_sparsespec.ops.kv_tokens import KvBuffers, gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sglang_sparsespec.kv.queues import Mark, Queue, Queues

BLOCK_TOKENS = 128
"""Tokens of a host block: half a block per request is lost to rounding, in memory alone."""
CHUNK_BYTES = 8 << 20
"""What crosses in one copy at most. Large, for a copy costs the host some 30 us of launches, the time in which 2 MB
cross; small, for the bus waits while the first chunk is gathered, and chunks of two queues are staged at a time."""


class HostPool:
    """Blocks of host memory.

    Args:
        widths: elements per token of each device buffer, in the order of the buffers (K of every layer, V of every
            layer).
        dtype: element type of all of them.
        num_bytes: budget; rounded down to whole blocks.
        is_pinned: register the memory with CUDA, for as long as this object lives.

    Raises:
        PinError: CUDA refuses to.
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
        self.block_tokens = block_tokens
        self.bytes_per_token = sum(widths) * dtype.itemsize
        self.num_blocks = num_bytes // (block_tokens * self.bytes_per_token)
        # untouched pages cost nothing on a CPU; registering commits them
        self._memory = torch.empty(self.num_blocks * block_tokens, sum(widths), dtype=dtype)
        if is_pinned and self.num_blocks > 0:
            _register(self._memory)
            # memory that is freed while registered cannot be registered again by whoever gets it next. The finalizer
            # keeps it alive until then; at the end of the process CUDA may be gone before it, and needs no telling
            weakref.finalize(self, _unregister, self._memory).atexit = False
        self.free_blocks = list(range(self.num_blocks))
        """In ascending order, so that neighbours are found."""
        self._holders: dict[int, int] = {}
        """How many requests hold a block; no entry: it is free."""
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        """Blocks that others may hold as well, by what is in them and before them."""

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_tokens * self.bytes_per_token

    @property
    def used_bytes(self) -> int:
        return (self.num_blocks - len(self.free_blocks)) * self.block_tokens * self.bytes_per_token

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def alloc(self, num_tokens: int) -> list[int] | None:
        """Blocks for a request, neighbours if there are any; None where the memory is full."""
        free, count = self.free_blocks, self.blocks_for(num_tokens)
        if count > len(free):
            return None
        # ascending, so blocks are neighbours where the last is as far from the first in number as in the list
        fits = (i for i in range(len(free) - count + 1) if count and free[i + count - 1] - free[i] == count - 1)
        first = next(fits, 0)
        blocks = free[first : first + count]
        del free[first : first + count]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less of each; those without any are free."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                self._block_of.pop(self._key_of.pop(block, b""), None)
                self.free_blocks.append(block)
        self.free_blocks.sort()

    def num_holders(self, block: int) -> int:
        return self._holders.get(block, 0)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of as many leading `keys` as are known, each with one holder more: the caller, who must free them.

        Args:
            keys: of the full blocks of a prefix, see `block_keys`.
        """
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._holders[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Let others share full blocks, the first of a request, whose copy has been started."""
        for key, block in zip(keys, blocks, strict=True):
            if self._block_of.setdefault(key, block) == block:
                self._key_of[block] = key

    def chunks(self, blocks: Sequence[int], start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Where tokens [start, end) of a request lie: the first token of each chunk, and its rows.

        Rows are [num_tokens, elements per token], one piece of memory of at most CHUNK_BYTES or one token.
        """
        size, most = self.block_tokens, max(1, CHUNK_BYTES // self.bytes_per_token)
        while start < end:
            index = start // size
            run = index + 1
            while run * size < start + most and run < len(blocks) and blocks[run] == blocks[run - 1] + 1:
                run += 1
            stop = min(end, run * size, start + most)
            row = blocks[index] * size + start - index * size
            yield start, self._memory[row : row + stop - start]
            start = stop


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
        self._checked: KvBuffers | None = None

    def warm_up(self) -> None:
        """Have kernels compiled before anybody waits for them: slot 0 of the pool goes into a row and back."""
        pool = self._pool()
        slots = torch.zeros(1, dtype=torch.int64, device=pool.device)
        row = torch.empty(1, pool.width, dtype=pool.dtype, device=pool.device)
        gather_tokens(pool, slots, row)
        scatter_tokens(pool, slots, row)

    def copy_out(self, slots: Tensor, blocks: Sequence[int], start: int = 0) -> Transfer:
        """Device to host, beside the round in flight, which must not write these slots.

        Args:
            slots: [num_tokens - start], int64, of positions `start` and later in order; made on the scheduler's queue.
            blocks: of the whole request.
            start: positions before it are in their blocks already, or will be when the copies started before are done.
        """
        # the scheduler may just have written the page table that `slots` was read from
        return self._transfer(self._gather, slots, blocks, start, [self._queues.schedule()])

    def copy_in(self, slots: Tensor, blocks: Sequence[int], start: int = 0) -> Transfer:
        """Host to device, after the round in flight: it may still write drafts into slots that it has lost.

        Args:
            slots: [num_tokens - start], int64: where positions `start` and later go; made on the scheduler's queue.
            blocks: of the whole request.
            start: positions before it are on the device already.
        """
        return self._transfer(self._scatter, slots, blocks, start, [self._queues.schedule(), self._queues.rounds])

    def _transfer(
        self,
        move: Callable[[KvBuffers, Tensor, Tensor], None],
        slots: Tensor,
        blocks: Sequence[int],
        start: int,
        after: Sequence[Queue],
    ) -> Transfer:
        """Copy chunks, every other one on the second queue: its kernel and its crossing take turns with the first's."""
        pool = self._pool()
        # made before the clock runs: only launches are left for then
        work = [
            partial(move, pool, slots[first - start : first - start + len(rows)], rows)
            for first, rows in self._host.chunks(blocks, start, start + len(slots))
        ]
        one, other = self._queues.copies
        for queue in after:
            one.wait_for(queue)
        begin = one.mark()
        other.wait_for(one)
        for index, chunk in enumerate(work):
            (other if index % 2 else one).run(chunk)
        one.wait_for(other)
        return Transfer(len(slots) * self._host.bytes_per_token, begin, one.mark(), [slots])

    def _pool(self) -> KvBuffers:
        buffers = self._buffers()
        known = () if self._checked is None else self._checked.buffers
        if len(known) != len(buffers) or any(a is not b for a, b in zip(known, buffers, strict=True)):
            self._checked = KvBuffers(buffers)
        assert self._checked is not None
        return self._checked

    def _gather(self, pool: KvBuffers, slots: Tensor, rows: Tensor) -> None:
        staging = torch.empty_like(rows, device=slots.device) if self._is_staged else rows
        gather_tokens(pool, slots, staging)
        if staging is not rows:
            rows.copy_(staging, non_blocking=True)

    def _scatter(self, pool: KvBuffers, slots: Tensor, rows: Tensor) -> None:
        if self._is_staged:
            rows = rows.to(slots.device, non_blocking=True, copy=True)
        scatter_tokens(pool, slots, rows)


def block_keys(token_ids: Sequence[int], extra_key: str | None, block_tokens: int) -> list[bytes]:
    """A key for each full block of a prefix: equal where it, and all before it, hold the same tokens.

    Args:
        token_ids: of the prefix.
        extra_key: what else tells prefixes apart in the host's cache.
        block_tokens: of a host block.
    """
    keys, before = [], hashlib.sha256(repr(extra_key).encode())
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        before.update(array("q", token_ids[start : start + block_tokens]).tobytes())
        keys.append(before.digest())
    return keys


def pinned_copy(tensor: Tensor) -> Tensor:
    """A host copy, made without waiting: from a CUDA device it is valid once the stream has got there."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _register(memory: Tensor) -> None:
    # not `pin_memory=True`: torch's allocator rounds pinned memory up to a power of two
    num_bytes = memory.numel() * memory.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    if code != 0:
        raise PinError(num_bytes, code)


def _unregister(memory: Tensor) -> None:
    # waits for copies that still use it; an error has nobody who could do anything about it
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
