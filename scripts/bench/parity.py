"""Is SPARSESPEC's greedy output that of the same server without it?

    python scripts/bench/parity.py --model PATH --dtype float32                      # CPU, the full set
    python scripts/bench/parity.py --model PATH --attention-backend triton --tolerance 0.2   # GPU, bf16
    python scripts/bench/parity.py --model PATH --tp-size 2 --tolerance 0.2                  # two cards

Starts the reference, records its output with its best tokens, stops it, starts SPARSESPEC, and compares up to each
request's first divergence. Every prompt runs alone (a sample) and batched, with a cold and a warm radix cache. With
`--control N` the reference is compared with itself as well, batched by N: what rounding alone does. Options that are
not its own go to both servers as they are. Writes one JSON document; exits 1 when a request diverges where the
reference was sure.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_sparsespec.bench.parity import RECORDING, ParityReport, Verdict, compare_greedy
from sglang_sparsespec.bench.prompts import token_prompts
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, has_gpu


def prompt_lengths(count: int, longest: int) -> list[int]:
    """Log-uniform from 16 to `longest` tokens, both ends included."""
    rng = random.Random(7)
    ratio = longest / 16
    return [16, longest] + [int(16 * ratio ** rng.random()) for _ in range(count - 2)]


def run(server: Server, prompts: list[list[int]], new_tokens: int, concurrency: int, record: bool) -> list[Any]:
    def one(ids: list[int]) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return server.generate({"input_ids": ids, "sampling_params": sampling, **(RECORDING if record else {})})

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, prompts))


COLD = "batched, cold cache"


def passes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Name -> (prompts, concurrency). The second batched pass finds every prompt in the radix cache."""
    batched = (args.prompts, args.concurrency)
    warm = {} if args.cold_only else {"batched, warm cache": batched}
    return {COLD: batched, **warm, "alone": (args.alone, 1)}


def record_all(
    model: str,
    server_args: list[str],
    prompts: list[list[int]],
    args: argparse.Namespace,
    control: int | None,
    command: list[str] | None,
) -> Any:
    outputs, seconds = {}, {}
    with Server(model, *server_args, command=command, timeout_s=600, request_timeout_s=3600) as server:
        run(server, prompts[:2], 4, 2, record=True)  # kernels compile on first use
        server.flush_cache()
        todo = passes(args)
        if control is not None:
            todo[f"control, by {control}, cold cache"] = (args.prompts, control)
        for name, (count, concurrency) in todo.items():
            if name != "batched, warm cache":
                server.flush_cache()
            started = time.monotonic()
            outputs[name] = run(server, prompts[:count], args.new_tokens, concurrency, record=True)
            seconds[name] = round(time.monotonic() - started, 2)
        server.idle_check()
    return outputs, seconds


def summary(report: ParityReport) -> dict[str, Any]:
    divergences = [request for request in report.requests if request.verdict is not Verdict.IDENTICAL]
    return {
        "requests": len(report.requests),
        "identical": len(report.with_verdict(Verdict.IDENTICAL)),
        "near_ties": len(report.with_verdict(Verdict.NEAR_TIE)),
        "diverged": len(report.with_verdict(Verdict.DIVERGED)),
        "equal_tokens": report.num_compared,
        "gaps_at_divergence": sorted(round(r.gap, 6) for r in divergences if r.gap is not None),
    }


def accept_lengths(outputs: list[Any]) -> dict[str, float]:
    lengths = [output["meta_info"]["spec_accept_length"] for output in outputs]
    return {
        "accept_length_mean": round(sum(lengths) / len(lengths), 3),
        "accept_length_min": round(min(lengths), 3),
    }


def max_logprob_difference(reference: list[Any], outputs: list[Any]) -> float:
    """Largest difference of an output token's log-probability, over each pair's common prefix."""
    worst = 0.0
    for a, b in zip(reference, outputs, strict=True):
        pairs = zip(a["meta_info"]["output_token_logprobs"], b["meta_info"]["output_token_logprobs"], strict=False)
        for x, y in pairs:
            if x[1] != y[1]:
                break
            worst = max(worst, abs(x[0] - y[0]))
    return worst


def main() -> None:
    # no abbreviations: they would take options that are meant for the servers
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="for the prompts; default: the model's")
    parser.add_argument("--random-tokens", type=int, metavar="VOCAB", help="random prompts, for random weights")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="prompts that also run alone")
    parser.add_argument("--cold-only", action="store_true", help="leave out the pass over a warm radix cache")
    parser.add_argument("--longest", type=int, default=3000, help="longest prompt, tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--control", type=int, metavar="N", help="compare the reference with itself, batched by N")
    parser.add_argument("--dtype")
    parser.add_argument("--attention-backend")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="gap up to which a difference is a near-tie, nats"
    )
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeat")
    parser.add_argument("--spec-arg", action="append", default=[], help="for SPARSESPEC alone; repeat")
    parser.add_argument(
        "--spec-command",
        help="what starts SPARSESPEC's server; 'python -m tests.support.random_steps' changes k every few rounds",
    )
    parser.add_argument("--name", default="parity")
    parser.add_argument("--together", action="store_true", help="run both servers at a time (a big GPU)")
    parser.add_argument("--output", type=Path)
    args, others = parser.parse_known_args()

    from transformers import AutoTokenizer

    lengths = prompt_lengths(args.prompts, args.longest)
    if args.random_tokens:
        rng = random.Random(0)
        prompts = [[rng.randrange(args.random_tokens) for _ in range(length)] for length in lengths]
    else:
        prompts = token_prompts(AutoTokenizer.from_pretrained(args.tokenizer or args.model), lengths)
    common = [*args.server_arg, *others]
    if args.dtype or not has_gpu():
        # by itself SGLang takes a float32 checkpoint down to bf16, where ties between two logits are common
        common += ["--dtype", args.dtype or "float32"]
    if args.attention_backend:
        common += ["--attention-backend", args.attention_backend]
    num_tokens = sum(map(len, prompts)) + args.concurrency * (args.longest + args.new_tokens + 64)
    common += ["--max-total-tokens", str(num_tokens), "--max-running-requests", str(args.concurrency)]

    spec_args = [*common, "--speculative-algorithm", "SPARSESPEC", *args.spec_arg]
    with ThreadPoolExecutor(2 if args.together else 1) as pool:
        runs = list(
            pool.map(
                lambda server_args, *rest: record_all(args.model, server_args, prompts, args, *rest),
                (common, spec_args),
                (args.control, None),
                (None, args.spec_command and shlex.split(args.spec_command)),
            )
        )
    (reference, reference_seconds), (outputs, seconds) = runs

    document: dict[str, Any] = {"name": args.name, **provenance(), "server_args": spec_args, "passes": {}}
    ok = True
    for name, recorded in reference.items():
        is_control = name not in outputs
        report = compare_greedy(
            reference[COLD] if is_control else recorded, outputs.get(name, recorded), tol=args.tolerance
        )
        document["passes"][name] = {**summary(report), "seconds_reference": reference_seconds[name]}
        if not is_control:
            ok &= report.ok
            document["passes"][name] |= {
                **accept_lengths(outputs[name]),
                "max_logprob_difference": max_logprob_difference(recorded, outputs[name]),
                "seconds_sparsespec": seconds[name],
            }
        print(f"{args.name}, {name}: {report}")
        print(json.dumps(document["passes"][name]))
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
