"""Real rounds of a server as files, for tests that replay them to the controller (tests/data).

    python scripts/bench/record_rounds.py --model PATH --scenes 1x256 2x1024 --out tests/data   # rounds_1x256.json, ...

One SPARSESPEC server, real weights and real acceptance. k is switched among all choices of the controller, in bursts
and in an order that is drawn anew for each pass, so that all of them see the same contexts. In a file "rounds" holds
[k, tokens in the pool, milliseconds or null, drafts that stood by request] in the order in which they ran; the first
round behind each switch is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_client import Study
from study_server import COMMAND, CONTROL

from sglang_sparsespec.bench.cells import Scene, Target
from sglang_sparsespec.bench.measure import PromptSource
from sglang_sparsespec.bench.planner import SIMULATION
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import Server, has_gpu
from sglang_sparsespec.bench.shapes import read_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from study_rounds import RoundLine

BURST = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", nargs="+", default=["2x512"], metavar="BATCHxCONTEXT")
    parser.add_argument("--passes", type=int, default=12, help="over all k")
    parser.add_argument("--spec-arg", action="append", default=[], help="for the server; repeat")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser.parse_args()


def record(study: Study, prompts: Sequence[Sequence[int]], passes: int, model_context: int) -> list[RoundLine]:
    """Rounds of every k, each as often."""
    choices, order = study.choices(), random.Random(0)
    # every draft could stand; two more rounds run while a k is changed
    growth = passes * sum((BURST + 3) * (1 + k) for k in choices)
    found = []
    study.set(0, None)
    with study.running(prompts, min(growth, model_context - len(prompts[0]) - 64)):
        for _ in range(passes):
            for k in order.sample(choices, len(choices)):
                found += study.turn(k, None, BURST, num_reqs=len(prompts), most_pool=float("inf"))
    return found


def main() -> int:
    args = arguments()
    target = Target(args.model.name, str(args.model), "bfloat16", read_shape(args.model))
    source = PromptSource(target)
    options = ["--speculative-algorithm", "SPARSESPEC", "--sparsespec-adaptive", "--skip-server-warmup"]
    options += [] if has_gpu() else ["--dtype", "float32"]
    options += args.spec_arg
    facts = provenance()
    head = {name: facts[name] for name in ("date", "machine", "versions", "commit")}
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "control.json"
        control.write_text("{}")
        env: dict[str, str | None] = {**dict.fromkeys(SIMULATION), CONTROL: str(control)}
        with Server(args.model, *options, env=env, command=COMMAND, timeout_s=600) as server:
            study = Study(server, control)
            for scene in args.scenes:
                batch, context = map(int, scene.split("x"))
                prompts = source.prompts(Scene(batch, context, 1), seed=0)
                found = record(study, prompts, args.passes, target.shape.context)
                shown = {**head, "model": target.name, "options": options, "choices": study.choices(), "scene": scene}
                write(args.out / f"rounds_{scene}.json", shown, found)
    return 0


def write(path: Path, head: dict[str, Any], rounds: Sequence[RoundLine]) -> None:
    """One round a line."""
    lines = [[r.num_steps, r.pool_tokens, r.round_ms and round(r.round_ms, 2), r.num_correct] for r in rounds]
    text = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    path.write_text(json.dumps(head)[:-1] + ',\n"rounds": [\n' + text + "\n]}\n")


if __name__ == "__main__":
    sys.exit(main())
