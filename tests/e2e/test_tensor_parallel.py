"""Two ranks: the server with SPARSESPEC answers what the server without it answers at the same --tp-size.

Every rank of the watched server flips coins of its own (tests/support/watched_ranks.py), so that sampled drafts and
acceptance differ from rank to rank unless rank 0 overrules the others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import workload
from tests.support.server import Server
from tests.support.watched_ranks import FOLDER, Entry, entries
from tests.support.workload import Exchange, assert_equal_logprobs, assert_greedy_parity, concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator

# two ranks and their servers take turns on few cores
pytestmark = [pytest.mark.slow, pytest.mark.long]

REPOSITORY = Path(__file__).resolve().parents[2]
TWO_RANKS = ("--tp-size", "2", "--skip-server-warmup")
OURS = "--speculative-algorithm SPARSESPEC --sparsespec-min-budget 32 --sparsespec-recent-window 4 --sparsespec-sink 1"
SERVERS = {
    "backend-page16-layer": "--speculative-num-steps 3 --page-size 16 --chunked-prefill-size 64",
    "fused-page1-head": "--speculative-num-steps 8 --sparsespec-verify-attention fused --sparsespec-sharing head "
    "--cuda-graph-bs-decode 3 7 11",
    "unified-page1-layer": "--speculative-num-steps 4 --sparsespec-verify-attention fused "
    "--sparsespec-schedule unified --cuda-graph-bs-decode 3 7 11",
}
# a head for each rank; one head, of which each rank has a copy and half of the queries
KV_HEADS = {"backend-page16-layer": 2, "fused-page1-head": 1, "unified-page1-layer": 2}
START_S = 900


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / f"tiny-qwen3-{KV_HEADS[name]}"
    return write_tiny_model(folder, context=workload.CONTEXT, kv_heads=KV_HEADS[name])


@pytest.fixture(scope="module")
def reference(model: Path) -> list[Exchange]:
    """What plain SGLang answers on two ranks."""
    with Server(model, *TWO_RANKS, env=TINY_ENV, timeout_s=START_S) as server:
        return workload.exchange(server, [workload.greedy(prompt) for prompt in workload.prompts()])


@pytest.fixture(scope="module")
def watched(
    name: str, model: Path, reference: list[Exchange], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    # reference first: that server is gone before this one starts
    folder = tmp_path_factory.mktemp("ranks")
    args = [*TWO_RANKS, *OURS.split(), *SERVERS[name].split()]
    command = [sys.executable, "-m", "tests.support.watched_ranks"]
    env = {**TINY_ENV, FOLDER: str(folder)}
    with Server(model, *args, env=env, command=command, cwd=REPOSITORY, timeout_s=START_S) as server:
        yield server, folder


@pytest.fixture
def server(watched: tuple[Server, Path]) -> Iterator[Server]:
    yield watched[0]
    watched[0].idle_check()


def committed(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """What both ranks wrote; the server is idle, so neither has more to come."""
    return entries(folder, 0), entries(folder, 1)


def test_greedy_parity(server: Server, reference: list[Exchange]) -> None:
    """A rank's heads, selections or slots taken for another's; alone, then all together."""
    for start in (0, 13):
        alone = [server.generate(exchange.payload) for exchange in reference[start::6]]
        assert_greedy_parity(reference[start::6], alone)
    for _ in range(2):
        outputs = concurrently(server, [exchange.payload for exchange in reference], stagger_s=0.02)
        assert_greedy_parity(reference, outputs)
        for exchange, output in zip(reference, outputs, strict=True):
            if output["output_ids"] == exchange.response["output_ids"]:
                assert_equal_logprobs(exchange.response, output, tol=1e-3)


def sampled(length: int, seed: int, new_tokens: int) -> dict[str, Any]:
    params = {"temperature": 0.9, "max_new_tokens": new_tokens, "ignore_eos": seed % 2 == 0}
    if seed % 3 == 0:
        params |= {"top_p": 0.9, "top_k": 20, "frequency_penalty": 0.5}
    return {"input_ids": workload.random_ids(length, seed=seed), "sampling_params": params}


def test_ranks_agree(watched: tuple[Server, Path], server: Server, reference: list[Exchange]) -> None:
    """Ranks that see a request end in different rounds wait for each other for ever."""
    payloads = [sampled(20 + 31 * seed, seed, 10 + 5 * seed) for seed in range(12)]
    # greedy ones between them, and batches that change in every round
    outputs = concurrently(server, [*payloads, *[e.payload for e in reference[:6]]], stagger_s=0.03)
    assert_greedy_parity(reference[:6], outputs[len(payloads) :])
    for payload, output in zip(payloads, outputs, strict=False):
        if payload["sampling_params"]["ignore_eos"]:
            assert len(output["output_ids"]) == payload["sampling_params"]["max_new_tokens"]
    server.idle_check()
    first, second = committed(watched[1])
    assert len(first) > 50
    assert [entry.committed for entry in first] == [entry.committed for entry in second]
    overruled = [entry.overruled for entry in second if not entry.is_greedy]
    print(f"rank 1 overruled in {sum(map(bool, overruled))} of {len(overruled)} sampled iterations")
    assert sum(overruled) > 10, "coins of its own, and rank 1 drew what rank 0 drew"
    # without coins there is nothing to disagree about: logits are the same bytes on both ranks
    greedy = [entry.overruled for entry in second if entry.is_greedy]
    assert len(greedy) > 20
    assert sum(greedy) == 0
    assert all(entry.overruled == 0 for entry in first)
