"""The reader of profiler traces on one made by hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

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
