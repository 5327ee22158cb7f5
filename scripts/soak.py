"""Mixed traffic at a bounded rate against a pool that is too small: does memory stay flat, is everything answered?

    python scripts/soak.py --minutes 30                  # a tiny random model, made on the fly; loopback only
    python scripts/soak.py --minutes 30 --model PATH --server-arg=--max-total-tokens=20000
    python scripts/soak.py --minutes 30 --plain          # SGLang without SPARSESPEC: what it grows by itself

Requests of random lengths, streams, aborts and clients that go away, `--rate` a second. Every answer must have the
length asked for and agree with other answers to the same prompt. Samples the resident memory of all server processes.
Prints one JSON document; exits 1 if a request was lost, if more than one answer in a hundred disagrees (ties may), if
the server is not idle and empty at the end, or if memory grew by more than `--growth` from the first third to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import requests

from sglang_sparsespec.bench.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.server import Server  # noqa: E402

NUM_PROMPTS, MAX_PROMPT, MAX_OUTPUT = 40, 160, 120
CLIENTS = 128
SERVER = (
    "--enable-metrics --max-running-requests 24 --max-total-tokens 1024 --decode-log-interval 40 --skip-server-warmup"
)
OURS = "--speculative-algorithm SPARSESPEC --sparsespec-host-memory-gb 0.2 --sparsespec-min-budget 32"
ENV = {
    "OMP_NUM_THREADS": "1",
    # SGLang's own checks of its pool, after every iteration and slot by slot: a leak ends the server
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


class Traffic:
    """Requests of one run; greedy, so that equal prompts have equal answers up to a tie."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._answers: dict[int, list[int]] = {}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def next(self) -> tuple[str, int, int]:
        """Kind, prompt number and output length of the next request."""
        kind = self._rng.choices(["answer", "stream", "abort", "disconnect"], weights=[12, 4, 2, 1])[0]
        return kind, self._rng.randrange(NUM_PROMPTS), self._rng.randint(2, MAX_OUTPUT)

    def send(self, number: int, kind: str, prompt: int, length: int) -> None:
        """One request from start to end; what goes wrong is noted, not raised."""
        rng = random.Random(prompt)
        payload = {
            "rid": f"soak-{number}",
            "input_ids": [rng.randrange(256) for _ in range(rng.randint(1, MAX_PROMPT))],
            "sampling_params": {"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
        }
        try:
            self._send(payload, kind, prompt, length)
        except Exception as error:
            with self._lock:
                self.failures.append(f"{kind} {number}: {error!r}"[:500])

    def _send(self, payload: dict[str, Any], kind: str, prompt: int, length: int) -> None:
        if kind == "disconnect":
            with self._server.post("/generate", {**payload, "stream": True}, stream=True) as response:
                next(response.iter_lines())
        elif kind == "abort":
            timer = threading.Timer(self._delay(), self._server.post, ("/abort_request", {"rid": payload["rid"]}))
            timer.start()
            # an abort may also come before the request runs, or after it has ended
            self._server.post("/generate", payload)
            timer.join()
        else:
            output = self._server.generate(payload) if kind == "answer" else self._last_chunk(payload)
            self._check(output, prompt, length)
        with self._lock:
            self.counts[kind] += 1

    def _delay(self) -> float:
        with self._lock:
            return self._rng.uniform(0, 2)

    def _last_chunk(self, payload: dict[str, Any]) -> Any:
        return list(self._server.stream("/generate", payload))[-1]

    def _check(self, output: Any, prompt: int, length: int) -> None:
        ids = output["output_ids"]
        if len(ids) != length:
            raise AssertionError(f"{len(ids)} tokens instead of {length}")
        with self._lock:
            self.counts["tokens"] += length
            self.counts["retractions"] += output["meta_info"]["num_retractions"]
            known = self._answers.setdefault(prompt, ids)
            if known[: len(ids)] != ids[: len(known)]:
                # a tie may fall either way; a request with another's KV differs from its first token
                self.counts["answers that differ"] += 1
            elif len(ids) > len(known):
                self._answers[prompt] = ids


def resident_mb(pid: int) -> float:
    """Of a process and all its children, 10^6 bytes."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes) / 1e6


def soak(server: Server, minutes: float, rate: float, seed: int) -> tuple[Traffic, list[float]]:
    """Send for `minutes`, at most `rate` requests a second; memory is sampled 60 times, from a tenth of the way on.

    No more than CLIENTS wait for an answer: a slow machine gets fewer requests, and not a backlog of them.
    """
    traffic, samples = Traffic(server, seed), []
    started = time.monotonic()
    until, sample_at = started + 60 * minutes, started + 6 * minutes
    number = 0
    places = threading.Semaphore(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        while (now := time.monotonic()) < until:
            if places.acquire(timeout=until - now):
                pool.submit(traffic.send, number, *traffic.next()).add_done_callback(lambda _: places.release())
                number += 1
            if now >= sample_at:
                samples.append(resident_mb(server.pid))
                sample_at += 0.9 * minutes
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
    traffic.counts["sent"] = number
    return traffic, samples


def metrics(server: Server) -> dict[str, float]:
    """The plugin's own, by name."""
    lines = requests.get(server.url + "/metrics", timeout=60).text.splitlines()
    ours = [line.rsplit(" ", 1) for line in lines if line.startswith("sglang:sparsespec_")]
    return {name.partition("{")[0].removeprefix("sglang:sparsespec_"): float(value) for name, value in ours}


def growth(samples: list[float]) -> float:
    """Median of the last third over that of the first, less 1."""
    third = max(1, len(samples) // 3)
    return statistics.median(samples[-third:]) / statistics.median(samples[:third]) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    parser.add_argument("--plain", action="store_true", help="SGLang without SPARSESPEC, for comparison")
    parser.add_argument("--server-arg", action="append", default=[], help="wins over the defaults; repeat")
    parser.add_argument("--growth", type=float, default=0.02, help="of resident memory, that is tolerated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from sglang_sparsespec.model_tools.tiny import write_tiny_model

            args.model = write_tiny_model(Path(folder) / "tiny", context=1024)
        options = SERVER.split() if args.plain else [*OURS.split(), *SERVER.split()]
        with Server(args.model, *options, *args.server_arg, env=ENV) as server:
            traffic, samples = soak(server, args.minutes, args.rate, args.seed)
            try:
                server.idle_check(timeout_s=120)
                server.flush_cache()
            except Exception as error:
                traffic.failures.append(f"at the end: {error!r}"[:2000])
            result = {
                **provenance(),
                "minutes": args.minutes,
                "rate": args.rate,
                "requests": dict(traffic.counts),
                "resident_mb": [round(sample, 1) for sample in samples],
                "growth": round(growth(samples), 4) if samples else None,
                "metrics": metrics(server),
                "failures": traffic.failures[:20],
            }
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n")
    has_grown = bool(samples) and growth(samples) > args.growth
    disagrees = traffic.counts["answers that differ"] > 0.01 * (traffic.counts["answer"] + traffic.counts["stream"])
    return 1 if traffic.failures or has_grown or disagrees else 0


if __name__ == "__main__":
    sys.exit(main())
