"""Streams a scene's requests from a server and keeps when each chunk came.

Why not `sglang.bench_serving`: it reports one number for a whole run, prefill and drain included, drops chunks without
text (dummy weights write such), takes token ids from no file, and cannot cut its run into a steady state or into parts
by pool fill. What is the same here: `/generate`, streamed, and its definition of the inter-token latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp

from sglang_sparsespec.bench.server import ServerError
from sglang_sparsespec.bench.window import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sglang_sparsespec.bench.server import Server

# a chunk is a JSON document; 20,000 a second are too many to parse whole
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
VERIFY_CT = re.compile(rb'"spec_verify_ct":\s*(\d+)')
POLL_S = 0.25


def run_requests(
    url: str, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], *, concurrency: int, timeout_s: float
) -> list[Trace]:
    """All prompts, at most `concurrency` at a time; traces in their order.

    Raises:
        ServerError: if a request fails or its stream ends without a token.
    """
    arrivals = [Arrival(ids, sampling) for ids in prompts]
    return asyncio.run(_run_requests(url, arrivals, concurrency, timeout_s))


def run_arrivals(url: str, arrivals: Sequence[Arrival], *, timeout_s: float) -> list[Trace]:
    """Requests as they come; traces in the order given.

    Raises:
        ServerError: as `run_requests`.
    """
    return asyncio.run(_run_requests(url, arrivals, max(1, len(arrivals)), timeout_s))


async def _run_requests(url: str, arrivals: Sequence[Arrival], concurrency: int, timeout_s: float) -> list[Trace]:
    places = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:

        async def one(arrival: Arrival) -> Trace:
            await asyncio.sleep(arrival.after_s)
            async with places:
                return await _stream(session, url, arrival.ids, arrival.sampling)

        try:
            return await asyncio.gather(*(one(arrival) for arrival in arrivals))
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise ServerError(f"a streamed request failed: {error!r}") from error


async def _stream(session: aiohttp.ClientSession, url: str, ids: Sequence[int], sampling: Mapping[str, Any]) -> Trace:
    payload = {"input_ids": list(ids), "sampling_params": dict(sampling), "stream": True}
    times: list[float] = []
    counts: list[int] = []
    verify_ct = 0
    sent = time.perf_counter()
    async with session.post(url + "/generate", json=payload) as response:
        if response.status != 200:
            raise ServerError(f"/generate answered {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            found = COMPLETION_TOKENS.search(line)
            if found is None:
                if b'"error"' in line:
                    raise ServerError(f"a stream ended with {line[:500]!r}")
                continue
            count = int(found[1])
            if count > (counts[-1] if counts else 0):
                times.append(time.perf_counter())
                counts.append(count)
            verified = VERIFY_CT.search(line)
            if verified:
                verify_ct = int(verified[1])
    if not times:
        raise ServerError("a stream ended without a token")
    return Trace(len(ids), sent, tuple(times), tuple(counts), verify_ct)


class Arrival(NamedTuple):
    """A request, and when it is sent."""

    ids: Sequence[int]
    """Of the prompt."""
    sampling: Mapping[str, Any]
    after_s: float = 0.0
    """Seconds from the start."""


@dataclass(frozen=True)
class Load:
    """What the scheduler says of itself at one moment."""

    time: float
    used_tokens: int
    """KV slots in use: committed, reserved for drafts, and cached."""
    total_tokens: int


@contextlib.contextmanager
def watch(server: Server) -> Iterator[list[Load]]:
    """Fills the list that it yields, four times a second, for as long as the block runs."""
    loads: list[Load] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_S):
            # a busy server may answer late; a sample less does no harm
            with contextlib.suppress(Exception):
                load = server.loads()
                used, size = int(load["num_used_tokens"]), int(load["max_total_num_tokens"])
                loads.append(Load(time.perf_counter(), used, size))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield loads
    finally:
        stop.set()
        thread.join(timeout=30)
