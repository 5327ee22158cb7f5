"""scripts/bench/schedules.py from end to end on a tiny model: schedules change within one server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.scripts import run_script

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_schedules_take_turns_in_one_server(tmp_path: Path) -> None:
    """A schedule that was set and did not run would be measured under its name. Which one is faster is no test."""
    output = tmp_path / "schedules.jsonl"
    options = (*["--tiny", "--batches", "3", "--repeats", "1", "--json"], str(output))
    report = run_script("bench/schedules.py", *options, timeout_s=600)
    # 1: auto was slower than the better one
    assert report.returncode in (0, 1), report.stderr[-4000:]
    plain, ours = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["record"] for record in (plain, ours)] == ["result", "result"], report.stderr[-4000:]
    turns = {turn["schedule"]: turn for turn in (*plain["turns"], *ours["turns"])}
    assert all(turn["tokens_per_s"] > 0 for turn in turns.values())
    for schedule, other in (("lockstep", "unified"), ("unified", "lockstep")):
        assert turns[schedule]["rounds"][schedule] > 5
        assert turns[schedule]["rounds"][other] == 0
    assert turns["plain"]["accept_length"] is None
    assert turns["unified"]["accept_length"] > 5
    assert "of lockstep" in report.stdout or "of unified" in report.stdout
    again = run_script("bench/schedules.py", *options, timeout_s=60)
    assert again.returncode == report.returncode
    assert len(output.read_text().splitlines()) == 2
