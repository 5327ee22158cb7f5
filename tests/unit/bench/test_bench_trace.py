"""The reader of profiler traces on one made by hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.bench.trace import HostTime, host_time

if TYPE_CHECKING:
    from pathlib import Path

MODULE = "sglang_sparsespec.bench.trace"


def work(cat: str, name: str, start: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": dur}


def test_reports_gaps_waits_and_kernels(tmp_path: Path) -> None:
    """Work of two streams at a time counted twice, or a gap after a longer neighbour, would hide that the GPU idles."""
    events = [
        work("kernel", "void at::native::copy<float>(int)", 100, 50),
        work("kernel", "_attend_kernel", 110, 10),
        work("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 200, 100),
        work("cuda_runtime", "cudaStreamSynchronize", 0, 2000),
        work("cuda_runtime", "cudaLaunchKernel", 90, 5),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "run.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    report = subprocess.run([sys.executable, "-m", MODULE, path], capture_output=True, text=True, check=True).stdout
    assert "span 0.20 ms, idle 0.05 ms (25.00 %)" in report
    assert "50.0 us  after at::native::copy, before Memcpy DtoH" in report
    assert "1      2.00 ms  cudaStreamSynchronize" in report
    assert "cudaLaunchKernel" not in report
    rows = [line.split("|")[1:] for line in report.splitlines() if line.startswith("| 0.")]
    assert [(row[2].strip(), row[4].strip()) for row in rows] == [
        ("1", "Memcpy DtoH"),
        ("1", "at::native::copy"),
        ("1", "_attend_kernel"),
    ]


def host(name: str, start: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return {**work("cuda_runtime", name, start, dur), "pid": 1, "tid": tid}


def test_host_time_is_what_lies_between_waits() -> None:
    """A wait counted as work, one inside another counted twice, or another thread's calls."""
    events = [
        # began before the trace did
        host("cudaGraphLaunch", 0, 10),
        host("cudaEventSynchronize", 1_000, 500),
        # 600 us: two forwards, and a short wait within the iteration, itself inside another call
        host("cudaGraphLaunch", 1_600, 10),
        host("cudaGraphLaunch", 1_700, 10),
        host("cudaLaunchKernel", 1_800, 5),
        host("aten::item", 2_100, 4_900),
        host("cudaStreamSynchronize", 2_200, 4_000),
        # 300 us and 500 us with a wait between them: one iteration, for nothing was launched before the wait
        host("cudaEventSynchronize", 7_300, 1_000),
        host("cudaGraphLaunch", 8_500, 10),
        host("cudaEventSynchronize", 8_800, 3_000),
        # does not end
        host("cudaGraphLaunch", 12_000, 10),
        *(host("cudaEventQuery", 100 * i, 1, tid=2) for i in range(100)),
        work("kernel", "k", 0, 12_000),
    ]
    found = host_time(events)
    assert found is not None
    assert found == HostTime(2, pytest.approx(0.7), pytest.approx(0.8), 3)
    assert found.per_forward_ms == pytest.approx(1.4 / 3)
    assert host_time([event for event in events if event["name"] != "cudaEventSynchronize"][:3]) is None
    eager = host_time([event for event in events if "Graph" not in event["name"]])
    assert eager is not None
    assert eager.per_forward_ms is None


def test_the_report_says_what_the_host_took(tmp_path: Path) -> None:
    """In the trace's own page, and unknown where there is none."""
    events = [host("cudaEventSynchronize", 0, 100), host("cudaGraphLaunch", 300, 10)]
    events += [host("cudaEventSynchronize", 900, 100), work("kernel", "k", 300, 500)]
    for name, content, line in (
        ("a", events, "host time: 0.800 ms an iteration (longest 0.800, 1 of them), 0.800 ms a forward"),
        ("b", events[-1:], "host time: unknown"),
    ):
        path = tmp_path / f"{name}.trace.json"
        path.write_text(json.dumps({"traceEvents": content}))
        report = subprocess.run([sys.executable, "-m", MODULE, path], capture_output=True, text=True, check=True).stdout
        assert line in report
