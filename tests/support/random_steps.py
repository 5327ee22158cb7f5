"""A server that changes k at random: `python -m tests.support.random_steps` takes the server's arguments.

SPARSESPEC_TEST_STEPS="seed=1,every=3": after 1 to `every` rounds the next ones get another k, 0 to K, 0 and K more
often than the rest; with ",guess=1" n-gram guesses are used whether they come true or not.
SPARSESPEC_TEST_STEPS_FILE: each round's k, and the tokens of a plain one, are appended to this file; rank r of several,
from 1 on, wants other k and appends to FILE-r. Schedulers import the main module again when they start, so they do
alike.

And logits of a forward are gone when the next one runs: captured forwards share their memory, and that shows on a GPU
only.
"""

from __future__ import annotations

import os
import random
import runpy
from pathlib import Path
from typing import Any

import torch

from tests.support.scripts import load_helper

before_worker_runs = load_helper("bench/hooked_server.py").before_worker_runs
SETTINGS = "SPARSESPEC_TEST_STEPS"
FILE = "SPARSESPEC_TEST_STEPS_FILE"


def chosen(file: Path, rank: int = 0) -> list[int]:
    """k of every round so far."""
    return [int(line.split()[0]) for line in _file_of(file, rank).read_text().splitlines()]


def plain_steps(file: Path) -> list[int]:
    """Tokens that each plain round decoded."""
    found = [int(line.split()[1]) for line in file.read_text().splitlines()]
    return [steps for steps in found if steps > 0]


def _file_of(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.name}-{rank}") if rank else file


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def install(settings: str, file: Path) -> None:
    """Replace the choice of k in this process."""
    from sglang_sparsespec.adapter import adaptive
    from sglang_sparsespec.speculation import ngram

    given = dict(part.split("=") for part in settings.split(","))
    # the worker is about to be made: ranks know that they are some
    file = _file_of(file, _rank())
    if "guess" in given:
        ngram.Pace.WORTH = 0.0
    rng = random.Random(int(given["seed"]) + _rank())
    left, steps = 0, 0

    def wanted(self: Any, pool_tokens: int, limits: Any) -> Any:
        nonlocal left, steps
        if left == 0:
            left = rng.randint(1, int(given["every"]))
            steps = rng.choice([0, self.max_steps, rng.randint(0, self.max_steps)])
        left -= 1
        return adaptive.round_of(steps, pool_tokens, limits)

    allowed = adaptive.RoundSteps.next_round

    def next_round(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = allowed(self, *args, **kwargs)
        with file.open("a") as out:
            out.write(f"{plan.num_steps} {plan.plain_steps}\n")
        return plan

    adaptive.RoundSteps.wanted = wanted  # type: ignore[method-assign]
    adaptive.RoundSteps.next_round = next_round  # type: ignore[method-assign]
    overwrite_logits()


def overwrite_logits() -> None:
    """Each of our forwards writes where the last one left its logits, as replays of graphs in one pool do."""
    from sglang_sparsespec.adapter import padded_forward

    run = padded_forward.PaddedForward.__call__
    last: list[torch.Tensor] = []

    def run_over_the_last(self: Any, batch_size: int) -> torch.Tensor:
        for logits in last:
            logits.fill_(float("nan"))
        last[:] = [run(self, batch_size)]
        return last[0]

    padded_forward.PaddedForward.__call__ = run_over_the_last  # type: ignore[method-assign]


def install_late(settings: str, file: Path) -> None:
    before_worker_runs(lambda: install(settings, file))


if __name__ in ("__main__", "__mp_main__") and SETTINGS in os.environ:
    install_late(os.environ[SETTINGS], Path(os.environ[FILE]))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
