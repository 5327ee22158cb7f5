"""A tensor-parallel server that writes down what each rank commits: `python -m tests.support.watched_ranks` ARGUMENTS.

SPARSESPEC_TEST_RANKS=FOLDER: rank r appends a line to FOLDER/rank-r for every prefill and every round: a digest of
what it holds afterwards, how often rank 0 overruled it on the way, and whether the batch was greedy. Every rank flips
coins of its own here, as if cards did not agree. Schedulers import the main module again when they start, so they do
alike.

The settings of `faulty_offload` and `random_steps` count here as well.
"""

from __future__ import annotations

import hashlib
import os
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support import faulty_offload, random_steps
from tests.support.random_steps import before_worker_runs

FOLDER = "SPARSESPEC_TEST_RANKS"


class Entry(NamedTuple):
    """One iteration of one rank."""

    committed: str
    """Digest of tokens, accept lengths, bonus tokens and sequence lengths."""
    overruled: int
    """How many tensors of its own differed from rank 0's."""
    is_greedy: bool


def entries(folder: Path, rank: int) -> list[Entry]:
    lines = [line.split() for line in (folder / f"rank-{rank}").read_text().splitlines()]
    return [Entry(digest, int(overruled), greedy == "True") for digest, overruled, greedy in lines]


def install(folder: Path) -> None:
    """Watch this process, if it becomes a scheduler."""
    from sglang_sparsespec.adapter import worker as module

    worker, ranks = module.SparseSpecWorker, module.Ranks
    init, agree, forward = worker.__init__, ranks.agree, worker.forward_batch_generation
    overruled = 0

    def init_apart(self: Any, server_args: Any, gpu_id: int, ps: Any, *args: Any, **kwargs: Any) -> None:
        init(self, server_args, gpu_id, ps, *args, **kwargs)
        self.watched_file = folder / f"rank-{ps.tp_rank}"
        self._sampler._generator.manual_seed(1000 + ps.tp_rank)
        # the coins of the sampler after a prefill
        torch.manual_seed(2000 + ps.tp_rank)

    def agree_and_count(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal overruled
        own = tokens.clone()
        agreed = agree(self, tokens)
        overruled += not torch.equal(own, agreed)
        return agreed

    def forward_and_note(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal overruled
        overruled = 0
        is_greedy = batch.sampling_info.is_all_greedy
        result = forward(self, batch, *args, **kwargs)
        held = (result.next_token_ids, result.accept_lens, result.next_draft_input.bonus_tokens, result.new_seq_lens)
        digest = hashlib.sha256(repr([None if part is None else part.tolist() for part in held]).encode())
        with self.watched_file.open("a") as file:
            file.write(f"{digest.hexdigest()} {overruled} {is_greedy}\n")
        return result

    worker.__init__ = init_apart  # type: ignore[method-assign]
    worker.forward_batch_generation = forward_and_note  # type: ignore[method-assign]
    ranks.agree = agree_and_count  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    if FOLDER in os.environ:
        before_worker_runs(lambda: install(Path(os.environ[FOLDER])))
    if faulty_offload.SETTINGS in os.environ:
        faulty_offload.install(os.environ[faulty_offload.SETTINGS])
    if random_steps.SETTINGS in os.environ:
        random_steps.install_late(os.environ[random_steps.SETTINGS], Path(os.environ[random_steps.FILE]))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
