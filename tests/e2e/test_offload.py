"""A pool that holds a third of the load: requests wait in host memory, and answer as if there were room for all.

SGLang checks its pool after every iteration here, slot by slot, and the accounts of host memory with it.
"""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from sglang_sparsespec.kv.policy import MovePolicy
from tests.e2e.conftest import TINY_ENV
from tests.support import pressure
from tests.support.parity import Verdict, compare_greedy
from tests.support.pressure import assert_nothing_is_left, metric, not_penalised
from tests.support.server import Server
from tests.support.workload import assert_equal_logprobs, assert_greedy_parity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.workload import Exchange, Payload, Response

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = (
    "--speculative-algorithm SPARSESPEC --speculative-num-steps 3 --sparsespec-min-budget 32 --skip-server-warmup "
    f"--enable-metrics --max-running-requests {pressure.MAX_RUNNING} --max-total-tokens {pressure.POOL_TOKENS} "
    "--sparsespec-host-memory-gb 0.2"
)
CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
SERVERS = {
    # CI runs the first of each kind
    "overlap-page1-radix": "--page-size 1",
    "sync-page16-chunked": "--page-size 16 --disable-overlap-schedule --chunked-prefill-size 64 --disable-radix-cache "
    "--schedule-conservativeness 0.01",
    # rounds of our own verify, padded as where graphs are captured
    "overlap-page16-fused": "--page-size 16 --chunked-prefill-size 64 --sparsespec-verify-attention fused "
    "--cuda-graph-bs-decode 5 12 24",
    "overlap-page1-unified": "--page-size 1 --chunked-prefill-size 64 --sparsespec-schedule unified",
}


def first_of(servers: dict[str, str]) -> list[Any]:
    """The first always; the others with --long."""
    names = iter(servers)
    return [next(names), *(pytest.param(name, marks=pytest.mark.long) for name in names)]


@pytest.fixture(scope="module", params=first_of(SERVERS))
def server(
    request: pytest.FixtureRequest, tiny_model: Path, pressure_record: list[Exchange]
) -> Iterator[tuple[str, Server]]:
    # pressure_record first: the reference server is gone before this one starts
    options = OPTIONS.split() + SERVERS[request.param].split()
    with Server(tiny_model, *options, env={**TINY_ENV, **CHECKS}) as server:
        yield request.param, server


FAULTY_SERVERS = {
    "overlap-page16-radix-chunked": "--page-size 16 --chunked-prefill-size 64 --schedule-conservativeness 0.01",
    "sync-page1-priority": "--disable-overlap-schedule --disable-radix-cache --enable-priority-scheduling "
    "--priority-scheduling-preemption-threshold 1",
    "overlap-page16-unified": "--page-size 16 --disable-radix-cache --sparsespec-schedule unified",
}


@pytest.fixture(scope="module", params=first_of(FAULTY_SERVERS))
def faulty_server(
    request: pytest.FixtureRequest, tiny_model: Path, pressure_record: list[Exchange]
) -> Iterator[tuple[str, Server]]:
    """Three of four allocations of host memory are refused; a copy takes four looks at it."""
    options = [*OPTIONS.split(), *FAULTY_SERVERS[request.param].split()]
    env = {**TINY_ENV, **CHECKS, "SPARSESPEC_TEST_FAULTS": "seed=5,refuse=0.75,polls=4"}
    command = [sys.executable, "-m", "tests.support.faulty_offload"]
    with Server(tiny_model, *options, env=env, command=command, cwd=REPOSITORY) as server:
        yield request.param, server


def payloads_for(name: str, exchanges: Sequence[Exchange]) -> list[Payload]:
    """With priorities where the server heeds them: of each three, one that may push others out of the pool."""
    if "priority" not in name:
        return [exchange.payload for exchange in exchanges]
    return [{**exchange.payload, "priority": 10 * (i % 3)} for i, exchange in enumerate(exchanges)]


def assert_answers(expected: Sequence[Exchange], outputs: Sequence[Response]) -> None:
    assert_greedy_parity(expected, outputs)
    identical = {
        r.index
        for r in compare_greedy([e.response for e in expected], outputs).requests
        if r.verdict is Verdict.IDENTICAL
    }
    assert len(identical) > 0.9 * len(expected)
    for index in identical:
        assert_equal_logprobs(expected[index].response, outputs[index], tol=1e-3)


def test_requests_wait_in_host_memory(server: tuple[str, Server], pressure_record: list[Exchange]) -> None:
    """KV of another request, a token applied twice or lost, a penalty, grammar or log-probability that is forgotten."""
    name, live = server
    assert pressure.load_over_pool() > 3
    doomed = pressure.Doomed(live, waves=2)
    outputs = pressure.send(live, [exchange.payload for exchange in pressure_record], pressure.MAX_RUNNING)
    doomed.join()
    assert_answers(pressure_record, outputs)
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) == 0
    assert_nothing_is_left(live)
    offloads = metric(live, "offloads_total")
    assert offloads > 10
    assert metric(live, "offload_refusals_total") == 0
    # the doomed have 180 tokens; in a pool of 1,024 nobody else may be left before a minimum stay is over
    bound = MovePolicy(tokens_per_round=4, pool_tokens=pressure.POOL_TOKENS).max_moves(180)
    assert 1 <= metric(live, "offload_most_moves") <= bound
    assert f"most moves of a request {metric(live, 'offload_most_moves'):.0f}" in live.log_text()
    assert metric(live, "offload_lost_rounds_total") == (offloads if "overlap" in name else 0)
    assert metric(live, "copied_out_bytes_total") >= metric(live, "copied_in_bytes_total") > 0
    assert metric(live, "copy_in_bytes_per_second") > 0
    assert "requests in host memory" in live.log_text()
    assert "Retract requests" not in live.log_text()


def somebody_left(live: Server, future: Future[Any]) -> bool:
    """Waits until somebody is in host memory by the newest report; whether that came before the last answer."""
    deadline = time.monotonic() + 60
    while not future.done():
        held = re.findall(r"SPARSESPEC: (\d+) requests in host", live.log_tail(60))
        if held and held[-1] != "0":
            return True
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return False


def test_abort_while_requests_wait(server: tuple[str, Server], pressure_record: list[Exchange]) -> None:
    """An answer that says less than that of a running request: counts that are missing, a stream without its end."""
    _, live = server
    exchanges = not_penalised(pressure_record)[:40]
    # whoever waited at the last report may be back when the pause arrives
    for attempt in range(8):
        payloads = [{**exchange.payload, "rid": f"gone-{attempt}-{i}"} for i, exchange in enumerate(exchanges)]
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(pressure.send, live, payloads, 40)
            if somebody_left(live, future):
                # nobody returns before the abort arrives
                assert live.post("/pause_generation", {"mode": "in_place"}).status_code == 200
                try:
                    assert live.post("/abort_request", {"abort_all": True}).status_code == 200
                finally:
                    assert live.post("/continue_generation", {}).status_code == 200
            outputs = future.result()
        num_aborted = pressure.assert_aborted_alike(live, payloads, outputs)
        assert_nothing_is_left(live)
        if num_aborted > 0:
            return
    pytest.fail("no abort met a request in host memory")


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_while_requests_wait(server: tuple[str, Server], pressure_record: list[Exchange], mode: str) -> None:
    """Offloaded requests that a pause forgets, or that come back with KV of weights that a pause was to replace."""
    _, live = server
    exchanges = not_penalised(pressure_record)[:40]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(pressure.send, live, [exchange.payload for exchange in exchanges], 40)
        assert somebody_left(live, future), "nobody left for host memory"
        assert live.post("/pause_generation", {"mode": mode}).status_code == 200
        try:
            if mode == "in_place":
                assert requests.post(live.url + "/flush_cache", timeout=60).status_code == 400
        finally:
            assert live.post("/continue_generation", {}).status_code == 200
        outputs = future.result()
    assert_greedy_parity(exchanges, outputs)
    if mode == "retract":
        assert any(output["meta_info"]["num_retractions"] > 0 for output in outputs)
    assert_nothing_is_left(live)


def test_refused_moves_retract_and_nothing_else(
    faulty_server: tuple[str, Server], pressure_record: list[Exchange]
) -> None:
    """A request that is lost, or computed from KV that is not there, when host memory fails or a copy takes long.

    Under priorities SGLang also pushes out requests that cannot move yet: just prefilled.
    """
    name, live = faulty_server
    exchanges = not_penalised(pressure_record)[:100]
    retractions = 0
    # how often the pool runs full depends on the machine
    for _ in range(5):
        outputs = pressure.send(live, payloads_for(name, exchanges), pressure.MAX_RUNNING)
        assert_greedy_parity(exchanges, outputs)
        assert_nothing_is_left(live)
        retractions += sum(output["meta_info"]["num_retractions"] for output in outputs)
        refusals, offloads = (metric(live, f"{what}_total") for what in ("offload_refusals", "offloads"))
        assert retractions == refusals
        if refusals > 0 and offloads > 0:
            return
    pytest.fail(f"{refusals} refusals and {offloads} moves: one of the two has not been tested")


def test_aborts_while_host_memory_fails(faulty_server: tuple[str, Server], pressure_record: list[Exchange]) -> None:
    """Slots, host blocks or page-table rows that an abort under pressure leaves behind, or neighbours that it harms.

    Whether it meets a request on its way depends on the moment; tests/adapter/test_offloader.py aborts in each place.
    """
    name, live = faulty_server
    exchanges = not_penalised(pressure_record)[100:]
    doomed = pressure.Doomed(live, waves=3)
    outputs = pressure.send(live, payloads_for(name, exchanges), concurrency=16)
    doomed.join()
    assert_greedy_parity(exchanges, outputs)
    assert_nothing_is_left(live)
