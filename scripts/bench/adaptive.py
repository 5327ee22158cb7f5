"""Is the controller never slower? Its speed beside plain SGLang's and beside every fixed k, over loads and acceptances.

    python scripts/bench/adaptive.py cells --shape qwen3-1.7b      # an 80 GB card, about 9 minutes
    python scripts/bench/adaptive.py load --shape qwen3-1.7b       # load that rises and falls, about 5 minutes
    python scripts/bench/adaptive.py cells --model PATH            # real weights, real acceptance
    python scripts/bench/adaptive.py cells --tiny --batches 2 --contexts 64    # CPU: shows that everything works

Two servers are up, plain SGLang and SPARSESPEC with --sparsespec-adaptive (scripts/bench/study_server.py), and one of
them runs at a time. **Acceptance is SIMULATED** for shapes: each draft stands with the given probability if all
before it do.

A cell is a number of requests, their context and an acceptance. In it k is switched within one server and one set of
requests, in turns, five times over: the controller's k, then each fixed k. A turn's speed is the tokens that its
rounds are expected to yield (by the given rates: no luck in it; with real acceptance those that came) over the time
between their results. Plain decoding is measured on its own server with the same requests, as a line of step time
over tokens in the pool, and compared at the pool of each turn. The controller begins each cell without any knowledge;
what it takes until it has settled is reported apart.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from study_server import CONTROL

from sglang_sparsespec.bench import measure
from sglang_sparsespec.bench.cells import Scene, Target
from sglang_sparsespec.bench.client import Arrival, run_arrivals, run_requests
from sglang_sparsespec.bench.planner import SIMULATION
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, ServerError, has_gpu
from sglang_sparsespec.bench.shapes import SHAPES, read_shape, write_shape
from sglang_sparsespec.config import SparseSpecConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent
STUDY_SERVER = [sys.executable, str(HERE / "study_server.py")]
REPEATS = 5
# rounds of a turn, of which the first does not count; and of the controller's
TURN_ROUNDS, OWN_ROUNDS = 5, 12
# until the controller counts as settled; and the rounds over which its speed is looked at
SETTLE_ROUNDS, SETTLE_WINDOW = 96, 16
PLAIN_SLICES = 8
# the bounds that are asked for
OVER_PLAIN, OVER_BEST = 0.98, 0.97
OWN = "own"
ROUND_TIMEOUT_S = 60.0


class RoundLine(NamedTuple):
    """A round as the server wrote it down."""

    time: float
    num_reqs: int
    num_steps: int
    pool_tokens: int
    round_ms: float | None
    tokens: int
    label: str


@dataclass(frozen=True)
class Line:
    """Milliseconds of a plain decode step over tokens in the pool."""

    fixed_ms: float
    ms_per_token: float

    def step_ms(self, pool_tokens: float) -> float:
        return self.fixed_ms + self.ms_per_token * pool_tokens

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Least squares; a level line where the pool hardly grew, or time fell with it."""
        pools, times = zip(*points, strict=True)
        if max(pools) < 1.02 * min(pools):
            return cls(statistics.median(times), 0.0)
        slope, fixed = np.polyfit(pools, times, 1)
        return cls(statistics.median(times), 0.0) if slope < 0 else cls(float(fixed), float(slope))


def expected_tokens(rates: Sequence[float], num_steps: int) -> float:
    """That a request's round yields, bonus token counted, where draft j stands with `rates[j]` if all before it do."""
    alive, tokens = 1.0, 1.0
    for j in range(num_steps):
        alive *= rates[min(j, len(rates) - 1)]
        tokens += alive
    return tokens


def speed(rounds: Sequence[RoundLine], rates: Sequence[float] | None) -> tuple[float, float]:
    """Tokens per second of some rounds, and their mean pool; rounds without a time do not count."""
    timed = [line for line in rounds if line.round_ms is not None]
    if not timed:
        raise ServerError("no round of a turn could be timed")
    tokens = sum(
        line.tokens if rates is None else line.num_reqs * expected_tokens(rates, line.num_steps) for line in timed
    )
    seconds = sum(line.round_ms or 0.0 for line in timed) / 1e3
    return tokens / seconds, statistics.fmean(line.pool_tokens for line in timed)


def over_plain(rounds: Sequence[RoundLine], rates: Sequence[float] | None, plain: Line) -> float:
    """Speed of some rounds over plain decoding's at the same pool and number of requests."""
    tokens_per_s, pool = speed(rounds, rates)
    num_reqs = statistics.fmean(line.num_reqs for line in rounds)
    return tokens_per_s / (1e3 * num_reqs / plain.step_ms(pool))


def rounds_to_settle(ratios: Sequence[float], tolerance: float = 0.03) -> int | None:
    """How many windows go by until all further ones are within `tolerance` of their median; None: the last is not."""
    middle = statistics.median(ratios[len(ratios) // 2 :])
    settled = len(ratios)
    for i in reversed(range(len(ratios))):
        if abs(ratios[i] / middle - 1) > tolerance:
            break
        settled = i
    return settled if settled < len(ratios) else None


def verdict(own: Sequence[float], fixed: dict[int, list[float]]) -> dict[str, Any]:
    """Ratios of one cell: of paired turns, medians with their range.

    Args:
        own: the controller's speed over plain SGLang's, turn by turn.
        fixed: the same of each fixed k, in the turns beside them.
    """
    best = max(fixed, key=lambda k: statistics.median(fixed[k]))
    # a server could be no faster than this, plain decoding outside of it included
    paired = [mine / theirs for mine, theirs in zip(own, fixed[best], strict=True)]
    result = {
        "over_plain": round(statistics.median(own), 4),
        "over_plain_range": [round(min(own), 4), round(max(own), 4)],
        "best_k": best,
        "best_over_plain": round(statistics.median(fixed[best]), 4),
        "over_best": round(statistics.median(paired), 4),
        "over_best_range": [round(min(paired), 4), round(max(paired), 4)],
        "fixed_over_plain": {str(k): round(statistics.median(values), 4) for k, values in fixed.items()},
    }
    result["met"] = result["over_plain"] >= OVER_PLAIN and result["over_best"] >= OVER_BEST
    return result


class Study:
    """The server whose rounds are set and watched."""

    def __init__(self, server: Server, control: Path) -> None:
        self.server, self._control = server, control
        self._rounds = control.with_name(control.name + ".rounds")
        self._labels = itertools.count()
        self._fresh = 0

    def choices(self) -> tuple[int, ...]:
        """Every k that the controller may choose, ascending."""
        most = self.server.get("/server_info")["speculative_num_steps"]
        return SparseSpecConfig(num_steps=most, adaptive=True).step_choices

    def set(self, k: int | None, rates: Sequence[float] | None, *, fresh: bool = False) -> str:
        """From the next round on; returns the label that its rounds carry."""
        self._fresh += fresh
        label = f"turn {next(self._labels)}"
        written = json.dumps({"k": k, "rates": rates, "fresh": self._fresh, "label": label})
        # whole or not at all: the server may look at any moment
        draft = self._control.with_suffix(".new")
        draft.write_text(written)
        draft.replace(self._control)
        return label

    def rounds(self, label: str) -> list[RoundLine]:
        if not self._rounds.exists():
            return []
        lines = [line for line in self._rounds.read_text().splitlines() if line.endswith(f'"{label}"]')]
        return [RoundLine(*json.loads(line)) for line in lines]

    def turn(self, k: int | None, rates: Sequence[float] | None, count: int, *, fresh: bool = False) -> list[RoundLine]:
        """Set k and wait for so many rounds of it."""
        label = self.set(k, rates, fresh=fresh)
        deadline = time.monotonic() + ROUND_TIMEOUT_S
        while len(found := self.rounds(label)) < count:
            self.server.check_alive("in a turn")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{len(found)} of {count} rounds in {ROUND_TIMEOUT_S:.0f} s\n{self.server.describe()}"
                )
            time.sleep(0.01)
        return found


@contextlib.contextmanager
def running(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[None]:
    """All requests decode while the block runs; what is left of them is aborted."""
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    failures: list[BaseException] = []

    def send() -> None:
        try:
            run_requests(server.url, prompts, sampling, concurrency=len(prompts), timeout_s=600)
        except BaseException as error:
            failures.append(error)

    server.flush_cache()
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 300
        while server.loads()["num_running_reqs"] < len(prompts):
            if failures:
                raise failures[0]
            if time.monotonic() > deadline:
                raise ServerError(f"never {len(prompts)} requests at a time\n{server.describe()}")
            time.sleep(0.05)
        yield
    finally:
        server.post("/abort_request", {"rid": "", "abort_all": True})
        thread.join(timeout=120)
        server.idle_check()


def plain_line(
    server: Server, source: measure.PromptSource, batch: int, contexts: Sequence[int], new_tokens: int
) -> Line:
    """Step times of plain SGLang from prompts of each of `contexts` on, which should span what is compared with."""
    points = []
    for context in contexts:
        scene = Scene(batch, context, new_tokens, num_slices=PLAIN_SLICES)
        result = measure.measure(server, source, scene, seed=0)
        points += [(part["pool_tokens"], part["round_ms"]) for part in result["slices"]]
    return Line.through(points)


def num_rounds(choices: Sequence[int]) -> int:
    """Of one cell."""
    return SETTLE_ROUNDS + REPEATS * (OWN_ROUNDS + len(choices) * TURN_ROUNDS)


def study_cell(
    study: Study, prompts: Sequence[Sequence[int]], rates: Sequence[float] | None, plain: Line, choices: Sequence[int]
) -> dict[str, Any]:
    """One cell: the controller from nothing, then in turns with every fixed k."""
    # all drafts of all rounds could stand
    with running(study.server, prompts, num_rounds(choices) * (1 + max(choices))):
        settling = study.turn(None, rates, SETTLE_ROUNDS, fresh=True)
        own: list[float] = []
        fixed: dict[int, list[float]] = {k: [] for k in choices}
        chosen: list[int] = []
        for repeat in range(REPEATS):
            order = [OWN, *choices]
            for what in order if repeat % 2 == 0 else reversed(order):
                if what == OWN:
                    found = study.turn(None, rates, OWN_ROUNDS)[1:]
                    own.append(over_plain(found, rates, plain))
                    chosen += [line.num_steps for line in found]
                else:
                    assert isinstance(what, int)
                    fixed[what].append(over_plain(study.turn(what, rates, TURN_ROUNDS)[1:], rates, plain))
    windows = [settling[i : i + SETTLE_WINDOW] for i in range(0, SETTLE_ROUNDS, SETTLE_WINDOW)]
    ratios = [over_plain(window, rates, plain) for window in windows]
    settled = rounds_to_settle(ratios)
    return {
        **verdict(own, fixed),
        "own_k": statistics.mode(chosen),
        "settled_after_rounds": None if settled is None else settled * SETTLE_WINDOW,
        "while_settling_over_plain": [round(ratio, 4) for ratio in ratios],
    }


def cells(args: argparse.Namespace, plain: Server, study: Study, target: Target) -> list[dict[str, Any]]:
    source = measure.PromptSource(target)
    choices = study.choices()
    rates: list[list[float] | None] = [[rate] for rate in args.rates] if args.shape or args.tiny else [None]
    # what a request says in a cell, about
    growth = num_rounds(choices) * (1 + max(choices)) // 2
    results = []
    for batch, context in itertools.product(args.batches, args.contexts):
        if batch * (context + growth) > args.pool or context + 2 * growth > target.shape.context:
            print(f"skipped: {batch} x {context}: {args.pool} tokens of KV do not hold it", file=sys.stderr)
            continue
        prompts = source.prompts(Scene(batch, context, 1), seed=0)
        line = plain_line(plain, source, batch, (context, context + growth), args.plain_tokens)
        for given in rates:
            result = study_cell(study, prompts, given, line, choices)
            results.append({"batch": batch, "context": context, "rate": given and given[0], **result})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def cells_table(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| batch x context | acceptance | over plain (range) | best fixed k: over plain | over the best (range) | "
        "own k | settled after rounds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rows.append(
            f"| {r['batch']} x {r['context']:,} | {r['rate'] or 'real'} | {r['over_plain']:.3f} "
            f"({r['over_plain_range'][0]:.3f} to {r['over_plain_range'][1]:.3f}) | {r['best_k']}: "
            f"{r['best_over_plain']:.3f} | {r['over_best']:.3f} ({r['over_best_range'][0]:.3f} to "
            f"{r['over_best_range'][1]:.3f}) | {r['own_k']} | {r['settled_after_rounds']} | "
            f"{'' if r['met'] else 'MISSED'} |"
        )
    return "\n".join(rows)


# Load that rises and falls


def rising_load(seconds: float, peak: int, vocab: int, seed: int = 0) -> list[Arrival]:
    """Requests whose number rises to about `peak` at a time and falls again; prompts from short to long."""
    rng = random.Random(seed)
    arrivals = []
    after = 0.0
    while after < seconds:
        # a triangle: 1 at both ends
        height = 1 + (peak - 1) * (1 - abs(2 * after / seconds - 1))
        context = int(2 ** rng.uniform(6, 6 + 5 * after / seconds + 1))
        prompt = [rng.randrange(vocab) for _ in range(context)]
        sampling = {"temperature": 0.0, "max_new_tokens": rng.randint(128, 512), "ignore_eos": True}
        arrivals.append(Arrival(prompt, sampling, after))
        # each stays for some seconds
        after += 4.0 / height
    return arrivals


def tokens_over_time(traces: Sequence[Any], began: float, ended: float, bin_s: float = 1.0) -> list[float]:
    """Tokens per second that arrived in each `bin_s` seconds."""
    edges = [began + i * bin_s for i in range(int((ended - began) / bin_s) + 2)]
    bins = [0.0] * (len(edges) - 1)
    for trace in traces:
        had = 0
        for at, count in zip(trace.times, trace.counts, strict=True):
            bins[min(max(bisect.bisect_right(edges, at) - 1, 0), len(bins) - 1)] += (count - had) / bin_s
            had = count
    return [round(value, 1) for value in bins]


def one_load(server: Server, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    server.flush_cache()
    began = time.perf_counter()
    traces = run_arrivals(server.url, arrivals, timeout_s=900)
    ended = time.perf_counter()
    latencies = sorted(trace.end - trace.sent for trace in traces)
    return {
        "seconds": round(ended - began, 2),
        "tokens": sum(trace.counts[-1] for trace in traces),
        "latency_p50_s": round(statistics.median(latencies), 3),
        "latency_p99_s": round(latencies[int(0.99 * (len(latencies) - 1))], 3),
        "tokens_per_s_over_time": tokens_over_time(traces, began, ended),
    }


def loads(args: argparse.Namespace, plain: Server, study: Study, target: Target) -> list[dict[str, Any]]:
    """The same arrivals for plain SGLang, the controller, and each fixed k."""
    choices = study.choices()
    arrivals = rising_load(args.seconds, max(args.batches), min(target.shape.vocab, 150_000))
    rates = [args.rates[len(args.rates) // 2]] if args.shape or args.tiny else None
    results = [{"who": "plain", **one_load(plain, arrivals)}]
    for k in (None, *choices):
        study.set(k, rates, fresh=k is None)
        results.append({"who": "controller" if k is None else f"k={k}", "rate": rates and rates[0]})
        results[-1] |= one_load(study.server, arrivals)
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def loads_table(results: Sequence[dict[str, Any]]) -> str:
    rows = ["| who | seconds for all | tokens | latency p50, s | p99, s |", "|---|---|---|---|---|"]
    rows += [
        f"| {r['who']} | {r['seconds']} | {r['tokens']:,} | {r['latency_p50_s']} | {r['latency_p99_s']} |"
        for r in results
    ]
    return "\n".join(rows)


def plot_loads(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for result in results:
        is_thick = result["who"] in ("plain", "controller")
        axes.plot(result["tokens_per_s_over_time"], label=result["who"], linewidth=2.2 if is_thick else 0.9)
    axes.set(xlabel="seconds", ylabel="tokens/s", title="Load that rises and falls")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "load"))
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="real weights, real acceptance")
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights, simulated acceptance")
    model.add_argument("--tiny", action="store_true", help="a tiny random model, simulated acceptance")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 16384])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="SIMULATED acceptance")
    parser.add_argument("--pool", type=int, help="tokens of KV of each server; default 220000, tiny 12000")
    parser.add_argument("--plain-tokens", type=int, help="that plain SGLang decodes in a cell; default 384, tiny 48")
    parser.add_argument("--seconds", type=float, default=40, help="of arrivals")
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeat")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC; repeat")
    parser.add_argument("--json", type=Path, help="where the JSON document goes as well")
    parser.add_argument("--plot", type=Path, help="of load over time")
    args = parser.parse_args()
    args.pool = args.pool or (12_000 if args.tiny else 220_000)
    args.plain_tokens = args.plain_tokens or (48 if args.tiny else 384)
    return args


def server_args(args: argparse.Namespace) -> list[str]:
    """The same for both."""
    common = ["--max-running-requests", str(max(args.batches)), "--max-total-tokens", str(args.pool)]
    common += ["--skip-server-warmup", "--incremental-streaming-output", "--random-seed", "1"]
    if args.shape:
        common += ["--load-format", "dummy", "--skip-tokenizer-init"]
    if has_gpu():
        common += ["--disable-prefill-cuda-graph", "--attention-backend", "flashinfer", "--dtype", "bfloat16"]
        # each takes its part of what is free when it starts
        common += ["--cuda-graph-bs-decode", *map(str, args.batches)]
    else:
        common += ["--dtype", "float32"]
    return common + args.server_arg


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = args.model
        if args.shape:
            model = write_shape(args.shape, Path(folder) / args.shape)
        elif args.tiny:
            from sglang_sparsespec.model_tools.tiny import write_tiny_model

            model = write_tiny_model(Path(folder) / "tiny", context=8192)
        target = Target(model.name, str(model), "bfloat16", read_shape(model), has_weights=args.model is not None)
        control = Path(folder) / "control.json"
        control.write_text("{}")
        common = server_args(args)
        # what the caller's shell left on would pass for real acceptance
        env: dict[str, str | None] = dict.fromkeys(SIMULATION)
        fractions = ("0.4", "0.8") if has_gpu() else ("0.5", "0.5")
        plain = Server(model, *common, "--mem-fraction-static", fractions[0], env=env, timeout_s=600)
        ours = ["--speculative-algorithm", "SPARSESPEC", "--sparsespec-adaptive", *args.spec_arg]
        study = Server(
            model,
            *common,
            *ours,
            "--mem-fraction-static",
            fractions[1],
            env={**env, CONTROL: str(control)},
            command=STUDY_SERVER,
            timeout_s=600,
        )
        # one after the other: each sizes its pool by what is free
        stack.enter_context(plain)
        stack.enter_context(study)
        run, table = (cells, cells_table) if args.what == "cells" else (loads, loads_table)
        results = run(args, plain, Study(study, control), target)
    acceptance = "real" if args.model else "SIMULATED"
    document = {**provenance(), "acceptance": acceptance, "server_args": [*common, *ours], "results": results}
    print(f"acceptance: {acceptance}\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot and args.what == "load":
        plot_loads(results, args.plot)
    return 0 if all(result.get("met", True) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
