"""A server whose host memory fails on purpose: `python -m tests.support.faulty_offload` takes the server's arguments.

SPARSESPEC_TEST_FAULTS="seed=1,refuse=0.3,polls=4": allocations of host memory are refused with this probability, and
each copy counts as under way until it has been asked about this often. Schedulers import the main module again when
they start, so they fail alike; but each rank of a server refuses others, and copies of rank r take r more looks each.
"""

from __future__ import annotations

import os
import random
import runpy

import torch

from sglang_sparsespec.kv import offload

SETTINGS = "SPARSESPEC_TEST_FAULTS"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def install(faults: str) -> None:
    """Replace allocation and completion in this process."""
    settings = dict(part.split("=") for part in faults.split(","))
    rng: random.Random | None = None
    refuse, polls = float(settings["refuse"]), int(settings["polls"])
    alloc = offload.HostPool.alloc

    def alloc_or_refuse(pool: offload.HostPool, num_tokens: int) -> list[int] | None:
        nonlocal rng
        # a rank knows that it is one only after this module was imported
        rng = rng or random.Random(int(settings["seed"]) + _rank())
        return None if rng.random() < refuse else alloc(pool, num_tokens)

    def is_done(transfer: offload.Transfer) -> bool:
        looks = getattr(transfer, "looks", 0)
        transfer.looks = looks + 1  # type: ignore[attr-defined]
        return looks >= polls + _rank()

    def wait(transfer: offload.Transfer) -> None:
        transfer.looks = polls + _rank()  # type: ignore[attr-defined]

    offload.HostPool.alloc = alloc_or_refuse  # type: ignore[method-assign]
    offload.Transfer.is_done = is_done  # type: ignore[method-assign]
    offload.Transfer.wait = wait  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__") and SETTINGS in os.environ:
    install(os.environ[SETTINGS])

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
