"""Do early stops, or a budget that follows the load, pay? From recorded rounds and the cost model; nothing is timed.

    python -m sglang_sparsespec.acceptance MODEL --num-steps 12 --new-tokens 160 --traces stop.jsonl
    python scripts/bench/draft_effort.py stop stop.jsonl
    python -m sglang_sparsespec.acceptance MODEL --budget-ratio 0.01 0.05 0.2 --min-budget 40 --traces budget.jsonl
    python scripts/bench/draft_effort.py budget budget.jsonl --default-ratio 0.05

A table goes to the standard output, rows to --output. docs/acceptance.md has the rule by which they were judged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.acceptance.effort import WAYS, Gain, Load, Machine, StopStudy, budget_gain
from sglang_sparsespec.acceptance.report import TEXT_NAMES, temperature_name
from sglang_sparsespec.acceptance.traces import Trace
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.speculation.budget import budget_tokens
from sglang_sparsespec.speculation.cost_model import RoundCost

if TYPE_CHECKING:
    from collections.abc import Sequence

# H100, docs/results.md: W, A, u and c of the 8B trace and its verify's products over 1,152 rows; for 1.7B W and A are
# the line through plain's steps at 128 x 530 and 128 x 2,800, a row is the card's roofline
MACHINES = {"8B": Machine(8.0, 47.0, 19.7, 0.83, 0.1), "1.7B": Machine(2.8, 38.0, 5.0, 0.83, 0.1)}
LOADS = ((1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 8192), (128, 530), (128, 2800))
THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# A over W, and V over W: a verify that reading weights limits, and one of 1,152 rows of the 8B
RATIOS, VERIFIES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0), (1.0, 2.8)
# a draft step reads what is new since the selection as well: half a round of it in the mean
TAIL = 5


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def default_share(context: int) -> float:
    config = SparseSpecConfig()
    budget = budget_tokens(context, ratio=config.budget_ratio, min_budget=config.min_budget)
    return min(1.0, (budget + TAIL) / context)


def drafts_read(record: dict[str, Any]) -> float:
    return min(1.0, round(record["read_share"] + TAIL / max(record["prompt_tokens"]), 4))


def cells(found: Gain) -> dict[str, Any]:
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in found._asdict().items()}


def stop_rows(records: Sequence[dict[str, Any]], max_steps: int | None) -> list[dict[str, Any]]:
    """A row for each text, temperature, machine, load and way."""
    rows = []
    for record in records:
        study = StopStudy(Trace.of_record(record), THRESHOLDS, max_steps)
        for name, machine in MACHINES.items():
            for batch, context in LOADS:
                load = Load(batch, context, default_share(context))
                for way in WAYS:
                    about = {"text": record["text"], "temperature": record["temperature"], "machine": name}
                    about |= {"batch": batch, "context": context, "way": way, "max_steps": study.max_steps}
                    rows.append(about | cells(study.gain(way, machine, load)))
    return rows


def budget_rows(records: Sequence[dict[str, Any]], default_ratio: float) -> list[dict[str, Any]]:
    """A row for each context, text, temperature, A over W, V over W, and budget: the one by load, and each fixed."""
    rows = []
    kinds = {(tuple(r["prompt_tokens"]), r["text"], r["temperature"]): None for r in records}
    for context, text, temperature in kinds:
        of_kind = [
            r
            for r in records
            if (tuple(r["prompt_tokens"]), r["text"], r["temperature"]) == (context, text, temperature)
        ]
        traces = {drafts_read(r): Trace.of_record(r) for r in of_kind}
        default = next(drafts_read(r) for r in of_kind if r["budget_ratio"] == default_ratio)
        for verify in VERIFIES:
            for ratio in RATIOS:
                cost = RoundCost(
                    weights_ms=1.0, attention_ms=ratio, verify_ms=verify, gather_efficiency=0.83, overhead_ms=0.0
                )
                about = {"context": max(context), "text": text, "temperature": temperature}
                about |= {"attention_over_weights": ratio, "verify_over_weights": verify, "default_share": default}
                for name, shares in [("by load", None), *((f"{share:.1%}", [share]) for share in traces)]:
                    rows.append(about | {"budget": name} | cells(budget_gain(cost, traces, default, shares)))
    return rows


def table(rows: Sequence[dict[str, Any]], by: Sequence[str], across: str) -> str:
    """Markdown: gains, a row for each value of `by`, a column for each of `across`; in brackets the best of all."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines = [
        "| " + " | ".join([*by, "over plain", *map(str, columns)]) + " |",
        "|" + "---|" * (len(by) + 1 + len(columns)),
    ]
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        of_key = [row for row in rows if tuple(row[name] for name in by) == key]
        shown = [f"{statistics.fmean(row['base_speedup'] for row in of_key if row[across] == columns[0]):.2f}"]
        for column in columns:
            cell = [row for row in of_key if row[across] == column]
            mean = statistics.fmean(row["gain"] for row in cell)
            # rows of a cell share texts, so their errors do not shrink together
            error = statistics.fmean(row["standard_error"] for row in cell)
            best = statistics.fmean(row["best_of_all"] for row in cell)
            shown.append(f"{mean:+.1%} ± {error:.1%} ({best:+.1%})")
        lines.append("| " + " | ".join([*map(str, key), *shown]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("stop", "budget"))
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--max-steps", type=int, help="of stop: the largest k (default: that of the traces)")
    parser.add_argument("--default-ratio", type=float, default=0.05, help="of budget: the setting to compare with")
    parser.add_argument("--text", choices=tuple(TEXT_NAMES), default="own")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    args = parser.parse_args(argv)
    records = [record for path in args.traces for record in read(path)]
    if args.question == "stop":
        rows = stop_rows(records, args.max_steps)
        by, across = ["machine", "batch", "context"], "way"
    else:
        rows = budget_rows(records, args.default_ratio)
        by, across = ["context", "verify_over_weights", "budget"], "attention_over_weights"
    if args.output is not None:
        with args.output.open("a") as file:
            file.write("".join(json.dumps({"question": args.question, **row}) + "\n" for row in rows))
    shown = [row for row in rows if row["text"] == args.text]
    sampled = ", ".join(temperature_name(t) for t in dict.fromkeys(row["temperature"] for row in shown))
    print(f"{TEXT_NAMES[args.text]}, mean of {sampled}\n\n{table(shown, by, across)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
