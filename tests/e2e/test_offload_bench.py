"""scripts/bench/offload.py from end to end on a tiny model: every server starts, is loaded, and is accounted for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.scripts import run_script

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_benchmark_of_host_memory_runs_without_a_gpu(tmp_path: Path) -> None:
    """A path of the script that only the card would run, at the price of a card."""
    output = tmp_path / "result.json"
    options = "--tiny --seconds 16 --max-running 12 --host-memory-gb 0.2 --json"
    report = run_script("bench/offload.py", *options.split(), str(output), timeout_s=1500)
    assert report.returncode == 0, report.stderr[-4000:]
    document = json.loads(output.read_text())
    ours, stock, careful = document["results"]
    assert all(result["tokens_per_s"] > 0 and result["finished"] > 0 for result in document["results"])
    assert ours["moves"]["moves"] > 0
    assert ours["moves"]["gb_out"] > 0
    assert ours["moves"]["refusals"] == ours["retracted"] == ours["reprefilled_tokens"] == 0
    assert "moves" not in stock
    assert careful["retracted"] == 0
    assert document["criteria"]["re-prefilled tokens"]["met"]
    assert document["criteria"]["copy out over a plain pinned copy"]["met"] is None
    assert "| sparsespec, host memory |" in report.stdout
