"""A server that writes down its rounds: `python -m tests.support.watched_rounds` takes the server's arguments.

SPARSESPEC_TEST_ROUNDS=FILE: rank 0 appends a JSON line for every round. Schedulers import the main module again when
they start, so they do alike. The settings of `random_steps` count here as well.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import random_steps
from tests.support.random_steps import before_worker_runs

FILE = "SPARSESPEC_TEST_ROUNDS"


class Round(NamedTuple):
    """One request's part of a round."""

    committed_len: int
    """Tokens before it: the position of the first one that was verified."""
    accept_len: int
    """Tokens that it added, the bonus counted."""
    is_sparse: bool
    """Whether the verify was to be one that may leave something out."""
    verify: str
    """Name of the forward that verified; empty: SGLang's own."""


def rounds_of(file: Path, rid: str) -> list[Round]:
    """The rounds of the request with this `rid`, in order."""
    lines = map(json.loads, file.read_text().splitlines())
    return [
        Round(*line["requests"][rid], line["is_sparse"], line["verify"]) for line in lines if rid in line["requests"]
    ]


def install(file: Path) -> None:
    """Watch this process, which is a scheduler."""
    import torch

    from sglang_sparsespec.adapter.padded_forward import PaddedForward
    from sglang_sparsespec.adapter.worker import SparseSpecWorker

    commit, run = SparseSpecWorker._commit, PaddedForward.__call__
    names: list[str] = []

    def run_and_note(self: Any, batch_size: int) -> torch.Tensor:
        names.append(self.name)
        return run(self, batch_size)

    def commit_and_note(self: Any, batch: Any, plan: Any, logits: Any, acceptance: Any, *args: Any) -> Any:
        pairs = zip(plan.committed_lens.tolist(), acceptance.accept_lens.tolist(), strict=True)
        noted = {req.rid: pair for req, pair in zip(batch.reqs, pairs, strict=True)}
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            with file.open("a") as out:
                verify = "".join(name for name in names if "verify" in name)
                out.write(json.dumps({"is_sparse": plan.is_sparse, "verify": verify, "requests": noted}) + "\n")
        names.clear()
        return commit(self, batch, plan, logits, acceptance, *args)

    SparseSpecWorker._commit = commit_and_note  # type: ignore[method-assign]
    PaddedForward.__call__ = run_and_note  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    if FILE in os.environ:
        before_worker_runs(lambda: install(Path(os.environ[FILE])))
    if random_steps.SETTINGS in os.environ:
        random_steps.install_late(os.environ[random_steps.SETTINGS], Path(os.environ[random_steps.FILE]))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
