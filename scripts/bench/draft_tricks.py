"""What drafts could save by leaving out channels and experts: products timed on this CPU, and arithmetic for a card.

    python scripts/bench/draft_tricks.py products --threads 1
    python scripts/bench/draft_tricks.py channels --share 0.1
    python scripts/bench/draft_tricks.py experts

`products` times the down projection of a decode step over the channels that a batch needs, gathered, beside the whole
one. `channels` and `experts` measure nothing: bytes over a card's bandwidth, by bench/cost_model.py. Each prints a
Markdown table; `--output` appends JSON lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.bench.cost_model import ROOFLINES, budget_share, round_time, speedup, step_times
from sglang_sparsespec.bench.shapes import SHAPES, ModelShape, shape_from_config

if TYPE_CHECKING:
    from collections.abc import Callable

# hidden and intermediate size, layers whose weights are read in turn so that none is found in a cache
PRODUCTS = {"smollm2-135m": (576, 1536, 30), "qwen3-8b": (4096, 12288, 4)}
BYTES = 2


def median_us(calls: list[Callable[[], object]], repeats: int) -> float:
    """Of one call, by the median of rounds over all of them."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    # the first round warms up
    return statistics.median(times[1:])


def products(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of x W^T over all channels, over those that are needed, and what finding and gathering costs of that."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = []
    for name, (hidden, intermediate, layers) in PRODUCTS.items():
        weights = [torch.randn(hidden, intermediate).bfloat16() for _ in range(layers)]
        # a copy with channels as rows, which a gather can take whole
        by_channel = [weight.t().contiguous() for weight in weights]
        for rows in args.rows:
            x = torch.randn(rows, intermediate).bfloat16()
            whole = median_us([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], args.repeats)
            for share in args.share:
                is_needed = torch.rand(intermediate) >= share
                needed = x * is_needed

                def by_columns(w: torch.Tensor, x: torch.Tensor = needed) -> torch.Tensor:
                    index = (x != 0).any(0).nonzero().squeeze(1)
                    return x.index_select(1, index) @ w.index_select(1, index).t()

                def by_rows(w: torch.Tensor, x: torch.Tensor = needed) -> torch.Tensor:
                    index = (x != 0).any(0).nonzero().squeeze(1)
                    return x.index_select(1, index) @ w.index_select(0, index)

                # a bound: as if the needed channels had lain together all along
                count = int(is_needed.sum())
                packed, x_packed = [w[:, :count].contiguous() for w in weights], x[:, :count].contiguous()
                ready = [lambda w=w, x=x_packed: torch.nn.functional.linear(x, w) for w in packed]
                found.append(
                    {
                        "shape": name,
                        "rows": rows,
                        "unneeded": share,
                        "whole_us": round(whole, 1),
                        "gathered_columns_us": round(
                            median_us([lambda w=w: by_columns(w) for w in weights], args.repeats), 1
                        ),
                        "gathered_rows_us": round(
                            median_us([lambda w=w: by_rows(w) for w in by_channel], args.repeats), 1
                        ),
                        "no_gather_us": round(median_us(ready, args.repeats), 1),
                    }
                )
    return found


def channels(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of a draft's weights that a down projection without unneeded channels does not read."""
    found = []
    for name in ("qwen3-1.7b", "qwen3-8b", "qwen3-14b"):
        shape = shape_from_config(SHAPES[name])
        down = shape.layers * shape.hidden * shape.intermediate
        read = shape.read_layer_params(1) + shape.head_params
        weights_ms, _ = step_times(shape, ROOFLINES["H100"], rows=1, pool_tokens=0, bytes_per_value=BYTES)
        for share in args.share:
            saved = share * down / read
            found.append(
                {
                    "shape": name,
                    "unneeded": share,
                    "down_share": round(down / read, 3),
                    "saved_share": round(saved, 3),
                    "h100_weights_ms": round(weights_ms, 2),
                    "h100_saved_ms": round(saved * weights_ms, 3),
                }
            )
    return found


def expert_round_ms(shape: ModelShape, num_experts: int, rows: int, pool_tokens: int, num_steps: int) -> dict[str, Any]:
    """A lockstep round on an H200 whose drafts visit `num_experts` experts per token."""
    card = ROOFLINES["H200"]

    def times(model: ModelShape, num_rows: int) -> tuple[float, float]:
        return step_times(model, card, rows=num_rows, pool_tokens=pool_tokens, bytes_per_value=BYTES)

    draft = dataclasses.replace(shape, experts_per_token=num_experts)
    draft_ms, kv_ms = times(draft, rows)
    plain_ms, _ = times(shape, rows)
    verify_ms, _ = times(shape, rows * (num_steps + 1))
    share = budget_share(pool_tokens / rows)
    cost = round_time(draft_ms, kv_ms, num_steps=num_steps, kv_share=share, verify_ms=verify_ms)
    return {
        "experts_read": round(draft.touched_experts(rows), 1),
        "draft_weights_ms": round(draft_ms, 2),
        "round_ms": cost.total,
        "plain_ms": plain_ms + kv_ms,
        "weights_and_kv_ms": (plain_ms, kv_ms),
    }


def experts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of Qwen3-30B-A3B with fewer experts in drafts: speed-up if acceptance stayed, and where it breaks even."""
    shape = shape_from_config(SHAPES["qwen3-30b-a3b"])
    found = []
    for rows in args.rows:
        full = expert_round_ms(shape, shape.experts_per_token, rows, args.pool, args.num_steps)
        for num_experts in args.experts:
            part = expert_round_ms(shape, num_experts, rows, args.pool, args.num_steps)
            weights_ms, kv_ms = part.pop("weights_and_kv_ms")
            gain = speedup(args.accept_length, weights_ms, kv_ms, part["round_ms"])
            found.append(
                {
                    "running": rows,
                    "draft_experts": num_experts,
                    **{key: round(value, 2) for key, value in part.items()},
                    "speedup_at_same_acceptance": round(gain, 2),
                    "break_even_accept_length": round(args.accept_length * part["round_ms"] / full["round_ms"], 2),
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(name.replace("_", " ") for name in found[0]) + " |", "|" + "---|" * len(found[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, function, text in (
        ("products", products, "time products on this CPU"),
        ("channels", channels, "arithmetic for dense models"),
        ("experts", experts, "arithmetic for a mixture of experts"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.set_defaults(function=function)
        kind.add_argument("--output", type=Path, help="JSON lines, appended")
        if name != "experts":
            default = [0.05, 0.25, 0.5, 0.75]
            kind.add_argument("--share", type=float, nargs="+", default=default, help="channels that no row needs")
        if name != "channels":
            running = [1, 8, 32, 128] if name == "products" else [8, 32, 128]
            kind.add_argument("--rows", type=int, nargs="+", default=running, help="requests of a step")
        if name == "products":
            kind.add_argument("--threads", type=int, default=1)
            kind.add_argument("--repeats", type=int, default=15)
        if name == "experts":
            kind.add_argument("--experts", type=int, nargs="+", default=[8, 6, 4, 2, 1], help="of a token in drafts")
            kind.add_argument("--pool", type=int, default=250_000, help="KV tokens in use")
            kind.add_argument("--num-steps", type=int, default=8)
            kind.add_argument("--accept-length", type=float, default=7.16, help="with all experts, bonus token counted")
    args = parser.parse_args()
    found = args.function(args)
    print(table(found))
    if args.output is not None:
        about = {
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
            "command": " ".join(["python scripts/bench/draft_tricks.py", *sys.argv[1:]]),
            "torch": torch.__version__,
            "source": f"CPU, {args.threads} threads" if args.kind == "products" else "arithmetic",
        }
        with args.output.open("a") as file:
            file.writelines(json.dumps({**about, **row}) + "\n" for row in found)


if __name__ == "__main__":
    main()
