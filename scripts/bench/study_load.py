"""Load that rises and falls: a client that keeps so many requests in flight, as many at the same time for all.

A request that ends makes place for the next one while the target holds; prompts and answers follow from the time at
which a request is sent, prompts from short to long. Tokens are those that requests were answered with, the time is that
until the last answer: nothing here depends on how fast a client reads a stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
from study_client import FAILURES
from study_rounds import OVER_BEST, OVER_PLAIN

from sglang_sparsespec.bench.cells import Scene
from sglang_sparsespec.bench.server import ServerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from study_book import Allowance, Book
    from study_client import PlainServer, Study, Watched
    from study_rounds import RoundLine

    from sglang_sparsespec.bench.cells import Target
    from sglang_sparsespec.bench.measure import PromptSource

WHAT = "load"
POLL_S = 0.01
# seconds beyond --seconds until the last answer, before one was measured
FIRST_GUESS_S = 10.0
NUM_TEXTS = 64
# behind a longer wait there was nothing to do
IDLE_MS = 1000.0
# seconds of the load before the load, on each k; and its answers, an eighth of the load's
WARM_S, WARM_SHARE = 1.5, 8


class Sizes(NamedTuple):
    """Tokens of requests."""

    shortest: int
    longest: int
    """Of prompts; those of the beginning are a quarter of that at most."""
    answers: tuple[int, int]


SIZES, TINY_SIZES = Sizes(128, 4096, (256, 768)), Sizes(16, 128, (16, 48))


class Answer(NamedTuple):
    sent: float
    ended: float
    tokens: int


def target_running(share: float, peak: int) -> int:
    """Requests in flight after this share of the time: a triangle from 1 to `peak` and back."""
    height = 1 - abs(2 * share - 1)
    return max(1, round(1 + (peak - 1) * height)) if 0 <= share < 1 else 0


def request_at(share: float, index: int, texts: Sequence[Sequence[int]], sizes: Sizes) -> tuple[list[int], int]:
    """(prompt, tokens of the answer) of the request that is sent as number `index`, after this share of the time."""
    rng = random.Random(index)
    # prompts of the beginning, an eighth of the longest at most; of the end, all lengths
    limit = sizes.longest / 8 ** (1 - share)
    length = int(sizes.shortest * max(1.0, limit / sizes.shortest) ** rng.random())
    text = texts[index % len(texts)]
    # from any place: no two prompts begin alike
    start = rng.randrange(max(1, len(text) - length))
    return list(text[start : start + length]), rng.randint(*sizes.answers)


async def _drive(url: str, texts: Sequence[Sequence[int]], sizes: Sizes, peak: int, seconds: float) -> list[Answer]:
    answers: list[Answer] = []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(ids: list[int], new_tokens: int) -> None:
            sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
            sent = time.perf_counter()
            async with session.post(url + "/generate", json={"input_ids": ids, "sampling_params": sampling}) as got:
                if got.status != 200:
                    raise ServerError(f"/generate answered {got.status}: {(await got.text())[:500]}")
                tokens = (await got.json())["meta_info"]["completion_tokens"]
            answers.append(Answer(sent, time.perf_counter(), tokens))

        began, index = time.perf_counter(), 0
        flying: set[asyncio.Task[None]] = set()
        try:
            while (share := (time.perf_counter() - began) / seconds) < 1 or flying:
                while len(flying) < target_running(share, peak):
                    flying.add(asyncio.create_task(one(*request_at(share, index, texts, sizes))))
                    index += 1
                done, flying = await asyncio.wait(flying, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise ServerError(f"a request failed: {error!r}") from error
        finally:
            for task in flying:
                task.cancel()
    return answers


def over_time(rounds: Sequence[RoundLine], began: float, ended: float) -> tuple[list[float], list[float], list[float]]:
    """(tokens, requests running, k) of each second, the latter on the average of rounds; 0 without any."""
    tokens = [0.0] * (int(ended - began) + 1)
    found: list[list[RoundLine]] = [[] for _ in tokens]
    for line in rounds:
        if began <= line.time <= ended:
            second = int(line.time - began)
            tokens[second] += line.tokens
            found[second].append(line)
    running = [mean(line.num_reqs for line in lines) for lines in found]
    return tokens, running, [mean(line.num_steps for line in lines) for lines in found]


def mean(values: Iterable[int]) -> float:
    """With one decimal; 0 without any."""
    taken = list(values)
    return round(statistics.fmean(taken), 1) if taken else 0.0


def one_load(
    watched: Watched, texts: Sequence[Sequence[int]], sizes: Sizes, peak: int, seconds: float
) -> dict[str, Any]:
    watched.forget_prompts()
    watched.new_rounds()
    watched.new_prefills()
    answers = asyncio.run(_drive(watched.server.url, texts, sizes, peak, seconds))
    began, ended = min(a.sent for a in answers), max(a.ended for a in answers)
    rounds = watched.new_rounds()
    tokens, running, steps = over_time(rounds, began, ended)
    prefills = [(tokens, ms) for _, _, tokens, ms in watched.new_prefills() if ms is not None and ms < IDLE_MS]
    latencies = sorted(a.ended - a.sent for a in answers)
    total = sum(a.tokens for a in answers)
    return {
        "wall_s": round(ended - began, 2),
        "requests": len(answers),
        "tokens": total,
        "tokens_per_s": round(total / (ended - began), 2),
        "most_running": max((line.num_reqs for line in rounds), default=0),
        "prefills": len(prefills),
        "prefill_tokens": sum(tokens for tokens, _ in prefills),
        "prefill_ms_p50": round(statistics.median([ms for _, ms in prefills] or [0.0]), 3),
        "prefill_s": round(sum(ms for _, ms in prefills) / 1e3, 3),
        "latency_p50_s": round(statistics.median(latencies), 3),
        "latency_p99_s": round(latencies[int(0.99 * (len(latencies) - 1))], 3),
        "tokens_over_time": tokens,
        "running_over_time": running,
        "k_over_time": steps,
    }


def warm_up(watched: Watched, texts: Sequence[Sequence[int]], sizes: Sizes, peak: int) -> None:
    """Kernels load and compile, and memory is set aside, where they are first met: with every batch, up and down."""
    shortest, longest = (max(1, tokens // WARM_SHARE) for tokens in sizes.answers)
    asyncio.run(_drive(watched.server.url, texts, sizes._replace(answers=(shortest, longest)), peak, WARM_S))


def run_loads(
    args: argparse.Namespace,
    book: Book,
    time_left: Allowance,
    plain: PlainServer,
    study: Study,
    target: Target,
    source: PromptSource,
) -> bool:
    """The same load for plain SGLang, the controller, and each fixed k; False where time was up before all were tried.

    Raises:
        ServerError: a server died.
    """
    sizes, peak = TINY_SIZES if args.tiny else SIZES, max(args.batches)
    texts = source.prompts(Scene(NUM_TEXTS, min(2 * sizes.longest, target.shape.context), 1), seed=0)
    rates = None if args.model else [args.rates[len(args.rates) // 2]]
    warm_up(plain, texts, sizes, peak)
    for k in study.choices():
        study.set(k, rates)
        warm_up(study, texts, sizes, peak)
    for who, k in wanted_loads(study.choices()):
        thing = load_of(args, who)
        if book.has(thing):
            continue
        extra = max((r["wall_s"] - r["seconds"] for r in book.of("result", WHAT)), default=FIRST_GUESS_S)
        if not time_left.allows(args.seconds + 1.2 * extra + 2):
            return False
        if who != "plain":
            study.set(k, rates, fresh=k is None)
        contender: Watched = plain if who == "plain" else study
        try:
            book.note("result", thing, one_load(contender, texts, sizes, peak, args.seconds))
            shown = {key: value for key, value in book.of("result", WHAT)[-1].items() if key in ("who", "tokens_per_s")}
            print(json.dumps(shown), file=sys.stderr, flush=True)
        except FAILURES as error:
            book.note_failure(thing, error)
            contender.require_alive()
    return True


def wanted_loads(choices: Sequence[int]) -> list[tuple[str, int | None]]:
    """(name, k) of each contender; those that a verdict needs first."""
    return [("plain", None), ("controller", None), *((f"k={k}", k) for k in reversed(choices))]


def load_of(args: argparse.Namespace, who: str) -> dict[str, Any]:
    rate = None if args.model else args.rates[len(args.rates) // 2]
    return {"what": WHAT, "who": who, "peak": max(args.batches), "seconds": args.seconds, "rate": rate}


def load_verdict(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The controller over plain SGLang and over the best fixed k, in tokens per second; None where one is missing."""
    speeds = {r["who"]: r["tokens_per_s"] for r in results}
    fixed = {who: value for who, value in speeds.items() if who.startswith("k=")}
    if not fixed or not {"plain", "controller"} <= speeds.keys():
        return None
    best = max(fixed, key=lambda who: fixed[who])
    over_plain, over_best = speeds["controller"] / speeds["plain"], speeds["controller"] / fixed[best]
    return {
        "over_plain": round(over_plain, 4),
        "best": best,
        "over_best": round(over_best, 4),
        "met": over_plain >= OVER_PLAIN and over_best >= OVER_BEST,
    }


def loads_table(book: Book) -> str:
    """Of everything on file."""
    results = book.of("result", WHAT)
    rows = [
        "| who | tokens/s | seconds | requests | tokens | most running | latency p50, s | p99, s | prefills: number, "
        "ms p50, s together |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {r['who']} | {r['tokens_per_s']:,} | {r['wall_s']} | {r['requests']} | {r['tokens']:,} | "
        f"{r['most_running']} | {r['latency_p50_s']} | {r['latency_p99_s']} | {r['prefills']}, "
        f"{r['prefill_ms_p50']}, {r['prefill_s']} |"
        for r in results
    ]
    found = load_verdict(results)
    if found is None:
        rows.append("\nno verdict: plain, the controller and a fixed k are needed")
    else:
        rows.append(
            f"\ncontroller: {found['over_plain']} of plain (at least {OVER_PLAIN} is asked for), {found['over_best']} "
            f"of the best fixed k, {found['best']} (at least {OVER_BEST}): {'met' if found['met'] else 'MISSED'}"
        )
    rows += [f"\nfailure: {r['who']}: {(r['reason'].splitlines() or [''])[0]}" for r in book.of("failure", WHAT)]
    return "\n".join(rows)


def plot_loads(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second over time, and on a second axis the requests that ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    beside = axes.twinx()
    for result in results:
        is_thick = result["who"] in ("plain", "controller")
        [line] = axes.plot(result["tokens_over_time"], label=result["who"], linewidth=2.2 if is_thick else 0.9)
        beside.plot(result["running_over_time"], color=line.get_color(), linestyle=":", linewidth=0.9)
    axes.set(xlabel="seconds", ylabel="tokens/s", title="Load that rises and falls")
    beside.set(ylabel="requests running (dotted)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
