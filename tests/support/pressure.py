"""Many short requests of random lengths, more than a small pool holds; what they use, offloading must not lose."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.support.workload import Payload, Response, greedy, random_ids

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


def load_over_pool() -> float:
    """Mean tokens of as many requests as may run, in pools."""
    sizes = [len(p["input_ids"]) + p["sampling_params"]["max_new_tokens"] for p in payloads()]
    return MAX_RUNNING * sum(sizes) / len(sizes) / POOL_TOKENS


def send(server: Server, requests: Sequence[Payload], concurrency: int) -> list[Response]:
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
        return list(pool.map(one, enumerate(requests)))


class Doomed:
    """Long requests that are aborted one by one, at random times, while others run.

    Args:
        count: how many.
        pace_s: mean time between two aborts.
    """

    def __init__(self, server: Server, count: int, pace_s: float, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self._pace_s = pace_s
        self._pool = ThreadPoolExecutor(count + 1)
        self._rids = [f"doomed-{seed}-{i}" for i in range(count)]
        self._futures = [
            self._pool.submit(
                server.post, "/generate", {**greedy(random_ids(40, seed=i), 180, frequency_penalty=0.1), "rid": rid}
            )
            for i, rid in enumerate(self._rids)
        ]
        self._aborts = self._pool.submit(self._abort)

    def _abort(self) -> None:
        for rid in self._rng.sample(self._rids, len(self._rids)):
            time.sleep(self._rng.uniform(0, 2 * self._pace_s))
            assert self._server.post("/abort_request", {"rid": rid}).status_code == 200

    def join(self) -> None:
        """Wait for all of them to end."""
        self._aborts.result()
        for future in self._futures:
            future.result()
        self._pool.shutdown()
