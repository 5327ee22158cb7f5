"""Measurements as a Markdown table and as JSON lines."""

from __future__ import annotations

import datetime
import json
import math
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import sglang_sparsespec
from sglang_sparsespec.acceptance.channels import BATCH_SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.measure import Measurement
    from sglang_sparsespec.speculation.cost_model import RoundCost

TEXT_NAMES = {"forced": "given text", "own": "own text"}


def temperature_name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def varied_options(measurements: Sequence[Measurement]) -> list[str]:
    """Names of the options that tell the settings apart, the policy first."""
    options = [m.setting.options() for m in measurements]
    # an option that some policy ignores does not vary by that
    varied = [
        name for name in options[0] if len({o[name] for o in options if o[name] is not None}) > 1 or name == "selection"
    ]
    return varied


def setting_name(measurement: Measurement, varied: Sequence[str]) -> str:
    """Short name of a setting among others: the policy, and the options that vary."""
    options = measurement.setting.options()
    parts = [f"{name.replace('_', ' ')} {options[name]}" for name in varied[1:] if options[name] is not None]
    return ", ".join([options["selection"], *parts])


def positions_shown(num_steps: int) -> list[int]:
    """Draft positions of the table: powers of two and the last."""
    return sorted({*(1 << i for i in range(num_steps.bit_length()) if 1 << i <= num_steps), num_steps})


def table(measurements: Sequence[Measurement], cost: RoundCost | None) -> str:
    """Markdown; a block of rows for each text and temperature, its first row what the others are compared with."""
    varied = varied_options(measurements)
    positions = positions_shown(max(m.setting.config.num_steps for m in measurements))
    header = ["setting", "text", "sampling", "accept length", "against the first", *(f"j={j}" for j in positions)]
    header += ["rounds", "KV read"]
    has_channels = any(m.channels is not None for m in measurements)
    if has_channels:
        header += ["channels dropped", *(f"by all of {size} rows" for size in BATCH_SIZES if size > 1)]
    if cost is not None:
        header += ["speed-up at k", "best k", "speed-up at best k"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    first: dict[tuple[str, float], Measurement] = {}
    for m in sorted(measurements, key=lambda m: (m.text, m.temperature)):
        base = first.setdefault((m.text, m.temperature), m)
        gain, gain_error = m.gain_over(base)
        cells = [
            setting_name(m, varied),
            TEXT_NAMES[m.text],
            temperature_name(m.temperature),
            plus_minus(m.accept_length, m.standard_error),
            "" if m is base else plus_minus(gain, gain_error, signed=True),
            *(_rate(m.accept_rates, j) for j in positions),
            str(sum(m.rounds)),
            f"{m.read_share:.1%}",
        ]
        if has_channels:
            cells += _channel_cells(m)
        if cost is not None:
            cells += _cost_cells(m, cost)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stop_table(measurements: Sequence[Measurement], signals: Sequence[str], thresholds: Sequence[float]) -> str:
    """Markdown: what stopping a request below each threshold would have changed; `Trace.stopped`."""
    varied = varied_options(measurements)
    header = ["setting", "text", "sampling", "signal", "stop below", "drafts made", "accept length"]
    header += ["fallen drafts saved", "standing drafts lost"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for m in sorted(measurements, key=lambda m: (m.text, m.temperature)):
        for found in (m.trace.stopped(signal, threshold) for signal in signals for threshold in thresholds):
            cells = [setting_name(m, varied), TEXT_NAMES[m.text], temperature_name(m.temperature), found.signal]
            cells += [f"{found.threshold:g}", f"{found.drafts_made:.2f}", f"{found.accept_length:.2f}"]
            cells += [f"{found.saved:.0%}", f"{found.lost:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(accept_rates: Sequence[float], position: int) -> str:
    if position > len(accept_rates) or math.isnan(accept_rates[position - 1]):
        return "-"
    return f"{accept_rates[position - 1]:.2f}"


def _channel_cells(m: Measurement) -> list[str]:
    if m.channels is None:
        return ["-"] * len(BATCH_SIZES)
    by_all = [m.channels.by_all.get(size) for size in BATCH_SIZES if size > 1]
    return [f"{m.channels.dropped:.1%}", *("-" if share is None else f"{share:.1%}" for share in by_all)]


def _cost_cells(m: Measurement, cost: RoundCost) -> list[str]:
    if not m.setting.knows_cost:
        return ["-", "-", "-"]
    cost = m.setting.cost(cost)
    num_steps, speedup = cost.best_num_steps(m.mean_survival, m.read_share)
    at_k = cost.speedup(m.setting.config.num_steps, m.read_share, m.accept_length)
    return [f"{at_k:.2f}", str(num_steps), f"{speedup:.2f}"]


def plus_minus(value: float, error: float, *, signed: bool = False) -> str:
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text if math.isnan(error) else f"{text} ± {error:.2f}"


def records(
    measurements: Sequence[Measurement],
    cost: RoundCost | None,
    about: dict[str, Any],
    stopping: tuple[Sequence[str], Sequence[float]] = ((), ()),
) -> list[dict[str, Any]]:
    """One JSON object a measurement. `accept_length` counts the bonus token, `survival` and `accept_rates` do not.

    Args:
        stopping: signals and thresholds, as `stop_table` takes them.
    """
    found = []
    for m in measurements:
        record = {
            **about,
            **m.setting.options(),
            "text": m.text,
            "temperature": m.temperature,
            "accept_length": round(m.accept_length, 4),
            "standard_error": None if math.isnan(m.standard_error) else round(m.standard_error, 4),
            "accept_length_by_text": [round(length, 4) for length in m.accept_lengths],
            "accept_rates": [None if math.isnan(rate) else round(rate, 4) for rate in m.accept_rates],
            "survival": [round(rate, 4) for rate in m.mean_survival],
            "rounds_by_text": m.rounds,
            "read_share": round(m.read_share, 4),
            "seconds": round(m.seconds, 1),
        }
        if m.channels is not None:
            record["channels_dropped"] = round(m.channels.dropped, 4)
            record["channels_dropped_by_all"] = {size: round(share, 4) for size, share in m.channels.by_all.items()}
        if cost is not None and m.setting.knows_cost:
            best, speedup = m.setting.cost(cost).best_num_steps(m.mean_survival, m.read_share)
            record["best_num_steps"], record["speedup_at_best"] = best, round(speedup, 3)
        signals, thresholds = stopping
        if signals and thresholds:
            rules = (m.trace.stopped(signal, threshold) for signal in signals for threshold in thresholds)
            record["stopping"] = [
                {name: round(value, 4) if isinstance(value, float) else value for name, value in rule._asdict().items()}
                for rule in rules
            ]
        found.append(record)
    return found


def trace_records(measurements: Sequence[Measurement], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON object a measurement, round by round: `Trace.record` beside what it belongs to."""
    return [
        {
            **about,
            **m.setting.options(),
            "text": m.text,
            "temperature": m.temperature,
            "read_share": round(m.read_share, 4),
            **m.trace.record(),
        }
        for m in measurements
    ]


def json_lines(found: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in found)


def about(model: str, device: str, *, program: str = "sglang_sparsespec.acceptance", **measured: Any) -> dict[str, Any]:
    """Where numbers come from; `program` is the module whose command line this is."""
    import torch

    card = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "command": " ".join(["python -m", program, *sys.argv[1:]]),
        "model": model,
        "machine": card,
        "versions": {
            "sglang-sparsespec": sglang_sparsespec.__version__,
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
        },
        **measured,
    }
