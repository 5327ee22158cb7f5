"""Device queues whose work happens as late, and in as odd an order, as what waits for what allows.

A seeded choice takes the next step of any queue that is free to go: a copy may run many rounds late, or a round may
run after copies that were enqueued long after it. What then still comes out right is right on a device of any speed.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sglang_sparsespec.kv.queues import Queues

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeDevice:
    """Queues that share a clock: every look at a mark lets some steps pass.

    Args:
        seed: of the order.
        patience: steps that pass at a look, at most.
    """

    def __init__(self, seed: int, patience: int = 6) -> None:
        self._rng = random.Random(seed)
        self._patience = patience
        self.all: list[FakeQueue] = []
        self._favourite: FakeQueue | None = None

    def queue(self) -> FakeQueue:
        self.all.append(FakeQueue(self))
        return self.all[-1]

    def queues(self) -> Queues:
        """Copies and rounds are queues; what the scheduler writes is written at once."""
        schedule, copies, beside, rounds = (self.queue() for _ in range(4))
        # one runs far ahead of the others
        self._favourite = self._rng.choice([copies, beside, rounds])
        return Queues((copies, beside), rounds, lambda: schedule)

    def step(self) -> bool:
        """One step of one queue; False if nothing can go on."""
        ready = [queue for queue in self.all if queue.is_ready()]
        if ready:
            favourites = [queue for queue in ready if queue is self._favourite] or ready
            self._rng.choice(favourites if self._rng.random() < 0.9 else ready).step()
        return bool(ready)

    def pass_time(self) -> None:
        for _ in range(self._rng.randint(0, self._patience)):
            self.step()

    def drain(self) -> None:
        """Until nothing is left to do."""
        while self.step():
            pass
        assert not any(queue.num_left for queue in self.all), "queues wait for each other"


class FakeQueue:
    """Work is done in order, some time later."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self._steps: list[Callable[[], None] | tuple[FakeQueue, int]] = []
        self.num_done = 0

    @property
    def num_left(self) -> int:
        return len(self._steps) - self.num_done

    def is_ready(self) -> bool:
        if not self.num_left:
            return False
        step = self._steps[self.num_done]
        return not isinstance(step, tuple) or step[0].num_done >= step[1]

    def step(self) -> None:
        step = self._steps[self.num_done]
        if not isinstance(step, tuple):
            step()
        self.num_done += 1

    def run(self, work: Callable[[], None]) -> None:
        self._steps.append(work)

    def entered(self) -> nullcontext[None]:
        # at once: selections are not what this is for
        return nullcontext()

    def wait_for(self, other: FakeQueue) -> None:
        self._steps.append((other, len(other._steps)))

    def mark(self) -> FakeMark:
        return FakeMark(self, len(self._steps))


class FakeMark:
    """After `count` steps of `queue`."""

    def __init__(self, queue: FakeQueue, count: int) -> None:
        self._queue, self._count = queue, count

    def query(self) -> bool:
        self._queue.device.pass_time()
        return self._queue.num_done >= self._count

    def synchronize(self) -> None:
        while self._queue.num_done < self._count:
            assert self._queue.device.step(), "waits for ever"

    def elapsed_time(self, end_event: FakeMark) -> float:
        return float(end_event._count - self._count)
