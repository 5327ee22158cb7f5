"""How far does a mixture of experts move when its tokens are computed in another shape, and is it the routers?

    python scripts/bench/moe_rounding.py --out TINY        # CPU, some minutes

Random tiny models, and dense ones of the same sizes, in plain transformers: greedy tokens one at a time with a KV
cache, then the same tokens k + 1 at once, as a verify has them; each in bfloat16 and in float32. Then once more with
the experts that the first pass chose: what is left is rounding without routers that flip. Last, bfloat16 beside
float32, both one token at a time, each over KV of its own. Prints one line of JSON a row.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from parity import prompt_lengths

from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.model_tools.tiny import MOE_ARCHS, write_tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"heads": 8, "kv_heads": 2, "experts": 32, "experts_per_token": 8},
    "qwen3": {"heads": 8, "kv_heads": 2},
    "mixtral": {"heads": 4, "kv_heads": 1, "experts": 8, "experts_per_token": 2},
    "llama": {"heads": 4, "kv_heads": 1},
}

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Routers:
    """Notes which experts a pass chooses, or makes it take those of another."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.chosen: list[torch.Tensor] = []
        self.forced: list[torch.Tensor] | None = None
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._hook)

    def _hook(self, router: torch.nn.Module, args: Any, output: Any) -> Any:
        logits, scores, indices = output
        if self.forced is not None:
            indices = self.forced.pop(0)
            weights = logits.float().softmax(-1).gather(-1, indices)
            output = (logits, (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), indices)
        self.chosen.append(indices)
        return output


@torch.inference_mode()
def feed(model: Any, routers: Routers, cache: Any, tokens: list[int], width: int, forced: Any = None) -> Any:
    """Logits [tokens, vocab], float32, and experts [tokens, layers, experts per token]; of dense models None."""
    logits, experts = [], []
    for start in range(0, len(tokens), width):
        part = torch.tensor([tokens[start : start + width]])
        routers.chosen = []
        if forced is not None:
            routers.forced = list(forced[start : start + width].unbind(1))
        logits.append(model(part, past_key_values=cache).logits[0].float())
        if routers.chosen:
            experts.append(torch.stack(routers.chosen, 1))
    routers.forced = None
    return torch.cat(logits), torch.cat(experts) if experts else None


@torch.inference_mode()
def decode(model: Any, routers: Routers, cache: Any, first: int, count: int) -> Any:
    """Greedy tokens, with the logits behind each."""
    tokens, logits, experts = [first], [], []
    for _ in range(count):
        row, chosen = feed(model, routers, cache, tokens[-1:], 1)
        logits.append(row)
        experts.append(chosen)
        tokens.append(int(row[0].argmax()))
    return tokens[:-1], torch.cat(logits), None if experts[0] is None else torch.cat(experts)


def compared(pairs: list[Any]) -> dict[str, Any]:
    """What another shape does.

    Args:
        pairs: of each request logits, the other pass's, and at which positions [tokens] experts differ, or None.
    """
    moved = [(a - b).abs().amax(-1) for a, b, _ in pairs]
    positions = torch.cat(moved)
    first, leads, all_leads = [], [], []
    for a, b, _ in pairs:
        flips = (a.argmax(-1) != b.argmax(-1)).nonzero().flatten()
        lost = a[flips].amax(-1) - a[flips].gather(-1, b[flips].argmax(-1, keepdim=True))[:, 0]
        all_leads += lost.tolist()
        if len(flips):
            first.append(int(flips[0]))
            leads.append(round(float(lost[0]), 4))
    chosen = torch.cat([a.log_softmax(-1).gather(-1, a.argmax(-1, keepdim=True)) for a, _, _ in pairs])
    others = torch.cat([b.log_softmax(-1).gather(-1, a.argmax(-1, keepdim=True)) for a, b, _ in pairs])
    found = {
        "positions": len(positions),
        "largest_move": {name: round(float(positions.quantile(q)), 5) for name, q in QUANTILES.items()},
        "positions_moved_above_0.5": int((positions > 0.5).sum()),
        "logprob_of_the_best_moved_most": round(float((chosen - others).abs().max()), 5),
        "positions_with_another_best": len(all_leads),
        "of_these_led_by_more_than_0.5": sum(lead > 0.5 for lead in all_leads),
        "largest_lead_lost": round(max(all_leads, default=0.0), 4),
        "requests": len(pairs),
        "requests_that_part": len(first),
        "first_difference": sorted(first),
        "leads_at_first_difference": sorted(leads),
    }
    if pairs[0][2] is not None:
        rerouted = torch.cat([other for _, _, other in pairs])
        found["positions_with_other_experts"] = int(rerouted.sum())
    return found


def other_experts(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """[tokens]: whether any layer sends a token elsewhere."""
    if a is None or b is None:
        return None
    return (a.sort(-1).values != b.sort(-1).values).flatten(1).any(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--archs", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=9, help="tokens at once, k + 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(args.threads)
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in prompt_lengths(args.prompts, args.longest)]
    for arch in args.archs:
        path = write_tiny_model(
            args.out / arch, arch=arch, hidden=512, layers=4, head_dim=128, dtype="bfloat16", **SIZES[arch]
        )
        options = {"experts_implementation": "eager"} if arch in MOE_ARCHS else {}
        found: dict[str, list[Any]] = {}
        models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval() for dtype in DTYPES.values()
        ]
        passes = dict(zip(DTYPES, ((model, Routers(model)) for model in models), strict=True))
        for prompt in prompts:
            ends, fed = {}, {}
            for dtype, (model, routers) in passes.items():
                cache = DynamicCache(config=model.config)
                last, _ = feed(model, routers, cache, prompt, len(prompt))
                one = decode(model, routers, copy.deepcopy(cache), int(last[-1].argmax()), args.new_tokens)
                tokens, logits, experts = one
                ends[dtype], fed[dtype] = cache, one
                at_once, others = feed(model, routers, copy.deepcopy(cache), tokens, args.width)
                found.setdefault(f"{dtype}, {args.width} at once", []).append(
                    (logits, at_once, other_experts(experts, others))
                )
                if experts is not None:
                    forced, same = feed(model, routers, copy.deepcopy(cache), tokens, args.width, experts)
                    found.setdefault(f"{dtype}, {args.width} at once, the first pass's experts", []).append(
                        (logits, forced, other_experts(experts, same))
                    )
            # the tokens of bfloat16 in float32, one at a time, over KV of its own
            tokens, logits, experts = fed["bfloat16"]
            exact, others = feed(*passes["float32"], copy.deepcopy(ends["float32"]), tokens, 1)
            found.setdefault("bfloat16 beside float32", []).append((logits, exact, other_experts(experts, others)))
        for name, pairs in found.items():
            row = {"arch": arch, "pass": name, **compared(pairs)}
            print(json.dumps(row), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps({"name": "moe-rounding", **provenance(), **row}) + "\n")


if __name__ == "__main__":
    main()
