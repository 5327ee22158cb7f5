"""The accounts of requests away from the device: every imbalance that the check exists for."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sglang_sparsespec.errors import AccountError
from sglang_sparsespec.kv.ledger import Entry, OffloadLedger, Place
from sglang_sparsespec.kv.offload import HostPool, Transfer
from sglang_sparsespec.kv.policy import Seniority
from sglang_sparsespec.kv.queues import HostMark


def host_pool(num_blocks: int = 8) -> HostPool:
    return HostPool([2, 2], torch.float32, num_blocks * 4 * 16, block_tokens=4)


def entry(host: HostPool, rid: str, num_tokens: int, place: Place = Place.ON_HOST, arrival: float = 0.0) -> Entry[str]:
    blocks = host.alloc(num_tokens)
    assert blocks is not None
    is_moving = place is not Place.ON_HOST
    return Entry(
        request=rid,
        seniority=Seniority(0, arrival, rid),
        num_tokens=num_tokens,
        blocks=blocks,
        place=place,
        transfer=Transfer(0, HostMark(), HostMark(), []) if is_moving else None,
        device_tokens=num_tokens if is_moving else 0,
    )


def test_any_history_balances() -> None:
    """A block that is lost or given twice shows in the sum, whatever came before."""
    rng, host = random.Random(1), host_pool(20)
    ledger: OffloadLedger[str] = OffloadLedger(host)
    expected: dict[str, Entry[str]] = {}
    for i in range(400):
        tokens = rng.randint(1, 30)
        if rng.random() < 0.5 and host.blocks_for(tokens) <= len(host.free_blocks):
            added = entry(host, f"r{i}", tokens, rng.choice(list(Place)), arrival=rng.random())
            ledger.add(added)
            expected[f"r{i}"] = added
        elif expected:
            ledger.remove(expected.pop(rng.choice(list(expected))))
        ledger.check_integrity()
        assert len(ledger) == len(expected)
        assert [e.request for e in ledger.entries()] == sorted(expected, key=lambda rid: expected[rid].seniority)
        for place in Place:
            there = [e for e in expected.values() if e.place is place]
            assert len(ledger.entries(place)) == len(there)
            assert ledger.device_tokens(place) == sum(e.device_tokens for e in there)
        assert ledger.device_tokens() == sum(e.device_tokens for e in expected.values())
    while expected:
        ledger.remove(expected.popitem()[1])
    assert len(host.free_blocks) == host.num_blocks


def _lose_a_block(host: HostPool, held: Entry[str]) -> None:
    host.free_blocks.pop()


def _free_a_held_block(host: HostPool, held: Entry[str]) -> None:
    host.free_blocks.append(held.blocks[0])


def _hold_a_block_twice(host: HostPool, held: Entry[str]) -> None:
    held.blocks[0] = held.blocks[1]


def _change_the_length(host: HostPool, held: Entry[str]) -> None:
    held.num_tokens = 1


def _share_without_counting(host: HostPool, held: Entry[str]) -> None:
    host._holders[held.blocks[0]] = 2


def _keep_slots_on_the_host(host: HostPool, held: Entry[str]) -> None:
    held.device_tokens = 5


def _move_without_a_copy(host: HostPool, held: Entry[str]) -> None:
    held.place = Place.LEAVING


@pytest.mark.parametrize(
    "damage",
    [
        _lose_a_block,
        _free_a_held_block,
        _hold_a_block_twice,
        _change_the_length,
        _share_without_counting,
        _keep_slots_on_the_host,
        _move_without_a_copy,
    ],
)
def test_check_integrity_notices(damage: Any) -> None:
    """A check that cannot fail would let KV of two requests share a block."""
    host = host_pool()
    ledger: OffloadLedger[str] = OffloadLedger(host)
    held = entry(host, "a", 8)
    ledger.add(held)
    ledger.check_integrity()
    damage(host, held)
    with pytest.raises(AccountError):
        ledger.check_integrity()


def test_a_shared_block_has_several_holders() -> None:
    """A check that calls sharing a fault, or that lets a block go while somebody holds it."""
    host = host_pool()
    ledger: OffloadLedger[str] = OffloadLedger(host)
    first = entry(host, "a", 10)
    host.publish([b"0", b"1"], first.blocks[:2])
    second = entry(host, "b", 1)
    second.blocks, second.num_tokens = host.share([b"0", b"1"]) + second.blocks, 9
    ledger.add(first)
    ledger.add(second)
    ledger.check_integrity()
    assert len(host.free_blocks) == host.num_blocks - 4
    ledger.remove(first)
    ledger.check_integrity()
    assert len(host.free_blocks) == host.num_blocks - 3
    ledger.remove(second)
    ledger.check_integrity()
    assert len(host.free_blocks) == host.num_blocks


def test_a_request_is_in_one_place() -> None:
    """Two entries of one request would both return, and run twice."""
    host = host_pool()
    ledger: OffloadLedger[str] = OffloadLedger(host)
    first = entry(host, "a", 4)
    ledger.add(first)
    with pytest.raises(AccountError, match="leaves twice"):
        ledger.add(entry(host, "a", 4))
    ledger.remove(first)
    assert "a" not in ledger
    with pytest.raises(AccountError, match="not in the ledger"):
        ledger.remove(first)
