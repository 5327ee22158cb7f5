"""Lockstep, unified and auto in one server, beside plain SGLang: tokens per second and time between tokens.

    python scripts/bench/schedules.py --shape qwen3-8b --json schedules.jsonl --max-minutes 9    # an 80 GB card
    python scripts/bench/schedules.py --model PATH                  # real weights, real acceptance
    python scripts/bench/schedules.py --tiny --batches 4            # CPU: its times mean nothing

Two servers, one after the other, each with the whole card: plain SGLang, then SPARSESPEC with a fixed k and
--sparsespec-schedule auto (scripts/bench/study_server.py), told between two loads which schedule to run by, if any.
So the schedules share one server, its graphs and its prompts, which lie in its radix cache, and take turns: auto,
lockstep, unified, and back. What `auto` learns it learns in its own turns and in one load before them. Acceptance is
SIMULATED without --model.

A turn is a load that all requests begin together; counted is what a client gets while all of them decode
(`sglang_sparsespec/bench/window.py`); beside it stands what rounds took by the server's own clock, which knows neither
luck with drafts nor a slow client, and on a GPU what an iteration takes of the host. With --profile a few rounds of
each schedule are traced (`sglang_sparsespec/bench/trace.py`) when all turns are over, since a profiler may leave
something behind that slows launches. With --json a scene is on file as soon as a server is through with it, and the
same command goes on where it was. Exit code 0: `auto` is within 3 % of the better schedule everywhere; 1: it is not, or
something failed; 3: --max-minutes were up before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from study_book import Allowance
from study_client import DEATH_S, FAILURES, Watched, write_control
from study_rounds import LinesFile
from study_server import COMMAND, CONTROL, HOSTS, schedules_file
from study_target import MET, MISSED, TIME_IS_UP, add_target, open_book, target_of

from sglang_sparsespec.bench import contenders as who
from sglang_sparsespec.bench.cells import Job, Scene
from sglang_sparsespec.bench.client import run_requests
from sglang_sparsespec.bench.machine import detect
from sglang_sparsespec.bench.measure import PromptSource, scheduler_rate, summarise
from sglang_sparsespec.bench.planner import START_S, common_args, environment, predicted_load_s
from sglang_sparsespec.bench.server import Server
from sglang_sparsespec.bench.sets import FILL_TOKENS, SCHEDULE_BATCHES, fill_tokens
from sglang_sparsespec.bench.summary import client_lag
from sglang_sparsespec.bench.trace import NEW_TOKENS as TRACED_TOKENS
from sglang_sparsespec.bench.trace import WRITE_S, record
from sglang_sparsespec.bench.trace import summarise as summarise_trace
from sglang_sparsespec.bench.window import NoSteadyStateError
from sglang_sparsespec.config import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from study_book import Book

    from sglang_sparsespec.bench.cells import Target
    from sglang_sparsespec.bench.machine import Machine

# the bound that is asked for
OVER_BETTER = 0.97
PLAIN, OURS = "plain", "sparsespec"
WHAT, TRACES = "scene", "traces"
LONGEST = 8192
# of a real model's prompts, whose context is short
REAL_PROMPT_TOKENS = 2048
# seconds of a load beside its prefill and its tokens: requests come, and the client counts
LOAD_S = 1.0
# what may take longer than the last scene let expect
SPARE = 1.15
# of a plain server's first load, which is there for its prompts; of ours it is one more turn
PREFILL_NEW_TOKENS = 16
TOP_KERNELS = 12
TURN = ("tokens_per_s", "accept_length", "round_ms", "itl_p50_ms", "itl_p99_ms", "chunk_gap_p99_ms", "pool_tokens")
# of the scheduler's clock; None where too little of it was seen
CLOCK = ("scheduler_tokens_per_s", "clock_ms")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=list(SCHEDULE_BATCHES))
    parser.add_argument("--new-tokens", type=int, help="of an answer; default 384, tiny 96")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each schedule")
    parser.add_argument("--plain-repeats", type=int, help="turns of plain SGLang; default two thirds as many")
    parser.add_argument("--accept-length", type=float, default=who.SIMULATED_ACCEPT_LENGTHS[OURS], help="SIMULATED")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC; repeat")
    parser.add_argument(
        "--profile", type=int, nargs="*", metavar="BATCH", help="trace both schedules at these batches, or all; a GPU"
    )
    parser.add_argument("--json", type=Path, help="JSON lines; the same command goes on")
    parser.add_argument("--max-minutes", type=float, help="stop in time and exit with 3; call again to go on")
    args = parser.parse_args(argv)
    args.new_tokens = args.new_tokens or (96 if args.tiny else 384)
    args.plain_repeats = args.plain_repeats or max(1, round(2 * args.repeats / 3))
    args.profile = args.batches if args.profile == [] else args.profile or []
    if args.shape and args.shape not in FILL_TOKENS:
        parser.error(f"--shape {args.shape}: how many tokens fill a card is known of {', '.join(sorted(FILL_TOKENS))}")
    return args


def scenes_of(args: argparse.Namespace, target: Target, machine: Machine) -> list[Scene]:
    """Each batch with as much context as the pool has room for, up to LONGEST."""
    found = []
    for batch in args.batches:
        length = REAL_PROMPT_TOKENS
        if args.tiny:
            length = 96
        elif args.shape:
            length = min(LONGEST, fill_tokens(args.shape, machine) // batch) - args.new_tokens
        length = min(length, target.shape.context - args.new_tokens - 1)
        found.append(Scene(batch, max(1, length), args.new_tokens))
    return found


def order_of(repeat: int) -> list[str]:
    """Who takes turns, and every other time the other way round: what drifts weighs on all alike."""
    order = [SCHEDULES[2], *SCHEDULES[:2]]
    return order[::-1] if repeat % 2 else order


def turns_of(name: str, args: argparse.Namespace) -> list[tuple[int, str]]:
    """(repeat, schedule) of each turn on a server, in order."""
    if name == PLAIN:
        return [(repeat, PLAIN) for repeat in range(args.plain_repeats)]
    return [(repeat, schedule) for repeat in range(args.repeats) for schedule in order_of(repeat)]


class Bench:
    """Loads on one server after another."""

    def __init__(self, args: argparse.Namespace, book: Book, time_left: Allowance, target: Target) -> None:
        self.args, self.book, self.time_left, self.target = args, book, time_left, target
        self.machine = detect()
        self.source = PromptSource(target)
        self.scenes = scenes_of(args, target, self.machine)
        [ours] = who.sparsespec(self.machine, ("pillar",), args.accept_length, tuple(args.spec_arg), SCHEDULES[2:])
        self.contenders = {PLAIN: who.plain(self.machine)[0][0], OURS: ours}
        # of each server: what its last scene took over the prediction
        self._pace: dict[str, float] = {}
        self._turn_no = 0
        self._cached: Scene | None = None

    def thing(self, name: str, scene: Scene, what: str = WHAT) -> dict[str, Any]:
        shown = {"batch": scene.batch, "prompt_tokens": scene.prompt_tokens, "new_tokens": scene.new_tokens}
        return {"what": what, "who": name, **shown}

    def to_do(self, name: str) -> list[tuple[Scene, str]]:
        """(scene, WHAT or TRACES), in order. The last scene's prompts are cached when traces begin."""
        wanted = [(scene, WHAT) for scene in self.scenes]
        if name == OURS:
            wanted += [(scene, TRACES) for scene in reversed(self.scenes) if scene.batch in self.args.profile]
        return [(scene, what) for scene, what in wanted if not self.book.has(self.thing(name, scene, what))]

    def predicted_s(self, name: str, scene: Scene, what: str) -> float:
        """By plain decoding's speed, until a scene of this server has told better."""

        def load_s(new_tokens: int) -> float:
            return predicted_load_s(self.target, self.machine, scene.batch, scene.prompt_tokens, new_tokens)

        prefill_s = load_s(0)
        turn_s = load_s(scene.new_tokens) - prefill_s + LOAD_S
        num_loads = len(turns_of(name, self.args)) + (name == OURS)
        pace = self._pace.get(name, 1.0)
        if what == TRACES:
            num_loads = len(SCHEDULES[:2])
            return pace * (prefill_s + num_loads * turn_s) + num_loads * WRITE_S
        return pace * (prefill_s + num_loads * turn_s)

    def run(self, name: str, folder: Path) -> bool:
        """All scenes on one server; False where time was up before the end.

        Raises:
            ServerError: the server died, or did not start.
        """
        to_do = self.to_do(name)
        if not to_do:
            return True
        if not self.time_left.allows(START_S[self.machine.has_gpu] + self.predicted_s(name, *to_do[0])):
            return False
        contender = self.contenders[name]
        job = Job(self.target, tuple(self.contenders.values()), tuple(self.scenes), 1, "")
        args = [*common_args(job, self.machine), *contender.args]
        env = environment(self.target, contender, self.machine)
        control = folder / f"{name}.json"
        write_control(control, {})
        options: dict[str, Any] = {"timeout_s": 600}
        if name == OURS:
            options["command"] = COMMAND
            env |= {CONTROL: str(control), HOSTS: str(hosts_file(control))}
        sizes = [str(size) for size in sorted(set(self.args.batches))]
        self._cached = None
        with Server(str(self.target.path), *args, "--cuda-graph-bs-decode", *sizes, env=env, **options) as server:
            watched = Watched(server, control)
            for scene, what in to_do:
                predicted_s = self.predicted_s(name, scene, what)
                if not self.time_left.allows(SPARE * predicted_s):
                    return False
                began = time.monotonic()
                try:
                    self._visit(watched, name, scene, what, control)
                except (NoSteadyStateError, *FAILURES) as error:
                    self.book.note_failure(self.thing(name, scene, what), error)
                    time.sleep(DEATH_S)
                    server.check_alive("at the failure")
                    continue
                if what == WHAT:
                    self._pace[name] = self._pace.get(name, 1.0) * (time.monotonic() - began) / predicted_s
        return True

    def _visit(self, watched: Watched, name: str, scene: Scene, what: str, control: Path) -> None:
        """Measure one scene, or trace it, and keep what was found."""
        if self._cached != scene:
            # the last round may still run
            watched.forget_prompts()
            self._cached = scene
        found: dict[str, Any]
        if what == TRACES:
            found = {"traces": self._traces(watched.server, scene, control)}
        else:
            found = {"turns": self._scene(watched.server, name, scene, control)}
            print(describe(name, scene, found["turns"]), file=sys.stderr, flush=True)
        self.book.note("result", self.thing(name, scene, what), found)

    def _scene(self, server: Server, name: str, scene: Scene, control: Path) -> list[dict[str, Any]]:
        prompts = self.source.prompts(scene, seed=0)
        # prefills, compiles, and shows `auto` both schedules
        write_control(control, {})
        first = scene if name == OURS else dataclasses.replace(scene, new_tokens=PREFILL_NEW_TOKENS)
        self._load(server, first, prompts)
        return [
            {"schedule": schedule, "repeat": repeat, **self._turn(server, scene, prompts, control, schedule)}
            for repeat, schedule in turns_of(name, self.args)
        ]

    def _turn(
        self, server: Server, scene: Scene, prompts: list[list[int]], control: Path, schedule: str
    ) -> dict[str, Any]:
        # a round that was under way when the last turn's answers ended is that turn's, however late its results come
        self._turn_no += 1
        label = f"turn {self._turn_no}"
        write_control(control, {"schedule": schedule if schedule in SCHEDULES[:2] else None, "label": label})
        logged = len(server.log_text())
        traces = self._load(server, scene, prompts)
        numbers = summarise(traces, [], scene)
        rounds = [
            (ms, by)
            for num_reqs, ms, by, turn in LinesFile(schedules_file(control)).new()
            if turn == label and num_reqs == scene.batch
        ]
        iterations = [times for *times, turn in LinesFile(hosts_file(control)).new() if turn == label]
        return {
            **{key: numbers[key] for key in TURN},
            "host": host_of([times for num_reqs, *times in iterations if num_reqs == scene.batch]),
            # far longer where prompts were not in the cache
            "fill_s": round(max(trace.first for trace in traces) - min(trace.sent for trace in traces), 3),
            "scheduler_tokens_per_s": scheduler_rate(server.log_text()[logged:], scene.batch),
            "rounds": {name: sum(by == name for _, by in rounds) for name in SCHEDULES[:2]},
            "clock_ms": mean_ms([ms for ms, _ in rounds]),
        }

    def _traces(self, server: Server, scene: Scene, control: Path) -> dict[str, Any]:
        found = {}
        # prompts of the same length are the same prompts
        traced = dataclasses.replace(scene, new_tokens=TRACED_TOKENS)
        for schedule in SCHEDULES[:2]:
            write_control(control, {"schedule": schedule})
            try:
                path = record(server, self.source, traced, control.parent, keeps_cache=True)
            except FAILURES:
                # one that waits for more rounds would trace the next scene
                with contextlib.suppress(*FAILURES):
                    server.post("/stop_profile", {}, timeout=30)
                raise
            found[schedule] = summarise_trace(path, TOP_KERNELS)
            path.unlink()
        return found

    def _load(self, server: Server, scene: Scene, prompts: list[list[int]]) -> Any:
        return run_requests(
            server.url, prompts, scene.sampling, concurrency=scene.batch, timeout_s=server.request_timeout_s
        )


def mean_ms(times: Sequence[float | None]) -> float | None:
    """Of rounds that could be timed."""
    timed = [ms for ms in times if ms is not None]
    return round(statistics.fmean(timed), 4) if timed else None


def hosts_file(control: Path) -> Path:
    """Where a server with this control writes down what iterations take of the host."""
    return control.with_name(control.name + ".hosts")


def host_of(iterations: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Medians over iterations of (ms, waiting, launching, launches): the host's own time, launches apart.

    None where no iteration was timed: without a GPU, and of plain SGLang.
    """
    if not iterations:
        return None
    total, waiting, launching, launches = (np.array(column) for column in zip(*iterations, strict=True))
    found = {
        "iteration_ms": total,
        "own_ms": total - waiting - launching,
        "launching_ms": launching,
        "launches": launches,
    }
    return {name: round(float(np.median(column)), 3) for name, column in found.items()}


def host_notes(turns: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Schedule -> what an iteration takes of the host, the median turn's."""
    found = {}
    for schedule in SCHEDULES[:2]:
        hosts = [turn["host"] for turn in turns if turn["schedule"] == schedule and turn.get("host")]
        if hosts:
            median = {name: statistics.median(host[name] for host in hosts) for name in hosts[0]}
            found[schedule] = (
                f"of an iteration's {median['iteration_ms']:.2f} ms the host works {median['own_ms']:.2f} and launches "
                f"{median['launches']:.0f} graphs in {median['launching_ms']:.2f}"
            )
    return found


def describe(name: str, scene: Scene, turns: Sequence[dict[str, Any]]) -> str:
    speeds = ", ".join(f"{who} {numbers['tokens_per_s']:,.0f}" for who, numbers in medians(turns).items())
    fill_s = max(turn["fill_s"] for turn in turns)
    return f"{scene.batch} x {scene.prompt_tokens}, {name}: {speeds} tokens/s; all began within {fill_s:.1f} s"


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each schedule's turns, number by number; what was not measured is left out."""
    found: dict[str, dict[str, float]] = {}
    for schedule in dict.fromkeys(turn["schedule"] for turn in turns):
        mine = [turn for turn in turns if turn["schedule"] == schedule]
        found[schedule] = {
            key: statistics.median(turn[key] for turn in mine)
            for key in TURN + CLOCK
            if all(turn[key] is not None for turn in mine)
        }
    return found


def over_better(turns: Sequence[dict[str, Any]]) -> tuple[str, list[float]]:
    """(the better schedule by the median, `auto` over it in each repeat, ascending)."""
    speeds = medians(turns)
    better = max(SCHEDULES[:2], key=lambda schedule: speeds[schedule]["tokens_per_s"])
    by_turn = {(turn["schedule"], turn["repeat"]): turn["tokens_per_s"] for turn in turns}
    repeats = sorted({turn["repeat"] for turn in turns})
    return better, sorted(by_turn["auto", i] / by_turn[better, i] for i in repeats)


def over_better_by_clock(turns: Sequence[dict[str, Any]]) -> float | None:
    """`auto` over the better schedule by the mean time of full rounds; None where some could not be timed.

    It leaves out what a change of schedule costs in drafts, half a round each.
    """
    better, _ = over_better(turns)
    found = {}
    for schedule in (better, "auto"):
        times = [turn["clock_ms"] for turn in turns if turn["schedule"] == schedule]
        if None in times:
            return None
        found[schedule] = statistics.fmean(times)
    return found[better] / found["auto"]


def speed(turns: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """(tokens per second, "*" if they are the scheduler's: the client could not keep up)."""
    lags = [client_lag({"result": turn}) for turn in turns]
    found = statistics.median(turn["tokens_per_s"] * lag for turn, lag in zip(turns, lags, strict=True))
    return found, "*" if max(lags) > 1 else ""


def is_forced(turns: Sequence[dict[str, Any]]) -> bool:
    """Whether every round of a full batch ran by the schedule that was set."""
    return all(
        count == 0
        for turn in turns
        if turn["schedule"] in SCHEDULES[:2]
        for schedule, count in turn["rounds"].items()
        if schedule != turn["schedule"]
    )


def table(book: Book) -> str:
    """Of everything on file, in Markdown."""
    rows = [
        "| batch x context | | tokens/s | over plain | round, ms | between tokens p50, p99, ms | chunks p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    results = {(r["batch"], r["prompt_tokens"], r["who"]): r for r in book.of("result", WHAT)}
    traced = {(r["batch"], r["prompt_tokens"]): r["traces"] for r in book.of("result", TRACES)}
    for batch, prompt_tokens in sorted({key[:2] for key in results}):
        plain, ours = (results.get((batch, prompt_tokens, name)) for name in (PLAIN, OURS))
        turns = [*(plain["turns"] if plain else []), *(ours["turns"] if ours else [])]
        by_schedule = medians(turns)
        speeds = {name: speed([turn for turn in turns if turn["schedule"] == name]) for name in by_schedule}
        for schedule in (PLAIN, *SCHEDULES):
            numbers = by_schedule.get(schedule)
            if numbers is None:
                continue
            tokens_per_s, mark = speeds[schedule]
            ratio = tokens_per_s / speeds[PLAIN][0] if plain else None
            rows.append(
                f"| {batch} x {prompt_tokens:,} | {schedule} | {tokens_per_s:,.0f}{mark} | "
                f"{'' if ratio is None else f'{ratio:.2f}'} | {numbers['round_ms']:.1f} | {numbers['itl_p50_ms']:.1f}, "
                f"{numbers['itl_p99_ms']:.1f} | {numbers['chunk_gap_p99_ms']:.1f} |"
            )
        if ours:
            better, ratios = over_better(ours["turns"])
            verdict = "met" if is_met(ours["turns"]) else "MISSED"
            scene, spread = f"{batch} x {prompt_tokens:,}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            by_clock = over_better_by_clock(ours["turns"])
            notes.append(
                f"{scene}: auto {statistics.median(ratios):.3f} ({spread}, mean {statistics.fmean(ratios):.3f}) of "
                f"{better}, the better{'' if by_clock is None else f'; rounds alone {by_clock:.3f}'}: {verdict}"
            )
            notes += [f"{scene}, {schedule}: {text}" for schedule, text in host_notes(ours["turns"]).items()]
            if not is_forced(ours["turns"]):
                notes.append(f"{scene}: some rounds did not run by the schedule that was set")
            for schedule, trace in traced.get((batch, prompt_tokens), {}).items():
                notes.append(f"{scene}, {schedule}, traced: GPU idle {100 * trace['idle_share']:.1f} %")
    if any("*" in row for row in rows):
        notes.append("*: by the scheduler's clock; the client could not keep up")
    failures = [
        f"failure: {r['who']}, {r['batch']} x {r['prompt_tokens']:,}: {(r['reason'].splitlines() or [''])[0]}"
        for what in (WHAT, TRACES)
        for r in book.of("failure", what)
    ]
    return "\n".join(rows) + "\n\n" + "\n".join(notes + failures)


def is_met(turns: Sequence[dict[str, Any]]) -> bool:
    return is_forced(turns) and statistics.median(over_better(turns)[1]) >= OVER_BETTER


def main() -> int:
    began = time.monotonic()
    args = arguments()
    length = None if args.model else args.accept_length
    acceptance = "real" if args.model else f"SIMULATED, {length} tokens a round, bonus counted"
    options = [args.repeats, args.plain_repeats, length, args.spec_arg]
    book = open_book(args, options, {"acceptance": acceptance})
    code = MET
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(args, book, Allowance(args.max_minutes, began), target_of(args, folder))
        for contender in (PLAIN, OURS):
            try:
                if not bench.run(contender, folder):
                    code = TIME_IS_UP
                    break
            except FAILURES as error:
                print(f"{contender}: {error}", file=sys.stderr, flush=True)
                code = MISSED
    print(f"acceptance: {acceptance}\n")
    print(table(book))
    if code == TIME_IS_UP:
        print("\ntime is up; the same command goes on")
    if code:
        return code
    met = all(is_met(r["turns"]) for r in book.of("result", WHAT) if r["who"] == OURS)
    failed = book.of("failure", WHAT) + book.of("failure", TRACES)
    return MET if met and not failed else MISSED


if __name__ == "__main__":
    sys.exit(main())
