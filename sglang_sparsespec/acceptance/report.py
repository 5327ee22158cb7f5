"""Measurements as a Markdown table and as JSON lines."""

from __future__ import annotations

import datetime
import json
import math
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import sglang_sparsespec

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
        if cost is not None:
            cells += _cost_cells(m, cost)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(accept_rates: Sequence[float], position: int) -> str:
    if position > len(accept_rates) or math.isnan(accept_rates[position - 1]):
        return "-"
    return f"{accept_rates[position - 1]:.2f}"


def _cost_cells(m: Measurement, cost: RoundCost) -> list[str]:
    if not m.setting.knows_cost:
        return ["-", "-", "-"]
    num_steps, speedup = cost.best_num_steps(m.mean_survival, m.read_share)
    at_k = cost.speedup(m.setting.config.num_steps, m.read_share, m.accept_length)
    return [f"{at_k:.2f}", str(num_steps), f"{speedup:.2f}"]


def plus_minus(value: float, error: float, *, signed: bool = False) -> str:
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text if math.isnan(error) else f"{text} ± {error:.2f}"


def records(measurements: Sequence[Measurement], cost: RoundCost | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON object a measurement. `accept_length` counts the bonus token, `survival` and `accept_rates` do not."""
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
        if cost is not None and m.setting.knows_cost:
            best, speedup = cost.best_num_steps(m.mean_survival, m.read_share)
            record["best_num_steps"], record["speedup_at_best"] = best, round(speedup, 3)
        found.append(record)
    return found


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
