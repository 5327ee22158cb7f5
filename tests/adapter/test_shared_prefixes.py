"""Requests that share a prefix of the radix cache and wait in host memory: it crosses once and outlives each."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.kv import offload as copies
from sglang_sparsespec.kv.ledger import Place
from tests.support.fake_queues import FakeDevice
from tests.support.offload_machine import LAYERS, NUM_ROWS, POOL_TOKENS, prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.offload_machine import Machine

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

BLOCK, PREFIX, OUTPUTS = 16, 40, 10
TOKEN_BYTES = 2 * LAYERS * 8 * 4
FULL = PREFIX // BLOCK * BLOCK
"""Tokens of the prefix in full host blocks."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_sparsespec.adapter import moves

    monkeypatch.setattr(moves, "BLOCK_TOKENS", BLOCK)


def sharers(host: Machine, num_requests: int, **attributes: Any) -> list[Any]:
    """With the same prefix, and one more token of their own in the prompt."""
    reqs = []
    for i in range(num_requests):
        req = host.request([*prompt(PREFIX), i], OUTPUTS)
        for name, value in attributes.items():
            setattr(req, name, value)
        reqs.append(req)
    return reqs


def empty_the_cache(host: Machine) -> None:
    """Of what nobody runs on; other slots than before are handed out next, full of garbage."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    host.tree.evict(EvictParams(num_tokens=POOL_TOKENS))
    free = host.occupy(host.allocator.available_size())
    for buffer in host.buffers:
        buffer[free] = float("nan")
    host.vacate(free)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_prefix_crosses_once(machine: Callable[..., Machine], page_size: int) -> None:
    """N copies of a system prompt in host memory, or KV that only one of its owners finds there."""
    host = machine(page_size)
    keep, *reqs = [host.request(prompt(20, seed=1), 2), *sharers(host, 3)]
    batch = host.run(keep, *reqs)
    kv = [host.kv_of(req) for req in reqs]
    host.leave(batch, *reqs)
    own = PREFIX + OUTPUTS
    assert host.metrics.counts["copied_out_bytes"] == (3 * own - 2 * FULL) * TOKEN_BYTES
    assert host.metrics.counts["shared_out_bytes"] == 2 * FULL * TOKEN_BYTES
    num_blocks = FULL // BLOCK + 3 * -(-(own - FULL) // BLOCK)
    assert host.offloader._moves.host.used_bytes == num_blocks * BLOCK * TOKEN_BYTES
    host.check()
    empty_the_cache(host)
    batch = host.iterate(batch)
    assert batch.reqs == [keep, *reqs]
    for req, expected in zip(reqs, kv, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(host.kv_of(req), expected, strict=True))
    assert host.offloader._moves.host.used_bytes == 0


@pytest.mark.parametrize("differ", ["extra_key", "radix off"])
def test_only_what_the_radix_cache_shares_is_shared(machine: Callable[..., Machine], differ: str) -> None:
    """The same tokens under another adapter have other KV."""
    host = machine(is_radix=differ != "radix off")
    keep, *reqs = [host.request(prompt(20, seed=1), 2), *sharers(host, 2)]
    if differ == "extra_key":
        reqs[1].extra_key = "adapter"
    host.leave(host.run(keep, *reqs), *reqs)
    assert host.metrics.counts["shared_out_bytes"] == 0
    host.check()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_who_ends_takes_nothing_from_the_others(machine: Callable[..., Machine], seed: int, first: int) -> None:
    """The abort of the one that brought the prefix, while its copy is under way, on a device that is late."""
    device = FakeDevice(seed)
    host = machine(queues=device.queues())
    host.offloader._moves.mover._is_staged = True
    keep, *reqs = [host.request(prompt(20, seed=1), 2), *sharers(host, 2)]
    batch = host.run(keep, *reqs)
    kv = [host.kv_of(req) for req in reqs]
    for req in reqs:
        assert host.offloader._moves.depart(req)
    batch.filter_batch(keep_indices=[0])
    assert [entry.place for entry in host.offloader._moves.ledger.entries()] == [Place.LEAVING] * 2
    host.offloader.abort(host.scheduler, reqs[first].rid, abort_all=False)
    host.check()
    other = reqs[1 - first]
    while host.offloader._moves.ledger.entry(other.rid).place is Place.LEAVING:
        # nobody returns meanwhile
        host.scheduler.chunked_req = object()
        batch = host.iterate(batch)
    host.scheduler.chunked_req = None
    empty_the_cache(host)
    while host.offloader.holds(other):
        batch = host.iterate(batch)
    device.drain()
    assert batch.reqs == [keep, other]
    assert all(torch.equal(a, b) for a, b in zip(host.kv_of(other), kv[1 - first], strict=True))
    assert host.offloader._moves.host.used_bytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_accounts_balance_whatever_is_refused(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A refused move that keeps its hold on a prefix, or takes it from those who have one."""
    rng, alloc = random.Random(seed), copies.HostPool.alloc
    monkeypatch.setattr(
        copies.HostPool, "alloc", lambda pool, num_tokens: None if rng.random() < 0.4 else alloc(pool, num_tokens)
    )
    host = machine()
    keep, *reqs = [host.request(prompt(20, seed=1), 2), *sharers(host, 5)]
    batch = host.run(keep, *reqs)
    kv = {req.rid: host.kv_of(req) for req in reqs}
    num_refused = 0
    for _ in range(30):
        leaving = [req for req in batch.reqs if req is not keep and rng.random() < 0.7]
        for req in leaving:
            num_refused += not host.offloader.take(batch, req)
            host.check()
        batch.filter_batch(keep_indices=[i for i, r in enumerate(batch.reqs) if not host.offloader.holds(r)])
        if rng.random() < 0.5:
            empty_the_cache(host)
        batch = host.iterate(batch)
        for req in batch.reqs:
            if req is not keep:
                assert all(torch.equal(a, b) for a, b in zip(host.kv_of(req), kv[req.rid], strict=True))
    assert num_refused > 5
    assert host.metrics.counts["shared_out_bytes"] > 0
    host.offloader.abort(host.scheduler, "", abort_all=True)
    assert host.offloader._moves.host.used_bytes == 0
    assert host.rows.available_size() == NUM_ROWS - len(batch.reqs)
