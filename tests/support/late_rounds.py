"""Rounds on a device that is late at everything, around `offload_machine.Machine`.

The rounds here write what real ones write, where they write it: drafts and rejected tokens past the committed length,
exact KV below it, and for a request that has just ended or left, once more into slots that it has lost.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tests.support.offload_machine import K1, Machine, prompt

if TYPE_CHECKING:
    from tests.support.fake_queues import FakeDevice

GARBAGE = -1.0


def exact(req: Any, first: int, last: int) -> torch.Tensor:
    """KV of positions `first` to `last` - 1 of a request; no two values of a test are equal."""
    return int(req.rid[1:]) * 1000.0 + torch.arange(first, last)


def hand_out_last_freed_first(allocator: Any) -> None:
    """So that whoever needs slots next gets those that may still be in use."""
    free = allocator.free

    def free_to_front(indices: torch.Tensor) -> None:
        before = len(allocator.free_pages)
        free(indices)
        allocator.free_pages = allocator.free_pages.roll(len(allocator.free_pages) - before)

    allocator.free = free_to_front


class Row(NamedTuple):
    """A request in one round."""

    req: Any
    accepted: int
    done: Any
    """The mark after which the host knows."""


class Rounds:
    """The scheduler's side: launches rounds on a late device, and looks at their results one iteration later."""

    def __init__(self, host: Machine, device: FakeDevice, queue: Any, seed: int) -> None:
        self.host, self.device, self.queue = host, device, queue
        self.rng = random.Random(seed)
        self.device_lens: dict[str, int] = {}
        self.in_flight: list[Row] = []
        self.num_moves = 0
        self.retracted: list[Any] = []

    def write(self, slots: torch.Tensor, values: torch.Tensor) -> None:
        for buffer in self.host.buffers:
            buffer.flatten(1)[slots] = values[:, None].expand(-1, 8)

    def admit(self, length: int, seed: int) -> Any:
        """A request whose prefill is done."""
        req = self.host.request(prompt(length, seed), 1)
        self.device.drain()
        slots = self.host.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
        self.write(slots, exact(req, 0, req.kv_committed_len))
        return req

    def launch(self, batch: Any) -> list[Row]:
        rows = []
        self.host.reserve(batch)
        for req in batch.reqs:
            start = self.device_lens.setdefault(req.rid, req.kv_committed_len)
            slots = self.host.rows.req_to_token[req.req_pool_idx, start : start + K1].long()
            accepted = self.rng.randint(1, K1)
            values = exact(req, start, start + K1)
            values[accepted:] = GARBAGE
            # drafts of this round; by the unified schedule also those behind its verify
            reach = self.host.reserved_tokens - K1
            drafts = self.host.rows.req_to_token[req.req_pool_idx, start : start + reach].long()
            self.queue.run(
                lambda slots=drafts: self.write(slots, torch.full((len(slots),), GARBAGE))  # type: ignore[misc]
            )
            self.queue.run(lambda slots=slots, values=values: self.write(slots, values))  # type: ignore[misc]
            self.device_lens[req.rid] = start + accepted
            rows.append(Row(req, accepted, self.queue.mark()))
        return rows

    def process(self, rows: list[Row]) -> None:
        """What SGLang does with results, one iteration late."""
        for row in rows:
            row.done.synchronize()
            if row.req.is_retracted:
                continue
            row.req.kv_committed_len += row.accepted
            row.req.output_ids.extend(range(row.accepted))

    def iterate(self, batch: Any) -> Any:
        host = self.host
        away = {e.request.rid for e in host.offloader._moves.ledger.entries()}
        batch = host.iterate(batch)
        for req in batch.reqs:
            if req.rid in away:
                # the device goes on from what the host knows
                self.device_lens[req.rid] = req.kv_committed_len
        before = len(host.offloader)
        if not batch.is_empty():
            host.offloader.relieve(host.scheduler, batch)
            host.check()
        # nobody prefills them again here
        self.retracted += host.queued
        host.scheduler.waiting_queue = []
        self.num_moves += len(host.offloader) - before
        launched = self.launch(batch)
        self.process(self.in_flight)
        self.in_flight = launched
        return batch


def end(host: Machine, batch: Any, req: Any) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH
    from sglang.srt.mem_cache.common import release_kv_cache

    # its KV is checked here: nobody will read it any more
    slots = host.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
    for buffer in host.buffers:
        assert buffer[slots].flatten(1)[:, 0].tolist() == exact(req, 0, req.kv_committed_len).tolist()
    req.finished_reason = FINISH_LENGTH(1)
    release_kv_cache(req, host.tree)
    batch.filter_batch()
