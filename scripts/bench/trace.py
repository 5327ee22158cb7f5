"""Where the GPU's time goes in a profiler trace of a server: kernels, gaps between them, and what the host waited for.

    curl -d '{"output_dir": "/tmp/trace", "num_steps": 4, "activities": ["CPU", "GPU"]}' .../start_profile
    python scripts/bench/trace.py /tmp/trace/*.trace.json.gz

A gap is time in which no kernel and no copy ran. A wait of the host costs the GPU nothing unless a gap follows it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "aten::item")
LONG_GAP_US = 20.0


class Work(NamedTuple):
    """Something the GPU did; microseconds."""

    start: float
    end: float
    name: str


def read_events(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return json.load(file)["traceEvents"]


def gpu_work(events: list[dict[str, Any]]) -> list[Work]:
    """By start."""
    return sorted(
        Work(event["ts"], event["ts"] + event["dur"], short(event["name"]))
        for event in events
        if event.get("cat") in GPU_WORK
    )


def short(name: str) -> str:
    """Without template arguments, and long names cut."""
    name = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::", "", name)
    elementwise = re.search(r"(\w+)(?:_kernel_impl|_kernel_cuda|Functor|_kernel)\b", name)
    base = re.split(r"[<(]", name)[0]
    if base.startswith("at::native::") and elementwise:
        base += f" [{elementwise.group(1)}]"
    return base[:90]


def gaps(work: list[Work]) -> list[tuple[float, str, str]]:
    """(microseconds, what ran before, what ran after), for every moment without work."""
    found = []
    last = work[0]
    for item in work[1:]:
        if item.start > last.end:
            found.append((item.start - last.end, last.name, item.name))
        if item.end > last.end:
            last = item
    return found


def waits(events: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Name -> (calls, microseconds) of what makes a host thread wait for the device."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and name in WAITS:
            calls, time = found[name]
            found[name] = (calls + 1, time + event["dur"])
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--top", type=int, default=40, help="kernels to list")
    args = parser.parse_args()
    events = read_events(args.trace)
    work = gpu_work(events)
    span = max(item.end for item in work) - work[0].start
    idle = gaps(work)
    idle_us = sum(gap for gap, _, _ in idle)
    print(f"span {span / 1e3:.2f} ms, idle {idle_us / 1e3:.2f} ms ({100 * idle_us / span:.2f} %)")
    print(f"gaps of {LONG_GAP_US:.0f} us and more:")
    for gap, before, after in sorted(idle, reverse=True)[:15]:
        if gap >= LONG_GAP_US:
            print(f"  {gap:9.1f} us  after {before}, before {after}")
    print("waits of the host:")
    for name, (calls, time) in waits(events).items():
        print(f"  {calls:6d} {time / 1e3:9.2f} ms  {name}")
    times: dict[str, list[float]] = defaultdict(list)
    for item in work:
        times[item.name].append(item.end - item.start)
    print("| ms | % of span | calls | mean us | kernel |\n|---|---|---|---|---|")
    for name, spent in sorted(times.items(), key=lambda pair: -sum(pair[1]))[: args.top]:
        total = sum(spent)
        print(f"| {total / 1e3:.3f} | {100 * total / span:.1f} | {len(spent)} | {total / len(spent):.1f} | {name} |")


if __name__ == "__main__":
    main()
