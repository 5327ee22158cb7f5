"""A SPARSESPEC server that writes down each of its forwards: how many rows it multiplied, and when.

    SPARSESPEC_ROWS=FILE python scripts/bench/rows_server.py --model-path PATH --speculative-algorithm SPARSESPEC ...

Lines of FILE: [milliseconds since the first forward, milliseconds it took, rows, kind]. Rows with padding: what matrix
products see. On a GPU times are of the device.
"""

from __future__ import annotations

import json
import os
import runpy
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import torch
from hooked_server import before_worker_runs

ROWS = "SPARSESPEC_ROWS"


class Moment(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it has passed."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to another one."""
        ...


class HostMoment:
    """Where the host does the work itself."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostMoment) -> float:
        return (end._time - self._time) * 1e3


def now(device: str) -> Moment:
    if device == "cpu":
        return HostMoment()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def install(file: Path) -> None:
    """Watch forwards over static tensors, which are all of SPARSESPEC's where the verify is its own."""
    from sglang_sparsespec.adapter.padded_forward import PaddedForward

    run = PaddedForward.__call__
    out = file.open("a", buffering=1)
    under_way: deque[tuple[Moment, Moment, int, str]] = deque()
    first: Moment | None = None

    def watched(self: Any, batch_size: int) -> Any:
        nonlocal first
        device = "cuda" if torch.cuda.is_available() else "cpu"
        began = now(device)
        first = first or began
        logits = run(self, batch_size)
        under_way.append((began, now(device), logits.shape[0], self.name))
        # nobody waits for the device here
        while under_way and under_way[0][1].query():
            start, end, rows, name = under_way.popleft()
            line = [round(first.elapsed_time(start), 3), round(start.elapsed_time(end), 3), rows, name]
            out.write(json.dumps(line) + "\n")
        return logits

    PaddedForward.__call__ = watched  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__") and ROWS in os.environ:
    before_worker_runs(lambda: install(Path(os.environ[ROWS])))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
