"""At temperature 0 the server with SPARSESPEC answers what the server without it answers.

Seven servers cover the options in pairs where options meet in code. Overlap and page size: every pair. Selection: what
takes a way of its own through the code. `pillar` captures all queries of a verify, `first-last` some, `oracle` none and
selects in every draft step (as `quest` does), `random` drafts badly. Chunked prefill meets every value but `pillar`,
and whole prefill is also what prompts below the chunk get. Granularity and sharing act on scores only; the tests of ops
and policies cross them. Draft sampling acts when a request of the batch is sampled
(test_greedy_requests_beside_sampled_ones). `unified` is the other schedule; test_variable_steps switches between both.
k is 8, 8, 8, 8, 3, 1, 3: with the page of 16, k = 8 reserves over a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import workload
from tests.support.server import Server
from tests.support.workload import ParityRecord, assert_equal_logprobs, assert_greedy_parity, concurrently, greedy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

MIN_BUDGET = 64
PILLAR = {
    "--sparsespec-selection": "pillar",
    "--sparsespec-min-budget": str(MIN_BUDGET),
    # leave most of the budget to the scores
    "--sparsespec-recent-window": "4",
    "--sparsespec-sink": "1",
}
BAD_DRAFTS = {
    "--sparsespec-selection": "random",
    "--sparsespec-budget-ratio": "0.0001",
    "--sparsespec-recent-window": "0",
    "--sparsespec-sink": "0",
}
SERVERS = {
    "page1-overlap-pillar": {
        **PILLAR,
        "--page-size": "1",
        "--sparsespec-granularity": "token",
        "--sparsespec-sharing": "head",
        "--sparsespec-score-pooling": "0",
        "--sparsespec-draft-sampling": "sampled",
        "--speculative-num-steps": "8",
    },
    "page16-sync-first-last": {
        **PILLAR,
        "--sparsespec-selection": "first-last",
        "--page-size": "16",
        "--disable-overlap-schedule": None,
        "--sparsespec-granularity": "8",
        "--sparsespec-sharing": "layer",
        "--sparsespec-draft-sampling": "greedy",
        "--speculative-num-steps": "8",
        "--chunked-prefill-size": "64",
    },
    "page1-overlap-pillar-fused": {
        **PILLAR,
        "--page-size": "1",
        "--sparsespec-verify-attention": "fused",
        "--sparsespec-ngram-assist": "2",
        # rounds of 1 to 16 requests are padded, or larger than all
        "--cuda-graph-bs-decode": "3 7 11",
        "--sparsespec-granularity": "token",
        "--sparsespec-sharing": "head",
        "--sparsespec-score-pooling": "0",
        "--sparsespec-draft-sampling": "sampled",
        "--speculative-num-steps": "8",
    },
    "page16-overlap-unified": {
        **PILLAR,
        "--page-size": "16",
        "--sparsespec-schedule": "unified",
        # rounds of 1 to 16 requests are padded, or larger than all
        "--cuda-graph-bs-decode": "3 7 11",
        "--sparsespec-granularity": "token",
        "--sparsespec-sharing": "head",
        "--sparsespec-draft-sampling": "sampled",
        "--speculative-num-steps": "8",
        "--chunked-prefill-size": "64",
    },
    "page16-overlap-oracle": {
        **PILLAR,
        "--sparsespec-selection": "oracle",
        "--page-size": "16",
        "--sparsespec-granularity": "token",
        "--sparsespec-sharing": "head",
        "--sparsespec-draft-sampling": "sampled",
        "--speculative-num-steps": "3",
        "--chunked-prefill-size": "64",
    },
    "page16-overlap-random": {
        **BAD_DRAFTS,
        "--page-size": "16",
        "--sparsespec-min-budget": "8",
        "--sparsespec-granularity": "8",
        "--sparsespec-sharing": "layer",
        "--sparsespec-draft-sampling": "greedy",
        "--speculative-num-steps": "1",
        "--chunked-prefill-size": "64",
        # drafts without any feed-forward network
        "--sparsespec-draft-ffn-threshold": "1e9",
    },
    "page1-sync-random": {
        **BAD_DRAFTS,
        "--page-size": "1",
        "--disable-overlap-schedule": None,
        "--sparsespec-min-budget": "1",
        "--sparsespec-granularity": "token",
        "--sparsespec-sharing": "head",
        "--sparsespec-draft-sampling": "sampled",
        "--speculative-num-steps": "3",
        "--chunked-prefill-size": "64",
    },
}


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(name: str, tiny_model: Path, parity_record: ParityRecord) -> Iterator[Server]:
    # parity_record first: the reference server is gone before this one starts
    args = [part for option in SERVERS[name].items() for value in option if value is not None for part in value.split()]
    with Server(
        tiny_model, "--speculative-algorithm", "SPARSESPEC", "--skip-server-warmup", *args, env=TINY_ENV
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_leaks(server: Server) -> Iterator[None]:
    yield
    server.idle_check()


def num_steps(name: str) -> int:
    return int(SERVERS[name]["--speculative-num-steps"])


def test_greedy_alone(server: Server, parity_record: ParityRecord) -> None:
    """A wrong position, slot, selection or acceptance for a single request, on a cold cache and then on a warm one."""
    payloads = [exchange.payload for exchange in parity_record.base]
    server.flush_cache()
    cold = [server.generate(payload) for payload in payloads]
    assert_greedy_parity(parity_record.base, cold)
    # the longest ones and those that share a prefix
    warm = [server.generate(payload) for payload in payloads[-8:]]
    assert_greedy_parity(parity_record.base[-8:], warm)
    # every whole page but that of the last token, which has to be computed for its logits
    for payload, response in zip(payloads[-8:], warm, strict=True):
        assert response["meta_info"]["cached_tokens"] >= len(payload["input_ids"]) - 17


def test_greedy_batched(server: Server, parity_record: ParityRecord) -> None:
    """Rows of a batch that take each other's slots, lengths or selections; all requests twice, cold then warm."""
    server.flush_cache()
    for _ in range(2):
        outputs = server.generate(batch([exchange.payload for exchange in parity_record.base]))
        assert_greedy_parity(parity_record.base, outputs)


def batch(payloads: list[workload.Payload]) -> workload.Payload:
    """One /generate request for many prompts."""
    return {
        **payloads[0],
        "input_ids": [payload["input_ids"] for payload in payloads],
        "sampling_params": [payload["sampling_params"] for payload in payloads],
    }


def test_greedy_with_requests_joining_and_leaving(server: Server, parity_record: ParityRecord) -> None:
    """A batch that is merged, filtered and prefilled between rounds: relayed state that follows the wrong request."""
    server.flush_cache()
    exchanges = parity_record.base * 2
    lens = [(7 * i) % workload.NEW_TOKENS + 1 for i in range(len(exchanges))]
    payloads = [greedy(e.payload["input_ids"], n) for e, n in zip(exchanges, lens, strict=True)]
    outputs = concurrently(server, payloads, stagger_s=0.04)
    assert_greedy_parity([workload.shortened(e.response, n) for e, n in zip(exchanges, lens, strict=True)], outputs)


def test_output_lengths_around_a_round(server: Server, parity_record: ParityRecord) -> None:
    """Tokens past max_new_tokens when a round accepts more than were asked for, or a length off by one."""
    payloads = [exchange.payload for exchange in parity_record.output_lens]
    assert_greedy_parity(parity_record.output_lens, [server.generate(payload) for payload in payloads])
    assert_greedy_parity(parity_record.output_lens, concurrently(server, payloads))


def test_eos_inside_a_draft(server: Server, parity_record: ParityRecord) -> None:
    """Tokens behind an accepted EOS that reach the client, or an EOS in the middle of a round that goes unseen."""
    reasons = [exchange.response["meta_info"]["finish_reason"]["type"] for exchange in parity_record.eos]
    assert reasons.count("stop") >= 4, f"the reference's output rarely meets an EOS: {reasons}"
    payloads = [exchange.payload for exchange in parity_record.eos]
    assert_greedy_parity(parity_record.eos, concurrently(server, payloads))


def test_eos_in_the_round_that_reaches_the_limit(server: Server, parity_record: ParityRecord) -> None:
    """SGLang alone looks no further than the limit then: tokens behind the EOS reach the client."""
    ended = [e for e in parity_record.eos if e.response["meta_info"]["finish_reason"]["type"] == "stop"]
    exchanges = ended * 3
    extra = [1 + i // len(ended) for i in range(len(exchanges))]
    payloads = [
        greedy(e.payload["input_ids"], len(e.response["output_ids"]) + n, ignore_eos=False)
        for e, n in zip(exchanges, extra, strict=True)
    ]
    outputs = concurrently(server, payloads)
    assert_greedy_parity(exchanges, outputs)
    assert all(output["meta_info"]["finish_reason"]["type"] == "stop" for output in outputs)


def test_stop_strings_inside_a_draft(server: Server, parity_record: ParityRecord) -> None:
    """Text behind a stop string that a round accepted in one go, or a stop string that spans two rounds and is lost."""
    assert len(parity_record.stop) >= 10
    matched = [e.response["meta_info"]["finish_reason"].get("matched") for e in parity_record.stop]
    assert all(matched), "the reference did not stop"
    payloads = [exchange.payload for exchange in parity_record.stop]
    assert_greedy_parity(parity_record.stop, concurrently(server, payloads))


def test_context_limit(server: Server, parity_record: ParityRecord) -> None:
    """Drafts past the last position: slots written into a neighbour's row, or a request that ends early or never."""
    payloads = [exchange.payload for exchange in parity_record.limit]
    assert_greedy_parity(parity_record.limit, [server.generate(payload) for payload in payloads])
    # all rows at their ends together, between neighbours with room
    exchanges = parity_record.limit * 2 + parity_record.base[:6]
    assert_greedy_parity(exchanges, concurrently(server, [exchange.payload for exchange in exchanges]))


def test_logprobs(server: Server, parity_record: ParityRecord) -> None:
    """Log-probabilities of rejected positions, of the draft, or shifted by one; input logprobs that capture loses."""
    payloads = [exchange.payload for exchange in parity_record.logprobs]
    for outputs in ([server.generate(payload) for payload in payloads], concurrently(server, payloads)):
        assert_greedy_parity(parity_record.logprobs, outputs)
        for exchange, output in zip(parity_record.logprobs, outputs, strict=True):
            assert_equal_logprobs(exchange.response, output)


def test_greedy_requests_beside_sampled_ones(server: Server, parity_record: ParityRecord) -> None:
    """A greedy row that is sampled because another row of its batch is."""
    exchanges = parity_record.base
    payloads = [exchange.payload for exchange in exchanges]
    sampled = [
        {"input_ids": e.payload["input_ids"], "sampling_params": params}
        for e, params in zip(
            exchanges,
            [
                {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True},
                {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 30, "ignore_eos": True},
            ]
            * (len(exchanges) // 2),
            strict=True,
        )
    ]
    mixed = [payload for pair in zip(payloads, sampled, strict=True) for payload in pair]
    outputs = concurrently(server, mixed, stagger_s=0.01)
    assert_greedy_parity(exchanges, outputs[::2])
    for payload, output in zip(sampled, outputs[1::2], strict=True):
        assert len(output["output_ids"]) == payload["sampling_params"]["max_new_tokens"]


def test_drafts_that_see_everything_are_accepted(server: Server, name: str) -> None:
    """Drafts that are wrong without being noticed: verification hides every error in a draft step but its cost."""
    if "random" in name:
        pytest.skip("the budget covers no context")
    k = num_steps(name)
    new_tokens = 1 + 2 * (k + 1)
    assert 8 + new_tokens <= MIN_BUDGET
    output = server.generate(greedy(workload.random_ids(8, seed=3), new_tokens))
    assert output["meta_info"]["spec_verify_ct"] == 2, output["meta_info"]["spec_accept_histogram"]


def test_bad_drafts_are_rejected(server: Server, name: str) -> None:
    """If `random` with a budget of 1 drafted well, the tests above would have run no rejection."""
    if "random" not in name:
        pytest.skip("these drafts are meant to be good")
    # what is selected is another thing in every run: of a single request the length passes the bound once in 25 runs
    outputs = server.generate(batch([greedy(workload.random_ids(500, seed=i), 40) for i in range(16)]))
    rounds = sum(output["meta_info"]["spec_verify_ct"] for output in outputs)
    assert sum(output["meta_info"]["completion_tokens"] for output in outputs) / rounds < 1.3


def test_drafts_without_channels_are_not_the_models(server: Server, name: str) -> None:
    """A threshold that reaches no draft: within the budget these would all be accepted."""
    if "--sparsespec-draft-ffn-threshold" not in SERVERS[name]:
        pytest.skip("these drafts have their networks")
    assert int(SERVERS[name]["--sparsespec-min-budget"]) >= 8
    # the prefill's token, and one round if the draft stands
    outputs = server.generate(batch([greedy(workload.random_ids(8, seed=i), 3) for i in range(16)]))
    num_rejected = sum(output["meta_info"]["spec_verify_ct"] for output in outputs) - len(outputs)
    # without feed-forward networks 8 of 16 were right by chance when this was written
    assert num_rejected >= 4


def test_selected_drafts_are_accepted_beyond_chance(server: Server, name: str) -> None:
    """Scores, heads or positions mixed up: selections of the wrong tokens cost speed, and nothing but this notices."""
    if "pillar" not in name and "unified" not in name and "oracle" not in name:
        pytest.skip("only the paper's rule and a step's own query predict the attention of random weights")
    outputs = server.generate(batch([greedy(workload.random_ids(300, seed=i), 60) for i in range(8)]))
    rounds = sum(output["meta_info"]["spec_verify_ct"] for output in outputs)
    accept_length = sum(output["meta_info"]["completion_tokens"] for output in outputs) / rounds
    print(f"accept length with {MIN_BUDGET} of 300 to 360 tokens: {accept_length:.2f} of {num_steps(name) + 1}")
    # random tokens: 1.39; the worst of these servers, without scores of the prompt: 1.77
    assert accept_length > 1.6
