"""Many short requests of random lengths, more than a small pool holds; what they use, offloading must not lose."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import requests

from tests.support.workload import Exchange, Payload, Response, greedy, random_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.server import Server

NUM_REQUESTS = 200
MAX_RUNNING = 24
POOL_TOKENS = 1024
SEED = 11


def payloads() -> list[Payload]:
    """Greedy, so that each has one answer; every feature whose state lives outside of the KV takes part."""
    rng = random.Random(SEED)
    shared = random_ids(90, seed=SEED)
    made = []
    for i in range(NUM_REQUESTS):
        prompt = random_ids(rng.randint(1, 160), seed=1000 + i)
        options: dict[str, Any] = {}
        if i % 10 == 1:
            options = {"frequency_penalty": 1.3, "logit_bias": {"97": 5.0, "12": 5.0, "30": 5.0}}
        elif i % 10 == 3:
            options = {"min_new_tokens": 6, "ignore_eos": False}
        elif i % 20 == 5:
            options = {"regex": "[0-9a-f]{40}", "ignore_eos": False}
        elif i % 10 == 7:
            prompt = shared + prompt[:70]
        payload = greedy(prompt, rng.randint(6, 120), **options)
        if i % 25 == 9:
            # without token_ids_logprob: SGLang's scheduler dies when only some requests of a prefill ask for it
            payload |= {"logprob_start_len": 0}
        made.append(payload)
    return made


def is_penalised(payload: Payload) -> bool:
    """Whether a retraction may change its answer: SGLang samples one token without penalties after the prefill."""
    params = payload["sampling_params"]
    return "frequency_penalty" in params or "min_new_tokens" in params


def load_over_pool() -> float:
    """Mean tokens of as many requests as may run, in pools."""
    sizes = [len(p["input_ids"]) + p["sampling_params"]["max_new_tokens"] for p in payloads()]
    return MAX_RUNNING * sum(sizes) / len(sizes) / POOL_TOKENS


def not_penalised(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """For tests in which requests are retracted, too."""
    return [exchange for exchange in exchanges if not is_penalised(exchange.payload)]


def metric(server: Server, name: str) -> float:
    """One of ours, after a report: the log interval is one round."""
    server.generate({"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}})
    text = requests.get(server.url + "/metrics", timeout=60).text
    found = re.search(rf"^sglang:sparsespec_{name}\{{.*?\}} (\S+)$", text, flags=re.MULTILINE)
    assert found, f"{name} is not in /metrics"
    return float(found[1])


def assert_nothing_is_left(server: Server) -> None:
    """Neither slots nor host memory, once all requests have ended."""
    server.idle_check()
    assert metric(server, "offloaded_requests") == 0
    assert metric(server, "host_memory_bytes") == 0
    server.idle_check()
    server.flush_cache()
    assert server.loads()["num_used_tokens"] == 0


def assert_aborted_alike(server: Server, payloads: Sequence[Payload], responses: Sequence[Response]) -> int:
    """Whoever was aborted in host memory answers as one that was running; how many there were. Payloads have a rid."""
    away = set(re.findall(r"SPARSESPEC: aborted request (\S+) \(", server.log_text()))
    num_aborted = 0
    for payload, response in zip(payloads, responses, strict=True):
        if payload["rid"] in away:
            meta = response["meta_info"]
            assert (meta["finish_reason"]["type"], meta["finish_reason"]["message"]) == ("abort", "Aborted")
            assert meta["prompt_tokens"] == len(payload["input_ids"])
            assert meta["completion_tokens"] == len(response["output_ids"]) > 0
            assert "spec_verify_ct" in meta
            num_aborted += 1
    return num_aborted


def send(server: Server, payloads: Sequence[Payload], concurrency: int) -> list[Response]:
    """All requests in order, `concurrency` at a time; every eleventh as a stream, of which the last chunk counts."""

    def one(numbered: tuple[int, Payload]) -> Response:
        index, payload = numbered
        if index % 11 != 4:
            return server.generate(payload)
        chunks = list(server.stream("/generate", payload))
        lens = [len(chunk["output_ids"]) for chunk in chunks]
        assert lens == sorted(lens), f"stream {index} shrinks: {lens}"
        return chunks[-1]

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, enumerate(payloads)))


class Doomed:
    """Long requests that come in waves while others run, and are aborted as soon as somebody waits in host memory.

    Args:
        waves: how many.
    """

    WAVE, LOOK_S, PATIENCE_S = 6, 0.05, 6.0

    def __init__(self, server: Server, waves: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._run, waves)

    def _run(self, waves: int) -> None:
        for wave in range(waves):
            payloads = [
                {**greedy(random_ids(40, seed=i), 180, frequency_penalty=0.1), "rid": f"doomed-{wave}-{i}"}
                for i in range(self.WAVE)
            ]
            with ThreadPoolExecutor(self.WAVE) as pool:
                futures = [pool.submit(self._server.post, "/generate", payload) for payload in payloads]
                self._wait_for_offload()
                assert self._server.post("/abort_request", {"rid": f"doomed-{wave}-"}).status_code == 200
                for future in futures:
                    future.result()

    def _wait_for_offload(self) -> None:
        deadline = time.monotonic() + self.PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(self.LOOK_S)
            held = re.findall(r"SPARSESPEC: (\d+) requests in host memory", self._server.log_tail(20))
            if held and int(held[-1]) > 0:
                return

    def join(self) -> None:
        """Wait for all of them to end."""
        self._done.result()
        self._pool.shutdown()
