"""Moves beside rounds on a device that is late at everything: whatever the order, every request keeps its KV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.kv import offload as copies
from tests.support.fake_queues import FakeDevice
from tests.support.late_rounds import Rounds, end, exact, hand_out_last_freed_first
from tests.support.offload_machine import K1, POOL_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.offload_machine import Machine

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


@pytest.fixture
def late(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    """Small blocks, so that a request is several; a release that offloads."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang_sparsespec.patches import install_offloader
    from sglang_sparsespec.patches.offload import offload_instead_of_release

    from sglang_sparsespec.adapter import moves

    monkeypatch.setattr(moves, "BLOCK_TOKENS", 16)
    stock = ScheduleBatch.release_req

    def build(seed: int, **options: Any) -> Rounds:
        device = FakeDevice(seed)
        queues = device.queues()
        host = machine(is_radix=False, queues=queues, **options)
        host.offloader._moves.mover._is_staged = True
        hand_out_last_freed_first(host.allocator)
        install_offloader(host.offloader)
        monkeypatch.setattr(
            ScheduleBatch, "release_req", lambda batch, *args: offload_instead_of_release(stock, batch, *args)
        )
        return Rounds(host, device, queues.rounds, seed)

    return build


@pytest.mark.parametrize("schedule", ["lockstep", "unified"])
@pytest.mark.parametrize("seed", range(12))
def test_kv_survives_any_order_of_copies_and_rounds(late: Callable[..., Rounds], seed: int, schedule: str) -> None:
    """Slots that are handed on before their copy is done, or a restore under the last owner's drafts.

    By the unified schedule a round also drafts behind its verify, into slots that lie further on.
    """
    rounds = late(seed, sparsespec_schedule=schedule)
    host = rounds.host
    assert host.reserved_tokens == (3 if schedule == "unified" else 2) * K1
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
    # 100 outputs and what the last round added; this pool is so small that a minimum stay may be cut short
    bound = host.offloader._policy.max_moves(100 + K1)
    assert 0 < host.metrics.most_moves <= bound + host.metrics.counts["offload_short_stays"]
    assert host.metrics.most_moves < 8 < bound
    assert host.metrics.counts["copied_in_bytes"] > 0
    for req in batch.reqs:
        slots = host.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
        for buffer in host.buffers:
            assert buffer[slots].flatten(1)[:, 0].tolist() == exact(req, 0, req.kv_committed_len).tolist()


def test_slots_of_a_pool_are_all_back(late: Callable[..., Rounds]) -> None:
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
