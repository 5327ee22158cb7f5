"""What was measured as a Markdown table and as JSON lines."""

from __future__ import annotations

import math
import statistics
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.quality.measure import Quality, mean_and_error
from sglang_sparsespec.quality.settings import Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.quality.calibrate import Similarity

SHORT_NAMES = {
    "attention_ratio": "rho",
    "dense_below": "L0",
    "block_size": "B",
    "anchors": "anchors",
    "ffn_threshold": "tau",
    "moe_thresholds": "beta",
    "moe_top_k": "top-k",
    "dense_every": "dense every",
    "num_steps": "k",
}
# values that say that a rule is not in force
OFF = {"attention_ratio": 1.0, "ffn_threshold": 0.0, "dense_every": 0, "anchors": "every-layer"}


def setting_name(quality: Quality, ks: int) -> str:
    """What is left out, and how; `ks` is the number of different k among the rows."""
    parts = []
    for name, value in quality.setting.options().items():
        if value is None or value == OFF.get(name) or (name == "num_steps" and ks == 1):
            continue
        if name == "moe_thresholds":
            value = " ".join(f"{threshold:g}" for threshold in value)
        elif name == "anchors":
            value = Path(value).name
        parts.append(f"{SHORT_NAMES[name]} {value}")
    return ("dense" + "".join(f", {part}" for part in parts)) if quality.setting.is_dense else ", ".join(parts)


def table(found: Sequence[Quality]) -> str:
    """Markdown, a row a setting; a column of what was kept only where something was left out."""
    shares = [
        ("KV read", [quality.read_share for quality in found]),
        ("channels kept", [quality.channels_kept for quality in found]),
        ("experts kept", [quality.experts_kept for quality in found]),
    ]
    shares = [(name, values) for name, values in shares if name == "KV read" or min(values) < 1]
    header = ["setting", *(name for name, _ in shares), "KL, nats", "same argmax", "perplexity", "equal greedy tokens"]
    with_recall = bool(found[0].recalled)
    header += ["lines recalled"] if with_recall else []
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    ks = len({quality.setting.num_steps for quality in found})
    for number, quality in enumerate(found):
        cells = [setting_name(quality, ks), *(f"{values[number]:.1%}" for _, values in shares)]
        cells += [
            plus_minus(*mean_and_error(quality.kl), "{:.4f}"),
            plus_minus(*mean_and_error(quality.agreement), "{:.1%}"),
            _perplexity(quality),
            f"{plus_minus(*mean_and_error(quality.equal_prefix), '{:.1f}')} of {quality.own_tokens}",
        ]
        if with_recall:
            cells.append(plus_minus(*mean_and_error(quality.recalled), "{:.0%}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _perplexity(quality: Quality) -> str:
    value = math.exp(statistics.fmean(quality.nll))
    if quality.setting.is_dense:
        return f"{value:.2f}"
    excess, error = mean_and_error(quality.nll_excess)
    return f"{value:.2f} ({plus_minus(math.expm1(excess), math.exp(excess) * error, '{:+.1%}')})"


def plus_minus(value: float, error: float, form: str) -> str:
    text = form.format(value)
    return text if math.isnan(error) else f"{text} ± {form.replace('+', '').format(error)}"


def records(found: Sequence[Quality], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON object a setting."""
    return [
        {
            **about,
            **quality.setting.options(),
            "lossy": not quality.setting.is_dense,
            "read_share": round(quality.read_share, 4),
            "channels_kept": round(quality.channels_kept, 4),
            "experts_kept": round(quality.experts_kept, 4),
            "kl_by_text": [_round(value) for value in quality.kl],
            "kl_by_round": [_round(value) for value in quality.kl_by_round],
            "agreement_by_text": [round(value, 4) for value in quality.agreement],
            "nll_by_text": [round(value, 5) for value in quality.nll],
            "dense_nll_by_text": [round(value, 5) for value in quality.dense_nll],
            "equal_greedy_tokens_by_text": quality.equal_prefix,
            "recalled_by_haystack": [round(value, 4) for value in quality.recalled],
            "seconds": round(quality.seconds, 1),
        }
        for quality in found
    ]


def quality_of(record: dict[str, Any]) -> Quality:
    """What `records` wrote; the numbers are those that were rounded there."""
    given = {field.name: record[field.name] for field in fields(Setting) if record.get(field.name) is not None}
    if "moe_thresholds" in given:
        given["moe_thresholds"] = tuple(given["moe_thresholds"])
    return Quality(
        setting=Setting(**given),
        kl=record["kl_by_text"],
        kl_by_round=record["kl_by_round"],
        agreement=record["agreement_by_text"],
        nll=record["nll_by_text"],
        dense_nll=record["dense_nll_by_text"],
        equal_prefix=record["equal_greedy_tokens_by_text"],
        own_tokens=record["own_tokens"],
        recalled=record["recalled_by_haystack"],
        read_share=record["read_share"],
        channels_kept=record["channels_kept"],
        experts_kept=record["experts_kept"],
        seconds=record["seconds"],
    )


def _round(value: float) -> float:
    """Four significant digits; 0 stays 0."""
    return float(f"{value:.4g}")


def similarity_table(found: Similarity) -> str:
    """Markdown: how alike layers choose, by the distance between them."""
    num_layers = len(found.matrix)
    distances = [distance for distance in (1, 2, 4, 8, 16, 32) if distance < num_layers]
    header = ["layers apart", *map(str, distances), "by chance"]
    cells = ["Jaccard similarity", *(f"{found.at_distance(distance):.2f}" for distance in distances)]
    cells.append(f"{found.by_chance:.2f}")
    rows = (header, ["---"] * len(header), cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
