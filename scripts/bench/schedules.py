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
(`sglang_sparsespec/bench/window.py`). With --profile a few rounds of each schedule are traced after the turns
(`sglang_sparsespec/bench/trace.py`). With --json a scene is on file as soon as a server is through with it, and the
same command goes on where it was. Exit code 0: `auto` is within 3 % of the better schedule everywhere; 1: it is not, or
something failed; 3: --max-minutes were up before the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_book import Allowance
from study_client import DEATH_S, FAILURES, write_control
from study_rounds import LinesFile
from study_server import COMMAND, CONTROL, schedules_file
from study_target import MET, MISSED, TIME_IS_UP, add_target, open_book, target_of

from sglang_sparsespec.bench import contenders as who
from sglang_sparsespec.bench.cells import Job, Scene
from sglang_sparsespec.bench.client import run_requests
from sglang_sparsespec.bench.machine import detect
from sglang_sparsespec.bench.measure import PromptSource, summarise
from sglang_sparsespec.bench.planner import common_args, environment
from sglang_sparsespec.bench.server import Server
from sglang_sparsespec.bench.sets import FILL_TOKENS, SCHEDULE_BATCHES, fill_tokens
from sglang_sparsespec.bench.trace import record
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
WHAT = "scene"
LONGEST = 8192
# of a real model's prompts, whose context is short
REAL_PROMPT_TOKENS = 2048
# seconds of a turn before one was measured, and of the prefill of all prompts
FIRST_TURN_S, FIRST_PREFILL_S = 15.0, 20.0
TOP_KERNELS = 12
TURN = ("tokens_per_s", "accept_length", "round_ms", "itl_p50_ms", "itl_p99_ms", "chunk_gap_p99_ms", "pool_tokens")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=list(SCHEDULE_BATCHES))
    parser.add_argument("--new-tokens", type=int, help="of an answer; default 384, tiny 96")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each schedule; two thirds as many of plain")
    parser.add_argument("--accept-length", type=float, default=who.SIMULATED_ACCEPT_LENGTHS[OURS], help="SIMULATED")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC; repeat")
    parser.add_argument("--profile", action="store_true", help="trace both schedules in every scene; a GPU")
    parser.add_argument("--json", type=Path, help="JSON lines; the same command goes on")
    parser.add_argument("--max-minutes", type=float, help="stop in time and exit with 3; call again to go on")
    args = parser.parse_args(argv)
    args.new_tokens = args.new_tokens or (96 if args.tiny else 384)
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


def turns_of(name: str, repeats: int) -> list[tuple[int, str]]:
    """(repeat, schedule) of each turn on a server, in order."""
    if name == PLAIN:
        return [(repeat, PLAIN) for repeat in range(max(1, round(2 * repeats / 3)))]
    return [(repeat, schedule) for repeat in range(repeats) for schedule in order_of(repeat)]


class Bench:
    """Loads on one server after another."""

    def __init__(self, args: argparse.Namespace, book: Book, time_left: Allowance, target: Target) -> None:
        self.args, self.book, self.time_left, self.target = args, book, time_left, target
        self.machine = detect()
        self.source = PromptSource(target)
        self.scenes = scenes_of(args, target, self.machine)
        [ours] = who.sparsespec(self.machine, ("pillar",), args.accept_length, tuple(args.spec_arg), SCHEDULES[2:])
        self.contenders = {PLAIN: who.plain(self.machine)[0][0], OURS: ours}
        self._slowest_s = 0.0

    def thing(self, name: str, scene: Scene) -> dict[str, Any]:
        shown = {"batch": scene.batch, "prompt_tokens": scene.prompt_tokens, "new_tokens": scene.new_tokens}
        return {"what": WHAT, "who": name, **shown}

    def is_done(self, name: str) -> bool:
        return all(self.book.has(self.thing(name, scene)) for scene in self.scenes)

    def run(self, name: str, folder: Path) -> bool:
        """All scenes on one server; False where time was up before the end.

        Raises:
            ServerError: the server died, or did not start.
        """
        if self.is_done(name):
            return True
        contender = self.contenders[name]
        job = Job(self.target, tuple(self.contenders.values()), tuple(self.scenes), 1, "")
        args = [*common_args(job, self.machine), *contender.args]
        env = environment(self.target, contender, self.machine)
        control = folder / f"{name}.json"
        write_control(control, {})
        options: dict[str, Any] = {"timeout_s": 600}
        if name == OURS:
            options["command"] = COMMAND
            env[CONTROL] = str(control)
        sizes = [str(size) for size in sorted(set(self.args.batches))]
        with Server(str(self.target.path), *args, "--cuda-graph-bs-decode", *sizes, env=env, **options) as server:
            for scene in self.scenes:
                if self.book.has(self.thing(name, scene)):
                    continue
                turns = turns_of(name, self.args.repeats)
                predicted_s = 1.3 * (1 + len(turns)) * (self._slowest_s or FIRST_TURN_S) + FIRST_PREFILL_S
                if not self.time_left.allows(predicted_s):
                    return False
                try:
                    found = self._scene(server, scene, control, turns)
                    traces = self._traces(server, scene, control) if name == OURS and self.args.profile else {}
                except (NoSteadyStateError, *FAILURES) as error:
                    self.book.note_failure(self.thing(name, scene), error)
                    time.sleep(DEATH_S)
                    server.check_alive("at the failure")
                    continue
                self.book.note("result", self.thing(name, scene), {"turns": found, "traces": traces})
                print(describe(name, scene, found), file=sys.stderr, flush=True)
        return True

    def _scene(
        self, server: Server, scene: Scene, control: Path, turns: Sequence[tuple[int, str]]
    ) -> list[dict[str, Any]]:
        server.flush_cache()
        prompts = self.source.prompts(scene, seed=0)
        # prefills, compiles, and shows `auto` both schedules
        write_control(control, {})
        self._load(server, scene, prompts)
        found = []
        for repeat, schedule in turns:
            write_control(control, {"schedule": schedule if schedule in SCHEDULES[:2] else None})
            found.append({"schedule": schedule, "repeat": repeat, **self._turn(server, scene, prompts, control)})
        return found

    def _turn(self, server: Server, scene: Scene, prompts: list[list[int]], control: Path) -> dict[str, Any]:
        rounds = LinesFile(schedules_file(control))
        rounds.new()
        began = time.monotonic()
        numbers = summarise(self._load(server, scene, prompts), [], scene)
        self._slowest_s = max(self._slowest_s, time.monotonic() - began)
        turn = {key: numbers[key] for key in TURN}
        ran = [schedule for num_reqs, _, schedule in rounds.new() if num_reqs == scene.batch]
        return {**turn, "rounds": {schedule: ran.count(schedule) for schedule in SCHEDULES[:2]}}

    def _traces(self, server: Server, scene: Scene, control: Path) -> dict[str, Any]:
        found = {}
        for schedule in SCHEDULES[:2]:
            write_control(control, {"schedule": schedule})
            path = record(server, self.source, scene, control.parent, keeps_cache=True)
            found[schedule] = summarise_trace(path, TOP_KERNELS)
            path.unlink()
        return found

    def _load(self, server: Server, scene: Scene, prompts: list[list[int]]) -> Any:
        return run_requests(
            server.url, prompts, scene.sampling, concurrency=scene.batch, timeout_s=server.request_timeout_s
        )


def describe(name: str, scene: Scene, turns: Sequence[dict[str, Any]]) -> str:
    speeds = ", ".join(f"{who} {numbers['tokens_per_s']:,.0f}" for who, numbers in medians(turns).items())
    return f"{scene.batch} x {scene.prompt_tokens}, {name}: {speeds} tokens/s"


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each schedule's turns, number by number; what was not measured is left out."""
    found: dict[str, dict[str, float]] = {}
    for schedule in dict.fromkeys(turn["schedule"] for turn in turns):
        mine = [turn for turn in turns if turn["schedule"] == schedule]
        found[schedule] = {
            key: statistics.median(turn[key] for turn in mine)
            for key in TURN
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
    for batch, prompt_tokens in sorted({key[:2] for key in results}):
        plain, ours = (results.get((batch, prompt_tokens, name)) for name in (PLAIN, OURS))
        speeds = {**medians(plain["turns"] if plain else []), **medians(ours["turns"] if ours else [])}
        for schedule in (PLAIN, *SCHEDULES):
            numbers = speeds.get(schedule)
            if numbers is None:
                continue
            ratio = numbers["tokens_per_s"] / speeds[PLAIN]["tokens_per_s"] if plain else None
            rows.append(
                f"| {batch} x {prompt_tokens:,} | {schedule} | {numbers['tokens_per_s']:,.0f} | "
                f"{'' if ratio is None else f'{ratio:.2f}'} | {numbers['round_ms']:.1f} | {numbers['itl_p50_ms']:.1f}, "
                f"{numbers['itl_p99_ms']:.1f} | {numbers['chunk_gap_p99_ms']:.1f} |"
            )
        if ours:
            better, ratios = over_better(ours["turns"])
            verdict = "met" if is_met(ours["turns"]) else "MISSED"
            scene, spread = f"{batch} x {prompt_tokens:,}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            notes.append(f"{scene}: auto {statistics.median(ratios):.3f} ({spread}) of {better}, the better: {verdict}")
            if not is_forced(ours["turns"]):
                notes.append(f"{scene}: some rounds did not run by the schedule that was set")
            for schedule, trace in ours["traces"].items():
                host = trace["host"] or {}
                notes.append(
                    f"{scene}, {schedule}, traced: the host's own time {host.get('iteration_ms')} ms a round, "
                    f"{host.get('forward_ms')} a forward; GPU idle {100 * trace['idle_share']:.1f} %"
                )
    failures = [
        f"failure: {r['who']}, {r['batch']} x {r['prompt_tokens']:,}: {(r['reason'].splitlines() or [''])[0]}"
        for r in book.of("failure", WHAT)
    ]
    return "\n".join(rows) + "\n\n" + "\n".join(notes + failures)


def is_met(turns: Sequence[dict[str, Any]]) -> bool:
    return is_forced(turns) and statistics.median(over_better(turns)[1]) >= OVER_BETTER


def main() -> int:
    began = time.monotonic()
    args = arguments()
    length = None if args.model else args.accept_length
    acceptance = "real" if args.model else f"SIMULATED, {length} tokens a round, bonus counted"
    book = open_book(args, [args.repeats, length, args.spec_arg], {"acceptance": acceptance})
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
                print(f"the call ends: {error}", file=sys.stderr, flush=True)
                code = MISSED
                break
    print(f"acceptance: {acceptance}\n")
    print(table(book))
    if code == TIME_IS_UP:
        print("\ntime is up; the same command goes on")
    if code:
        return code
    met = all(is_met(r["turns"]) for r in book.of("result", WHAT) if r["who"] == OURS)
    return MET if met and not book.of("failure", WHAT) else MISSED


if __name__ == "__main__":
    sys.exit(main())
