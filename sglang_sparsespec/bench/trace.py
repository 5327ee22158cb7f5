"""Where the GPU's time goes in rounds of a server: kernels, gaps between them, and what the host waited for.

`record` profiles a server under the load of a scene; `--profile` of the benchmark calls it. A trace of one's own:

    curl -d '{"output_dir": "traces", "num_steps": 4, "activities": ["GPU"]}' .../start_profile
    python -m sglang_sparsespec.bench.trace traces/*.trace.json.gz

Host time is that of the thread that launches, from one wait for results to the next: what an iteration of the scheduler
takes of the host, Python included; per forward it is that over the graphs it launched.

A gap is time in which no kernel and no copy ran. A wait of the host costs the GPU nothing unless a gap follows it. With
activity "CPU" the profiler slows the host, and gaps appear that are not there without it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_sparsespec.bench.client import run_requests
from sglang_sparsespec.bench.server import ServerError

if TYPE_CHECKING:
    from sglang_sparsespec.bench.cells import Scene
    from sglang_sparsespec.bench.measure import PromptSource
    from sglang_sparsespec.bench.server import Server

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "aten::item")
LONG_GAP_US = 20.0
NUM_ROUNDS = 8
NEW_TOKENS = 384
"""More than the rounds that are traced, with what passes until all requests run and the profiler has started."""
WRITE_TIMEOUT_S = 60.0
WRITE_S = 10.0
"""Seen: 3 to 8 s."""


def record(server: Server, source: PromptSource, scene: Scene, folder: Path, *, keeps_cache: bool = False) -> Path:
    """Trace `NUM_ROUNDS` iterations at the end of a scene, all its requests running; returns the trace's file.

    Args:
        keeps_cache: whether prompts may be in the radix cache; else it is emptied before.

    Raises:
        ServerError: if the batch never was full, or no trace appeared.
    """
    length = scene.prompt_tokens + scene.new_tokens - NEW_TOKENS
    end = replace(scene, prompt_tokens=max(1, length), new_tokens=NEW_TOKENS, num_slices=1)
    if not keeps_cache:
        server.flush_cache()
    before = set(folder.glob("**/*.trace.json.gz"))
    errors: list[BaseException] = []

    def load() -> None:
        try:
            run_requests(
                server.url,
                source.prompts(end, seed=0),
                end.sampling,
                concurrency=end.batch,
                timeout_s=server.request_timeout_s,
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        while server.loads()["num_running_reqs"] < end.batch and thread.is_alive():
            time.sleep(0.02)
        is_full = thread.is_alive()
        if is_full:
            request = {"output_dir": str(folder.resolve()), "num_steps": NUM_ROUNDS, "activities": ["GPU"]}
            server.post("/start_profile", request)
    finally:
        thread.join()
    if errors or not is_full:
        raise ServerError(f"no trace of {scene}: {errors[0] if errors else 'the batch was never full'}")
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while time.monotonic() < deadline:
        found = set(folder.glob("**/*.trace.json.gz")) - before
        if found and is_whole(min(found)):
            return min(found)
        time.sleep(0.5)
    raise ServerError(f"no trace of {scene} appeared in {folder} within {WRITE_TIMEOUT_S:.0f} s")


def is_whole(path: Path) -> bool:
    """Whether a trace has been written to its end."""
    try:
        read_events(path)
    except (EOFError, OSError, ValueError):
        return False
    return True


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


class HostTime(NamedTuple):
    """What the launching thread did between waits for the device; milliseconds."""

    iterations: int
    """From one wait behind launches to the next one."""
    mean_ms: float
    """Of an iteration, its waits left out."""
    max_ms: float
    forwards: int
    """Graphs that it launched in them; a forward without graphs is not counted."""

    @property
    def per_forward_ms(self) -> float | None:
        return self.iterations * self.mean_ms / self.forwards if self.forwards else None


def host_time(events: list[dict[str, Any]]) -> HostTime | None:
    """None for a trace without two waits of a thread that launches."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        is_call = event.get("cat") in HOST_CALLS or event.get("name") in WAITS
        if event.get("ph") == "X" and is_call:
            threads[(event.get("pid"), event.get("tid"))].append(event)
    calls = max(threads.values(), key=lambda calls: sum("Launch" in call["name"] for call in calls), default=[])
    stretches: list[tuple[float, int]] = []
    free_from: float | None = None
    busy, launches, graphs = 0.0, 0, 0
    for call in sorted(calls, key=lambda call: call["ts"]):
        if call["name"] not in WAITS:
            launches += "Launch" in call["name"]
            graphs += "GraphLaunch" in call["name"]
            continue
        if free_from is None:
            # what came before the first wait began before the trace did
            busy, launches, graphs = 0.0, 0, 0
        else:
            # a wait may lie inside another one
            busy += max(0.0, call["ts"] - free_from)
        if launches:
            stretches.append((busy, graphs))
            busy, launches, graphs = 0.0, 0, 0
        free_from = max(free_from or 0.0, call["ts"] + call["dur"])
    if not stretches:
        return None
    times = [time / 1e3 for time, _ in stretches]
    return HostTime(len(times), sum(times) / len(times), max(times), sum(count for _, count in stretches))


def summarise(path: Path, top: int = 40) -> dict[str, Any]:
    """A trace in numbers: `span_ms`, `idle_ms` and `idle_share` of the GPU, its longest gaps, waits of the host, its
    own time by iteration and forward (`host`, None where unknown), and the kernels that took most, as (name, calls,
    milliseconds)."""
    events = read_events(path)
    work, host = gpu_work(events), host_time(events)
    span = max(item.end for item in work) - work[0].start
    idle = sorted(gaps(work), reverse=True)
    idle_us = sum(gap for gap, _, _ in idle)
    times: dict[str, list[float]] = defaultdict(list)
    for item in work:
        times[item.name].append(item.end - item.start)
    return {
        "span_ms": round(span / 1e3, 3),
        "idle_ms": round(idle_us / 1e3, 3),
        "idle_share": round(idle_us / span, 5),
        "gaps_us": [
            (round(gap, 1), *between) for gap, *between in sorted(idle, reverse=True)[:15] if gap >= LONG_GAP_US
        ],
        "waits_ms": {name: (calls, round(spent / 1e3, 3)) for name, (calls, spent) in waits(events).items()},
        "host": None
        if host is None
        else {
            "iterations": host.iterations,
            "iteration_ms": round(host.mean_ms, 3),
            "longest_iteration_ms": round(host.max_ms, 3),
            "forward_ms": None if host.per_forward_ms is None else round(host.per_forward_ms, 3),
        },
        "kernels": [
            (name, len(spent), round(sum(spent) / 1e3, 3))
            for name, spent in sorted(times.items(), key=lambda pair: -sum(pair[1]))[:top]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_sparsespec.bench.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--top", type=int, default=40, help="kernels to list")
    args = parser.parse_args()
    found = summarise(args.trace, args.top)
    span = found["span_ms"]
    print(f"span {span:.2f} ms, idle {found['idle_ms']:.2f} ms ({100 * found['idle_share']:.2f} %)")
    print(f"gaps of {LONG_GAP_US:.0f} us and more:")
    for gap, before, after in found["gaps_us"]:
        print(f"  {gap:9.1f} us  after {before}, before {after}")
    print("waits of the host:")
    for name, (calls, spent) in found["waits_ms"].items():
        print(f"  {calls:6d} {spent:9.2f} ms  {name}")
    if found["host"] is None:
        print("host time: unknown, no two waits of a thread that launches")
    else:
        host = found["host"]
        per_forward = "no graphs" if host["forward_ms"] is None else f"{host['forward_ms']:.3f} ms a forward"
        print(
            f"host time: {host['iteration_ms']:.3f} ms an iteration (longest {host['longest_iteration_ms']:.3f}, "
            f"{host['iterations']} of them), {per_forward}"
        )
    print("| ms | % of span | calls | mean us | kernel |\n|---|---|---|---|---|")
    for name, calls, spent in found["kernels"]:
        print(f"| {spent:.3f} | {100 * spent / span:.1f} | {calls} | {1e3 * spent / calls:.1f} | {name} |")


if __name__ == "__main__":
    main()
