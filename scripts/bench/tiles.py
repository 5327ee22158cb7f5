"""Times of a kernel under other tiles than the ones it chooses: what docs/kernels.md stands on.

    python scripts/bench/tiles.py --kernel draft          # on a GPU host; about two minutes, most of it compilation
    python scripts/bench/tiles.py --kernel verify --shape qwen3-8b
    python scripts/bench/tiles.py --kernel plain --shape smollm2 --batch 32 --tokens 6144   # rounds without drafts

`resident` is how many programs of the verify kernel on a multiprocessor its splits aim at.

The chosen tiles stand first. Sizes, bytes and shares are those of ops.py, which is the gated measurement.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import ops
import torch

from sglang_sparsespec.ops import _paged_kernels
from sglang_sparsespec.ops.sparse_decode import triton_impl as sparse

if TYPE_CHECKING:
    from collections.abc import Callable

RESIDENT = "resident"
DRAFT_TILES = [
    {"BS": block, "num_warps": warps, "num_stages": stages}
    for block, warps, stages in (
        (16, 1, 2),
        (16, 1, 3),
        (16, 1, 4),
        (32, 1, 2),
        (32, 1, 3),
        (32, 1, 4),
        (32, 2, 3),
        (32, 4, 3),
        (64, 2, 2),
        (64, 4, 2),
        (64, 4, 3),
        (128, 4, 2),
    )
]
VERIFY_TILES = [
    {"BN": block, "num_warps": warps, "num_stages": stages}
    for block in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
]
PLAIN_TILES = [
    {"BN": block, "num_warps": warps, "num_stages": stages, RESIDENT: resident}
    for block in (32, 64, 128)
    for warps in (2, 4)
    for stages in (2, 3)
    for resident in (2, 4, 8)
]
KERNELS: dict[str, tuple[Any, list[dict[str, int]], str]] = {
    "draft": (sparse, DRAFT_TILES, "sparse_decode"),
    "plain": (_paged_kernels, PLAIN_TILES, "plain"),
    "verify": (_paged_kernels, VERIFY_TILES, "verify"),
}


def with_tiles(choose: Callable[..., dict[str, int]], tiles: dict[str, int]) -> Callable[..., dict[str, int]]:
    own = {name: value for name, value in tiles.items() if name != RESIDENT}
    return lambda *sizes: {**choose(*sizes), **own}


def with_resident(choose: Callable[..., int], resident: int | None) -> Callable[..., int]:
    return choose if resident is None else lambda *sizes: resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(KERNELS), required=True)
    parser.add_argument("--shape", choices=[shape.name for shape in ops.SHAPES], default="qwen3-8b")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    module, variants, prefix = KERNELS[args.kernel]
    shape = next(shape for shape in ops.SHAPES if shape.name == args.shape)
    bandwidth = ops.copy_gb_s("cuda")
    choose, resident = module.choose_tiles, _paged_kernels.verify_resident
    print(f"copy: {bandwidth:.0f} GB/s\n\n| op | tiles | us | share |\n|---|---|---|---|")
    for tiles in [{}, *variants]:
        module.choose_tiles = with_tiles(choose, tiles)
        _paged_kernels.verify_resident = with_resident(resident, tiles.get(RESIDENT))
        for what, run, num_bytes in ops.GROUPS[args.kernel](shape, args.batch, args.tokens, "cuda"):
            if not what["op"].startswith(prefix) or what.get("block", 1) != 1:
                continue
            name = ", ".join(str(value) for value in what.values())
            try:
                milliseconds = ops.median_ms(run, "cuda", args.repeats)
            except Exception as error:  # a variant that needs too much shared memory, for one
                print(f"| {name} | {tiles} | {type(error).__name__} | |", flush=True)
                continue
            share = num_bytes / milliseconds / 1e6 / bandwidth
            print(f"| {name} | {tiles or 'chosen'} | {1e3 * milliseconds:.1f} | {share:.2f} |", flush=True)
            torch.cuda.synchronize()
    module.choose_tiles, _paged_kernels.verify_resident = choose, resident


if __name__ == "__main__":
    main()
