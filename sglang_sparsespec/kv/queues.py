"""Order between copies and rounds: as much of a device's streams as moving a request needs.

A queue does its work in the order in which it got it, some time after `run` has returned. Queues know nothing of each
other unless one waits. On a CUDA device a queue is a stream; on a CPU it does everything at once, so that nothing has
to wait for anything. Invariant: only `Mark.synchronize` blocks the host.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class Mark(Protocol):
    """A point in a queue; a CUDA event."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Block the host until it is."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later mark of the same queue; both must be done."""


class Queue(Protocol):
    """Where work of one kind is done in order; a CUDA stream."""

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue `work`, which may be called later: it reads nothing of the host that changes."""

    def entered(self) -> AbstractContextManager[Any]:
        """For what must be called at once; what it gives to the device is enqueued here."""

    def wait_for(self, other: Any) -> None:
        """What is enqueued here from now on starts after what `other`, a queue of the same kind, holds now."""

    def mark(self) -> Mark:
        """After what has been enqueued so far."""


class Queues(NamedTuple):
    """Those that a move touches."""

    copies: tuple[Queue, Queue]
    """KV crosses the bus here, and nothing else happens. Two, so that one block is gathered, beside rounds that leave
    it little room, while another crosses; a CPU has one for both."""
    rounds: Queue
    """Drafts, verifies, prefills: reads selections and writes KV past the committed length."""
    schedule: Callable[[], Queue]
    """The scheduler's own small writes: page table, lists of free slots. Asked for when it is needed."""


class CudaQueue:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        with self.entered():
            work()

    def entered(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def wait_for(self, other: CudaQueue) -> None:
        self._stream.wait_stream(other._stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class HostMark:
    """Everything before it is done already."""

    def __init__(self) -> None:
        self._time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: HostMark) -> float:
        return 1e3 * (end_event._time_s - self._time_s)


class HostQueue:
    """Work is done when `run` returns."""

    def run(self, work: Callable[[], None]) -> None:
        work()

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait_for(self, other: HostQueue) -> None:
        pass

    def mark(self) -> HostMark:
        return HostMark()


def device_queues(device: str, round_stream: Any) -> Queues:
    """Queues of a device.

    Args:
        device: "cuda" or "cpu".
        round_stream: the torch stream on which rounds run; not looked at on a CPU.
    """
    if device != "cuda":
        queue = HostQueue()
        return Queues((queue, queue), queue, lambda: queue)
    # first in line, for their kernels are short and a bus waits for them; and from another pool of streams than the
    # rest, so that none ever turns out to be the stream of the rounds
    copies = (CudaQueue(torch.cuda.Stream(priority=-1)), CudaQueue(torch.cuda.Stream(priority=-1)))
    return Queues(copies, CudaQueue(round_stream), lambda: CudaQueue(torch.cuda.current_stream()))
