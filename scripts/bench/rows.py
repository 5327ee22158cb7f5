"""Rows per matrix product over time, in both schedules: a plot and a table.

    python scripts/bench/rows.py --shape qwen3-8b --plot rows.png    # a GPU; random weights, SIMULATED acceptance
    python scripts/bench/rows.py --model PATH                        # real weights, real acceptance
    python scripts/bench/rows.py --tiny --batch 16                   # CPU: its times mean nothing, its rows do

One server after another (with --together both start at a time, and answer one after the other); each answers the same
requests, all at once, and every forward of its rounds is written down (scripts/bench/rows_server.py). What is shown
begins when all requests decode.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rows_server import ROWS
from study_target import add_target, target_of

from sglang_sparsespec.bench import measure
from sglang_sparsespec.bench.cells import RESERVE_TOKENS, Scene
from sglang_sparsespec.bench.client import run_requests
from sglang_sparsespec.bench.planner import SIMULATION
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, has_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROWS_SERVER = [sys.executable, str(Path(__file__).resolve().parent / "rows_server.py")]
SCHEDULES = ("lockstep", "unified")
# of the forwards with as many rows as the batch asks for, the middle half: all requests decode there
STEADY = (0.25, 0.75)


class Forward(NamedTuple):
    """One forward as the server wrote it down."""

    start_ms: float
    took_ms: float
    rows: int
    kind: str


def steady(forwards: Sequence[Forward]) -> list[Forward]:
    """The middle of the longest stretch at the batch's full size."""
    full = {kind: max(f.rows for f in forwards if f.kind == kind) for kind in {f.kind for f in forwards}}
    stretches: list[list[Forward]] = [[]]
    for forward in forwards:
        if forward.rows == full[forward.kind]:
            stretches[-1].append(forward)
        elif stretches[-1]:
            stretches.append([])
    longest = max(stretches, key=len)
    return longest[int(STEADY[0] * len(longest)) : int(STEADY[1] * len(longest))]


def summary(forwards: Sequence[Forward]) -> dict[str, Any]:
    """Rows of a forward, and how uneven they are over time."""
    rows = [forward.rows for forward in forwards]
    took = sum(forward.took_ms for forward in forwards)
    return {
        "forwards": len(rows),
        "rows": dict(sorted({forward.kind: forward.rows for forward in forwards}.items())),
        "rows_mean": round(statistics.fmean(rows), 1),
        "rows_highest_over_mean": round(max(rows) / statistics.fmean(rows), 2),
        "share_of_time_in_the_highest": round(
            sum(f.took_ms for f in forwards if f.rows == max(rows)) / took if took else 0.0, 3
        ),
    }


def plot(found: dict[str, list[Forward]], path: Path, span: int, *, by_time: bool) -> None:
    """Rows over time, or over forwards where time is not worth showing; one panel per schedule, `span` of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(found), 1, figsize=(9, 2.4 * len(found)), sharex=True, sharey=True, squeeze=False
    )
    for axis, (schedule, forwards) in zip(axes[:, 0], found.items(), strict=True):
        shown = forwards[:span]
        for number, forward in enumerate(shown):
            axis.bar(
                forward.start_ms - shown[0].start_ms if by_time else number,
                forward.rows,
                width=forward.took_ms if by_time else 0.9,
                align="edge",
                color="tab:orange" if "verify" in forward.kind else "tab:blue",
            )
        axis.set(ylabel="rows", title=schedule)
    axes[-1, 0].set(xlabel="ms" if by_time else "forward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def watched(
    model: Path, schedule: str, args: argparse.Namespace, prompts: Sequence[Sequence[int]]
) -> Iterator[Callable[[], list[Forward]]]:
    """A server by one schedule; what it yields serves the prompts and returns every forward, in order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        env: dict[str, str | None] = dict.fromkeys(SIMULATION)
        if args.model is None:
            env |= {"SGLANG_SIMULATE_ACC_LEN": str(args.accept_length)}
        fixed = "--no-sparsespec-adaptive"
        ours = ["--speculative-algorithm", "SPARSESPEC", fixed, "--sparsespec-schedule", schedule]
        ours += ["--sparsespec-verify-attention", "fused", "--max-running-requests", str(args.batch)]
        # on a CPU the server would take the machine's memory
        longest = max(map(len, prompts)) + args.new_tokens + RESERVE_TOKENS
        ours += ["--max-total-tokens", str(args.batch * longest)]
        ours += ["--skip-server-warmup", "--incremental-streaming-output"]
        if args.shape:
            ours += ["--load-format", "dummy", "--skip-tokenizer-init"]
        ours += ["--cuda-graph-bs-decode", str(args.batch), "--dtype", "bfloat16" if has_gpu() else "float32"]

        def serve() -> list[Forward]:
            sampling = {"temperature": 0.0, "max_new_tokens": args.new_tokens, "ignore_eos": True}
            run_requests(server.url, prompts, sampling, concurrency=len(prompts), timeout_s=900)
            return [Forward(*json.loads(line)) for line in file.read_text().splitlines()]

        with Server(
            model, *ours, *args.server_arg, env={**env, ROWS: str(file)}, command=ROWS_SERVER, timeout_s=600
        ) as server:
            yield serve


def watch_all(model: Path, args: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> dict[str, list[Forward]]:
    """Every forward by each schedule. Servers that are up together never work at the same time."""
    servers = {schedule: watched(model, schedule, args, prompts) for schedule in SCHEDULES}
    found = {}
    if not args.together:
        for schedule, server in servers.items():
            with server as serve:
                found[schedule] = serve()
        return found
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(stack.enter_context, server) for server in servers.values()]
        # whoever still starts would be in the way
        serves = [start.result() for start in starts]
        found = {schedule: serve() for schedule, serve in zip(servers, serves, strict=True)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target(parser)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--accept-length", type=float, default=7.16, help="SIMULATED, bonus token counted")
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeat")
    parser.add_argument("--together", action="store_true", help="start both servers at a time (a big GPU)")
    parser.add_argument("--json", type=Path, help="JSON lines: one per schedule, with every forward that is shown")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--span", type=int, default=36, help="forwards in the plot and in the JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = target_of(args, Path(folder))
        scene = Scene(args.batch, args.context, args.new_tokens)
        prompts = measure.PromptSource(target).prompts(scene, seed=0)
        watched_all = watch_all(Path(target.path), args, prompts)
        found = {schedule: steady(forwards) for schedule, forwards in watched_all.items()}
    print("| schedule | rows of a forward, by kind | mean | highest over mean | share of time in the highest |")
    print("|---|---|---|---|---|")
    lines = []
    for schedule, forwards in found.items():
        result = summary(forwards)
        rows = ", ".join(f"{kind} {count:,}" for kind, count in result["rows"].items())
        print(
            f"| {schedule} | {rows} | {result['rows_mean']:,} | {result['rows_highest_over_mean']} | "
            f"{result['share_of_time_in_the_highest']:.0%} |"
        )
        shown = [list(forward) for forward in forwards[: args.span]]
        lines.append({**provenance(), "schedule": schedule, "batch": args.batch, **result, "shown": shown})
    if args.json:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.plot:
        plot(found, args.plot, args.span, by_time=has_gpu())
    return 0


if __name__ == "__main__":
    sys.exit(main())
