"""No speed-up without this: greedy output of a contender against that of the baseline on the same target.

The rule is `parity.compare_greedy`. On a target without weights the contender answers with simulation off; there the
gate says that the shape is served, and little more, for the tokens of random weights are nearly tied.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.cells import Scene
from sglang_sparsespec.bench.parity import RECORDING, Verdict, compare_greedy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sglang_sparsespec.bench.cells import Target
    from sglang_sparsespec.bench.measure import PromptSource
    from sglang_sparsespec.bench.server import Server

NUM_PROMPTS = 8
LONGEST = 1200
# nats by which two right answers may differ. bfloat16 logits of this size are 0.125 apart, and both servers round.
TOLERANCES = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
MIN_EQUAL_SHARE = 0.3
"""Of all tokens; below it a tolerance would excuse wrong output. Measured for bf16, H100, 192 tokens each: 0.47."""


def gate_prompts(source: PromptSource, target: Target) -> list[list[int]]:
    """Prompts of 16 tokens to LONGEST, or to half the context."""
    longest = min(LONGEST, target.shape.context // 2)
    lengths = [round(16 * (longest / 16) ** (i / (NUM_PROMPTS - 1))) for i in range(NUM_PROMPTS)]
    prompts = source.prompts(Scene(NUM_PROMPTS, longest, 1), seed=7)
    return [ids[:length] for ids, length in zip(prompts, lengths, strict=True)]


def loss_of(server: Server) -> list[str]:
    """What a server says that its verifies leave out; empty for one whose output is its model's.

    The options alone do not settle it: a configuration file may hold more, and no prompt of a gate is long.
    """
    ours = server.get("/server_info")["internal_states"][0].get("sparsespec", {})
    return list(ours.get("lossy", {}).get("verify_sparsity", []))


def answers(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
    """Greedy responses with what a comparison needs: half of the prompts together, then half one by one."""

    def one(ids: Sequence[int]) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        response = server.generate({"input_ids": list(ids), "sampling_params": sampling, **RECORDING})
        return {
            "output_ids": response["output_ids"],
            "meta_info": {"output_top_logprobs": response["meta_info"]["output_top_logprobs"]},
        }

    half = len(prompts) // 2
    with ThreadPoolExecutor(len(prompts) - half) as pool:
        together = list(pool.map(one, prompts[half:]))
    return [one(ids) for ids in prompts[:half]] + together


def judge(reference: Sequence[Any], outputs: Sequence[Any], dtype: str) -> dict[str, Any]:
    """The verdict, for a record: `ok`, and why."""
    report = compare_greedy(reference, outputs, tol=TOLERANCES[dtype])
    share = report.num_compared / sum(len(answer["output_ids"]) for answer in reference)
    return {
        "ok": report.ok and share >= MIN_EQUAL_SHARE,
        "requests": len(report.requests),
        **{verdict.value: len(report.with_verdict(verdict)) for verdict in Verdict},
        "equal_share": round(share, 4),
        "tolerance": report.tol,
        "report": str(report),
    }


def save_reference(path: Path, reference: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(reference))
    partial.rename(path)


def load_reference(path: Path) -> list[Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
