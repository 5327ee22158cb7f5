"""Mixture of experts: the server with SPARSESPEC answers what the server without it answers, on both families.

A router looks at one token at a time, so a verify sends each of its k + 1 tokens where a decode would have sent it, and
what padding is sent to changes nothing for the others. In float32 the comparison is as strict as for dense models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import workload
from tests.support.server import Server
from tests.support.workload import Exchange, assert_greedy_parity, concurrently, greedy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

NUM_STEPS = 4
MIN_BUDGET = 32
SHARED = f"--speculative-num-steps {NUM_STEPS} --sparsespec-min-budget {MIN_BUDGET} --sparsespec-recent-window 4"
SERVERS = {
    # rounds are padded to one of these sizes, and so route padding too
    "qwen3-moe": "--sparsespec-verify-attention fused --cuda-graph-bs-decode 3 7 11",
    "mixtral": "--sparsespec-verify-attention backend --page-size 16 --chunked-prefill-size 64",
}
PROMPT_LENS = (1, 17, 64, 130, 300, 700)
NEW_TOKENS = 24
START_S = 900


# one family in every run: the other goes through the same layers of experts
@pytest.fixture(scope="module", params=["qwen3-moe", pytest.param("mixtral", marks=pytest.mark.long)])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(arch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / f"tiny-{arch}"
    # of Mixtral a head has hidden / heads
    return write_tiny_model(folder, arch=arch, hidden=128, experts=8, experts_per_token=2, context=workload.CONTEXT)


@pytest.fixture(scope="module")
def reference(model: Path) -> list[Exchange]:
    """What plain SGLang answers."""
    payloads = [greedy(workload.random_ids(length, seed=length), NEW_TOKENS) for length in PROMPT_LENS]
    with Server(model, "--skip-server-warmup", env=TINY_ENV, timeout_s=START_S) as server:
        return workload.exchange(server, payloads)


def start(arch: str, model: Path, *options: str) -> Server:
    args = [*SHARED.split(), *SERVERS[arch].split(), "--skip-server-warmup"]
    ours = ("--speculative-algorithm", "SPARSESPEC")
    return Server(model, *ours, *args, *options, env=TINY_ENV, timeout_s=START_S)


class Answers(NamedTuple):
    """Of a server whose drafts visit one expert per token."""

    alone: list[dict[str, Any]]
    together: list[dict[str, Any]]
    seeing_everything: dict[str, Any]


@pytest.fixture(scope="module")
def fewer_experts(arch: str, model: Path, reference: list[Exchange]) -> Answers:
    payloads = [exchange.payload for exchange in reference]
    with start(arch, model, "--sparsespec-draft-experts", "1") as server:
        return Answers(
            [server.generate(payload) for payload in payloads],
            concurrently(server, payloads),
            server.generate(within_the_budget(rounds=3)),
        )


@pytest.fixture(scope="module")
def lossy(arch: str, model: Path, reference: list[Exchange]) -> list[dict[str, Any]]:
    """Answers of a server whose verifies visit one expert per token."""
    rule = {"qwen3-moe": "--sparsespec-verify-experts 1", "mixtral": "--sparsespec-verify-expert-thresholds 1e9"}[arch]
    options = f"--sparsespec-verify-attention fused --sparsespec-allow-lossy --sparsespec-verify-sparsity moe {rule}"
    with start(arch, model, *options.split()) as server:
        return concurrently(server, [exchange.payload for exchange in reference])


@pytest.fixture(scope="module")
def server(arch: str, model: Path, fewer_experts: Answers, lossy: list[dict[str, Any]]) -> Iterator[Server]:
    # the others first: those servers are gone before this one starts
    with start(arch, model) as server:
        yield server


def within_the_budget(rounds: int) -> workload.Payload:
    """A request whose drafts see everything, over in so many rounds if all of them stand."""
    new_tokens = 1 + rounds * (NUM_STEPS + 1)
    assert 8 + new_tokens <= MIN_BUDGET
    return greedy(workload.random_ids(8, seed=3), new_tokens)


@pytest.fixture(autouse=True)
def _nothing_leaks(server: Server) -> Iterator[None]:
    yield
    server.idle_check()


def test_greedy_parity(server: Server, reference: list[Exchange]) -> None:
    """Tokens of a verify, or padding, that reach another token's experts; alone, then together, cold and warm."""
    alone = [server.generate(exchange.payload) for exchange in reference[1::2]]
    assert_greedy_parity(reference[1::2], alone)
    server.idle_check()
    server.flush_cache()
    for _ in range(2):
        assert_greedy_parity(reference, concurrently(server, [exchange.payload for exchange in reference]))


def test_greedy_requests_beside_sampled_ones(server: Server, reference: list[Exchange]) -> None:
    """Rounds that draft by coins, in batches whose size changes."""
    params = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    sampled = [{"input_ids": e.payload["input_ids"], "sampling_params": params} for e in reference]
    mixed = [payload for e, other in zip(reference, sampled, strict=True) for payload in (e.payload, other)]
    outputs = concurrently(server, mixed, stagger_s=0.02)
    assert_greedy_parity(reference, outputs[::2])
    assert [len(output["output_ids"]) for output in outputs[1::2]] == [NEW_TOKENS] * len(sampled)


def test_drafts_that_see_everything_are_accepted(server: Server) -> None:
    """A draft step that sent its tokens to other experts than the verify does would be right now and then only."""
    output = server.generate(within_the_budget(rounds=3))
    assert output["meta_info"]["spec_verify_ct"] == 3, output["meta_info"]["spec_accept_histogram"]


def test_fewer_experts_in_drafts_change_speed_alone(fewer_experts: Answers, reference: list[Exchange]) -> None:
    """A top-k that a verify or a prefill inherits from a draft; or drafts that never knew of it."""
    assert_greedy_parity(reference, fewer_experts.alone)
    assert_greedy_parity(reference, fewer_experts.together)
    lengths = [output["meta_info"]["spec_accept_length"] for output in fewer_experts.alone]
    print(f"accept lengths with 1 of 2 experts, {NUM_STEPS} drafts: {lengths}")
    # with both of its experts every draft of this one stands
    assert fewer_experts.seeing_everything["meta_info"]["spec_verify_ct"] > 3


def test_fewer_experts_in_verifies_are_lossy(lossy: list[dict[str, Any]], reference: list[Exchange]) -> None:
    """A rule that reaches drafts alone, or a label that says nothing of it. What a prefill yields stays the model's."""
    expected = [exchange.response["output_ids"] for exchange in reference]
    assert [output["output_ids"][0] for output in lossy] == [ids[0] for ids in expected]
    assert any(output["output_ids"] != ids for output, ids in zip(lossy, expected, strict=True))
    assert all(output["meta_info"]["sparsespec_verify_sparsity"] == ["moe"] for output in lossy)


def test_rejected_drafts_do_not_reach_the_output(server: Server, reference: list[Exchange]) -> None:
    """If every draft stood, nothing above would have seen a rejection."""
    outputs = [server.generate(exchange.payload) for exchange in reference[-2:]]
    correct, proposed = (
        sum(output["meta_info"][f"spec_num_{name}_drafts"] for output in outputs) for name in ("correct", "proposed")
    )
    print(f"{correct} of {proposed} drafts stood")
    assert 0 < correct < 0.9 * proposed
    assert_greedy_parity(reference[-2:], outputs)
