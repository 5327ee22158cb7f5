"""`python -m sglang_sparsespec.bench`, whole: real servers, gate, turns, page, plots, and a second call."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.server import server_env

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]


def bench(out: Path, *options: str, name: str = "smoke") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_sparsespec.bench", name, "--repeats", "1", "--out", str(out), *options]
    env = server_env({"SPARSESPEC_COMMIT": "test"})
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_smoke_measures_everyone_and_resumes(tmp_path: Path) -> None:
    """A set that ends with a page but without a number, a plot or a gate; a second call that starts servers again."""
    done = bench(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    gates = {record["contender"]: record["ok"] for record in records if record["record"] == "gate"}
    assert gates == {"sparsespec/pillar": True, "sparsespec/window": True}
    turns = [record for record in records if record["record"] == "turn"]
    # five scenes, two pairs of two
    assert len(turns) == 20
    assert {record["record"] for record in records} == {"turn", "gate", "skip"}
    for turn in turns:
        result, scene = turn["result"], turn["scene"]
        assert result["running"] == pytest.approx(scene["batch"], abs=0.01)
        assert result["tokens_per_s"] > 0
        longest = scene["batch"] * (scene["prompt_tokens"] + scene["new_tokens"])
        assert scene["batch"] * scene["prompt_tokens"] <= result["pool_tokens"] <= longest
        assert (result["accept_length"] or 1.0) <= 9
        assert (result["accept_length"] is None) == (turn["contender"] == "plain/torch_native")
        assert turn["provenance"]["versions"]["sglang"] == "0.5.17"
        assert turn["acceptance"] in ("none", "real")
    page = (tmp_path / "report.md").read_text()
    assert "refused" not in page
    assert "## Where speculation loses" in page
    assert "Triton kernels, which need a GPU" in page
    assert {"speedup-tiny-qwen3-by-fill.png", "throughput-tiny-qwen3-by-batch-256.png"} <= {
        path.name for path in tmp_path.glob("*.png")
    }

    again = bench(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "about 0 minutes for the 0 turns" in again.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records)


def test_answers_that_end_by_themselves(tiny_model: Path, tmp_path: Path) -> None:
    """The paper's load: more requests than places, sampled, each until its own end; the steady state is another one."""
    load = ("--batch", "4", "--requests", "8", "--new-tokens", "128", "--spec-arg=--sparsespec-min-budget=64")
    done = bench(tmp_path, "--model", str(tiny_model), "--device", "cpu", *load, name="paper")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    turns = [record for record in records if record["record"] == "turn"]
    assert [turn["contender"] for turn in turns] == [
        "plain/torch_native",
        "sparsespec/pillar",
        "plain/torch_native",
        "sparsespec/window",
    ]
    for turn in turns:
        assert (turn["scene"]["ignore_eos"], turn["scene"]["temperature"]) == (False, 0.65)
        assert 1 <= turn["result"]["running"] <= 4
        assert turn["result"]["tokens_per_s"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "4, 160 prompt + at most 128 new, T=0.65" in page
    assert "## Where speculation loses" in page
