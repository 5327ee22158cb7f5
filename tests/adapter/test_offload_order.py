"""Moves beside rounds on a device that is late at everything: whatever the order, every request keeps its KV.

The rounds here write what real ones write, where they write it: drafts and rejected tokens past the committed length,
exact KV below it, and for a request that has just ended or left, once more into slots that it has lost.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from sglang_sparsespec.kv import offload as copies
from tests.support.fake_queues import FakeDevice
from tests.support.offload_machine import K1, POOL_TOKENS, Machine, prompt

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

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
        for req in batch.reqs:
            start = self.device_lens.setdefault(req.rid, req.kv_committed_len)
            missing = req.kv_committed_len + 2 * K1 - req.kv.kv_allocated_len
            if missing > 0:
                slots = self.host.allocator.alloc(missing)
                assert slots is not None, "relief has made room"
                end = req.kv.kv_allocated_len + missing
                self.host.rows.write((req.req_pool_idx, slice(req.kv.kv_allocated_len, end)), slots)
                req.kv.kv_allocated_len = end
            slots = self.host.rows.req_to_token[req.req_pool_idx, start : start + K1].long()
            accepted = self.rng.randint(1, K1)
            values = exact(req, start, start + K1)
            values[accepted:] = GARBAGE
            self.queue.run(lambda slots=slots: self.write(slots, torch.full((K1,), GARBAGE)))  # type: ignore[misc]
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
        self.num_moves += len(host.offloader) - before
        launched = self.launch(batch)
        self.process(self.in_flight)
        self.in_flight = launched
        return batch


@pytest.fixture
def late(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Rounds]:
    """Small blocks, so that a request is several; a release that offloads."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang_sparsespec.patches import install_offloader
    from sglang_sparsespec.patches.offload import offload_instead_of_release

    from sglang_sparsespec.adapter import moves

    monkeypatch.setattr(moves, "BLOCK_TOKENS", 16)
    stock = ScheduleBatch.release_req

    def build(seed: int) -> Rounds:
        device = FakeDevice(seed)
        queues = device.queues()
        host = machine(is_radix=False, queues=queues)
        host.offloader._moves.mover._is_staged = True
        hand_out_last_freed_first(host.allocator)
        install_offloader(host.offloader)
        monkeypatch.setattr(
            ScheduleBatch, "release_req", lambda batch, *args: offload_instead_of_release(stock, batch, *args)
        )
        return Rounds(host, device, queues.rounds, seed)

    return build


@pytest.mark.parametrize("seed", range(12))
def test_kv_survives_any_order_of_copies_and_rounds(late: Callable[[int], Rounds], seed: int) -> None:
    """Slots that are handed on before their copy is done, or a restore under the last owner's drafts."""
    rounds = late(seed)
    host = rounds.host
    reqs = [rounds.admit(20 + 10 * i, i) for i in range(6)]
    batch = host.run(*reqs)
    for _ in range(120):
        batch = rounds.iterate(batch)
        live = [*batch.reqs, *(e.request for e in host.offloader._moves.ledger.entries())]
        assert {req.rid for req in live} | {r.rid for r in reqs if r.finished()} == {req.rid for req in reqs}
        for req in live:
            if len(req.output_ids) > 100 and req in batch.reqs and any(row.req is req for row in rounds.in_flight):
                # it ends while a round of it is in flight, which writes into slots that are free already
                end(host, batch, req)
        if not live:
            break
    rounds.process(rounds.in_flight)
    rounds.device.drain()
    assert rounds.num_moves > 1
    assert host.metrics.counts["copied_in_bytes"] > 0
    for req in batch.reqs:
        slots = host.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
        for buffer in host.buffers:
            assert buffer[slots].flatten(1)[:, 0].tolist() == exact(req, 0, req.kv_committed_len).tolist()


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


def test_slots_of_a_pool_are_all_back(late: Callable[[int], Rounds]) -> None:
    """The test above would pass if requests never left: here one leaves and comes back, step by step."""
    rounds = late(3)
    host, device = rounds.host, rounds.device
    first, second = rounds.admit(40, 0), rounds.admit(50, 1)
    batch = host.run(first, second)
    rounds.in_flight = rounds.launch(batch)
    assert host.offloader._moves.depart(second)
    batch.filter_batch(keep_indices=[0])
    transfer = host.offloader._moves.ledger.entries()[0].transfer
    assert isinstance(transfer, copies.Transfer)
    used = POOL_TOKENS - host.allocator.available_size()
    rounds.process(rounds.in_flight)
    rounds.in_flight = []
    transfer.wait()
    batch = host.offloader.before_batch(host.scheduler, batch, None)
    device.drain()
    assert POOL_TOKENS - host.allocator.available_size() <= used
    batch = host.offloader.before_batch(host.scheduler, batch, None)
    assert batch.reqs == [first, second]
    slots = host.rows.req_to_token[second.req_pool_idx, : second.kv_committed_len].long()
    assert host.buffers[0][slots].flatten(1)[:, 0].tolist() == exact(second, 0, 50).tolist()
