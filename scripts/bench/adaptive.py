"""Is the controller never slower? Its speed beside plain SGLang's and beside every fixed k, over loads and acceptances.

    python scripts/bench/adaptive.py cells --shape qwen3-1.7b --json cells.jsonl --max-minutes 9    # an 80 GB card
    python scripts/bench/adaptive.py load --shape qwen3-1.7b --json load.jsonl --plot load.png      # rises and falls
    python scripts/bench/adaptive.py cells load --model PATH       # real weights, real acceptance; both on two servers
    python scripts/bench/adaptive.py cells --tiny --batches 2 --contexts 64    # CPU: shows that everything works

Two servers are up, plain SGLang and SPARSESPEC with --sparsespec-adaptive (both scripts/bench/study_server.py), and one
of them runs at a time. **Acceptance is SIMULATED** without --model: each draft stands with the given probability if all
before it do.

A cell is a number of requests, their context and an acceptance. In it k is switched within one server, in turns, five
times over: the controller's k, then each fixed k. A turn's speed is the tokens that its rounds are expected to yield
over the time between their results: by the given rates or, with real acceptance, by how often drafts of each position
stood in all turns of the cell together (a turn of few rounds would compare luck). Plain decoding is measured right
before and right after the turns, by the same clock in its own scheduler, on the same prompts at two or three lengths
from where the turns begin to where they end at most; its time at a turn's pool is read off one line through these
points, and all are on file. The controller begins each cell without any knowledge; what it takes until it has settled
is reported apart.

With --json each cell, and in `load` each contender, is a line of that file as soon as it is measured, and the same
command goes on where it was: what is on file with the same machine, versions, commit, model and options is not measured
again. A cell that failed is on file with its reason, and tried again. The table is made from everything on file. Exit
code 0: all bounds are met; 1: one is not, or something failed; 3: --max-minutes were up before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from study_book import Allowance, Book
from study_cells import WHAT as CELL
from study_cells import cells_table, run_cells, wanted_cells
from study_client import FAILURES, PlainServer, Study
from study_load import WHAT as LOAD
from study_load import load_of, load_verdict, loads_table, plot_loads, run_loads
from study_server import COMMAND, CONTROL, PLAIN
from study_target import MET, MISSED, TIME_IS_UP, add_target, open_book, target_of

from sglang_sparsespec.bench.measure import PromptSource
from sglang_sparsespec.bench.planner import SIMULATION, SPARE_REQUESTS
from sglang_sparsespec.bench.server import Server, has_gpu

# what SGLang sets aside for the rest of each request before it admits another: requests of a study are told to say far
# more than they will, and are aborted
ADMISSION = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "512"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("cells", "load"))
    add_target(parser)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="the largest is the load's peak"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 16384])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="SIMULATED acceptance")
    parser.add_argument("--pool", type=int, help="tokens of KV of each server; default 240000, tiny 12000")
    parser.add_argument("--plain-tokens", type=int, help="plain decode steps at a length; default 48, tiny 24")
    parser.add_argument("--seconds", type=float, default=30, help="of load")
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeat")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC; repeat")
    parser.add_argument("--json", type=Path, help="JSON lines, one a cell or contender; the same command goes on")
    parser.add_argument("--max-minutes", type=float, help="stop in time and exit with 3; call again to go on")
    parser.add_argument("--plot", type=Path, help="of load over time")
    args = parser.parse_args()
    args.pool = args.pool or (12_000 if args.tiny else 240_000)
    args.plain_tokens = args.plain_tokens or (24 if args.tiny else 48)
    return args


def graph_sizes(what: list[str], batches: list[int]) -> list[int]:
    """Batches that graphs are captured for, ascending: those of the cells, and few enough to pad little under load."""
    found = set(batches) if "cells" in what else set()
    if "load" in what:
        peak = max(batches)
        powers = [1 << i for i in range(peak.bit_length())]
        found |= {size for power in powers for size in (power, 3 * power // 2) if size < peak} | {peak}
    return sorted(found)


def server_args(args: argparse.Namespace) -> list[str]:
    """The same for both."""
    # the spare: at its limit SGLang would let the last request of a batch wait for the first
    common = ["--max-running-requests", str(max(args.batches) + SPARE_REQUESTS)]
    common += ["--max-total-tokens", str(args.pool), "--skip-server-warmup", "--random-seed", "1"]
    common += ["--incremental-streaming-output"]
    if args.shape:
        common += ["--load-format", "dummy", "--skip-tokenizer-init"]
    if has_gpu():
        common += ["--disable-prefill-cuda-graph", "--attention-backend", "flashinfer", "--dtype", "bfloat16"]
        common += ["--cuda-graph-bs-decode", *map(str, graph_sizes(args.what, args.batches))]
    else:
        common += ["--dtype", "float32"]
    return common + args.server_arg


def spec_args(args: argparse.Namespace) -> list[str]:
    # a pool that overflows is another study (offload.py)
    without = ["--sparsespec-host-memory-gb", "0"]
    return ["--speculative-algorithm", "SPARSESPEC", "--sparsespec-adaptive", *without, *args.spec_arg]


def start(
    args: argparse.Namespace, model: Path, folder: Path, stack: contextlib.ExitStack
) -> tuple[PlainServer, Study]:
    """Both servers, up until the stack ends."""
    control, plain_control = folder / "control.json", folder / "plain.json"
    control.write_text("{}")
    # a simulation that the caller's shell left on would pass for real acceptance
    env: dict[str, str | None] = {**dict.fromkeys(SIMULATION), **ADMISSION}
    # each takes its part of what is free when it starts
    fractions = ("0.4", "0.8") if has_gpu() else ("0.5", "0.5")
    common: dict[str, Any] = {"command": COMMAND, "timeout_s": 600}
    plain_args = [*server_args(args), "--mem-fraction-static", fractions[0]]
    ours = [*server_args(args), *spec_args(args), "--mem-fraction-static", fractions[1]]
    # one after the other: each sizes its pool by what is free
    plain = stack.enter_context(Server(model, *plain_args, env={**env, PLAIN: str(plain_control)}, **common))
    study = stack.enter_context(Server(model, *ours, env={**env, CONTROL: str(control)}, **common))
    return PlainServer(plain, plain_control), Study(study, control)


def book_of(args: argparse.Namespace) -> Book:
    # not the batches: a cell is the same whatever other cells are asked for
    options = [args.pool, args.plain_tokens, args.server_arg, args.spec_arg]
    acceptance = "real" if args.model else "SIMULATED"
    return open_book(args, options, {"acceptance": acceptance, "server_args": [*server_args(args), *spec_args(args)]})


def is_complete(args: argparse.Namespace, book: Book, what: str) -> bool:
    """Whether nothing is left to measure, as far as one knows without a server."""
    if what == "cells":
        return all(book.has(cell) for cell in wanted_cells(args))
    # the k are the server's to say: all are there if the last one is, for failures are none
    names = {r["who"] for r in book.of("result", LOAD) if book.has(load_of(args, r["who"]))}
    return {"plain", "controller", "k=0"} <= names and not book.of("failure", LOAD)


def measure(args: argparse.Namespace, book: Book, time_left: Allowance) -> int:
    """What the file lacks. Exit code: MET, or why there is more to do."""
    runs = [{"cells": run_cells, "load": run_loads}[what] for what in args.what]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        target = target_of(args, folder)
        try:
            plain, study = start(args, Path(target.path), folder, stack)
            source = PromptSource(target)
            is_whole = all(run(args, book, time_left, plain, study, target, source) for run in runs)
        except FAILURES as error:
            # a dead server ends the call; what was measured is on file
            print(f"the call ends: {error}", file=sys.stderr, flush=True)
            return MISSED
    return MET if is_whole else TIME_IS_UP


def main() -> int:
    began = time.monotonic()
    args = arguments()
    book = book_of(args)
    is_whole = all(is_complete(args, book, what) for what in args.what)
    code = MET if is_whole else measure(args, book, Allowance(args.max_minutes, began))
    print(f"acceptance: {'real' if args.model else 'SIMULATED'}")
    for what in args.what:
        print("\n" + (cells_table(book) if what == "cells" else loads_table(book)))
    if args.plot and book.of("result", LOAD):
        plot_loads(book.of("result", LOAD), args.plot)
    if code == TIME_IS_UP:
        print("\ntime is up; the same command goes on")
    return code or (MET if all(is_met(book, what) for what in args.what) else MISSED)


def is_met(book: Book, what: str) -> bool:
    if what == "load":
        found = load_verdict(book.of("result", LOAD))
        return found is not None and found["met"] and not book.of("failure", LOAD)
    return all(cell["met"] for cell in book.of("result", CELL)) and not book.of("failure", CELL)


if __name__ == "__main__":
    sys.exit(main())
