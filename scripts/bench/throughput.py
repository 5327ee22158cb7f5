"""Decode throughput of SPARSESPEC beside the same server without it, in pairs.

    python scripts/bench/throughput.py --model PATH --batch 8 --length 2048

Both servers are up; they take turns. Prompts are in the radix cache before timing, so that a run is decoding and little
else. Prints tokens/s of each turn, medians, their ratio and the accept length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from prompts import token_prompts  # noqa: E402
from provenance import provenance  # noqa: E402

from tests.support.server import Server  # noqa: E402


def turn(server: Server, prompts: list[list[int]], new_tokens: int, temperature: float) -> tuple[float, float | None]:
    """Tokens per second of one batch, and its mean accept length."""

    def one(ids: list[int]) -> Any:
        sampling = {"temperature": temperature, "max_new_tokens": new_tokens, "ignore_eos": True}
        return server.generate({"input_ids": ids, "sampling_params": sampling})["meta_info"]

    started = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        metas = list(pool.map(one, prompts))
    seconds = time.monotonic() - started
    lengths = [meta["spec_accept_length"] for meta in metas if "spec_accept_length" in meta]
    return new_tokens * len(prompts) / seconds, statistics.fmean(lengths) if lengths else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeat")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC alone; repeat")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    prompts = token_prompts(AutoTokenizer.from_pretrained(args.model), [args.length] * args.batch)
    num_tokens = args.batch * (args.length + args.new_tokens + 128)
    common = [*args.server_arg, "--max-total-tokens", str(num_tokens), "--max-running-requests", str(args.batch)]
    spec_args = [*common, "--speculative-algorithm", "SPARSESPEC", *args.spec_arg]
    records: dict[str, list[float]] = {"plain": [], "sparsespec": []}
    with Server(args.model, *common, timeout_s=900) as plain, Server(args.model, *spec_args, timeout_s=900) as spec:
        servers = {"plain": plain, "sparsespec": spec}
        for server in servers.values():
            turn(server, prompts, 8, args.temperature)
        accept_length = None
        for _ in range(args.turns):
            for name, server in servers.items():
                speed, length = turn(server, prompts, args.new_tokens, args.temperature)
                accept_length = length or accept_length
                records[name].append(round(speed, 2))
                print(f"{name}: {speed:.2f} tokens/s", flush=True)
    medians = {name: statistics.median(speeds) for name, speeds in records.items()}
    result = {
        **provenance(),
        "batch": args.batch,
        "prompt_tokens": args.length,
        "new_tokens": args.new_tokens,
        "temperature": args.temperature,
        "tokens_per_s": records,
        "ratio_of_medians": round(medians["sparsespec"] / medians["plain"], 3),
        "accept_length": accept_length,
    }
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
