"""Every Triton kernel compiles for a GPU, on a machine without one: the interpreter takes what the compiler refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

HOPPER = ("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches compile and run nothing; the names of what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for parameter in self.params:
            value = given.get(parameter.name, parameter.default)
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                # as the runtime does, which makes a constant of it
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget(*HOPPER), options=options)
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return names


def paged(dtype: torch.dtype, head_dim: int, group: int, num_queries: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, and the table of two requests of 64 tokens."""
    q = torch.zeros(2, num_queries, 2 * group, head_dim, dtype=dtype)
    pool = torch.zeros(160, 2, head_dim, dtype=dtype)
    table = torch.arange(160, dtype=torch.int32).view(2, 80)
    rows, lens = torch.arange(2), torch.tensor([64, 50], dtype=torch.int32)
    return q, pool, pool, table, rows, lens, torch.full_like(lens, num_queries)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [(torch.bfloat16, 128, 4), (torch.bfloat16, 80, 1), (torch.bfloat16, 256, 16), (torch.float32, 64, 3)],
)
def test_attention_compiles(compiled: list[str], dtype: torch.dtype, head_dim: int, group: int) -> None:
    from sglang_sparsespec.ops._paged_kernels import attend_paged_triton
    from sglang_sparsespec.ops.sparse_decode.triton_impl import sparse_decode_triton

    q, k, v, *table = paged(dtype, head_dim, group, num_queries=9)
    options: dict[str, Any] = {"scale": 0.1, "max_len": 80, "num_splits": 2}
    attend_paged_triton(q, k, v, *table, table[2], logit_cap=30.0, **options)
    scores, starts = torch.zeros(2, 128), torch.tensor([0, 64])
    attend_paged_triton(q, k, v, *table, None, logit_cap=0.0, anchored_scores=scores, score_starts=starts, **options)
    slots, lens = torch.zeros(2, 2, 40, dtype=torch.int32), torch.tensor([40, 3], dtype=torch.int32)
    sparse_decode_triton(q[:, 0], k, v, slots, lens, scale=0.1, num_splits=2)
    sparse_decode_triton(q[:, 0], k, v, slots[:, :1], lens, scale=0.1, logit_cap=30.0, num_splits=1)
    sparse_decode_triton(q[:, 0], k, v, slots[:, :1], lens, scale=0.1, kv_rows=lens, num_splits=1)
    assert (compiled.count("_attend_kernel"), compiled.count("_sparse_attend_kernel")) == (2, 3)


@pytest.mark.parametrize(("dtype", "block_size"), [(torch.bfloat16, 16), (torch.float32, 100)])
def test_block_scores_compile(compiled: list[str], dtype: torch.dtype, block_size: int) -> None:
    from sglang_sparsespec.ops.block_scores.triton_impl import block_scores_triton

    q, k, _, table, rows, lens, _ = paged(dtype, head_dim=80, group=3, num_queries=1)
    block_scores_triton(q[:, 0], k, table, rows, lens, block_size=block_size, max_len=80)
    assert compiled == ["_block_scores_kernel"]


@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize(("granularity", "pooling"), [(1, 8), (16, 0)])
def test_selection_compiles(compiled: list[str], granularity: int, pooling: int, share_heads: bool) -> None:
    from sglang_sparsespec.ops.select_positions.triton_impl import select_positions_triton

    lens = torch.tensor([90, 17], dtype=torch.int32)
    select_positions_triton(
        torch.zeros(3, 2, 128),
        lens,
        lens,
        torch.tensor([0, 90]),
        max_len=90,
        max_budget=32,
        sink=4,
        recent_window=8,
        pooling=pooling,
        granularity=granularity,
        share_heads=share_heads,
    )
    assert compiled == ["_select_kernel"]


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "has_greedy"),
    [(torch.bfloat16, 151936, True), (torch.float32, 151936, False), (torch.float16, 1, True)],
)
def test_sampling_compiles(compiled: list[str], dtype: torch.dtype, vocab_size: int, has_greedy: bool) -> None:
    """A draw from one row of each request, and an acceptance with drafts that were sampled or chosen."""
    from sglang_sparsespec.ops.row_stats.triton_impl import row_stats_triton, token_probs_triton
    from sglang_sparsespec.ops.sample_rows.triton_impl import sample_rows_triton

    temperatures, coins = torch.ones(2), torch.zeros(2, dtype=torch.float64)
    is_greedy = torch.tensor([False, True]) if has_greedy else None
    steps, tokens = torch.tensor([0, 3]), torch.zeros(2, 3, dtype=torch.int32)
    for width, num_drafts in ((1, 0), (4, 3)):
        logits = torch.zeros(2, width, vocab_size, dtype=dtype)
        floors = torch.zeros(2, width) if dtype == torch.bfloat16 else None
        stats = row_stats_triton(logits, temperatures, None, floors)
        if num_drafts == 0:
            sample_rows_triton(logits, stats, temperatures, coins, is_greedy=is_greedy)
            continue
        token_probs_triton(logits, stats, temperatures, tokens, is_greedy)
        drafts = logits[:, :num_drafts]
        q_floors = None if floors is None else floors[:, 0].contiguous()
        kept = {"draft_logits": drafts, "draft_stats": row_stats_triton(drafts, temperatures, steps, q_floors)}
        for options in (kept, {"draft_tokens": tokens}):
            sample_rows_triton(logits, stats, temperatures, coins, steps=steps, is_greedy=is_greedy, **options)
    assert compiled == [
        *["_tile_kernel", "_merge_kernel", "_mass_kernel", "_pick_kernel"],
        *["_tile_kernel", "_merge_kernel", "_token_kernel", "_tile_kernel", "_merge_kernel"],
        *["_mass_kernel", "_pick_kernel"] * 2,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_moves_of_kv_compile(compiled: list[str], dtype: torch.dtype) -> None:
    from sglang_sparsespec.ops.kv_tokens import KvBuffers
    from sglang_sparsespec.ops.kv_tokens.triton_impl import gather_tokens_triton, scatter_tokens_triton

    pool = KvBuffers([torch.zeros(40, 2, 3, dtype=dtype) for _ in range(4)])
    rows = torch.zeros(16, pool.width, dtype=dtype)
    gather_tokens_triton(pool, torch.arange(9), rows[:9])
    scatter_tokens_triton(pool, torch.arange(9, dtype=torch.int32), rows[2:11])
    assert compiled == ["_move_kernel"] * 2
