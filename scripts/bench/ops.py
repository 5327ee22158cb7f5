"""What each kernel costs and what it could cost: times, bytes moved, and the share of the copy bandwidth.

    python scripts/bench/ops.py --output ops.jsonl            # on a GPU host; tests of the ops run first, and gate it
    python scripts/bench/ops.py --device cpu --no-gate        # the same code on small sizes, to see that it runs

Every line is one layer's work. `share` is (bytes that have to be moved / time) over the bandwidth of a large copy in
the same run. Bytes: of selected K and V for a draft step, of all K and V for a verify, of scores for a selection, of
logits for sampling, each row once per pass over it. For the sampling group `batch` is rows and `tokens` the vocabulary,
and the shape has no part in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch

from sglang_sparsespec.adapter.fused_verify import FusedPlan
from sglang_sparsespec.adapter.side_stream import SideStream
from sglang_sparsespec.adapter.sparse_verify import SparseVerify
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.ops.block_scores import block_scores
from sglang_sparsespec.ops.paged_attention import paged_attention
from sglang_sparsespec.ops.row_stats import row_stats
from sglang_sparsespec.ops.sample_rows import sample_rows
from sglang_sparsespec.ops.score_capture import capture_scores
from sglang_sparsespec.ops.select_positions import select_positions
from sglang_sparsespec.ops.sparse_decode import sparse_decode
from sglang_sparsespec.selection import POLICIES
from sglang_sparsespec.selection.store import SelectionStore
from sglang_sparsespec.sparsity.attention import num_kept_blocks
from sglang_sparsespec.sparsity.block_lists import BlockRule, list_positions
from sglang_sparsespec.speculation.phases import load_of

ROOT = Path(__file__).resolve().parents[2]
NUM_DRAFT_TOKENS = 9


class Shape(NamedTuple):
    """Heads of one layer."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = [Shape("qwen3-8b", 32, 8, 128), Shape("qwen3-1.7b", 16, 8, 128), Shape("smollm2", 9, 3, 64)]


class Pool(NamedTuple):
    """KV of some requests of equal length at scattered slots, one token to a slot or whole blocks of neighbours."""

    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    rows: torch.Tensor
    lens: torch.Tensor
    scale: float

    @property
    def kv_bytes(self) -> int:
        """Of the whole context of all requests."""
        num_tokens = int(self.lens.shape[0]) * self.req_to_token.shape[1]
        return 2 * num_tokens * self.k.shape[1] * self.k.shape[2] * self.k.element_size()


def make_pool(shape: Shape, batch: int, length: int, device: str) -> Pool:
    """Slots of a request lie together in runs of 16, as an allocator leaves them after a while."""
    width = -(-(length + NUM_DRAFT_TOKENS) // 16) * 16
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    k, v = (
        torch.randn(batch * width + 16, shape.num_kv_heads, shape.head_dim, device=device).to(dtype) for _ in range(2)
    )
    runs = torch.randperm(batch * width // 16, device=device)
    slots = (runs[:, None] * 16 + torch.arange(16, device=device) + 16).view(batch, width)
    return Pool(
        k,
        v,
        slots.to(torch.int32),
        torch.arange(batch, device=device),
        torch.full((batch,), length, dtype=torch.int32, device=device),
        shape.head_dim**-0.5,
    )


# runs in one graph, so that the launch of a graph counts for little, and how long the card is kept busy before
RUNS_PER_GRAPH = 8
WARM_UP_S = 0.2


def median_ms(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of one run, after warm-up.

    On a GPU runs stand in a graph, as in rounds, with a large buffer read before each, so that nothing is found in the
    L2 cache and nothing has to be written back from it; the time of the reads alone is taken off.
    """
    if device == "cpu":
        times = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times[2:])
    buffer = torch.zeros(32 << 20, dtype=torch.int64, device=device)

    def read() -> None:
        buffer.max()

    def both() -> None:
        read()
        run()

    whole, reads = captured(both), captured(read)
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_S:
        whole()
        torch.cuda.synchronize()
    difference = statistics.median(spans_ms(whole, repeats)) - statistics.median(spans_ms(reads, repeats))
    return difference / RUNS_PER_GRAPH


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A graph of some runs."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS_PER_GRAPH):
            run()
    return graph.replay


def spans_ms(run: Callable[[], Any], repeats: int) -> list[float]:
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in spans]


Case = tuple[dict[str, Any], Callable[[], Any], int]
"""What it is, the work, bytes."""


def draft_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    pool = make_pool(shape, batch, length, device)
    budget = max(192, length // 20)
    q = torch.randn(batch, shape.num_q_heads, shape.head_dim, device=device).to(pool.k.dtype)
    num_bytes = 2 * batch * budget * shape.num_kv_heads * shape.head_dim * pool.k.element_size()
    for block, num_lists in ((1, 1), (1, shape.num_kv_heads), (4, 1), (8, 1), (16, 1)):
        starts = torch.rand(batch, num_lists, length // block, device=device).argsort(-1)[..., : budget // block]
        positions = (starts.sort(-1).values[..., None] * block + torch.arange(block, device=device)).flatten(2)
        slots = torch.gather(pool.req_to_token[:, None].expand(-1, num_lists, -1), 2, positions).contiguous()
        lens = torch.full((batch,), slots.shape[-1], dtype=torch.int32, device=device)

        def run(slots: torch.Tensor = slots, lens: torch.Tensor = lens) -> torch.Tensor:
            return sparse_decode(q, pool.k, pool.v, slots, lens, scale=pool.scale)

        what = {"op": "sparse_decode", "block": block, "lists": "head" if num_lists > 1 else "layer", "budget": budget}
        yield what, run, num_bytes
        if device == "cuda":
            yield {**what, "op": "flashinfer folded decode"}, flashinfer_decode(q, pool, slots, shape), num_bytes


def flashinfer_decode(q: torch.Tensor, pool: Pool, slots: torch.Tensor, shape: Shape) -> Callable[[], Any]:
    """FlashInfer's paged decode on the pool seen as [slots * H, 1, D]: KV heads folded into the batch."""
    batch, heads = q.shape[0], shape.num_kv_heads
    group = shape.num_q_heads // heads
    folded = slots.expand(-1, heads, -1).long() * heads + torch.arange(heads, device=q.device)[None, :, None]
    one_head = Shape(shape.name, group, 1, shape.head_dim)
    run = planned_decode(folded.flatten(0, 1).to(torch.int32), q.dtype, one_head, pool.scale)
    folded_q = q.view(batch * heads, group, shape.head_dim)
    k, v = (cache.view(-1, 1, 1, shape.head_dim) for cache in (pool.k, pool.v))
    return lambda: run(folded_q, (k, v))


def planned_decode(lists: torch.Tensor, dtype: torch.dtype, shape: Shape, scale: float) -> Callable[..., Any]:
    """FlashInfer's paged decode, planned for `lists` [R, W] of slots, with tensor cores where SGLang's has them."""
    import flashinfer

    use_tensor_cores = shape.num_q_heads >= 4 * shape.num_kv_heads
    num_lists, width = lists.shape
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=lists.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=use_tensor_cores)
    wrapper.plan(
        torch.arange(num_lists + 1, dtype=torch.int32, device=lists.device) * width,
        lists.flatten(),
        torch.ones(num_lists, dtype=torch.int32, device=lists.device),
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.head_dim,
        1,
        q_data_type=dtype,
        kv_data_type=dtype,
        sm_scale=scale,
    )
    return cast("Callable[..., Any]", wrapper.run)


def plain_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    """A round without drafts: one query a request, with and without scores, and what plain SGLang runs."""
    pool = make_pool(shape, batch, length, device)
    q = torch.randn(batch, 1, shape.num_q_heads, shape.head_dim, device=device).to(pool.k.dtype)
    table = (pool.req_to_token, pool.rows, pool.lens, torch.ones_like(pool.lens))
    options: dict[str, Any] = {"scale": pool.scale, "max_len": pool.req_to_token.shape[1]}
    scores = torch.empty(shape.num_kv_heads, batch * length, device=device)
    starts = torch.arange(batch, device=device) * length
    yield {"op": "plain"}, lambda: paged_attention(q, pool.k, pool.v, *table, **options), pool.kv_bytes
    yield (
        {"op": "one token verified, anchored scores"},
        lambda: paged_attention(q, pool.k, pool.v, *table, anchored_scores=scores, score_starts=starts, **options),
        pool.kv_bytes,
    )
    if device == "cuda":
        lists = pool.req_to_token[:, : length + 1].contiguous()
        run = planned_decode(lists, q.dtype, shape, pool.scale)
        k, v = pool.k.unsqueeze(1), pool.v.unsqueeze(1)
        yield {"op": "flashinfer decode"}, lambda: run(q[:, 0], (k, v)), pool.kv_bytes


def verify_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    pool = make_pool(shape, batch, length, device)
    q = torch.randn(batch, NUM_DRAFT_TOKENS, shape.num_q_heads, shape.head_dim, device=device).to(pool.k.dtype)
    num_queries = torch.full_like(pool.lens, NUM_DRAFT_TOKENS)
    table = (pool.req_to_token, pool.rows, pool.lens, num_queries)
    max_len = pool.req_to_token.shape[1]
    scores = torch.empty(shape.num_kv_heads, batch * length, device=device)
    starts = torch.arange(batch, device=device) * length
    options: dict[str, Any] = {"scale": pool.scale, "max_len": max_len}
    variants: list[tuple[str, Callable[[], Any]]] = [
        ("verify", lambda: paged_attention(q, pool.k, pool.v, *table, **options)),
        (
            "verify, anchored scores",
            lambda: paged_attention(q, pool.k, pool.v, *table, anchored_scores=scores, score_starts=starts, **options),
        ),
        ("verify, mean scores", lambda: paged_attention(q, pool.k, pool.v, *table, score_lens=pool.lens, **options)),
        ("mean scores alone", lambda: capture_scores(q, pool.k, *table, pool.lens, **options)),
    ]
    if device == "cuda":
        variants.append(("flashinfer verify", flashinfer_verify(q, pool, shape)))
    for name, run in variants:
        yield {"op": name}, run, pool.kv_bytes


def mixed_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    """A forward of the unified schedule: the first requests draft, a ninth verifies; both parts into one output."""
    pool = make_pool(shape, batch, length, device)
    load = load_of(batch, NUM_DRAFT_TOKENS - 1)
    budget = max(192, length // 20)
    q = torch.randn(load.num_tokens, shape.num_q_heads, shape.head_dim, device=device).to(pool.k.dtype)
    out = torch.empty_like(q)
    drafting, verifying = slice(load.draft_reqs), slice(batch - load.verify_reqs, batch)
    positions = torch.rand(load.draft_reqs, 1, length, device=device).argsort(-1)[..., :budget].sort(-1).values
    slots = torch.gather(pool.req_to_token[drafting, None], 2, positions).contiguous()
    lens = torch.full((load.draft_reqs,), budget, dtype=torch.int32, device=device)
    starts = torch.arange(load.verify_reqs, device=device) * length
    scores = torch.empty(shape.num_kv_heads, load.verify_reqs * length, device=device)
    beside = SideStream(device)

    def drafts() -> None:
        parts = q[drafting], pool.k, pool.v, slots, lens
        sparse_decode(*parts, scale=pool.scale, out=out[drafting])

    def verify() -> None:
        chains = (load.verify_reqs, NUM_DRAFT_TOKENS, shape.num_q_heads, shape.head_dim)
        paged_attention(
            q[load.draft_reqs :].view(chains),
            pool.k,
            pool.v,
            pool.req_to_token,
            pool.rows[verifying],
            pool.lens[verifying],
            torch.full_like(pool.lens[verifying], NUM_DRAFT_TOKENS),
            scale=pool.scale,
            max_len=pool.req_to_token.shape[1],
            anchored_scores=scores,
            score_starts=starts,
            out=out[load.draft_reqs :].view(chains),
        )

    def in_turn() -> None:
        drafts()
        verify()

    def side_by_side() -> None:
        with beside:
            verify()
        drafts()
        beside.join()

    num_bytes = pool.kv_bytes // (batch * pool.req_to_token.shape[1])
    num_bytes *= load.verify_reqs * length + load.draft_reqs * budget
    yield {"op": "mixed, drafts alone"}, drafts, num_bytes
    yield {"op": "mixed, verify alone"}, verify, num_bytes
    yield {"op": "mixed, one after the other"}, in_turn, num_bytes
    yield {"op": "mixed, side by side"}, side_by_side, num_bytes


def flashinfer_verify(q: torch.Tensor, pool: Pool, shape: Shape) -> Callable[[], Any]:
    import flashinfer

    batch = pool.req_to_token.shape[0]
    length = int(pool.lens[0]) + NUM_DRAFT_TOKENS
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    step = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        step * NUM_DRAFT_TOKENS,
        step * length,
        pool.req_to_token[:, :length].flatten().contiguous(),
        torch.ones(batch, dtype=torch.int32, device=q.device),
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.head_dim,
        1,
        causal=True,
        sm_scale=pool.scale,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    flat, k, v = q.flatten(0, 1), pool.k.unsqueeze(1), pool.v.unsqueeze(1)
    return lambda: wrapper.run(flat, (k, v))


def sparse_verify_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    """A layer of a sparse verify (lossy): an anchor, which scores and chooses blocks, and one that reuses its choice.

    Bytes: K of the context to score it, K and V of the blocks that are read.
    """
    pool = make_pool(shape, batch, length, device)
    rule = BlockRule(ratio=0.25, dense_below=min(1024, length // 4), block_size=16)
    kv_pool = SimpleNamespace(
        head_num=shape.num_kv_heads, get_key_buffer=lambda _: pool.k, get_value_buffer=lambda _: pool.v
    )
    runner: Any = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=pool.req_to_token), token_to_kv_pool=kv_pool
    )
    config = SparseSpecConfig(selection="window")
    store = SelectionStore(num_layers=2, num_rows=batch, num_heads=1, max_budget=config.min_budget, device=device)
    verify = SparseVerify(runner, POLICIES["window"](config), store, batch * length, rule=rule, anchors=[0])
    num_queries = torch.full_like(pool.lens, NUM_DRAFT_TOKENS)
    max_len = pool.req_to_token.shape[1]
    verify.begin(FusedPlan(pool.rows, pool.lens, num_queries, NUM_DRAFT_TOKENS, max_len, is_sparse=True))
    q = torch.randn(batch, NUM_DRAFT_TOKENS, shape.num_q_heads, shape.head_dim, device=device).to(pool.k.dtype)
    scores = torch.empty(shape.num_kv_heads, batch * length, device=device)
    layers: list[Any] = [SimpleNamespace(layer_id=i, scaling=pool.scale, logit_cap=0.0) for i in range(2)]
    kept = int(num_kept_blocks(torch.tensor([length]), **rule._asdict()))
    read_bytes = pool.kv_bytes * kept * rule.block_size // max_len

    def score() -> Any:
        return block_scores(
            q[:, 0], pool.k, pool.req_to_token, pool.rows, pool.lens, block_size=rule.block_size, max_len=max_len
        )

    blocks = score()

    def choose() -> Any:
        return list_positions(
            blocks, pool.lens, rule, width=NUM_DRAFT_TOKENS, max_len=max_len, max_position=max_len - 1
        )

    what = {"blocks": f"{kept} of {-(-length // rule.block_size)}"}
    yield {"op": "block_scores", **what}, score, pool.kv_bytes // 2
    yield {"op": "list positions", **what}, choose, blocks.numel() * 4
    for name, wanted in (("", None), (", anchored scores", scores)):
        for layer, role, num_bytes in ((0, "anchor", pool.kv_bytes // 2 + read_bytes), (1, "reuses", read_bytes)):

            def attend(layer: int = layer, wanted: torch.Tensor | None = wanted) -> Any:
                return verify._attend(q, layers[layer], wanted, None)

            yield {"op": f"sparse verify, {role}{name}", **what}, attend, num_bytes


def selection_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    """Four layers at once; time and bytes are of all four."""
    num_layers = 4
    scores = torch.rand(num_layers, shape.num_kv_heads, batch * length, device=device)
    starts = torch.arange(batch, device=device) * length
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    budgets = torch.full_like(lens, max(192, length // 20))
    options: dict[str, Any] = {
        "max_budget": max(192, length // 20),
        "sink": 4,
        "recent_window": 32,
        "pooling": 8,
        "granularity": 1,
        "share_heads": True,
    }

    def with_torch() -> Any:
        return select_positions(scores, lens, budgets, score_starts=starts, max_len=length, **options)

    yield {"op": "select_positions, torch", "layers": num_layers}, with_torch, scores.numel() * 4
    if device == "cuda":
        from sglang_sparsespec.ops.select_positions.triton_impl import select_positions_triton

        yield (
            {"op": "select_positions, triton", "layers": num_layers},
            lambda: select_positions_triton(scores, lens, budgets, starts, max_len=length, **options),
            scores.numel() * 4,
        )


def sampling_cases(shape: Shape, batch: int, length: int, device: str) -> Iterator[Case]:
    """`batch` rows of `length` logits, in bfloat16; a ninth of them, with as many drafts, stop at a rejected one."""
    logits = (torch.randn(batch, 1, length, device=device) * 3).bfloat16()
    temperatures = torch.full((batch,), 0.6, device=device)
    coins = torch.rand(batch, device=device, dtype=torch.float64)
    stats = row_stats(logits, temperatures)
    yield {"op": "row_stats"}, lambda: row_stats(logits, temperatures), 2 * logits.numel()
    yield {"op": "sample_rows"}, lambda: sample_rows(logits, stats, temperatures, coins), 2 * logits.numel()

    num_reqs = batch // NUM_DRAFT_TOKENS
    if num_reqs == 0:
        return
    rows = logits[: num_reqs * NUM_DRAFT_TOKENS, 0].view(num_reqs, NUM_DRAFT_TOKENS, length)
    drafts = (rows[:, :-1] + torch.randn_like(rows[:, :-1])).contiguous()
    temperatures, coins = temperatures[:num_reqs], coins[:num_reqs]
    steps = torch.arange(num_reqs, device=device) % (NUM_DRAFT_TOKENS - 1)
    options: dict[str, Any] = {
        "steps": steps,
        "draft_logits": drafts,
        "draft_stats": row_stats(drafts, temperatures, steps=steps),
    }
    row_stats_of = row_stats(rows, temperatures)
    yield (
        {"op": "sample_rows, residual", "requests": num_reqs},
        lambda: sample_rows(rows, row_stats_of, temperatures, coins, **options),
        2 * 2 * num_reqs * length,
    )


def copy_gb_s(device: str) -> float:
    """Bytes read and written by a large copy, per second."""
    source = torch.empty((4 << 30) if device == "cuda" else (64 << 20), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device, 10) / 1e6


GROUPS = {
    "draft": draft_cases,
    "plain": plain_cases,
    "verify": verify_cases,
    "mixed": mixed_cases,
    "sparse-verify": sparse_verify_cases,
    "selection": selection_cases,
    "sampling": sampling_cases,
}
SIZES = {
    "draft": [(128, 4096), (128, 8192), (128, 16384), (32, 8192), (8, 8192), (1, 8192)],
    "plain": [(8, 256), (128, 256), (32, 2048), (32, 6144), (128, 6144), (8, 32768)],
    "verify": [(32, 4096), (128, 4096), (64, 8192), (32, 32768), (128, 16384), (8, 8192)],
    "mixed": [(128, 2930), (32, 11000)],
    "sparse-verify": [(32, 11619), (8, 32512), (128, 4096)],
    "selection": [(128, 3072), (64, 8192), (24, 16384)],
    # a draft step, and a verify, at batch 128
    "sampling": [(128, 151936), (1152, 151936)],
}
SMALL_SIZES = {
    "draft": [(2, 256)],
    "plain": [(2, 256)],
    "verify": [(2, 256)],
    "mixed": [(10, 256)],
    "sparse-verify": [(2, 256)],
    "selection": [(2, 256)],
    "sampling": [(18, 1000)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--group", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--shape", nargs="+", choices=[shape.name for shape in SHAPES], default=["qwen3-8b"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-gate", action="store_true", help="do not run the ops' tests first")
    parser.add_argument("--output", type=Path, help="JSON lines, one per row")
    args = parser.parse_args()
    if not args.no_gate:
        gate = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "ops")], check=False)
        if gate.returncode:
            sys.exit("the ops' tests are red: no number is printed. Their output is above.")
    bandwidth = copy_gb_s(args.device)
    origin = {**provenance(), "copy_gb_s": round(bandwidth, 1)}
    print(f"copy: {bandwidth:.0f} GB/s\n\n| shape | batch | tokens | op | ms | GB/s | share |")
    print("|---|---|---|---|---|---|---|")
    for shape in (shape for shape in SHAPES if shape.name in args.shape):
        for group in args.group:
            for batch, length in (SMALL_SIZES if args.device == "cpu" else SIZES)[group]:
                for what, run, num_bytes in GROUPS[group](shape, batch, length, args.device):
                    milliseconds = median_ms(run, args.device, args.repeats)
                    gb_s = num_bytes / milliseconds / 1e6
                    name = ", ".join(str(v) if k == "op" else f"{k} {v}" for k, v in what.items())
                    cells = (shape.name, batch, length, name, f"{milliseconds:.4f}", f"{gb_s:.0f}")
                    print("| " + " | ".join(map(str, cells)) + f" | {gb_s / bandwidth:.2f} |", flush=True)
                    if args.output:
                        row = {"shape": shape.name, "batch": batch, "tokens": length, **what, "ms": milliseconds}
                        with args.output.open("a") as file:
                            file.write(json.dumps({**row, "gb_s": gb_s, **origin}) + "\n")


if __name__ == "__main__":
    main()
