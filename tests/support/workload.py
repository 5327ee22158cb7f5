"""The requests of the parity tests, and what the server without speculation answers to them.

`record` runs on the reference server; the same requests then go to every SPARSESPEC server. Prompts are token ids: a
text of the tiny model's tokens may not survive decoding and encoding.
Invariant: everything here is a function of the model; two recordings of one model differ by rounding only.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.parity import RECORDING, ReferenceOutput, compare_greedy, reference_output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.support.server import Server

Payload = dict[str, Any]
Response = dict[str, Any]

CONTEXT = 1024
EOS_IDS = (100, 144, 201, 230, 258)
"""Of the checkpoint that `conftest.tiny_model` writes: no ASCII, which grammars need; they soon end a greedy output."""
NEW_TOKENS = 32
# around the page size of 16, the budget of 32, the chunk of 64; up to most of the context
PROMPT_LENS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 200, 333, 500, 700, 900)
NUM_SHARING_PREFIX = 4
# 1, 2, k, k + 1 for each k of the servers (1, 3, 8)
OUTPUT_LENS = (1, 2, 3, 4, 8, 9)
LIMIT_PROMPT_LENS = (900, 990, 1015)
EOS_NEW_TOKENS = 150


def random_ids(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def prompts() -> list[list[int]]:
    """Prompts of every length, then some that share the first 300 tokens of one."""
    plain = [random_ids(length, seed=length) for length in PROMPT_LENS]
    prefix = plain[PROMPT_LENS.index(333)][:300]
    return plain + [prefix + random_ids(20 + 7 * i, seed=10_000 + i) for i in range(NUM_SHARING_PREFIX)]


def greedy(input_ids: Sequence[int], max_new_tokens: int = NEW_TOKENS, **params: Any) -> Payload:
    """A /generate payload whose response can serve as a reference."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **params}
    return {"input_ids": list(input_ids), "sampling_params": sampling, **RECORDING}


def output_len_requests() -> list[Payload]:
    return [greedy(random_ids(100, seed=50 + n), n) for n in OUTPUT_LENS]


def limit_requests() -> list[Payload]:
    """To the last token of the context, asked for by number and by leaving the number large enough."""
    return [greedy(random_ids(n, seed=60_000 + n), CONTEXT - n) for n in LIMIT_PROMPT_LENS]


def eos_requests() -> list[Payload]:
    return [
        greedy(random_ids(n, seed=70_000 + n), EOS_NEW_TOKENS, ignore_eos=False) for n in (5, 40, 64, 100, 300, 800)
    ]


def logprob_requests() -> list[Payload]:
    return [
        {
            **greedy(random_ids(n, seed=80_000 + n), 24),
            "top_logprobs_num": 5,
            "token_ids_logprob": [3, 97, 258],
            "logprob_start_len": 0,
        }
        for n in (4, 70, 250)
    ]


def stop_requests(recorded: Sequence[tuple[list[int], Response]], model: Path) -> list[Payload]:
    """Requests whose stop string is a text that their output contains, at changing places."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model))
    requests = []
    for i, (prompt, response) in enumerate(recorded):
        pieces = [tokenizer.decode([token]) for token in response["output_ids"]]
        readable = [piece.isascii() and piece.isprintable() for piece in pieces]
        for start in range(5 + i % 9, len(pieces) - 1):
            if readable[start] and readable[start + 1]:
                stop = pieces[start] + pieces[start + 1]
                requests.append(greedy(prompt, stop=[stop, "never generated"], no_stop_trim=i % 2 == 0))
                break
    return requests


@dataclass(frozen=True)
class Exchange:
    """A request and the reference's response."""

    payload: Payload
    response: Response


@dataclass(frozen=True)
class ParityRecord:
    """What the reference server answered."""

    base: list[Exchange]
    output_lens: list[Exchange]
    limit: list[Exchange]
    eos: list[Exchange]
    stop: list[Exchange]
    logprobs: list[Exchange]


def exchange(server: Server, payloads: Sequence[Payload]) -> list[Exchange]:
    return [Exchange(payload, server.generate(payload)) for payload in payloads]


def record(server: Server, model: Path) -> ParityRecord:
    base = exchange(server, [greedy(prompt) for prompt in prompts()])
    return ParityRecord(
        base=base,
        output_lens=exchange(server, output_len_requests()),
        limit=exchange(server, limit_requests()),
        eos=exchange(server, eos_requests()),
        stop=exchange(server, stop_requests([(e.payload["input_ids"], e.response) for e in base], model)),
        logprobs=exchange(server, logprob_requests()),
    )


def concurrently(server: Server, payloads: Sequence[Mapping[str, Any]], stagger_s: float = 0.0) -> list[Response]:
    """One connection per request, each `stagger_s` after the one before; responses in the order of the payloads."""

    def send(index: int) -> Response:
        time.sleep(index * stagger_s)
        return server.generate(payloads[index])

    with ThreadPoolExecutor(len(payloads)) as pool:
        return list(pool.map(send, range(len(payloads))))


def shortened(response: Response, length: int) -> ReferenceOutput:
    """The reference for a request that asks for fewer tokens than the recorded one."""
    whole = reference_output(response)
    return ReferenceOutput(whole.token_ids[:length], whole.top[:length])


def assert_greedy_parity(
    expected: Sequence[Exchange | ReferenceOutput], outputs: Sequence[Mapping[str, Any]], *, ends: bool = True
) -> None:
    """Fail unless outputs equal the reference's up to a near-tie; identical ones must also end alike.

    Args:
        expected: recorded.
        outputs: /generate responses in the same order.
        ends: also compare text and finish reason of the identical ones.
    """
    report = compare_greedy([e.response if isinstance(e, Exchange) else e for e in expected], outputs)
    assert report.ok, str(report)
    if not ends:
        return
    for request in report.requests:
        reference = expected[request.index]
        if not isinstance(reference, Exchange) or request.num_equal < len(reference.response["output_ids"]):
            continue
        output = outputs[request.index]
        assert output["text"] == reference.response["text"], f"request {request.index}"
        for field in ("finish_reason", "prompt_tokens", "completion_tokens"):
            wanted, got = reference.response["meta_info"][field], output["meta_info"][field]
            assert got == wanted, f"request {request.index}: {field} is {got}, not {wanted}"


LOGPROB_FIELDS = ("output_token_logprobs", "input_token_logprobs")
TOP_LOGPROB_FIELDS = ("output_top_logprobs", "input_top_logprobs")
TOKEN_IDS_LOGPROB_FIELDS = ("output_token_ids_logprobs", "input_token_ids_logprobs")


def assert_equal_logprobs(reference: Response, response: Response, tol: float = 1e-4) -> None:
    """Every log-probability that the reference reports, the response reports as well, within `tol` nats."""
    assert response["output_ids"] == reference["output_ids"], "compare logprobs of equal outputs only"
    wanted_meta, meta = reference["meta_info"], response["meta_info"]
    for field in LOGPROB_FIELDS + TOKEN_IDS_LOGPROB_FIELDS + TOP_LOGPROB_FIELDS:
        assert (field in meta) == (field in wanted_meta), field
        wanted_rows, rows = wanted_meta.get(field) or [], meta.get(field) or []
        assert len(rows) == len(wanted_rows), f"{field}: {len(rows)} rows, not {len(wanted_rows)}"
        for position, (wanted, got) in enumerate(zip(wanted_rows, rows, strict=True)):
            where = f"{field}[{position}]: {got}, not {wanted}"
            if field in LOGPROB_FIELDS:
                wanted, got = [wanted], [got]
            if wanted is None or got is None:
                assert wanted == got, where
                continue
            assert len(wanted) == len(got), where
            for (wanted_value, wanted_id, *_), (value, token_id, *_) in zip(wanted, got, strict=True):
                if wanted_value is None:
                    assert value is None, where
                    continue
                assert abs(value - wanted_value) <= tol, where
                # tokens as likely as each other may change places
                if field not in TOP_LOGPROB_FIELDS:
                    assert token_id == wanted_id, where
