"""Accept length of several SPARSESPEC configurations on the same real prompts, greedy and sampled.

    python scripts/bench/acceptance.py --model PATH --case default= --case paper="--sparsespec-score-pooling 0"

One server per case, a few at a time; every number is the mean over requests of completion tokens per verify (bonus
counted), with its standard error. Drafts condition on text that the model goes on with by itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_sparsespec.bench.prompts import token_prompts
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, has_gpu

SAMPLINGS = {"greedy": {"temperature": 0}, "T=0.6": {"temperature": 0.6}, "T=1": {"temperature": 1.0}}


def measure(args: argparse.Namespace, prompts: list[list[int]], name: str, options: str) -> dict[str, Any]:
    num_tokens = args.concurrency * (max(args.length) + args.new_tokens + 128)
    server_args = ["--max-total-tokens", str(num_tokens), "--max-running-requests", str(args.concurrency)]
    if not has_gpu():
        # by itself SGLang takes a float32 checkpoint down to bf16
        server_args += ["--dtype", "float32"]
    # the last one of an option counts
    server_args += ["--speculative-algorithm", "SPARSESPEC", *args.server_arg, *shlex.split(options)]
    record: dict[str, Any] = {"case": name, "options": options}
    with Server(args.model, *server_args, timeout_s=900, request_timeout_s=3600) as server:
        for sampling_name in args.sampling:

            def one(ids: list[int], sampling: dict[str, Any] = SAMPLINGS[sampling_name]) -> float:
                params = {**sampling, "max_new_tokens": args.new_tokens, "ignore_eos": True}
                response = server.generate({"input_ids": ids, "sampling_params": params})
                return float(response["meta_info"]["spec_accept_length"])

            with ThreadPoolExecutor(args.concurrency) as pool:
                lengths = list(pool.map(one, prompts))
            record[sampling_name] = {
                "accept_length": round(statistics.fmean(lengths), 3),
                "standard_error": round(statistics.stdev(lengths) / len(lengths) ** 0.5, 3),
                "per_prompt": [round(length, 3) for length in lengths],
            }
    print(json.dumps({key: value for key, value in record.items() if key != "options"}), flush=True)
    return record


def table(records: list[dict[str, Any]], samplings: list[str]) -> str:
    lines = ["| case | options | " + " | ".join(samplings) + " |", "|---|---|" + "---|" * len(samplings)]
    for record in records:
        cells = [f"{record[s]['accept_length']:.2f} ± {record[s]['standard_error']:.2f}" for s in samplings]
        lines.append(f"| {record['case']} | `{record['options']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--case", action="append", required=True, help="NAME=OPTIONS; repeat")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096], help="prompt lengths, tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLINGS), default=["greedy", "T=0.6"])
    parser.add_argument("--parallel", type=int, default=1, help="servers at a time")
    parser.add_argument("--server-arg", action="append", default=[], help="for every case; repeat")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    lengths = [args.length[i // 2 % len(args.length)] for i in range(args.prompts)]
    prompts = token_prompts(AutoTokenizer.from_pretrained(args.model), lengths)
    cases = [case.split("=", 1) for case in args.case]
    with ThreadPoolExecutor(args.parallel) as pool:
        records = list(pool.map(lambda case: measure(args, prompts, *case), cases))
    print(table(records, args.sampling))
    if args.output:
        args.output.write_text(json.dumps({**provenance(), "prompt_tokens": lengths, "cases": records}) + "\n")


if __name__ == "__main__":
    main()
