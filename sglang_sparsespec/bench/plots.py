"""Plots of a file of results, as PNG files. Needs matplotlib (`pip install sglang-sparsespec[bench]`)."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.model_check import ModelCheck, check_all
from sglang_sparsespec.bench.report import scene_title
from sglang_sparsespec.bench.summary import Row, current, rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from sglang_sparsespec.bench.records import Record

MISSING = "matplotlib is not installed: pip install 'sglang-sparsespec[bench]'"
WIDTH, HEIGHT = 7.0, 4.2


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Sequence[Record], folder: Path) -> list[str]:
    """Write the plots that the records allow; returns their file names.

    A plot without two points on an axis, or without a speed-up that the parity gate allows, is left out.
    """
    pyplot = _pyplot()
    kept, _ = current(records)
    found = rows(kept)
    checks, _notes = check_all(found, kept[-1]["provenance"] if kept else {"machine": ""})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    figures = (
        *_lines_by(pyplot, found, "batch", "prompt_tokens"),
        *_lines_by(pyplot, found, "prompt_tokens", "batch"),
        *_speedups(pyplot, found),
        *_rounds(pyplot, checks),
    )
    for name, figure in figures:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        drawn.append(name)
    return drawn


def _pyplot() -> Any:
    """Without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _lines_by(pyplot: Any, found: Sequence[Row], axis: str, fixed: str) -> Iterable[tuple[str, Any]]:
    """Throughput over `axis`, one figure per target and value of `fixed`, one line per contender and temperature."""
    for target in dict.fromkeys(row.target for row in found):
        for value in sorted({row.scene[fixed] for row in found if row.target == target}):
            lines: dict[str, dict[int, float]] = {}
            members = [row for row in found if row.target == target and row.scene[fixed] == value]
            for row in members:
                # answers of another length, or another server's pool, are another line
                name = f"{row.label}, {row.scene['new_tokens']} new, {_temperature(row)}"
                if len({member.server for member in members}) > 1:
                    name += f", {row.server}"
                lines.setdefault(name, {})[row.scene[axis]] = row.tokens_per_s
            lines = {name: points for name, points in lines.items() if len(points) > 1}
            if not lines:
                continue
            figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
            for name, points in lines.items():
                axes.plot(sorted(points), [points[x] for x in sorted(points)], marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel({"batch": "requests at a time", "prompt_tokens": "prompt, tokens"}[axis])
            axes.set_ylabel("tokens/s")
            axes.set_title(f"{target}, {fixed.replace('_', ' ')} {value}")
            axes.legend(fontsize=7)
            yield f"throughput-{_slug(target)}-by-{axis.replace('_', '-')}-{value}.png", figure


def _speedups(pyplot: Any, found: Sequence[Row]) -> Iterable[tuple[str, Any]]:
    """Speed-up over the baseline by pool fill; only where the gate allows one."""
    for target in dict.fromkeys(row.target for row in found):
        figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in found:
            if row.target == target and not row.is_baseline and row.ratio is not None:
                name = f"{row.label}, batch {row.scene['batch']}, {_temperature(row)}"
                lines.setdefault(name, []).extend(speedup_by_fill(row, found))
        if not any(lines.values()):
            pyplot.close(figure)
            continue
        for name, points in lines.items():
            points.sort()
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("KV tokens of the running requests")
        axes.set_ylabel("tokens/s over the baseline's")
        axes.set_title(target)
        axes.legend(fontsize=7)
        yield f"speedup-{_slug(target)}-by-fill.png", figure


def speedup_by_fill(row: Row, found: Sequence[Row]) -> list[tuple[float, float]]:
    """(pool tokens, speed-up): one point for a cell with one fill, else one per slice at the fill of the slice."""
    baseline = next(
        (
            other
            for other in found
            if other.is_baseline and (other.target, other.scene, other.server) == (row.target, row.scene, row.server)
        ),
        None,
    )
    if baseline is None or row.ratio is None:
        return []
    if row.scene["num_slices"] == 1:
        return [(row.medians["pool_tokens"] or 0.0, row.ratio)]
    pair = row.turns[0]["pair"]
    plain = sorted(_points([turn for turn in baseline.turns if turn["pair"] == pair]))
    if not plain:
        return []
    return [
        (fill, speed / _interpolate(plain, fill))
        for fill, speed in _points(row.turns)
        if plain[0][0] <= fill <= plain[-1][0]
    ]


def _points(turns: Sequence[Record]) -> list[tuple[float, float]]:
    """(pool tokens, tokens/s) of each slice in order, medians over the turns."""
    return [
        (
            statistics.median(part["pool_tokens"] for part in parts),
            statistics.median(part["tokens_per_s"] for part in parts),
        )
        for parts in zip(*(turn["result"]["slices"] for turn in turns), strict=False)
    ]


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _rounds(pyplot: Any, checks: Sequence[ModelCheck]) -> Iterable[tuple[str, Any]]:
    """Bars per cell: what the card allows, and the model, stacked by term, and the measured round (in two parts where a
    sweep gives them)."""
    for target in dict.fromkeys(check.target for check in checks):
        cells = [check for check in checks if check.target == target]
        figure, axes = pyplot.subplots(figsize=(max(WIDTH, 1.9 * len(cells)), HEIGHT))
        bars = [(3.5 * i, check.roofline) for i, check in enumerate(cells) if check.roofline is not None]
        has_roofline = bool(bars)
        bars += [(3.5 * i + 1, check.model) for i, check in enumerate(cells)]
        bottoms = [0.0] * len(bars)
        for term in cells[0].model.terms():
            heights = [found.terms()[term] for _, found in bars]
            axes.bar([place for place, _ in bars], heights, bottom=bottoms, label=term.replace("_", " "), width=0.9)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        parts = [check.measured_terms or (check.measured, 0.0) for check in cells]
        places = [3.5 * i + 2 for i in range(len(cells))]
        axes.bar(places, [part[0] for part in parts], label="measured (fixed part)", color="dimgrey", width=0.9)
        axes.bar(
            places,
            [part[1] for part in parts],
            bottom=[part[0] for part in parts],
            label="measured (grows with the pool)",
            color="lightgrey",
            width=0.9,
        )
        axes.set_xticks([3.5 * i + 1 for i in range(len(cells))])
        axes.set_xticklabels(
            [f"{c.contender}\n{scene_title(c.scene).replace(', ', chr(10))}" for c in cells], fontsize=6
        )
        axes.set_ylabel("ms per round")
        order = "roofline, model, measured" if has_roofline else "model, measured; no roofline of this machine is known"
        axes.set_title(f"{target}: one round by term ({order})", fontsize=9)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        yield f"round-{_slug(target)}.png", figure


def _temperature(row: Row) -> str:
    return "greedy" if row.scene["temperature"] == 0 else f"T={row.scene['temperature']:g}"


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() or char in ".-" else "-" for char in name.lower())
