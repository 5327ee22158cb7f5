"""A server that chooses k and the schedule for itself: same answers, and everybody can see what it chose and why."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import requests

from tests.e2e.conftest import TINY_ENV
from tests.support import workload
from tests.support.server import Server
from tests.support.workload import assert_greedy_parity, concurrently, greedy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.workload import ParityRecord

pytestmark = pytest.mark.slow

OURS = "--speculative-algorithm SPARSESPEC --sparsespec-adaptive --speculative-num-steps 6 --skip-server-warmup"
MORE = "--sparsespec-min-budget 32 --sparsespec-verify-attention fused --cuda-graph-bs-decode 4 16 --enable-metrics"
AUTO = "--sparsespec-schedule auto"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile") / "rounds.json"


@pytest.fixture(scope="module")
def server(tiny_model: Path, parity_record: ParityRecord, profile: Path) -> Iterator[Server]:
    # parity_record first: the reference server is gone before this one starts
    args = [*OURS.split(), *MORE.split(), *AUTO.split(), "--sparsespec-profile", str(profile)]
    with Server(tiny_model, *args, env=TINY_ENV) as server:
        yield server


def test_adaptive_server_decides_and_shows_it(server: Server, parity_record: ParityRecord, profile: Path) -> None:
    """A controller that is never asked, or never told; or one that changes answers.

    What it decides depends on the machine, so that it decides at all is what is checked.
    """
    exchanges = parity_record.base * 2
    first = concurrently(server, [e.payload for e in exchanges], stagger_s=0.05)
    assert_greedy_parity(exchanges, first)
    # enough rounds without a prefill in between
    long = [greedy(workload.random_ids(100 + i, seed=900 + i), 300) for i in range(4)]
    outputs = concurrently(server, long)
    assert [len(output["output_ids"]) for output in outputs] == [300] * 4
    server.idle_check()

    shown = server.get("/server_info")["internal_states"][0]["sparsespec"]
    assert shown["adaptive"] is True
    assert shown["num_steps"] in (0, 1, 2, 4, 6)
    assert shown["reason"] in ("the fastest by the cost model", "drafting does not pay"), shown
    assert shown["predicted_speedup"] >= 1 / 1.02
    assert shown["measured_speedup"] > 0
    assert len(shown["survival"]) == 6
    assert shown["terms_by_batch"]
    # trials need rounds of the whole k, and it may have been another one
    assert shown["schedule"] == "auto"
    assert shown["auto"]["now"] in ("lockstep", "unified")

    text = requests.get(server.url + "/metrics", timeout=60).text
    for name in ("num_steps", "predicted_speedup", "measured_speedup"):
        assert f"sglang:sparsespec_{name}{{" in text
    reasons = dict(re.findall(r'sparsespec_reason\{.*?reason="(.*?)",what="k"\} (\S+)', text))
    assert list(reasons.values()).count("1.0") == 1, reasons
    measured = {"the fastest by the cost model", "drafting does not pay"}
    assert set(reasons) <= measured | {"nothing measured yet", "a first guess by the cost model"}
    assert "over plain decoding" in server.log_text()
    # drafts were made, if only until it found that they do not pay
    used = [output["meta_info"]["spec_correct_drafts_histogram"] for output in [*first, *outputs]]
    assert any(sum(histogram[1:]) for histogram in used)
    if profile.exists():  # written every minute
        assert json.loads(profile.read_text())["identity"]["num_steps"] == "6"


def test_auto_runs_both_schedules_and_shows_what_they_took(tiny_model: Path, parity_record: ParityRecord) -> None:
    """A schedule that is never tried, or times that are never noted: `auto` would be another name for the first one."""
    args = [
        "--speculative-algorithm",
        "SPARSESPEC",
        "--speculative-num-steps",
        "3",
        "--skip-server-warmup",
        *AUTO.split(),
    ]
    with Server(tiny_model, *args, *MORE.split(), env=TINY_ENV) as server:
        exchanges = parity_record.base
        assert_greedy_parity(exchanges, concurrently(server, [e.payload for e in exchanges], stagger_s=0.05))
        # rounds without a prefill between them
        concurrently(server, [greedy(workload.random_ids(60 + i, seed=700 + i), 160) for i in range(4)])
        server.idle_check()
        shown = server.get("/server_info")["internal_states"][0]["sparsespec"]
        assert (shown["adaptive"], shown["schedule"]) == (False, "auto")
        auto = shown["auto"]
        assert set(auto["round_ms"]) == {"lockstep", "unified"}, auto
        assert all(ms > 0 for ms in auto["round_ms"].values())
        assert auto["now"] in ("lockstep", "unified")
        assert auto["reason"] in ("the faster by measured times", "the other is not faster by enough, or not for long")
        assert auto["predicted_ratio"] > 0
        assert auto["measured_ratio"] > 0
        text = requests.get(server.url + "/metrics", timeout=60).text
        assert "sglang:sparsespec_measured_unified_ratio{" in text
        assert "a unified round's time over a lockstep one's" in server.log_text()
