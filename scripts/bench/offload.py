"""A pool that holds a fraction of the demand: host memory for KV, SGLang that retracts, and SGLang that is careful.

    python scripts/bench/offload.py --shape qwen3-8b --simulate-accept-length 5    # an 80 GB card, about 6 minutes
    python scripts/bench/offload.py --model PATH                                  # a real model
    python scripts/bench/offload.py --tiny --seconds 20 --max-running 12          # CPU: shows that everything works

Three servers in turn, with the same model, pool and stream of requests: SPARSESPEC with host memory for KV, SGLang as
it is, and SGLang that reserves every request's whole output before it admits it (it knows `max_new_tokens`, which here
is the true length: it could not do better). A client keeps more requests waiting than may run; counted is what arrives
after `--ramp` seconds. Random weights accept nothing: `--simulate-accept-length` fixes the accept length, bonus
counted, for SPARSESPEC alone, and its output is then not the model's. Prints a table and one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import requests

from sglang_sparsespec.bench.client import watch
from sglang_sparsespec.bench.planner import SIMULATION
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, has_gpu
from sglang_sparsespec.bench.shapes import SHAPES, read_shape, write_shape

COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
METRIC = re.compile(r"^sglang:sparsespec_(\w+?)(?:_total)?\{.*?\} (\S+)$", flags=re.MULTILINE)
PLAIN_COPY_BYTES = 1 << 30
# requests beyond those that may run, so that somebody always waits
QUEUED = 16


class Contender(NamedTuple):
    """A server to measure."""

    name: str
    args: tuple[str, ...]
    env: dict[str, str | None]


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Those that were asked for, in that order."""
    # what the caller's shell left on would pass for real acceptance
    plain: dict[str, str | None] = dict.fromkeys(SIMULATION)
    if args.tiny:
        # threads that wait for each other cost a tiny model more than they save
        plain["OMP_NUM_THREADS"] = "1"
    simulated = plain
    if args.simulate_accept_length:
        values = (str(args.simulate_accept_length), "match-expected")
        simulated = plain | dict(zip(SIMULATION, values, strict=True))
    ours = ("--speculative-algorithm", "SPARSESPEC", *args.spec_arg)
    bold = ("--schedule-conservativeness", "0.1")
    known = {
        "host-memory": Contender(
            "sparsespec, host memory", (*ours, "--sparsespec-host-memory-gb", args.host_memory_gb), simulated
        ),
        "retract": Contender("sparsespec, retracts", (*ours, *bold, "--sparsespec-host-memory-gb", "0"), simulated),
        "stock": Contender("sglang", (), plain),
        "bold": Contender("sglang, bold", bold, plain),
        # reserves everything, always
        "careful": Contender(
            "sglang, careful",
            ("--schedule-conservativeness", "2"),
            plain | {"SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "1"},
        ),
    }
    return [known[name] for name in args.contenders]


class Request(NamedTuple):
    prompt: list[int]
    new_tokens: int


def load(args: argparse.Namespace, vocab: int) -> Any:
    """The stream of requests, the same for everybody."""
    rng = random.Random(args.seed)
    while True:
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(*args.prompt))]
        yield Request(prompt, rng.randint(*args.output))


def mean_tokens(args: argparse.Namespace) -> float:
    """Of a request at its end."""
    return (sum(args.prompt) + sum(args.output)) / 2


@dataclass
class Counts:
    """What has arrived so far."""

    tokens: int = 0
    finished: int = 0
    prefilled_tokens: int = 0
    """Prompts of which a token has come back."""
    marks: dict[str, Any] = field(default_factory=dict)


async def drive(server: Server, args: argparse.Namespace, vocab: int, mark: Any) -> Counts:
    """Send for `--seconds`; `mark(name, counts)` is called when the measured part begins and ends."""
    counts, stream = Counts(), load(args, vocab)

    async def client(session: aiohttp.ClientSession) -> None:
        while True:
            await one(session, next(stream))

    async def one(session: aiohttp.ClientSession, request: Request) -> None:
        sampling = {"temperature": args.temperature, "max_new_tokens": request.new_tokens, "ignore_eos": True}
        payload = {"input_ids": request.prompt, "sampling_params": sampling, "stream": True}
        known = 0
        async with session.post(server.url + "/generate", json=payload) as response:
            async for line in response.content:
                found = COMPLETION_TOKENS.search(line)
                if found is None:
                    if b'"error"' in line:
                        raise RuntimeError(f"a stream ended with {line[:500]!r}")
                    continue
                new = int(found[1])
                counts.prefilled_tokens += len(request.prompt) if known == 0 else 0
                counts.tokens += new - known
                known = new
        if known != request.new_tokens:
            raise RuntimeError(f"{known} tokens instead of {request.new_tokens}")
        counts.finished += 1

    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        tasks = [asyncio.create_task(client(session)) for _ in range(args.max_running + QUEUED)]
        for name, seconds in (("begin", args.ramp), ("end", args.seconds - args.ramp)):
            done, _ = await asyncio.wait(tasks, timeout=seconds)
            for task in done:
                task.result()
            await asyncio.to_thread(mark, name, counts)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    return counts


def own_metrics(server: Server) -> dict[str, float]:
    text = requests.get(server.url + "/metrics", timeout=60).text
    return {name: float(value) for name, value in METRIC.findall(text)}


def measure(contender: Contender, model: Path, args: argparse.Namespace, common: list[str], vocab: int) -> Any:
    began = time.monotonic()
    with Server(model, *common, *contender.args, env=contender.env, timeout_s=600, request_timeout_s=600) as server:
        ready_s = time.monotonic() - began
        # kernels compile on first use
        warm = {"temperature": args.temperature, "max_new_tokens": 24, "ignore_eos": True}
        server.generate({"input_ids": [1, 2, 3] * 20, "sampling_params": warm})
        log_start = len(server.log_text())
        at: dict[str, Any] = {}

        def mark(name: str, counts: Counts) -> None:
            at[name] = {
                "time": time.perf_counter(),
                "tokens": counts.tokens,
                "finished": counts.finished,
                "prefilled": counts.prefilled_tokens,
                "metrics": own_metrics(server),
                "log": server.log_text()[log_start:],
            }

        with watch(server) as loads:
            asyncio.run(drive(server, args, vocab, mark))
        server.check_alive("under load")
    begin, end = at["begin"], at["end"]
    seconds = end["time"] - begin["time"]
    samples = [s for s in loads if begin["time"] <= s.time <= end["time"] and s.total_tokens > 0]
    result = {
        "name": contender.name,
        "start_s": round(ready_s, 1),
        "seconds": round(seconds, 1),
        "tokens_per_s": round((end["tokens"] - begin["tokens"]) / seconds, 1),
        "finished": end["finished"] - begin["finished"],
        "pool_use": round(statistics.mean(s.used_tokens / s.total_tokens for s in samples), 4) if samples else None,
        "pool_tokens": samples[0].total_tokens if samples else None,
        **recomputed(end["log"], end["prefilled"]),
    }
    if end["metrics"].get("host_memory_limit_bytes"):
        result["moves"] = moves(begin["metrics"], end["metrics"])
    return result


def recomputed(log: str, prefilled_tokens: int) -> dict[str, int]:
    """Retractions in a server's log, and the tokens that were prefilled again for them.

    Args:
        prefilled_tokens: of prompts that have been answered with a token; a prompt that is on its way counts as
            computed again, so that the number is up to one prefill too high where anybody was retracted.
    """
    retracted = sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log)))
    retracted += sum(map(int, re.findall(r"SPARSESPEC: .*; retracting (\d+) request", log)))
    new_tokens = sum(map(int, re.findall(r"Prefill batch.*?#new-token: (\d+)", log)))
    return {"retracted": retracted, "reprefilled_tokens": max(0, new_tokens - prefilled_tokens) if retracted else 0}


def moves(begin: dict[str, float], end: dict[str, float]) -> dict[str, float | None]:
    """What moving cost between two readings of our metrics."""
    of = {name: value - begin.get(name, 0) for name, value in end.items()}

    def ratio(above: float, below: float) -> float | None:
        return round(above / below, 4) if below > 0 else None

    def speed(direction: str) -> float | None:
        return ratio(of[f"copied_{direction}_bytes"] / 1e9, of[f"copy_{direction}_seconds"])

    kinds = ("full_pool", "one_copy", "both_copies")
    mean = {kind: ratio(1e3 * of[f"{kind}_round_seconds"], of[f"{kind}_rounds"]) for kind in kinds}
    undisturbed = mean["full_pool"]
    added = added_share = None
    if undisturbed:
        total = sum(1e3 * of[f"{kind}_round_seconds"] for kind in kinds)
        added = sum(of[f"{kind}_rounds"] * ((mean[kind] or undisturbed) - undisturbed) for kind in kinds)
        added_share = ratio(added, total - added)
    return {
        "moves": of["offloads"],
        "gb_out": round(of["copied_out_bytes"] / 1e9, 3),
        "gb_in": round(of["copied_in_bytes"] / 1e9, 3),
        "lost_rounds_per_move": ratio(of["offload_lost_rounds"], of["offloads"]),
        "stalls": of["offload_stalls"],
        "refusals": of["offload_refusals"],
        "gb_per_s_out": speed("out"),
        "gb_per_s_in": speed("in"),
        **{f"ms_{kind}": mean[kind] for kind in kinds},
        **{f"rounds_{kind}": of[f"{kind}_rounds"] for kind in kinds},
        "added_time_average": added_share,
        "added_time_both_copies": ratio(mean["both_copies"] or 0, undisturbed or 0),
    }


def criteria(ours: dict[str, Any], plain_copy: dict[str, float] | None) -> dict[str, dict[str, Any]]:
    """What is asked of the feature, and what was found; `met` is None where this machine cannot say."""
    found = ours.get("moves", {})
    both = found.get("added_time_both_copies")
    checks: dict[str, tuple[float | None, float, bool]] = {
        "average pool use": (ours["pool_use"], 0.95, True),
        "re-prefilled tokens": (ours["reprefilled_tokens"], 0, False),
        "lost rounds per move": (found.get("lost_rounds_per_move"), 1, False),
        "added time, average": (found.get("added_time_average"), 0.01, False),
        "added time, rounds with copies both ways": (both - 1 if both else None, 0.04, False),
    }
    for direction in ("out", "in"):
        speed = found.get(f"gb_per_s_{direction}")
        share = speed / plain_copy[direction] if speed and plain_copy else None
        checks[f"copy {direction} over a plain pinned copy"] = (share, 0.8, True)
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": f"{'at least' if at_least else 'at most'} {bound}",
            "met": None if value is None else (value >= bound if at_least else value <= bound),
        }
        for name, (value, bound, at_least) in checks.items()
    }


def measure_plain_copy() -> dict[str, float]:
    """GB/s of one large copy between pinned memory and the card, each way; the best of five."""
    import torch

    host = torch.empty(PLAIN_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    card = torch.empty_like(host, device="cuda")
    speeds = {}
    for direction, target, source in (("out", host, card), ("in", card, host)):
        times = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(1e-3 * start.elapsed_time(end))
        speeds[direction] = PLAIN_COPY_BYTES / 1e9 / min(times[1:])
    return speeds


def plain_copy() -> dict[str, float] | None:
    """In a process of its own, so that its memory on the card is gone when the servers start."""
    if not has_gpu():
        return None
    command = [sys.executable, __file__, "--plain-copy-only"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| who | tokens/s | the first over it | finished | pool use | retracted | re-prefilled tokens |"]
    rows.append("|---|---|---|---|---|---|---|")
    for result in results:
        ratio = results[0]["tokens_per_s"] / result["tokens_per_s"] if result["tokens_per_s"] else float("nan")
        use = "-" if result["pool_use"] is None else f"{result['pool_use']:.3f}"
        rows.append(
            f"| {result['name']} | {result['tokens_per_s']} | {ratio:.2f} | {result['finished']} | {use} | "
            f"{result['retracted']} | {result['reprefilled_tokens']} |"
        )
    return "\n".join(rows)


def server_args(args: argparse.Namespace, pool_tokens: int) -> list[str]:
    """The same for everybody."""
    common = ["--max-running-requests", str(args.max_running), "--max-total-tokens", str(pool_tokens)]
    common += ["--enable-metrics", "--decode-log-interval", "5", "--skip-server-warmup", "--stream-interval", "16"]
    # with the radix cache, though prompts are random: without it, SGLang admits requests that ignore EOS by a plan of
    # who ends when, which it has of no other request, and nothing runs full
    if args.shape:
        common += ["--load-format", "dummy", "--skip-tokenizer-init"]
    if has_gpu():
        common += ["--disable-prefill-cuda-graph"]
        if "--attention-backend" not in " ".join(args.server_arg):
            # SGLang's own default depends on the card, and is one that SPARSESPEC may not serve
            common += ["--attention-backend", "flashinfer"]
    else:
        common += ["--dtype", "float32"]
    return common + args.server_arg


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path)
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights")
    what.add_argument("--tiny", action="store_true", help="a tiny random model, made on the fly")
    what.add_argument("--plain-copy-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--max-running", type=int, default=128)
    parser.add_argument("--prompt", type=int, nargs=2, metavar=("LOW", "HIGH"), help="tokens; default 256 768")
    parser.add_argument("--output", type=int, nargs=2, metavar=("LOW", "HIGH"), help="tokens; default 512 2560")
    parser.add_argument("--demand", type=float, default=2.5, help="tokens of all that may run, at their ends, in pools")
    parser.add_argument("--seconds", type=float, default=55, help="of traffic, per server")
    parser.add_argument("--ramp", type=float, help="seconds that do not count; default: a quarter")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--host-memory-gb", default="auto")
    parser.add_argument("--simulate-accept-length", type=float, help="for SPARSESPEC, bonus counted; 1 to k + 1")
    parser.add_argument("--server-arg", action="append", default=[], help="for all servers; repeat")
    parser.add_argument("--spec-arg", action="append", help="for SPARSESPEC; default on a GPU: fused verify; repeat")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=("host-memory", "retract", "stock", "bold", "careful"),
        default=["host-memory", "stock", "careful"],
        help="retract: SPARSESPEC without host memory, as bold as with it; bold: SGLang with the same admission. "
        "Each takes about two minutes. Default: host-memory stock careful",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the JSON document goes as well")
    args = parser.parse_args()
    args.prompt = args.prompt or ([8, 40] if args.tiny else [256, 768])
    args.output = args.output or ([20, 120] if args.tiny else [512, 2560])
    args.ramp = args.seconds / 4 if args.ramp is None else args.ramp
    if args.spec_arg is None:
        args.spec_arg = ["--sparsespec-verify-attention", "fused"] if has_gpu() else []
    if not (args.model or args.shape or args.tiny or args.plain_copy_only):
        parser.error("name what is served: --model PATH, --shape NAME or --tiny")
    if not 0 < args.ramp < args.seconds:
        parser.error(f"--ramp is {args.ramp}; it must be between 0 and --seconds ({args.seconds})")
    return args


def main() -> int:
    args = arguments()
    if args.plain_copy_only:
        print(json.dumps(measure_plain_copy()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            from sglang_sparsespec.model_tools.tiny import write_tiny_model

            args.model = write_tiny_model(Path(folder) / "tiny", context=1024)
        model = write_shape(args.shape, Path(folder) / args.shape) if args.shape else args.model
        pool_tokens = int(args.max_running * mean_tokens(args) / args.demand)
        common = server_args(args, pool_tokens)
        vocab = read_shape(model).vocab
        copy = plain_copy()
        results = []
        for contender in contenders(args):
            results.append(measure(contender, model, args, common, vocab))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    document = {
        **provenance(),
        "demand": args.demand,
        "pool_tokens_asked": pool_tokens,
        "server_args": common,
        "simulated_accept_length": args.simulate_accept_length,
        "plain_pinned_copy_gb_per_s": copy,
        "results": results,
        "criteria": next((criteria(result, copy) for result in results if "moves" in result), None),
    }
    print(table(results))
    for name, check in (document["criteria"] or {}).items():
        verdict = {True: "met", False: "MISSED", None: "not measured"}[check["met"]]
        print(f"{name}: {check['value']} ({check['bound']}): {verdict}")
    print(json.dumps(document))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
