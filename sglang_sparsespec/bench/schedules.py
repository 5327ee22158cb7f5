"""What lockstep and unified rounds should take, by the cost model, beside a lockstep whose drafts run without graphs.

    python -m sglang_sparsespec.bench.schedules                     # Qwen3-1.7B and 8B on an H100, batch 16 to 256
    python -m sglang_sparsespec.bench.schedules --card H200 --shapes qwen3-14b --eager-gap-ms 4

No server, no GPU: arithmetic on shapes and the constants of `speculation/cost_model.py`. A prediction.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.bench.contenders import SIMULATED_ACCEPT_LENGTHS
from sglang_sparsespec.bench.cost_model import products_s
from sglang_sparsespec.bench.sets import FILL_TOKENS, SCHEDULE_BATCHES
from sglang_sparsespec.bench.shapes import BYTES, SHAPES, shape_from_config
from sglang_sparsespec.config import SCHEDULES, SparseSpecConfig
from sglang_sparsespec.speculation.cost_model import ROOFLINES, RoundTerms, ServerCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.cost_model import Roofline
    from sglang_sparsespec.bench.shapes import ModelShape

LONGEST = 8192
EAGER_GAP_MS = 3.0
"""Between the kernels of a forward that is launched one by one, all of them together, where the device would wait: an
assumption for `naive`, of the order of 100 us a layer."""


class Row(NamedTuple):
    """One batch of one shape; milliseconds a round."""

    shape: str
    batch: int
    context: int
    lockstep: RoundTerms
    unified: RoundTerms
    naive_ms: float
    """Lockstep with `eager_gap_ms` more in every draft forward."""
    plain_ms: float
    """One decode step of the host."""


def server_cost(shape: ModelShape, card: Roofline, dtype: str = "bfloat16") -> ServerCost:
    """The model of a shape on one card, with the default budget."""
    defaults, size = SparseSpecConfig(), BYTES[dtype]
    return ServerCost(
        weights_ms=1e3 * products_s(shape, card, rows=1, bytes_per_value=size),
        row_ms=1e3 * 2 * (shape.active_layer_params + shape.head_params) / card.flops,
        kv_ms=1e3 * shape.kv_values_per_token * size / card.bandwidth,
        budget_ratio=defaults.budget_ratio,
        min_budget=defaults.min_budget,
    )


def predict(name: str, card: Roofline, batches: Sequence[int], eager_gap_ms: float) -> list[Row]:
    """Each batch with as much context as fills the pool of an 80 GB card, at most LONGEST."""
    shape, num_steps = shape_from_config(SHAPES[name]), SparseSpecConfig().num_steps
    cost = server_cost(shape, card)
    rows = []
    for batch in batches:
        context = min(LONGEST, FILL_TOKENS[name] // batch)
        lockstep, unified = (cost.terms(schedule, batch, batch * context, num_steps) for schedule in SCHEDULES[:2])
        plain = max(cost.weights_ms, batch * cost.row_ms) + batch * context * cost.kv_ms
        rows.append(Row(name, batch, context, lockstep, unified, lockstep.total + num_steps * eager_gap_ms, plain))
    return rows


def table(rows: Sequence[Row]) -> str:
    """In Markdown. Ratios are speeds: above 1, unified is the faster."""
    lines = [
        "| shape | batch x context | lockstep: products, KV, between, all, ms | "
        "unified: products, KV, between, all, ms | unified over lockstep | "
        "without `between` | over naive | lockstep over plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    length = SIMULATED_ACCEPT_LENGTHS["sparsespec"]
    for row in rows:
        parts = [", ".join(f"{ms:.1f}" for ms in (*terms, terms.total)) for terms in (row.lockstep, row.unified)]
        bare = sum(row.lockstep[:2]) / sum(row.unified[:2])
        lines.append(
            f"| {row.shape} | {row.batch} x {row.context:,} | {parts[0]} | {parts[1]} | "
            f"{row.lockstep.total / row.unified.total:.2f} | {bare:.2f} | {row.naive_ms / row.unified.total:.2f} | "
            f"{length * row.plain_ms / row.lockstep.total:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_sparsespec.bench.schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", choices=sorted(ROOFLINES), default="H100")
    parser.add_argument("--shapes", nargs="+", choices=sorted(FILL_TOKENS), default=["qwen3-1.7b", "qwen3-8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(SCHEDULE_BATCHES))
    parser.add_argument("--eager-gap-ms", type=float, default=EAGER_GAP_MS, help="of a draft forward without graphs")
    args = parser.parse_args(argv)
    card = ROOFLINES[args.card]
    print(table([row for name in args.shapes for row in predict(name, card, args.batches, args.eager_gap_ms)]))


if __name__ == "__main__":
    main()
