"""One turn: a scene on a server that is up, as the numbers of its steady state."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench import window
from sglang_sparsespec.bench.client import Load, run_requests, watch
from sglang_sparsespec.bench.machine import gpu_memory_bytes, load_average
from sglang_sparsespec.bench.prompts import file_prompts, random_prompts, token_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.cells import Scene, Target
    from sglang_sparsespec.bench.server import Server

# SGLang's log, every --decode-log-interval iterations; /v1/loads has this number only under --enable-metrics
DECODE_LINE = re.compile(r"Decode batch.*?#running-req: (\d+),.*?gen throughput \(token/s\): ([\d.]+)")
WARMUP_PROMPT_TOKENS = 256
WARMUP_NEW_TOKENS = 24
"""Enough for two rounds of k = 8."""


class PromptSource:
    """The prompts of each scene; a target's tokenizer is loaded once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tokenizer: Any = None

    def prompts(self, scene: Scene, seed: int) -> list[list[int]]:
        """One list of token ids per request; the same for the same seed."""
        lengths = [scene.prompt_tokens] * scene.requests
        if not self._target.has_weights:
            # ids at the end of a vocabulary are special tokens
            return random_prompts(min(self._target.shape.vocab, 150_000), lengths, seed)
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._target.path)
        if scene.prompts:
            # a longer prompt keeps its end, where a chat's question is
            return [
                ids[-scene.prompt_tokens :]
                for ids in file_prompts(self._tokenizer, Path(scene.prompts), scene.requests)
            ]
        return token_prompts(self._tokenizer, lengths, seed)


def warm_up(server: Server, source: PromptSource, scene: Scene) -> None:
    """Compile what a scene needs, with its batch and its sampling, on other prompts."""
    prompts = [ids[: min(len(ids), WARMUP_PROMPT_TOKENS)] for ids in source.prompts(scene, seed=999)][: scene.batch]
    sampling = {**scene.sampling, "max_new_tokens": WARMUP_NEW_TOKENS, "ignore_eos": True}
    run_requests(server.url, prompts, sampling, concurrency=scene.batch, timeout_s=server.request_timeout_s)


def measure(server: Server, source: PromptSource, scene: Scene, seed: int) -> dict[str, Any]:
    """The numbers of one turn, for a record. Starts from an empty radix cache.

    Raises:
        NoSteadyStateError: if the batch was never full.
        ServerError: if a request fails.
    """
    prompts = source.prompts(scene, seed)
    server.flush_cache()
    busy = load_average()
    logged = len(server.log_text())
    started = time.perf_counter()
    with watch(server) as loads:
        traces = run_requests(
            server.url, prompts, scene.sampling, concurrency=scene.batch, timeout_s=server.request_timeout_s
        )
    wall_s = time.perf_counter() - started
    server.check_alive("after a turn")
    return {
        **summarise(traces, loads, scene),
        "scheduler_tokens_per_s": scheduler_rate(server.log_text()[logged:], scene.batch),
        "wall_s": round(wall_s, 3),
        "gpu_memory_bytes": gpu_memory_bytes(server.pid),
        "load_before": round(busy, 2),
    }


def scheduler_rate(log: str, batch: int) -> float | None:
    """Tokens per second by the scheduler's own clock, over the log lines with a full batch; None without two of them.

    Each line stands for as many iterations as the next: their mean rate is the harmonic one. The first line's interval
    begins before the batch was full.
    """
    rates = [float(rate) for running, rate in DECODE_LINE.findall(log) if int(running) == batch][1:]
    return round(statistics.harmonic_mean(rates), 3) if rates and min(rates) > 0 else None


def summarise(traces: Sequence[window.Trace], loads: Sequence[Load], scene: Scene) -> dict[str, Any]:
    """Everything that follows from the traces of one turn. Milliseconds, tokens, tokens per second."""
    begin, end = window.steady_state(traces, scene.batch, is_full=scene.is_full)
    [whole] = window.slices(traces, begin, end)
    parts = window.slices(traces, begin, end, scene.num_slices)
    per_token, per_chunk = window.gaps(traces, begin, end)
    accept_length = window.accept_length(traces)
    inside = [load for load in loads if begin <= load.time <= end]
    used = max(inside, key=lambda load: load.used_tokens, default=None)
    return {
        "tokens_per_s": round(whole.tokens_per_s, 3),
        "accept_length": None if accept_length is None else round(accept_length, 4),
        "round_ms": round(whole.round_ms(accept_length or 1.0), 4),
        "itl_p50_ms": round(1e3 * window.percentile(per_token, 0.5), 4),
        "itl_p99_ms": round(1e3 * window.percentile(per_token, 0.99), 4),
        "chunk_gap_p99_ms": round(1e3 * window.percentile(per_chunk, 0.99), 4),
        "running": round(whole.running, 2),
        "pool_tokens": round(whole.pool_tokens, 1),
        "pool_used_peak": used.used_tokens if used else None,
        "pool_size": used.total_tokens if used else None,
        "steady_s": round(end - begin, 4),
        "steady_tokens": whole.tokens,
        "slices": [
            {
                "pool_tokens": round(part.pool_tokens, 1),
                "running": round(part.running, 2),
                "tokens_per_s": round(part.tokens_per_s, 3),
                "round_ms": round(part.round_ms(accept_length or 1.0), 4),
            }
            for part in parts
        ],
    }
