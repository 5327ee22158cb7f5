"""Acceptance of sparse drafts on a local Llama, Qwen or Mixtral checkpoint: which policy, which budget, which k.

    python -m sglang_sparsespec.acceptance MODEL
    python -m sglang_sparsespec.acceptance MODEL --selection pillar --score-pooling 0 8 --sharing head layer
    python -m sglang_sparsespec.acceptance MODEL --texts a.txt b.jsonl --length 8192 --weights-ms 8 --attention-ms 12

Options with several values are crossed. A table goes to the standard output; accept lengths count the bonus token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec import config as cfg
from sglang_sparsespec.acceptance import plot, report
from sglang_sparsespec.acceptance.settings import CAPTURES, Setting, cross
from sglang_sparsespec.acceptance.traces import SIGNALS
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.speculation.cost_model import RoundCost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sglang_sparsespec.acceptance.measure import Measurement

_DEFAULTS = cfg.SparseSpecConfig()
TEXTS = ("forced", "own")
# settings that are crossed: (field of the config or of Setting, type, choices, default)
CROSSED: tuple[tuple[str, type, Sequence[str] | None, list[Any]], ...] = (
    ("selection", str, cfg.SELECTIONS, ["pillar", "first-last", "window"]),
    ("num_steps", int, None, [_DEFAULTS.num_steps]),
    ("budget_ratio", float, None, [_DEFAULTS.budget_ratio]),
    ("min_budget", int, None, [_DEFAULTS.min_budget]),
    ("score_pooling", int, None, [_DEFAULTS.score_pooling]),
    ("granularity", str, cfg.GRANULARITIES, [_DEFAULTS.granularity]),
    ("sharing", str, cfg.SHARINGS, [_DEFAULTS.sharing]),
    ("recent_window", int, None, [_DEFAULTS.recent_window]),
    ("sink", int, None, [_DEFAULTS.sink]),
    ("capture", str, CAPTURES, ["policy"]),
    ("refresh_every", int, None, [1]),
    ("anchor_every", int, None, [1]),
    ("draft_ffn_threshold", float, None, [_DEFAULTS.draft_ffn_threshold]),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_sparsespec.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    workload = parser.add_argument_group("what is read")
    workload.add_argument("--texts", type=Path, nargs="+", help=".txt or .jsonl; default: Python's sources and manual")
    workload.add_argument("--text", nargs="+", choices=TEXTS, default=list(TEXTS), help="walk a given text, or the own")
    workload.add_argument("--requests", type=int, default=8, help="prompts, from the texts in turn (default: 8)")
    workload.add_argument(
        "--length", type=int, nargs="+", default=[2048], help="prompt tokens, in turn (default: 2048)"
    )
    workload.add_argument("--new-tokens", type=int, default=64, help="behind each prompt (default: 64)")
    workload.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], help="0 is greedy (default: 0 1)")
    workload.add_argument("--seed", type=int, default=0)
    crossed = parser.add_argument_group("settings, crossed; docs/configuration.md. oracle: for analysis only")
    for name, kind, choices, default in CROSSED:
        shown = " ".join(map(str, default))
        option = "--" + name.replace("_", "-")
        crossed.add_argument(option, type=kind, nargs="+", choices=choices, default=default, help=f"(default: {shown})")
    stopping = parser.add_argument_group("stopping a request's drafts early; a second table")
    stopping.add_argument(
        "--stop-confidence",
        type=float,
        nargs="+",
        default=[],
        metavar="P",
        help="no draft behind one below P; 0: never",
    )
    stopping.add_argument(
        "--stop-signal", nargs="+", choices=SIGNALS, default=["top1"], help="what is compared with P (default: top1)"
    )
    costs = parser.add_argument_group("cost model, for the best k; both W and A, in ms")
    costs.add_argument("--weights-ms", type=float, metavar="W", help="a plain decode step without attention")
    costs.add_argument("--attention-ms", type=float, metavar="A", help="the attention of a plain decode step")
    costs.add_argument("--verify-ms", type=float, metavar="V", help="a verify without attention (default: W)")
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    machine.add_argument("--dtype", default=None, help="float32 (default on cpu), bfloat16 (default on cuda), float16")
    machine.add_argument("--threads", type=int, help="of torch on a CPU")
    machine.add_argument("--output", type=Path, help="JSON lines, appended as settings are done")
    machine.add_argument("--traces", type=Path, help="JSON lines, appended: every round, draft by draft")
    machine.add_argument("--plot", type=Path, help="picture; needs matplotlib")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> RoundCost | None:
    """The cost model, if its times are given.

    Raises:
        ConfigError: for values that cannot be measured.
    """
    if (args.weights_ms is None) != (args.attention_ms is None):
        raise ConfigError(
            "--weights-ms and --attention-ms", "one alone", "given together", "Drop it, or add the other."
        )
    for name, low in (("requests", 1), ("new_tokens", 2), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"at least {low}", "Raise it.")
    if min(args.length) < 1:
        raise ConfigError("--length", min(args.length), "at least 1", "Raise it.")
    if min(args.temperature) < 0:
        raise ConfigError("--temperature", min(args.temperature), "0 or more", "0 is greedy.")
    if any(not 0 <= threshold <= 1 for threshold in args.stop_confidence):
        raise ConfigError("--stop-confidence", args.stop_confidence, "between 0 and 1", "It is a probability.")
    if args.plot is not None:
        plot.check_available()
    if args.weights_ms is None:
        return None
    return RoundCost(weights_ms=args.weights_ms, attention_ms=args.attention_ms, verify_ms=args.verify_ms)


def run(args: argparse.Namespace, settings: list[Setting]) -> Iterator[list[Measurement]]:
    """Load, prefill once, measure every setting on the same prompts; yields as settings are done."""
    import torch
    from transformers import AutoTokenizer

    from sglang_sparsespec.acceptance.measure import measure_forced, measure_own
    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.acceptance.rounds import prefill
    from sglang_sparsespec.model_tools.texts import builtin_texts, read_texts, token_windows

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    model = PagedModel(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    lengths = [args.length[i // 2 % len(args.length)] for i in range(args.requests)]
    # a forced walk ends in whole rounds; an own one may pass its end by a round, and drafts beyond that
    width = max(setting.config.num_draft_tokens for setting in settings)
    room = max(args.new_tokens, width) + 2 * width
    if max(lengths) + room > model.max_context:
        longest = model.max_context - room
        raise ConfigError("--length", max(lengths), f"at most {longest} for this model", "Its context ends there.")
    texts = read_texts(args.texts) if args.texts else builtin_texts()
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    windows = token_windows(tokenizer, texts, [length + room for length in lengths], args.seed)
    model.allocate(len(windows), max(lengths) + room)
    say(f"prefill of {len(windows)} prompts, {sum(lengths)} tokens")
    prompts = prefill(model, [window[:n] for window, n in zip(windows, lengths, strict=True)], keep=width)
    for number, setting in enumerate(settings, start=1):
        found: list[Measurement] = []
        if "forced" in args.text:
            found += measure_forced(model, setting, prompts, windows, args.temperature, new_tokens=args.new_tokens)
        if "own" in args.text:
            for temperature in args.temperature:
                found.append(
                    measure_own(model, setting, prompts, temperature, new_tokens=args.new_tokens, seed=args.seed)
                )
        for m in found:
            name = f"{report.TEXT_NAMES[m.text]}, {report.temperature_name(m.temperature)}"
            length = report.plus_minus(m.accept_length, m.standard_error)
            say(f"{number}/{len(settings)} {setting.config.selection}: {name}: {length} ({m.seconds:.0f} s)")
        yield found


def append(args: argparse.Namespace, found: Sequence[Measurement], cost: RoundCost | None) -> None:
    """Add to the output files, setting by setting: what is measured survives whatever ends the run."""
    origin = report.about(
        args.model, args.device, dtype=args.dtype, prompt_tokens=args.length, new_tokens=args.new_tokens
    )
    stopping = (args.stop_signal, args.stop_confidence)
    if args.output is not None:
        with args.output.open("a") as file:
            file.write(report.json_lines(report.records(found, cost, origin, stopping)))
    if args.traces is not None:
        with args.traces.open("a") as file:
            file.write(report.json_lines(report.trace_records(found, origin)))


def say(text: str) -> None:
    print(f"acceptance: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        cost = check(args)
        settings = cross({name: getattr(args, name) for name, *_ in CROSSED})
        measurements: list[Measurement] = []
        for found in run(args, settings):
            measurements += found
            append(args, found, cost)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    print(report.table(measurements, cost))
    if args.stop_confidence:
        print()
        print(report.stop_table(measurements, args.stop_signal, args.stop_confidence))
    if args.plot is not None:
        plot.draw(measurements, cost, args.plot)
    return 0
