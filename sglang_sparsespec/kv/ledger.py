"""The accounts of requests that are not running: on their way out, in host memory, on their way back.

    running -> LEAVING -> ON_HOST -> RETURNING -> running

LEAVING and RETURNING hold slots of the device pool and blocks of host memory both, because a copy is under way; ON_HOST
holds blocks alone. An entry that is removed at any point gives its blocks back.
Invariant: `check_integrity` passes between any two calls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sglang_sparsespec.errors import AccountError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_sparsespec.kv.offload import HostPool, Transfer
    from sglang_sparsespec.kv.policy import Seniority

RequestT = TypeVar("RequestT")


class Place(Enum):
    LEAVING = "leaving"
    ON_HOST = "on host"
    RETURNING = "returning"


@dataclass
class Entry(Generic[RequestT]):
    """One request that is not running."""

    request: RequestT
    seniority: Seniority
    num_tokens: int
    """Committed tokens, whose KV lies, or will lie, in `blocks`."""
    blocks: list[int]
    place: Place
    transfer: Transfer | None
    """The copy under way; None on the host."""
    state: Any = None
    """What else has to survive: the selection."""
    device_tokens: int = 0
    """Slots of the device pool that are held by this entry and no running request."""


class OffloadLedger(Generic[RequestT]):
    """Entries by request id, and the host blocks they hold."""

    def __init__(self, host: HostPool) -> None:
        self._host = host
        self._entries: dict[str, Entry[RequestT]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, rid: str) -> bool:
        return rid in self._entries

    def add(self, entry: Entry[RequestT]) -> None:
        """A running request leaves."""
        if entry.seniority.rid in self._entries:
            raise AccountError(f"request {entry.seniority.rid!r} leaves twice.")
        self._entries[entry.seniority.rid] = entry

    def remove(self, entry: Entry[RequestT]) -> None:
        """The request runs again, or has ended: its host blocks are free."""
        if self._entries.pop(entry.seniority.rid, None) is not entry:
            raise AccountError(f"request {entry.seniority.rid!r} is not in the ledger.")
        self._host.free(entry.blocks)

    def entry(self, rid: str) -> Entry[RequestT]:
        return self._entries[rid]

    def entries(self, place: Place | None = None) -> list[Entry[RequestT]]:
        """Those at `place`, or all; the senior first."""
        chosen: Iterable[Entry[RequestT]] = self._entries.values()
        if place is not None:
            chosen = (entry for entry in chosen if entry.place is place)
        return sorted(chosen, key=lambda entry: entry.seniority)

    def device_tokens(self, place: Place | None = None) -> int:
        """Slots of the device pool held by entries at `place`, or by all."""
        return sum(e.device_tokens for e in self._entries.values() if place is None or e.place is place)

    def check_integrity(self) -> None:
        """Every host block is free or has as many holders as there are entries that hold it, and those are all blocks;
        whoever has a copy under way holds both ends of it.

        Raises:
            AccountError: naming the account that does not balance.
        """
        held = Counter(block for entry in self._entries.values() for block in entry.blocks)
        if any(count != self._host.num_holders(block) for block, count in held.items()):
            raise AccountError("a host block is held by more or fewer requests than it counts.")
        if set(held) & set(self._host.free_blocks):
            raise AccountError("a host block is held and free.")
        if len(held) + len(self._host.free_blocks) != self._host.num_blocks:
            raise AccountError(
                f"{len(held)} host blocks are held and {len(self._host.free_blocks)} free, of {self._host.num_blocks}."
            )
        for rid, entry in self._entries.items():
            if len(entry.blocks) != self._host.blocks_for(entry.num_tokens):
                raise AccountError(f"{rid!r} holds {len(entry.blocks)} host blocks for {entry.num_tokens} tokens.")
            is_moving = entry.place is not Place.ON_HOST
            if is_moving != (entry.transfer is not None) or (entry.device_tokens > 0 and not is_moving):
                raise AccountError(f"{rid!r} is {entry.place.value} with {entry.device_tokens} slots of the device.")
