"""Requests whose lengths add up to several pools, because they share a prefix that is there once.

A fused verify scores every request's own view of the prefix in a buffer of a pool's size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import requests

from tests.e2e.conftest import TINY_ENV
from tests.support import workload
from tests.support.server import Server
from tests.support.workload import assert_greedy_parity, concurrently, greedy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PREFIX, NEW_TOKENS = 300, 60
SPEC = "--speculative-algorithm SPARSESPEC --sparsespec-verify-attention fused --sparsespec-min-budget 32"
# rounds of seven are padded; groups of them to a smaller size
MORE = "--cuda-graph-bs-decode 3 8 --enable-metrics --decode-log-interval 2 --skip-server-warmup"
# seven requests of 390 tokens at their ends, of which 300 are shared
SMALL_POOL = "--max-total-tokens 1500"


def payloads() -> list[workload.Payload]:
    prefix = workload.random_ids(PREFIX, seed=3)
    return [greedy(prefix + workload.random_ids(8 + i, seed=50 + i), NEW_TOKENS) for i in range(7)]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> list[workload.Exchange]:
    with Server(tiny_model, "--skip-server-warmup", env=TINY_ENV) as server:
        return workload.exchange(server, payloads())


def run(model: Path, reference: list[workload.Exchange], *options: str) -> tuple[int, str, str]:
    """Verifies of all requests; the server's log, and its metrics."""
    with Server(model, *SPEC.split(), *MORE.split(), *" ".join(options).split(), env=TINY_ENV) as server:
        # the prefix is in the cache, and its owner gone, when the others come
        server.generate(reference[0].payload)
        outputs = concurrently(server, [exchange.payload for exchange in reference])
        metrics = requests.get(server.url + "/metrics", timeout=60).text
        server.idle_check()
        log = server.log_text()
    assert_greedy_parity(reference, outputs)
    return sum(output["meta_info"]["spec_verify_ct"] for output in outputs), log, metrics


def test_verifies_in_groups(tiny_model: Path, reference: list[workload.Exchange]) -> None:
    """A group that reads another's rows, or whose selections go to them, drafts worse or not at all."""
    whole, log, metrics = run(tiny_model, reference)
    assert "verifies/round" not in log
    assert re.search(r"^sglang:sparsespec_verifies_per_round\{.*?\} 1.0$", metrics, flags=re.MULTILINE)
    split, log, _ = run(tiny_model, reference, SMALL_POOL)
    assert "2.00 verifies/round" in log
    # the same selections: only a tie may fall otherwise
    assert abs(split - whole) <= 0.03 * whole


def test_unified_rounds_go_on(tiny_model: Path, reference: list[workload.Exchange]) -> None:
    """Few verify in one forward, so that their scores fit though those of all do not."""
    _, log, metrics = run(tiny_model, reference, SMALL_POOL, "--sparsespec-schedule unified")
    assert "verifies/round" not in log
    assert re.search(r"^sglang:sparsespec_verifies_per_round\{.*?\} 0.0$", metrics, flags=re.MULTILINE)
