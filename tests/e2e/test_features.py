"""Every feature that a client may use, on one SPARSESPEC server, against what the server without it answered.

In both schedules: what ends, stops or changes a round from outside always, the others with --long.
"""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import requests
import torch

from tests.e2e.conftest import TINY_ENV
from tests.support import feature_requests, workload
from tests.support.feature_requests import SCHEMA, FeatureRecord
from tests.support.schedules import SCHEDULES, skip_if_long
from tests.support.server import Server, has_gpu
from tests.support.teacher import Teacher
from tests.support.workload import assert_equal_logprobs, assert_greedy_parity, concurrently, greedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

pytestmark = pytest.mark.slow

NUM_STEPS = 4
NATIVE = (
    "frequency_penalty",
    "negative_frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "additive_penalties",
    "logit_bias",
    "logit_bias_and_penalty",
    "regex",
    "regex_and_penalty",
    "json_schema",
    "ebnf",
    "stop",
    "no_stop_trim",
    "stop_regex",
    "stop_token_ids",
    "min_new_tokens",
)
OPENAI = (
    "completion",
    "completion_of_many_prompts",
    "completion_logprobs",
    "completion_echo",
    "completion_n",
    "completion_stop",
    "completion_max_tokens_1",
    "completion_json_schema",
    "chat",
    "chat_logprobs",
    "chat_n",
    "chat_max_completion_tokens",
    "chat_json_schema",
    "chat_regex",
    "chat_penalties",
)


IN_BOTH_SCHEDULES = {
    "test_batch_of_everything",
    "test_abort_in_the_middle_of_rounds",
    "test_abort_all_and_abort_of_waiting_requests",
    "test_client_that_disconnects_is_forgotten",
    "test_pause_and_continue",
    "test_pause_with_abort_ends_everything",
    "test_flush_cache_frees_every_slot",
    "test_update_weights_from_disk",
}


@pytest.fixture(scope="module", params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(schedule: str, tiny_model: Path, feature_record: FeatureRecord) -> Iterator[Server]:
    # feature_record first: the reference server is gone before this one starts
    with Server(
        tiny_model,
        "--speculative-algorithm=SPARSESPEC",
        # as the launcher's defaults always had it here; on a machine with a GPU it ran with overlap
        *(() if has_gpu() else ("--disable-overlap-schedule",)),
        f"--speculative-num-steps={NUM_STEPS}",
        "--sparsespec-min-budget=32",
        "--sparsespec-recent-window=4",
        "--skip-server-warmup",
        "--constrained-json-disable-any-whitespace",
        *SCHEDULES[schedule],
        env=TINY_ENV,
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def _short(request: pytest.FixtureRequest, schedule: str) -> None:
    skip_if_long(request, schedule, IN_BOTH_SCHEDULES)


@pytest.fixture(autouse=True)
def _nothing_leaks(_short: None, server: Server) -> Iterator[None]:
    yield
    server.idle_check()


# What must not change


def test_every_recorded_feature_has_a_test(feature_record: FeatureRecord) -> None:
    """A request that is recorded and then forgotten."""
    assert set(NATIVE) == set(feature_record.native)
    assert set(OPENAI) == set(feature_record.openai)


@pytest.mark.parametrize("feature", NATIVE)
def test_native_feature_answers_like_the_reference(server: Server, feature_record: FeatureRecord, feature: str) -> None:
    """A feature that applies to the first position of a verify only, or to the drafts only, or not at all."""
    exchange = feature_record.native[feature]
    output = server.generate(exchange.payload)
    assert_greedy_parity([exchange], [output])
    if output["output_ids"] == exchange.response["output_ids"]:
        assert_equal_logprobs(exchange.response, output, tol=1e-3)


def test_features_change_the_reference(feature_record: FeatureRecord) -> None:
    """A parameter too weak to change the output compares nothing."""
    outputs = {name: e.response["output_ids"] for name, e in feature_record.native.items()}
    plain = feature_record.plain["plain"].response["output_ids"]
    names = [name for name in NATIVE if "penalty" in name or "penalties" in name or "bias" in name or "regex" in name]
    assert len({tuple(outputs[name]) for name in names}) == len(names)
    assert feature_record.native["stop"].response["meta_info"]["finish_reason"]["type"] == "stop"
    assert 20 <= len(outputs["min_new_tokens"]) < len(plain)
    assert outputs["stop_token_ids"] == plain[: len(outputs["stop_token_ids"])]


@pytest.mark.parametrize("feature", OPENAI)
def test_openai_feature_answers_like_the_reference(server: Server, feature_record: FeatureRecord, feature: str) -> None:
    """The layers above /generate: usage, choices, logprobs and finish reasons, in SGLang's own words.

    Texts are compared whole: of these few tokens none is a near-tie.
    """
    path, payload, wanted = feature_record.openai[feature]
    response = server.post(path, payload)
    assert response.status_code == 200, response.text
    assert_same_json(wanted, response.json(), feature)


VOLATILE = {"id", "created", "metadata", "system_fingerprint", "sglext"}


def assert_same_json(wanted: Any, got: Any, where: str) -> None:
    if isinstance(wanted, dict):
        assert isinstance(got, dict), where
        assert set(got) - VOLATILE == set(wanted) - VOLATILE, where
        for key in set(wanted) - VOLATILE:
            assert_same_json(wanted[key], got[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            assert_same_json(a, b, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=1e-3), where
    else:
        assert got == wanted, where


def test_json_schema_output_fits_the_schema(server: Server) -> None:
    """Drafts that leave the grammar and are accepted; greedy and sampled."""
    for params in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.95}):
        for _ in range(4):
            response = server.chat(
                "A thing, please.", max_tokens=99, response_format=feature_requests.RESPONSE_FORMAT, **params
            )
            [choice] = response["choices"]
            assert choice["finish_reason"] == "stop"
            assert_fits_schema(json.loads(choice["message"]["content"]))


def assert_fits_schema(thing: dict[str, Any]) -> None:
    assert set(thing) == set(SCHEMA["required"])
    assert thing["color"] in ("red", "green", "blue")
    assert 0 <= thing["size"] <= 99
    assert 1 <= len(thing["tags"]) <= 3
    assert set(thing["tags"]) <= {"a", "b"}


def test_streamed_chunks_are_the_whole_text(server: Server, feature_record: FeatureRecord) -> None:
    """Text lost or repeated where a round brings several tokens at once."""
    path, payload, wanted = feature_record.openai["chat"]
    chunks = list(server.stream(path, {**payload, "stream_options": {"include_usage": True}}))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == wanted["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 24

    path, payload, wanted = feature_record.openai["completion"]
    chunks = list(server.stream(path, payload))
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == wanted["choices"][0]["text"]

    path, payload, wanted = feature_record.openai["completion_stop"]
    chunks = list(server.stream(path, payload))
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == wanted["choices"][0]["text"]


def test_streamed_n_choices_keep_apart(server: Server, feature_record: FeatureRecord) -> None:
    """Chunks of one choice that end up in another."""
    path, payload, wanted = feature_record.openai["chat_n"]
    texts = dict.fromkeys(range(3), "")
    for chunk in server.stream(path, payload):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == {choice["index"]: choice["message"]["content"] for choice in wanted["choices"]}


def test_native_stream_grows_token_by_token(server: Server, feature_record: FeatureRecord) -> None:
    """Output ids and log-probabilities that a stream repeats, drops or reorders."""
    exchange = feature_record.native["additive_penalties"]
    chunks = list(server.stream("/generate", exchange.payload))
    assert [len(chunk["output_ids"]) for chunk in chunks] == sorted(len(chunk["output_ids"]) for chunk in chunks)
    assert chunks[-1]["text"] == exchange.response["text"]
    assert chunks[-1]["output_ids"] == exchange.response["output_ids"]
    for chunk in chunks:
        assert exchange.response["text"].startswith(chunk["text"].rstrip("\ufffd"))
        assert len(chunk["meta_info"]["output_token_logprobs"]) == len(chunk["output_ids"])
    assert len(chunks) >= 3


def test_frontend_programs_run_like_on_the_reference(server: Server, feature_record: FeatureRecord) -> None:
    """gen, select (which asks for no new token and for logprobs), fork and streaming of SGLang's frontend language."""
    assert feature_requests.run_programs(server) == feature_record.programs


def test_repetition_penalty_scales_after_the_others(server: Server, tiny_model: Path) -> None:
    """Penalties of both kinds in the wrong order.

    SGLang's order under its overlap scheduler; without it the order is that of a Python set, so there is no reference.
    """
    prompt = workload.random_ids(120, seed=7)
    payload = greedy(prompt, 40, frequency_penalty=0.9, presence_penalty=-0.5, repetition_penalty=1.2)
    response = server.generate(payload)
    output = response["output_ids"]
    teacher = Teacher(tiny_model)
    counts = torch.zeros(teacher.vocab_size)
    logits = teacher.forced_logits(prompt, output)
    for position, token in enumerate(output):
        row = logits[position] - 0.9 * counts + 0.5 * (counts > 0)
        row = torch.where(counts > 0, torch.where(row < 0, row * 1.2, row / 1.2), row)
        logprobs = torch.log_softmax(row, dim=-1)
        assert logprobs[token] > logprobs.max() - 1e-4, position
        reported = response["meta_info"]["output_token_logprobs"][position][0]
        assert reported == pytest.approx(float(logprobs[token]), abs=1e-3), position
        counts[token] += 1


def test_degenerate_samplers_equal_greedy(server: Server, feature_record: FeatureRecord) -> None:
    """min_p and top_k are skipped by SGLang's own speculative verification; here they must bind at every position."""
    exchange = feature_record.plain["plain"]
    for params in (
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1e-7},
    ):
        payload = greedy(exchange.payload["input_ids"], feature_requests.NEW_TOKENS, **params)
        assert server.generate(payload)["output_ids"] == exchange.response["output_ids"], params


def test_sampled_logprobs_are_of_the_sampling_temperature(server: Server, tiny_model: Path) -> None:
    """Log-probabilities of a sampled output that belong to other positions, or to temperature 1."""
    teacher = Teacher(tiny_model)
    prompt = workload.random_ids(90, seed=31)
    for temperature in (0.6, 1.0, 1.4):
        params = {"temperature": temperature, "max_new_tokens": 30, "ignore_eos": True}
        response = server.generate({"input_ids": prompt, "sampling_params": params, "return_logprob": True})
        logprobs = torch.log_softmax(teacher.forced_logits(prompt, response["output_ids"]) / temperature, dim=-1)
        for position, (value, token, _) in enumerate(response["meta_info"]["output_token_logprobs"]):
            assert token == response["output_ids"][position]
            assert value == pytest.approx(float(logprobs[position, token]), abs=1e-3), (temperature, position)


def test_batch_of_everything(server: Server, feature_record: FeatureRecord) -> None:
    """Penalties, biases, grammars and temperatures that reach a neighbour's row as the batch changes under them."""
    exchanges = (
        [feature_record.native[name] for name in NATIVE] + [feature_record.plain["plain"]] + feature_record.long[:2]
    )
    sampled = [
        {"input_ids": workload.random_ids(50 + i, seed=i), "sampling_params": {"max_new_tokens": 30, **params}}
        for i, params in enumerate(
            [
                {"temperature": 1.0},
                {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
                {"temperature": 1.0, "min_p": 0.1},
                {"temperature": 1.2, "frequency_penalty": 1.0},
                {"temperature": 1.0, "json_schema": json.dumps(SCHEMA), "max_new_tokens": 99},
                {"temperature": 1.0, "regex": feature_requests.REGEX, "max_new_tokens": 99, "min_p": 0.01},
            ]
        )
    ]
    for stagger_s in (0.0, 0.03):
        outputs = concurrently(server, [e.payload for e in exchanges] + sampled, stagger_s=stagger_s)
        assert_greedy_parity(exchanges, outputs[: len(exchanges)])
        assert_fits_schema(json.loads(outputs[-2]["text"]))
        assert re.fullmatch(feature_requests.REGEX, outputs[-1]["text"])


# What is refused


@pytest.mark.parametrize(
    ("path", "payload", "field"),
    [
        ("/generate", {"text": "Hi", "custom_logit_processor": "{}"}, "custom_logit_processor"),
        ("/generate", {"text": "Hi", "sampling_params": {"sampling_seed": 3}}, "seed"),
        (
            "/generate",
            {"text": ["Hi", "Ho"], "sampling_params": [{"max_new_tokens": 2}, {"sampling_seed": 3}]},
            "seed",
        ),
        ("/v1/completions", {"model": "default", "prompt": "Hi", "seed": 5}, "seed"),
        ("/v1/chat/completions", {"model": "default", "messages": feature_requests.MESSAGES, "seed": 5}, "seed"),
        (
            "/v1/chat/completions",
            {"model": "default", "messages": feature_requests.MESSAGES, "custom_logit_processor": "{}"},
            "custom_logit_processor",
        ),
        ("/generate", {"text": "Hi", "return_hidden_states": True}, "hidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_request_gets_400_that_names_the_field(
    server: Server, path: str, payload: dict[str, Any], field: str
) -> None:
    """A field that is accepted and ignored, an error 500, or a server that dies of one client's request."""
    response = server.post(path, payload)
    assert response.status_code == 400, f"{response.status_code}: {response.text}"
    assert field in response.text
    assert len(server.generate(greedy([1, 2, 3], 4))["output_ids"]) == 4


# What a server says about itself


def test_meta_info_counts_rounds(server: Server) -> None:
    """Counters that include rejected drafts, forget the bonus token, or count a round of a finished request."""
    for length, new_tokens in ((3, 1), (3, 30), (200, 40)):
        output = server.generate(greedy(workload.random_ids(length, seed=length), new_tokens))
        meta = output["meta_info"]
        assert meta["completion_tokens"] == new_tokens == len(output["output_ids"])
        if new_tokens == 1:
            assert meta.get("spec_verify_ct", 0) == 0
            continue
        histogram = meta["spec_correct_drafts_histogram"]
        assert sum(histogram) == meta["spec_verify_ct"]
        assert len(histogram) <= NUM_STEPS + 1
        assert sum(i * count for i, count in enumerate(histogram)) == meta["spec_num_correct_drafts"]
        assert meta["spec_num_proposed_drafts"] == NUM_STEPS * meta["spec_verify_ct"]
        assert meta["spec_accept_length"] == pytest.approx(new_tokens / meta["spec_verify_ct"])
        # the prefill's token and each round's; the last round may overshoot
        generated = 1 + sum((i + 1) * count for i, count in enumerate(histogram))
        assert new_tokens <= generated <= new_tokens + NUM_STEPS


def test_server_info_shows_the_configuration(server: Server) -> None:
    """Options that are parsed and not used, or a configuration that nobody can look up."""
    info = server.get("/server_info")
    config = info["sparsespec_config"]
    assert config["num_steps"] == info["speculative_num_steps"] == NUM_STEPS
    assert info["speculative_num_draft_tokens"] == NUM_STEPS + 1
    assert (config["min_budget"], config["recent_window"], config["selection"]) == (32, 4, "pillar")
    assert info["speculative_algorithm"] == "SPARSESPEC"
    assert server.accept_length() >= 1


# Aborts and pauses


def run_together(server: Server, since: int, futures: Sequence[Future[Any]]) -> bool:
    """Waits until as many requests as there are `futures` had a round together; False if one ended before that.

    Args:
        since: length of the log when the first of them was sent.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        has_ended = any(future.done() for future in futures)
        running = re.findall(r"Decode batch.*?#running-req: (\d+)", server.log_text()[since:])
        if any(int(number) >= len(futures) for number in running):
            return True
        if has_ended:
            return False
        time.sleep(0.02)
    pytest.fail("requests neither run nor end")


def test_abort_in_the_middle_of_rounds(server: Server, feature_record: FeatureRecord) -> None:
    """Slots, selections or penalties of an aborted request that stay, or that the next one in its row inherits."""
    long, since = feature_record.long, len(server.log_text())
    with ThreadPoolExecutor(len(long) + 3) as pool:
        doomed = [
            pool.submit(
                server.generate,
                {**greedy(workload.random_ids(150, seed=i), 700, frequency_penalty=0.1), "rid": f"doomed-{i}"},
            )
            for i in range(3)
        ]
        assert run_together(server, since, doomed)
        kept = [pool.submit(server.generate, exchange.payload) for exchange in long]
        assert run_together(server, since, [*doomed, kept[0]])
        for i in range(3):
            assert server.post("/abort_request", {"rid": f"doomed-{i}"}).status_code == 200
            time.sleep(0.05)
        outputs = [future.result() for future in kept]
        aborted = [future.result() for future in doomed]
    assert_greedy_parity(long, outputs)
    for output in aborted:
        assert output["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < output["meta_info"]["completion_tokens"] < 700
    server.idle_check()
    server.flush_cache()


def test_abort_all_and_abort_of_waiting_requests(server: Server, feature_record: FeatureRecord) -> None:
    """More requests than may run: an abort of those still queued must not touch those that run."""
    payloads = [{**greedy(workload.random_ids(20, seed=i), 500), "rid": f"all-{i}"} for i in range(24)]
    with ThreadPoolExecutor(len(payloads)) as pool:
        futures = [pool.submit(server.post, "/generate", payload) for payload in payloads]
        time.sleep(1.5)
        assert server.post("/abort_request", {"rid": "", "abort_all": True}).status_code == 200
        responses = [future.result() for future in futures]
    # SGLang answers an abort while waiting with an error status of its own
    assert all(response.status_code < 600 for response in responses)
    server.idle_check()
    assert_greedy_parity(feature_record.long[:1], [server.generate(feature_record.long[0].payload)])


def test_client_that_disconnects_is_forgotten(server: Server, feature_record: FeatureRecord) -> None:
    """A request that runs on, or leaks, when the client of its stream goes away."""
    others: list[Any] = []
    thread = threading.Thread(
        target=lambda: others.extend(concurrently(server, [e.payload for e in feature_record.long]))
    )
    thread.start()
    for seed in range(3):
        payload = {**greedy(workload.random_ids(60, seed=seed), 900), "stream": True}
        with server.post("/generate", payload, stream=True) as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in range(3):
                next(lines)
    thread.join()
    assert_greedy_parity(feature_record.long, others)
    server.idle_check()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_and_continue(server: Server, feature_record: FeatureRecord, mode: str) -> None:
    """A round lost, or run twice, around a pause; retracted requests that resume with stale lengths or selections."""
    long = feature_record.long
    # all may have ended when the pause arrives
    for _ in range(5):
        since = len(server.log_text())
        with ThreadPoolExecutor(len(long)) as pool:
            futures = [pool.submit(server.generate, exchange.payload) for exchange in long]
            ran_together = run_together(server, since, futures)
            pause(server, mode)
            was_running = [not future.done() for future in futures]
            outputs = [future.result() for future in futures]
        assert_greedy_parity(long, outputs)
        if ran_together and any(was_running):
            assert mode != "retract" or any(output["meta_info"]["num_retractions"] > 0 for output in outputs)
            return
    pytest.fail("paused too late")


def pause(server: Server, mode: str) -> None:
    """Pause for a second; the server goes on whatever happens, or every later test would wait for it."""
    try:
        assert server.post("/pause_generation", {"mode": mode}).status_code == 200
        time.sleep(1.0)
    finally:
        assert server.post("/continue_generation", {}).status_code == 200


def test_pause_with_abort_ends_everything(server: Server) -> None:
    """The default mode of /pause_generation, before a weight update."""
    since = len(server.log_text())
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(server.post, "/generate", greedy([i, 2, 3], 900)) for i in range(4)]
        assert run_together(server, since, futures)
        pause(server, "abort")
        for future in futures:
            assert future.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(server.generate(greedy([5, 6], 5))["output_ids"]) == 5


# Weights and memory


def test_flush_cache_frees_every_slot(server: Server, feature_record: FeatureRecord) -> None:
    """Slots that no request owns and no cache knows: reserved for drafts, and never given back."""
    server.flush_cache()
    assert server.loads()["num_used_tokens"] == 0
    outputs = concurrently(server, [exchange.payload for exchange in feature_record.long])
    assert_greedy_parity(feature_record.long, outputs)
    server.idle_check()
    server.flush_cache()
    assert server.loads()["num_used_tokens"] == 0


def test_update_weights_from_disk(
    server: Server, tiny_model: Path, tmp_path: Path, feature_record: FeatureRecord
) -> None:
    """Drafts, caches or selections of the weights before the update; and the way back."""
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1, context=workload.CONTEXT)
    exchange = feature_record.plain["plain"]

    def load(path: Path) -> None:
        response = server.post("/update_weights_from_disk", {"model_path": str(path), "flush_cache": True})
        assert response.status_code == 200, response.text
        assert response.json()["success"], response.text

    load(other)
    output = server.generate(exchange.payload)
    # an update that meets the scheduler before it has noticed the end of the request ends SGLang
    server.idle_check()
    load(tiny_model)
    assert output["output_ids"] != exchange.response["output_ids"]
    logits = Teacher(other).forced_logits(exchange.payload["input_ids"], output["output_ids"])
    gap = logits.max(dim=-1).values - logits[torch.arange(len(logits)), torch.tensor(output["output_ids"])]
    assert float(gap.max()) < 1e-3, gap
    exchanges = [exchange, *feature_record.long[:2]]
    assert_greedy_parity(exchanges, concurrently(server, [e.payload for e in exchanges]))


def test_release_and_resume_memory(server: Server, feature_record: FeatureRecord) -> None:
    """What an RL trainer calls between rollouts. On a CPU nothing is freed, but the calls flush and must go through."""
    assert server.post("/release_memory_occupation", {}).status_code == 200
    assert server.post("/resume_memory_occupation", {}).status_code == 200
    exchange = feature_record.plain["plain"]
    assert_greedy_parity([exchange], [server.generate(exchange.payload)])


def test_health_generate_answers(server: Server) -> None:
    """The probe that orchestrators use runs a request of its own through a round."""
    assert requests.get(server.url + "/health_generate", timeout=60).status_code == 200
