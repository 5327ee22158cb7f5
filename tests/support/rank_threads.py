"""Ranks of a server as threads of one process: what each decides can be compared, and one that hangs is an error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from sglang_sparsespec.adapter.host_ranks import HostRanks

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE_S = 30.0


class Meeting:
    """Where ranks meet; a rank that does not come breaks it, and all fail."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[str] = []
        """Kinds of the collectives so far."""
        self.disagreements = 0
        """How many of them brought together different values."""
        self._said: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)

    def exchange(self, rank: int, kind: str, value: Any) -> list[Any]:
        """What all ranks say, once all have said it."""
        self._said[rank] = (kind, value)
        self._barrier.wait()
        said = list(self._said)
        if rank == 0:
            self.calls.append(kind)
            self.disagreements += len({repr(value) for _, value in said}) > 1
        # nobody speaks again before all have heard
        self._barrier.wait()
        assert {other for other, _ in said} == {kind}, f"collectives that do not match: {said}"
        return [value for _, value in said]

    def run(self, work: Callable[[HostRanks], T]) -> list[T]:
        """`work` on every rank at the same time; what the ranks return, or the first error.

        A rank that is left alone by one that failed has a broken barrier to report, which is not the cause.
        """

        def on(rank: int) -> T:
            try:
                return work(ThreadRanks(self, rank))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(on, rank) for rank in range(self.size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


class ThreadRanks(HostRanks):
    """One of them; everything but the group is the real thing."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(None, rank, meeting.size)
        self._meeting = meeting

    def _all_reduce_min(self, values: list[int]) -> list[int]:
        said = self._meeting.exchange(self.rank, "smallest", values)
        return [min(column) for column in zip(*said, strict=True)]

    def _broadcast(self, value: int) -> int:
        return int(self._meeting.exchange(self.rank, "rank 0", value)[0])
