"""The Markdown page of a file of results: what ran, what did not and why, the table, and the cost model beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.cells import Skip, is_lossy_record
from sglang_sparsespec.bench.model_check import ModelCheck, check_all
from sglang_sparsespec.bench.summary import Row, current, rows
from sglang_sparsespec.bench.trace import NUM_ROUNDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sglang_sparsespec.bench.records import Record

COLUMNS = (
    "contender",
    "tokens/s",
    "spread",
    "over baseline",
    "over best plain",
    "accept length (bonus counted)",
    "ms per round",
    "ITL p50, ms",
    "ITL p99, ms",
    "gap p99, ms",
    "running",
    "pool tokens",
    "pool peak",
    "GPU GiB",
    "turns",
)

QUIET_LOAD = 1.3
"""Processes that want a core, per core: two servers of our own on two cores stay below."""
MODEL_COLUMNS = (
    *("cell", "W", "A", "k W", "k s A/u", "k o", "V", "verify A", "c A", "extra", "model", "measured"),
    *("speed-up: model", "speed-up: measured", "off"),
)


def markdown(records: Sequence[Record], more_skips: Iterable[Skip] = (), plots: Sequence[str] = ()) -> str:
    """The page. Speed-ups only where parity is green; everything else is said in words.

    Args:
        more_skips: besides those on file.
        plots: file names beside the page.
    """
    kept, others = current(records)
    if not kept:
        return "# Benchmark\n\nNothing has been measured yet.\n" + _skips(more_skips)
    found = rows(kept)
    lines = [f"# Benchmark: set {kept[-1]['set']}", "", *_provenance(kept[-1]["provenance"]), ""]
    if others:
        lines += [f"{others} records of other commits, versions or machines are in the file and not on this page.", ""]
    busiest = max((turn["result"].get("load_before") or 0.0 for row in found for turn in row.turns), default=0.0)
    if busiest > QUIET_LOAD:
        lines += [f"**The machine was not quiet**: up to {busiest:.1f} processes per core wanted to run.", ""]
    lines += [*_gates(kept), "", *_tables(found), *_losses(found)]
    checks, notes = check_all(found, kept[-1]["provenance"])
    lines += [*_model(checks, notes), *_traces(kept), *_failures(kept)]
    skips = [Skip(record["what"], record["reason"]) for record in kept if record["record"] == "skip"]
    text = "\n".join(lines) + _skips([*skips, *more_skips])
    if plots:
        text += "\n## Plots\n\n" + "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots) + "\n"
    return text


def _provenance(provenance: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    ranks = provenance.get("tp_size", 1)
    spread = "" if ranks == 1 else f", every server on {ranks} ranks (--tp-size {ranks})"
    driver = f", driver {provenance['driver']}" if provenance.get("driver") else ""
    return [
        f"{provenance['date']}, {provenance['machine']}{spread}{driver}, Python {provenance['python']}, {versions}, "
        f"commit {provenance['commit']}.",
        "",
        f"`{provenance['command']}`",
    ]


def _gates(records: Sequence[Record]) -> list[str]:
    gates = [record for record in records if record["record"] == "gate"]
    lines = ["## Parity gate", ""]
    if not gates:
        return [*lines, "No contender has been compared with the baseline yet, so no speed-up is given."]
    lines += ["| contender | on | verdict | identical | near-ties | diverged | equal tokens | tolerance, nats |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for gate in gates:
        verdict = "green" if gate["ok"] else "**RED**"
        if is_lossy_record(gate):
            verdict = "**LOSSY**, as asked"
        weights = "its own weights" if gate["has_weights"] else "random weights, simulation off"
        counts = f"{gate['identical']} of {gate['requests']} | {gate['near-tie']} | {gate['diverged']}"
        lines.append(
            f"| {gate['contender']} | {gate['target']}, {weights} | {verdict} | {counts} | "
            f"{gate['equal_share']:.0%} | {gate['tolerance']:g} |"
        )
    return lines


def scene_title(scene: dict[str, Any]) -> str:
    temperature = scene["temperature"]
    sampling = "greedy" if temperature == 0 else f"T={temperature:g}"
    if temperature and (scene["top_p"], scene["top_k"]) != (1.0, -1):
        sampling += f", top-p {scene['top_p']:g}, top-k {scene['top_k']}"
    at_most = "" if scene["ignore_eos"] else "at most "
    # written by versions that had full pools alone
    share = scene.get("pool_share", 1.0)
    pool = "" if share >= 1 else f", pool for {share:.0%} of it"
    tokens = f"{scene['prompt_tokens']} prompt + {at_most}{scene['new_tokens']} new"
    return f"batch {scene['batch']}, {tokens}, {sampling}{pool}"


def _tables(found: Sequence[Row]) -> list[str]:
    lines = []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.target, scene_title(row.scene), row.server), []).append(row)
    for (target, title, server), members in groups.items():
        simulated = {row.acceptance for row in members} - {"", "real"}
        note = "Acceptance **simulated**, random weights" if simulated else "Acceptance as the model gives it"
        where = f" Server: {server}." if server else ""
        lines += [f"## {target}: {title}", "", f"{note}.{where}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in members]
        refused = [row for row in members if row.refusal]
        lines += ["", *(f"No speed-up for {row.contender}: {row.refusal}." for row in refused)]
        limited = [row.contender for row in members if row.is_client_limited]
        if limited:
            lines.append(
                f"* {', '.join(limited)}: the stream reached the client over 5 % slower than the scheduler made it; "
                "ratios are by the scheduler's clock."
            )
        if refused or limited:
            lines.append("")
    return lines


def _losses(found: Sequence[Row]) -> list[str]:
    """Speculation that is slower than plain decoding, and ours where a rival is faster."""
    lines = ["## Where speculation loses", ""]
    given = [row for row in found if row.acceptance and row.ratio is not None]
    if not given:
        return [*lines, "No speed-up is given above, so nothing can be said.", ""]
    lost = []
    for row in given:
        rivals = [
            other
            for other in found
            if (other.target, other.scene, other.server) == (row.target, row.scene, row.server)
            and other.ratio is not None
            and not is_ours(other)
        ]
        best = max(rivals, key=lambda other: other.ratio or 0.0, default=None)
        assert row.ratio is not None
        words = [f"{row.ratio:.2f} times the baseline"] if row.ratio < 1 else []
        if is_ours(row) and best is not None and not best.is_baseline and row.ratio < (best.ratio or 0.0):
            words.append(f"{row.ratio:.2f} where {best.label} has {best.ratio:.2f}")
        if words:
            lost.append(f"* {row.target}, {scene_title(row.scene)}: {row.label}: {', and '.join(words)}")
    if not lost:
        return [*lines, "Nowhere on this page: no ratio is below 1, and no rival is ahead of ours.", ""]
    return [*lines, f"{len(lost)} of {len(given)} cells:", "", *lost, ""]


def is_ours(row: Row) -> bool:
    return "SPARSESPEC" in row.turns[0]["contender_args"]


def _cells(row: Row) -> list[str]:
    medians = row.medians
    used, size, memory = (medians[name] for name in ("pool_used_peak", "pool_size", "gpu_memory_bytes"))
    accept = _number(medians["accept_length"], ".2f")
    if row.acceptance.startswith("simulated"):
        accept += f" ({row.acceptance})"
    return [
        f"{row.label}" + (" (baseline)" if row.is_baseline else ""),
        f"{row.tokens_per_s:,.1f}" + ("*" if row.is_client_limited else ""),
        f"±{row.spread:.1%}",
        "refused" if row.refusal else _number(row.ratio, ".2f"),
        "refused" if row.refusal else _number(row.over_best_plain, ".2f"),
        accept,
        *(_number(medians[name], ".2f") for name in ("round_ms", "itl_p50_ms", "itl_p99_ms", "chunk_gap_p99_ms")),
        _number(medians["running"], ".0f"),
        _number(medians["pool_tokens"], ",.0f"),
        f"{used / size:.0%}" if used is not None and size else "-",
        _number(None if memory is None else memory / 2**30, ".1f"),
        str(len(row.turns)),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _model(checks: Sequence[ModelCheck], notes: Sequence[str]) -> list[str]:
    lines = ["## Cost model", ""]
    if checks:
        lines += [
            "ms. W and A are the plain server's in this run, at the contender's mean pool fill; terms off by more than "
            "20 % are named.",
            "",
            "| " + " | ".join(MODEL_COLUMNS) + " |",
            "|" + "---|" * len(MODEL_COLUMNS),
        ]
    for found in checks:
        terms = " | ".join(f"{value:.2f}" for value in found.model.terms().values())
        speedup = _number(found.measured_speedup, ".2f")
        lines.append(
            f"| {found.target}, {found.contender}, {scene_title(found.scene)} | {found.plain_weights:.2f} | "
            f"{found.plain_kv:.2f} | {terms} | {found.model.total:.2f} | {found.measured:.2f} | "
            f"{found.predicted_speedup:.2f} | {speedup} | {'; '.join(found.flags()) or '-'} |"
        )
    if checks:
        lines.append("")
    lines += [f"* {note}" for note in dict.fromkeys(notes)]
    return [*lines, ""] if notes else lines


def _traces(records: Sequence[Record]) -> list[str]:
    found = [record for record in records if record["record"] == "trace"]
    if not found:
        return []
    lines = ["## Rounds under the profiler", "", "GPU activity only; all kernels are in the records.", ""]
    lines += [
        "| target | contender | scene | rounds | ms | GPU idle | host, ms an iteration | "
        "waits of the host | what took most, ms |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for record in found:
        # records of versions that did not know
        host = (record.get("host") or {}).get("iteration_ms")
        waits = ", ".join(f"{name} {calls} x" for name, (calls, _) in record["waits_ms"].items()) or "none"
        most = ", ".join(f"{name} {spent:.1f}" for name, _, spent in record["kernels"][:4])
        lines.append(
            f"| {record['target']} | {record['contender']} | {scene_title(record['scene'])} | {NUM_ROUNDS} | "
            f"{record['span_ms']:.1f} | {100 * record['idle_share']:.2f}% | "
            f"{'-' if host is None else f'{host:.2f}'} | {waits} | {most} |"
        )
    return [*lines, ""]


def _failures(records: Sequence[Record]) -> list[str]:
    failed: dict[str, Record] = {}
    for record in records:
        if record["record"] == "failure":
            failed[f"{record['target']}, {record['contender']}, {scene_title(record['scene'])}"] = record
    if not failed:
        return []
    lines = ["## Failed", "", "These are tried again at the next call.", ""]
    return [*lines, *(f"* {title}: {record['reason'].splitlines()[0]}" for title, record in failed.items()), ""]


def _skips(skips: Iterable[Skip]) -> str:
    listed = list(dict.fromkeys(skips))
    if not listed:
        return ""
    return "\n## Skipped\n\n" + "".join(f"* {skip.what}: {skip.reason}\n" for skip in listed)
