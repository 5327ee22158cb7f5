"""From the records of a file to the rows of a table: medians, spreads, and speed-ups where the parity gate allows them.

Pure functions on records. A speed-up compares turns that were taken in turn with the same baseline server.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.cells import digest, is_lossy_record
from sglang_sparsespec.bench.window import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.records import Record

CLIENT_LIMIT = 0.05
"""Client and scheduler that disagree by more than this share: the stream was slower than the engine."""
TIMES = ("round_ms", "itl_p50_ms", "itl_p99_ms", "chunk_gap_p99_ms")
GAUGES = ("accept_length", "pool_tokens", "running", "pool_used_peak", "pool_size", "gpu_memory_bytes")


@dataclass(frozen=True)
class Row:
    """One cell: a contender on a target in a scene, over all its turns."""

    target: str
    contender: str
    label: str
    scene: dict[str, Any]
    acceptance: str
    is_baseline: bool
    turns: tuple[Record, ...]
    tokens_per_s: float
    spread: float
    medians: dict[str, float | None]
    is_client_limited: bool
    ratio: float | None
    """Tokens per second over the baseline's; None where it may not be given."""
    refusal: str = ""
    """Why there is no ratio."""
    over_best_plain: float | None = None
    """The same over the fastest plain backend of the scene."""

    @property
    def server(self) -> str:
        """The same for rows that were measured on servers with the same pool and limits."""
        return server_of(self.turns[0])


def current(records: Sequence[Record]) -> tuple[list[Record], int]:
    """The records of the latest run's context, and how many others there are (another commit, version or machine)."""
    if not records:
        return [], 0
    latest = records[-1]["context"]
    kept = [record for record in records if record["context"] == latest]
    return kept, len(records) - len(kept)


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per cell, in the order in which cells were first measured."""
    cells: dict[str, list[Record]] = {}
    for record in records:
        if record["record"] == "turn":
            cell = digest(record["target"], record["contender_args"], record["scene"], server_of(record))
            cells.setdefault(cell, []).append(record)
    gates = [record for record in records if record["record"] == "gate"]
    return _over_best_plain([_row(turns, records, gates) for turns in cells.values()])


def _row(turns: list[Record], records: Sequence[Record], gates: list[Record]) -> Row:
    first = turns[0]
    speeds = [turn["result"]["tokens_per_s"] for turn in turns]
    medians = {name: _median(turn["result"].get(name) for turn in turns) for name in (*TIMES, *GAUGES)}
    is_limited = any(client_lag(turn) > 1 for turn in turns)
    refusal = gate_refusal(first, gates)
    ratio = None
    if not refusal:
        baseline = [
            record
            for record in records
            if record["record"] == "turn"
            and record["is_baseline"]
            and (record["target"], record["scene"], server_of(record))
            == (first["target"], first["scene"], server_of(first))
            and (first["is_baseline"] or record["pair"] == first["pair"])
        ]
        # a turn that failed is missing on one side: other prompts, and the machine at another time
        shared = {turn["repeat"] for turn in turns} & {turn["repeat"] for turn in baseline}
        baseline = [turn for turn in baseline if turn["repeat"] in shared]
        ratio = _ratio([turn for turn in turns if turn["repeat"] in shared], baseline) if baseline else None
        refusal = "" if baseline else "the baseline has no turn of the same repeat yet"
    return Row(
        target=first["target"],
        contender=first["contender"],
        label=first["label"],
        scene=first["scene"],
        acceptance=_acceptance(first),
        is_baseline=first["is_baseline"],
        turns=tuple(turns),
        tokens_per_s=statistics.median(speeds),
        spread=spread(speeds),
        medians=medians,
        is_client_limited=is_limited,
        ratio=ratio,
        refusal=refusal,
    )


def server_of(turn: Record) -> str:
    """Pool and limits of the server: `--only` changes them, and a larger pool is another measurement."""
    args = turn.get("server_args", [])
    named = dict(itertools.pairwise(args))
    pool, running = (named.get(name) for name in ("--max-total-tokens", "--max-running-requests"))
    return "" if pool is None else f"pool of {int(pool):,} tokens, at most {running} running"


def gate_refusal(turn: Record, gates: Sequence[Record]) -> str:
    """Why a turn's speed-up may not be given; empty where it may. Plain backends need no gate: they are the rule."""
    if turn["acceptance"] == "none":
        return ""
    verdicts = [
        gate for gate in gates if gate["target"] == turn["gate_on"] and gate["contender_args"] == turn["contender_args"]
    ]
    if not verdicts:
        return f"no parity check on {turn['gate_on']} yet"
    # a lossy contender is compared, to show by how much it differs; it carries its label instead of a refusal
    if verdicts[-1]["ok"] or is_lossy_record(turn):
        return ""
    return f"parity on {turn['gate_on']} is red"


def _acceptance(turn: Record) -> str:
    if turn["simulated_accept_length"] is None:
        return "" if turn["acceptance"] == "none" else "real"
    return f"simulated, {turn['simulated_accept_length']:g}"


def client_lag(turn: Record) -> float:
    """Scheduler's rate over the client's where the stream was clearly slower than the engine, else 1."""
    result = turn["result"]
    lag = (result.get("scheduler_tokens_per_s") or 0.0) / result["tokens_per_s"]
    return lag if lag > 1 + CLIENT_LIMIT else 1.0


def _ratio(turns: Sequence[Record], baseline: Sequence[Record]) -> float:
    """By the client's clock; by the scheduler's where a client could not keep up.

    A contender without a rate of the scheduler's keeps the client's, which then is too low, never too high. Without one
    of the baseline both keep the client's.
    """
    by_scheduler = any(client_lag(turn) > 1 for turn in [*turns, *baseline])
    by_scheduler &= all(turn["result"].get("scheduler_tokens_per_s") for turn in baseline)

    def rate(turn: Record) -> float:
        result = turn["result"]
        return float((by_scheduler and result.get("scheduler_tokens_per_s")) or result["tokens_per_s"])

    return statistics.median(map(rate, turns)) / statistics.median(map(rate, baseline))


def _over_best_plain(found: list[Row]) -> list[Row]:
    """Plain backends are compared through the baseline, with which each of them took turns."""
    best: dict[str, float] = {}
    for row in found:
        if row.ratio is not None and not row.acceptance:
            key = digest(row.target, row.scene, row.server)
            best[key] = max(best.get(key, 0.0), row.ratio)
    done = []
    for row in found:
        top = best.get(digest(row.target, row.scene, row.server))
        over = row.ratio / top if row.ratio is not None and top else None
        done.append(Row(**{**vars(row), "over_best_plain": over}))
    return done


def _median(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
