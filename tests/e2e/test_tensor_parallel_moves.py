"""Two ranks whose copies take different times, and which would like other k: they move and draft alike, and answer
what plain SGLang answers on two ranks.

The pool holds a third of the load. SGLang checks its pool after every iteration here, slot by slot, on each rank.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import faulty_offload, pressure, random_steps
from tests.support.pressure import assert_nothing_is_left, metric
from tests.support.server import Server
from tests.support.watched_ranks import FOLDER, entries
from tests.support.workload import Exchange, assert_greedy_parity

if TYPE_CHECKING:
    from collections.abc import Iterator

# two ranks and their servers take turns on few cores
pytestmark = [pytest.mark.slow, pytest.mark.long]

REPOSITORY = Path(__file__).resolve().parents[2]
TWO_RANKS = ("--tp-size", "2", "--skip-server-warmup")
NUM_REQUESTS = 40
NUM_STEPS = 3
OPTIONS = (
    f"--speculative-algorithm SPARSESPEC --speculative-num-steps {NUM_STEPS} --sparsespec-min-budget 32 "
    "--sparsespec-adaptive --sparsespec-host-memory-gb 0.2 --enable-metrics "
    f"--max-running-requests {pressure.MAX_RUNNING} --max-total-tokens {pressure.POOL_TOKENS}"
)
CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
SERVERS = {
    # plain rounds among the others: requests leave with selections that are too old to draft from
    "overlap-page1-radix": "--page-size 1 --sparsespec-verify-attention fused",
    "sync-page16-chunked": "--page-size 16 --disable-overlap-schedule --chunked-prefill-size 64 "
    "--schedule-conservativeness 0.01",
}
# a copy takes two looks on rank 0, three on rank 1
FAULTS = "seed=5,refuse=0,polls=2"
START_S = 900


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> list[Exchange]:
    """What plain SGLang answers on two ranks, with room for all."""
    with Server(tiny_model, *TWO_RANKS, env=TINY_ENV, timeout_s=START_S) as server:
        payloads = pressure.payloads()[:NUM_REQUESTS]
        return list(map(Exchange, payloads, pressure.send(server, payloads, concurrency=16)))


@pytest.fixture(scope="module", params=SERVERS)
def watched(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    reference: list[Exchange],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, Path]]:
    # reference first: that server is gone before this one starts
    folder = tmp_path_factory.mktemp("ranks")
    args = [*TWO_RANKS, *OPTIONS.split(), *SERVERS[request.param].split()]
    command = [sys.executable, "-m", "tests.support.watched_ranks"]
    env = {
        **TINY_ENV,
        **CHECKS,
        FOLDER: str(folder),
        faulty_offload.SETTINGS: FAULTS,
        random_steps.SETTINGS: "seed=7,every=3",
        random_steps.FILE: str(folder / "steps"),
    }
    with Server(tiny_model, *args, env=env, command=command, cwd=REPOSITORY, timeout_s=START_S) as server:
        yield server, folder


def test_ranks_move_and_draft_alike(watched: tuple[Server, Path], reference: list[Exchange]) -> None:
    """Ranks that resume a request in different rounds, or draft by their own clocks, wait for each other for ever."""
    server, folder = watched
    assert pressure.load_over_pool() > 3
    outputs = pressure.send(server, [exchange.payload for exchange in reference], pressure.MAX_RUNNING)
    assert_greedy_parity(reference, outputs)
    assert_nothing_is_left(server)

    assert sum(output["meta_info"]["num_retractions"] for output in outputs) == 0
    assert metric(server, "offload_refusals_total") == 0
    assert metric(server, "offloads_total") > 0
    assert metric(server, "copied_in_bytes_total") > 0

    server.idle_check()
    first, second = (entries(folder, rank) for rank in range(2))
    assert len(first) > 50
    assert [entry.committed for entry in first] == [entry.committed for entry in second]
    steps = random_steps.chosen(folder / "steps")
    assert steps == random_steps.chosen(folder / "steps", rank=1)
    assert set(steps) == set(range(NUM_STEPS + 1))

    said = re.findall(r"TP(\d)\] SPARSESPEC: \d+ requests in host memory", server.log_text())
    assert said
    assert set(said) == {"0"}, "one rank speaks"
