"""The server answers what the server without speculation answers, whatever k each round has and each request allows.

k is another one every few rounds, at random (tests/support/random_steps.py): rounds that draft, plain decodes, and
verifies narrower than the widest follow each other within one request, and so do rounds of the two schedules.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import random_steps, workload
from tests.support.server import Server
from tests.support.workload import ParityRecord, assert_equal_logprobs, assert_greedy_parity, concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.feature_requests import FeatureRecord

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "--speculative-algorithm SPARSESPEC --skip-server-warmup --constrained-json-disable-any-whitespace"
BUDGET = "--sparsespec-min-budget 32 --sparsespec-recent-window 4 --sparsespec-sink 1"
SERVERS = {
    # guesses whether they come true or not
    "backend-page16-sync": "--page-size 16 --disable-overlap-schedule --sparsespec-selection first-last "
    "--sparsespec-ngram-assist 3 "
    "--speculative-num-steps 5 --chunked-prefill-size 64",
    # unified where k is 8, else in lockstep
    "fused-page1-overlap": "--sparsespec-schedule unified --cuda-graph-bs-decode 3 7 11 "
    "--sparsespec-sharing head --speculative-num-steps 8",
    # plain rounds of up to five tokens, and verifies that make a selection before drafts go on
    "plain-page16-overlap": "--sparsespec-adaptive --sparsespec-plain-steps 5 --page-size 16 "
    "--sparsespec-verify-attention fused --sparsespec-granularity 4 --speculative-num-steps 6",
}
NUM_STEPS = {"backend-page16-sync": 5, "fused-page1-overlap": 8, "plain-page16-overlap": 6}


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def switching(
    name: str, tiny_model: Path, parity_record: ParityRecord, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    # parity_record first: the reference server is gone before this one starts
    file = tmp_path_factory.mktemp("steps") / "steps"
    file.touch()
    env = {**TINY_ENV, random_steps.SETTINGS: "seed=7,every=3,guess=1", random_steps.FILE: str(file)}
    command = [sys.executable, "-m", "tests.support.random_steps"]
    args = f"{OURS} {BUDGET} {SERVERS[name]}".split()
    with Server(tiny_model, *args, env=env, command=command, cwd=REPOSITORY) as server:
        yield server, file


@pytest.fixture
def server(switching: tuple[Server, Path]) -> Iterator[Server]:
    yield switching[0]
    switching[0].idle_check()


def test_greedy_alone_and_batched(server: Server, parity_record: ParityRecord) -> None:
    """A position, slot or selection that counts on k drafts where a round had fewer; alone, then batched."""
    alone = parity_record.base[::3]
    assert_greedy_parity(alone, [server.generate(exchange.payload) for exchange in alone])
    exchanges = parity_record.base * 2
    assert_greedy_parity(exchanges, concurrently(server, [e.payload for e in exchanges], stagger_s=0.03))


def test_logprobs(server: Server, parity_record: ParityRecord) -> None:
    """Log-probabilities are read by a stride that changes from round to round."""
    exchanges = parity_record.logprobs
    outputs = concurrently(server, [exchange.payload for exchange in exchanges])
    assert_greedy_parity(exchanges, outputs)
    for exchange, output in zip(exchanges, outputs, strict=True):
        assert_equal_logprobs(exchange.response, output)


def test_ends(server: Server, parity_record: ParityRecord) -> None:
    """Output lengths, stop strings, EOS and the context limit inside rounds of any width."""
    exchanges = [*parity_record.output_lens, *parity_record.stop, *parity_record.eos, *parity_record.limit]
    assert_greedy_parity(exchanges, concurrently(server, [exchange.payload for exchange in exchanges]))


def test_features(server: Server, feature_record: FeatureRecord) -> None:
    """Penalties count, and grammars mask, per position of a verify: of one position as of many."""
    exchanges = list(feature_record.native.values())
    assert_greedy_parity(exchanges, concurrently(server, [exchange.payload for exchange in exchanges]))


def test_sampled_requests_beside_greedy_ones(server: Server, parity_record: ParityRecord) -> None:
    """Sampled drafts keep their distributions for as many steps as there were."""
    exchanges = parity_record.base[:8]
    sampled = [
        {
            "input_ids": workload.random_ids(50 + 9 * i, seed=i),
            "sampling_params": {"temperature": 0.8, "top_k": [-1, 20][i % 2], "max_new_tokens": 30, "ignore_eos": True},
        }
        for i in range(6)
    ]
    outputs = concurrently(server, [*[e.payload for e in exchanges], *sampled], stagger_s=0.01)
    assert_greedy_parity(exchanges, outputs[: len(exchanges)])
    assert [len(output["output_ids"]) for output in outputs[len(exchanges) :]] == [30] * len(sampled)


def limited(payload: workload.Payload, options: dict[str, Any]) -> workload.Payload:
    """The same request with something to say about speculation."""
    params = {**payload["sampling_params"], "custom_params": {"sparsespec": options}}
    return {**payload, "sampling_params": params}


def test_limits_of_requests_in_one_batch(server: Server, parity_record: ParityRecord) -> None:
    """A limit that changes the output, or is another request's: off, one, three and all drafts beside each other."""
    options: list[dict[str, Any]] = [
        {"enabled": False},
        {"max_draft_tokens": 1},
        {"max_draft_tokens": 3},
        {"enabled": True},
    ]
    exchanges = parity_record.base
    payloads = [limited(exchange.payload, options[i % 4]) for i, exchange in enumerate(exchanges)]
    most = [0, 0, 0, 0]
    # which of them meet rounds of many drafts depends on the moment
    for _ in range(5):
        outputs = concurrently(server, payloads, stagger_s=0.02)
        assert_greedy_parity(exchanges, outputs)
        most = [max(before, max_correct(outputs[i::4])) for i, before in enumerate(most)]
        if most[:3] == [0, 1, 3] and most[3] > 3:
            break
    assert most[:3] == [0, 1, 3], most
    assert most[3] > 3
    # nobody wants drafts
    alone = [limited(exchange.payload, {"max_draft_tokens": 0}) for exchange in exchanges[:4]]
    assert_greedy_parity(exchanges[:4], concurrently(server, alone))


def max_correct(outputs: list[workload.Response]) -> int:
    """The most drafts that stood in a round of any of these requests."""
    histograms = [output["meta_info"]["spec_correct_drafts_histogram"] for output in outputs]
    return max(i for histogram in histograms for i, count in enumerate(histogram) if count)


def test_openai_requests_with_limits(server: Server, feature_record: FeatureRecord) -> None:
    """`custom_params` of a body that never reaches the request's sampling parameters."""
    for name in ("completion", "chat"):
        path, payload, wanted = feature_record.openai[name]
        answer = server.post(path, {**payload, "custom_params": {"sparsespec": {"enabled": False}}})
        assert answer.status_code == 200, answer.text
        assert text_of(answer.json()) == text_of(wanted)
        refused = server.post(path, {**payload, "custom_params": {"sparsespec": {"enabled": "no"}}})
        assert refused.status_code == 400
        assert "custom_params.sparsespec.enabled is 'no'; " in refused.text


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("options", [{"max_draft_tokens": -1}, {"max_drafts": 3}, {}, [], "off", None], ids=str)
def test_nonsense_is_refused(server: Server, parity_record: ParityRecord, options: Any) -> None:
    """Nonsense that reaches the scheduler ends it, and every request with it."""
    answer = server.post("/generate", limited(parity_record.base[0].payload, options))
    assert answer.status_code == 400, answer.text
    assert "custom_params.sparsespec" in answer.text
    assert server.generate(parity_record.base[0].payload)["output_ids"]


def test_every_k_has_run(switching: tuple[Server, Path], name: str) -> None:
    """Without it, the tests above could pass with one k alone."""
    steps = random_steps.chosen(switching[1])
    counts = Counter(steps)
    assert set(counts) == set(range(NUM_STEPS[name] + 1)), counts
    # rounds behind a plain one make a selection first
    assert min(counts.values()) > (2 if name.startswith("plain") else 5), counts
    assert sum(first != second for first, second in pairwise(steps)) > len(steps) / 5
    plain = Counter(random_steps.plain_steps(switching[1]))
    if name.startswith("plain"):
        assert max(plain) == 5, plain
        assert plain[5] > len(steps) / 10, plain
        assert len(plain) > 1, plain
    else:
        assert not plain
