"""What it costs the schedulers of a tensor-parallel server to decide together: collectives over gloo, on this host.

    python scripts/bench/agreement.py --ranks 2 4

Prints microseconds a call, as rank 0 and as the last rank see them: the all-reduce of an iteration in which copies are
under way, and the broadcast of k. No GPU and no server takes part; in a server ranks come by at different times, and
whoever is early waits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_sparsespec.adapter.host_ranks import HostRanks

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 100


def time_us(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 90th percentile of a call, microseconds."""
    times = []
    for index in range(WARM_UP + repeats):
        start = time.perf_counter()
        call()
        if index >= WARM_UP:
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def run_rank(rank: int, size: int, meeting: str, repeats: int, moving: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    ranks = HostRanks(dist.group.WORLD, rank, size)
    answers = {f"request-{index}": index % 2 == 0 for index in range(moving)}
    for name, call in (
        (f"all-reduce, {moving} copies", lambda: ranks.all_hold("leaving", answers)),
        ("broadcast of k", lambda: ranks.of_rank_0(4)),
    ):
        dist.barrier()
        median, slow = time_us(call, repeats)
        if rank in (0, size - 1):
            print(f"{size} ranks, rank {rank}: {name}: median {median:.0f} us, 90th percentile {slow:.0f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks")
    parser.add_argument("--repeats", type=int, default=2000, help="calls that are timed")
    parser.add_argument("--moving", type=int, default=8, help="copies under way")
    args = parser.parse_args()
    for size in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(size, f"{folder}/meeting", args.repeats, args.moving), nprocs=size)


if __name__ == "__main__":
    main()
