"""`python -m sglang_sparsespec.bench SET`: the command line, and what it makes before anything runs.

Exit codes: 0 everything is measured, 1 something failed or parity is red, 2 a refused argument, 3 time is up (call
again to go on).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench import plots
from sglang_sparsespec.bench.cells import Skip, Target
from sglang_sparsespec.bench.contenders import SIMULATED_ACCEPT_LENGTHS
from sglang_sparsespec.bench.machine import Machine, detect
from sglang_sparsespec.bench.planner import num_starts, predicted_s, side_by_side, together, turns
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.records import read_records
from sglang_sparsespec.bench.report import markdown
from sglang_sparsespec.bench.runner import Runner
from sglang_sparsespec.bench.sets import CPU_MIN_BUDGET, CPU_SETS, DEFAULT_SHAPES, SETS, Plan, Request, check
from sglang_sparsespec.bench.shapes import SHAPES, read_shape, write_shape
from sglang_sparsespec.bench.summary import current
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import evenly_spaced, write_anchors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.records import Record

FINISHED, FAILED, REFUSED, TIME_IS_UP = 0, 1, 2, 3
TINY_CONTEXT = 4096
CONTEXT = ("machine", "driver", "python", "versions", "commit", "sources", "tp_size")
"""Of the provenance: what decides numbers besides the cells themselves. Others are measured anew."""
TINY_MIN_BUDGET = "64"
NO_GATE = "anything (--no-gate)"
""" "no parity check on ... yet": of a job that is not compared."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m sglang_sparsespec.bench", description=__doc__.split("\n")[0])
    sets = "; ".join(f"{name}: {(build.__doc__ or 'a workload').splitlines()[0]}" for name, build in SETS.items())
    found.add_argument("set", choices=list(SETS), help=sets)
    found.add_argument("--model", type=Path, help="a local checkpoint for real acceptance (default: SmolLM2)")
    found.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16; on a CPU float32"
    )
    found.add_argument("--device", choices=("cpu",), help="leave the GPU out of account (smoke and cpu-table do)")
    found.add_argument(
        "--tp-size", type=int, choices=(1, 2, 4, 8), default=1, help="ranks of every server, the baseline's too"
    )
    found.add_argument("--out", type=Path, help="folder of results (default: bench-results/SET)")
    found.add_argument("--dry-run", action="store_true", help="list cells, skips and predicted minutes; start nothing")
    found.add_argument("--report", action="store_true", help="page and plots from what is on file; start nothing")
    found.add_argument(
        "--profile", action="store_true", help="trace some rounds of each SPARSESPEC server on a GPU, large batches"
    )
    found.add_argument("--max-minutes", type=float, help="stop in time and exit with 3; call again to go on")
    found.add_argument("--repeats", type=int, default=2, help="turns per cell (default: 2)")
    found.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=[],
        metavar="SHAPE",
        help=f"random weights: any of {', '.join(SHAPES)} (default: the set's)",
    )
    found.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="scenes with this in their name (--dry-run); repeat"
    )
    found.add_argument(
        "--no-gate",
        action="store_true",
        help="start no servers to compare output of random weights, which shows little; the page then gives no "
        "speed-ups for them, and the numbers are in results.jsonl",
    )
    found.add_argument(
        "--accept-length",
        action="append",
        default=[],
        metavar="WHO=N",
        help=f"simulated on random weights, bonus counted; WHO is one of {', '.join(SIMULATED_ACCEPT_LENGTHS)}; repeat",
    )
    found.add_argument("--eagle3-draft", help="draft model for EAGLE-3 on the real model")
    found.add_argument("--spec-arg", action="append", default=[], help="for every SPARSESPEC contender; repeat")
    found.add_argument(
        "--contender", action="append", default=[], metavar="NAME=OPTIONS", help="one more of ours; repeat"
    )
    found.add_argument("--prompts", type=Path, help="JSONL file of prompts, for paper and vegas")
    found.add_argument("--batch", type=int, help="requests at a time, for paper and vegas")
    found.add_argument("--new-tokens", type=int, help="longest answer, for paper and vegas")
    found.add_argument("--requests", type=int, help="requests in all, for paper and vegas (default: twice the batch)")
    return found


def _run(args: argparse.Namespace) -> int:
    out = args.out or Path("bench-results") / args.set
    machine = detect("cpu" if args.set in CPU_SETS else args.device, args.tp_size)
    request = build_request(args, machine, out)
    check(args.set, request)
    plan = only(SETS[args.set](machine, request), args.only)
    if args.no_gate:
        plan = without_gates(plan)
    path = out / "results.jsonl"
    if args.report:
        return _report(path, out)
    facts = {**provenance(use_gpu=machine.has_gpu), "tp_size": machine.tp_size}
    context = {name: facts[name] for name in CONTEXT}
    runner = Runner(
        args.set,
        plan.jobs,
        machine,
        out,
        records=read_records(path),
        provenance=facts,
        context=context,
        profile=args.profile,
        max_s=None if args.max_minutes is None else 60 * args.max_minutes,
    )
    if args.dry_run:
        print(dry_run(plan, machine, runner, context))
        return FINISHED
    print(dry_run(plan, machine, runner, context, cells=False), flush=True)
    runner.note_skips(plan.skips)
    done = runner.run() if plan.jobs else True
    code = _report(path, out)
    if runner.is_out_of_time:
        print(f"time is up; {len(runner.pending)} turns are left. The same command goes on.")
        return TIME_IS_UP
    return code if done else FAILED


def build_request(args: argparse.Namespace, machine: Machine, out: Path) -> Request:
    """Models and options from the command line.

    Raises:
        ConfigError: for a model, a number or an accept length that cannot be.
    """
    for option, value in (
        ("--repeats", args.repeats),
        ("--max-minutes", args.max_minutes),
        ("--batch", args.batch),
        ("--new-tokens", args.new_tokens),
        ("--requests", args.requests),
    ):
        if value is not None and value <= 0:
            raise ConfigError(option, value, "more than 0", "Leave it out to get the default.")
    if args.prompts and not args.prompts.is_file():
        raise ConfigError("--prompts", str(args.prompts), "a JSONL file", "Check the path.")
    if args.profile and not machine.has_gpu:
        here = f"set {args.set} leaves a GPU out of account" if args.set in CPU_SETS else "there is no GPU here"
        raise ConfigError("--profile", True, f"left out: {here}", "It traces what the GPU does in a round.")
    dtype = args.dtype or ("bfloat16" if machine.has_gpu else "float32")
    needs_model = args.set not in ("smoke",)
    if args.model and not needs_model:
        raise ConfigError("--model", str(args.model), "left out with set smoke", "It makes a tiny model of its own.")
    spec_args = tuple(args.spec_arg)
    tiny = None
    if args.set == "smoke":
        tiny = tiny_target(out / "models" / "tiny", args.dtype or "float32")
        spec_args = ("--sparsespec-min-budget", TINY_MIN_BUDGET, *spec_args)
    if args.set == "cpu-table":
        spec_args = (*CPU_MIN_BUDGET, *spec_args)
    model = real_target(args.model, dtype) if needs_model else None
    shapes = args.shapes or DEFAULT_SHAPES.get(args.set, ())
    no_model = Request.no_model
    if model is not None and not model.shape.splits_over(machine.tp_size):
        no_model = f"the heads of {model.name} ({model.shape.heads}, KV {model.shape.kv_heads}) do not split over "
        no_model += f"{machine.tp_size} ranks; --model PATH names another one"
        model = None
    return Request(
        model=model,
        no_model=no_model,
        shapes=tuple(shape_target(name, out / "models" / name, dtype) for name in shapes),
        shapes_given=tuple(args.shapes),
        anchors={name: anchors_file(name, out / "models" / name) for name in shapes if args.set == "lossy"},
        tiny=tiny,
        eagle3_draft=args.eagle3_draft,
        spec_args=spec_args,
        named=tuple(args.contender),
        accept_lengths=accept_lengths(args.accept_length),
        accept_lengths_given=tuple(text.partition("=")[0] for text in args.accept_length),
        repeats=args.repeats,
        prompts=str(args.prompts.resolve()) if args.prompts else "",
        batch=args.batch,
        new_tokens=args.new_tokens,
        requests=args.requests,
    )


def only(plan: Plan, texts: Sequence[str]) -> Plan:
    """The scenes whose name contains one of `texts`; all of them where there is none.

    Raises:
        ConfigError: if a text is in no scene's name.
    """
    names = {f"{job.target.name}: {scene}": (job, scene) for job in plan.jobs for scene in job.scenes}
    for text in texts:
        if plan.jobs and not any(text in name for name in names):
            raise ConfigError("--only", text, f"part of one of: {'; '.join(names)}", "Look at --dry-run.")
    if not texts:
        return plan
    kept = [value for name, value in names.items() if any(text in name for text in texts)]
    jobs = [dataclasses.replace(job, scenes=tuple(scene for of, scene in kept if of is job)) for job in plan.jobs]
    return Plan(tuple(job for job in jobs if job.scenes), plan.skips)


def without_gates(plan: Plan) -> Plan:
    """No gate on random weights, each of which is a server of its own."""
    jobs = [job if job.target.has_weights else dataclasses.replace(job, gate_on=NO_GATE) for job in plan.jobs]
    return Plan(tuple(jobs), plan.skips)


def accept_lengths(given: Sequence[str]) -> dict[str, float]:
    """Raises ConfigError for what is not WHO=N with a known WHO and an N of at least 1."""
    found = dict(SIMULATED_ACCEPT_LENGTHS)
    for text in given:
        name, _, value = text.partition("=")
        try:
            length = float(value)
        except ValueError:
            length = 0.0
        if name not in found or not length >= 1:
            allowed = f"WHO=N with WHO one of {', '.join(found)} and N at least 1"
            raise ConfigError("--accept-length", text, allowed, "N counts the bonus token.")
        found[name] = length
    return found


def real_target(path: Path | None, dtype: str) -> Target | None:
    """The model that was named, else the one that quickstart made, else None."""
    from sglang_sparsespec.model_tools import smollm2

    if path is None:
        path = smollm2.default_cache() / "models" / smollm2.MODEL_NAME
        if not (path / "config.json").is_file():
            return None
    path = path.resolve()
    return Target(path.name, str(path), dtype, read_shape(path))


def shape_target(name: str, folder: Path, dtype: str) -> Target:
    # a few hundred bytes: written even for a dry run, which reads the shape from it
    return Target(name, str(write_shape(name, folder).resolve()), dtype, read_shape(folder), has_weights=False)


def anchors_file(name: str, folder: Path) -> str:
    """One layer in four, at equal distances: a shape has no weights to calibrate on, and the file says so.

    Relative as the folder is: the path stands among the server's arguments, which are part of a turn's key.
    """
    path = folder / "anchors-evenly-spaced.json"
    num_layers = SHAPES[name]["num_hidden_layers"]
    anchors = evenly_spaced(num_layers, num_layers // 4)
    write_anchors(path, model=SHAPES[name], block_size=SparseSpecConfig().verify_block_size, anchors=anchors)
    return str(path)


def tiny_target(folder: Path, dtype: str) -> Target:
    """The random model of set smoke, complete or made anew."""
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    if not (folder / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        write_tiny_model(partial, dtype=dtype, context=TINY_CONTEXT)
        partial.rename(folder)
    return Target("tiny-qwen3", str(folder.resolve()), dtype, read_shape(folder))


def dry_run(plan: Plan, machine: Machine, runner: Runner, context: dict[str, Any], *, cells: bool = True) -> str:
    """What would run, in the terminal."""
    pending = runner.pending
    keys = {turn.key for turn in pending}
    lines = []
    for job in plan.jobs:
        order = "one server at a time, in turn"
        if together(job, machine):
            order = "all servers up, taking turns"
        elif side_by_side(job, machine):
            order = "taking turns with the baseline"
        own = turns(job, machine, context)
        left = sum(turn.key in keys for turn in own)
        lines.append(
            f"{job.target.name}: {len(job.contenders)} contenders, {len(job.scenes)} scenes, {job.repeats} repeats, "
            f"{order}; {num_starts(job, machine)} server starts, {left} of {len(own)} turns left; "
            f"parity gate on {job.gate_on}"
        )
        if cells:
            lines += [f"  {contender.name}: {contender.label}" for contender in job.contenders]
            lines += [f"  {scene}" for scene in job.scenes]
    lines += [f"skipped: {skip.what}: {skip.reason}" for skip in plan.skips]
    starts = sum(num_starts(job, machine) for job in plan.jobs)
    minutes = predicted_s(plan.jobs, machine, pending) / 60
    lines.append(
        f"{starts} server starts in all; about {minutes:.0f} minutes for the {len(pending)} turns that are left"
    )
    return "\n".join(lines)


def _report(path: Path, out: Path) -> int:
    """Write the page and the plots; FAILED if something failed or parity is red."""
    records = read_records(path)
    drawn: list[str] = []
    skipped = []
    if plots.is_available():
        drawn = plots.draw(records, out)
    else:
        skipped.append(Skip("plots", plots.MISSING))
    page = markdown(records, skipped, drawn)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(page)
    print(page)
    print(f"written: {out / 'report.md'}, {len(drawn)} plots; records: {path}")
    return FAILED if _has_failed(records) else FINISHED


def _has_failed(records: Sequence[Record]) -> bool:
    return any(record["record"] == "failure" or not record.get("ok", True) for record in current(records)[0])
