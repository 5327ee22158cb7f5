"""Hostile inputs for the attention ops, and what equality means for their results.

Every slot that no valid entry names holds NaN, slot 0 too; every index past a length is INT_MAX or -1; query rows
past a length are NaN; q is a slice of a wider tensor, as a fused projection yields it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

INT_MAX = 2**31 - 1

# (atol, rtol) of attention outputs, values of size about 1 (at most 5). float32: the order of a few hundred additions,
# and an exp that is good to some ulp. float16, bfloat16: the probabilities and the result are rounded once each, by
# half an ulp of 2^-10 or 2^-7. A wrong mask, slot or scale errs by 0.1 and more.
OUTPUT_TOLERANCE = {
    torch.float32: (2e-6, 2e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 8e-3),
}
# (atol, rtol) of scores: products of 16-bit numbers are exact in float32, so every dtype has the bound of float32 sums.
# Logits reach 10, where one ulp is 1e-6 and goes into the exponent.
SCORE_TOLERANCE = (1e-7, 2e-5)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def skip_unless_interpretable(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as bit patterns; a GPU covers it")


def assert_output_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol, rtol = OUTPUT_TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual), atol=atol, rtol=rtol)


def assert_scores_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    atol, rtol = SCORE_TOLERANCE
    torch.testing.assert_close(actual, expected.to(actual), atol=atol, rtol=rtol)


def garbage(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(shape, generator=generator) < 0.5, INT_MAX, -1).to(torch.int32)


def make_pool(
    num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [num_slots, H, D], NaN everywhere; layouts: two tensors, interleaved slots, or heads in padded rows."""
    if layout == "interleaved":
        pool = torch.full((num_slots, 2, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        return pool[:, 0], pool[:, 1]
    if layout == "padded":
        pool = torch.full((num_slots, num_kv_heads, 2 * head_dim + 8), torch.nan, dtype=dtype)
        return pool[..., :head_dim], pool[..., head_dim : 2 * head_dim]
    return (
        torch.full((num_slots, num_kv_heads, head_dim), torch.nan, dtype=dtype),
        torch.full((num_slots, num_kv_heads, head_dim), torch.nan, dtype=dtype),
    )


def fill_slots(
    caches: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for cache in caches:
        cache[slots] = torch.randn(len(slots), *cache.shape[1:], generator=generator).to(dtype)


class ListedCase(NamedTuple):
    """Arguments of sparse_decode."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_slots: torch.Tensor
    kv_lens: torch.Tensor

    def to(self, device: torch.device) -> ListedCase:
        return ListedCase(*(tensor.to(device) for tensor in self))


def make_listed_case(
    kv_lens: list[int],
    *,
    width: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    is_shared: bool = False,
    layout: str = "plain",
    seed: int = 0,
) -> ListedCase:
    generator = torch.Generator().manual_seed(seed)
    num_reqs, num_lists = len(kv_lens), 1 if is_shared else num_kv_heads
    num_used = width * 2 + 1
    num_slots = 2 * num_used
    caches = make_pool(num_slots, num_kv_heads, head_dim, dtype, generator, layout)
    used = 1 + torch.randperm(num_slots - 1, generator=generator)[:num_used]
    fill_slots(caches, used, dtype, generator)
    kv_slots = garbage((num_reqs, num_lists, width), generator)
    for r, kv_len in enumerate(kv_lens):
        for h in range(num_lists):
            kv_slots[r, h, :kv_len] = used[torch.randperm(num_used, generator=generator)[:kv_len]].int()
    wide = torch.randn(num_reqs, num_kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    q = wide[:, : num_kv_heads * group]
    return ListedCase(q, *caches, kv_slots, torch.tensor(kv_lens, dtype=torch.int32))


class PagedCase(NamedTuple):
    """Positional arguments of paged_attention; capture_scores takes them without v_cache."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor

    def to(self, device: torch.device) -> PagedCase:
        return PagedCase(*(tensor.to(device) for tensor in self))

    def without_value(self) -> tuple[torch.Tensor, ...]:
        return (self.q, self.k_cache, *self[3:])


def make_paged_case(
    spans: list[tuple[int, int]],
    *,
    num_queries: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    layout: str = "plain",
    seed: int = 0,
    query_step: int = 1,
) -> PagedCase:
    """`spans` holds (query_start, query_len) of each request; one with query_len 0 is padding and owns no slots."""
    generator = torch.Generator().manual_seed(seed)
    kv_lens = [start + (length - 1) * query_step + 1 if length else 0 for start, length in spans]
    num_slots = 2 * sum(kv_lens) + 2
    caches = make_pool(num_slots, num_kv_heads, head_dim, dtype, generator, layout)
    used = 1 + torch.randperm(num_slots - 1, generator=generator)[: sum(kv_lens)]
    fill_slots(caches, used, dtype, generator)
    pool_rows = torch.randperm(len(spans) + 2, generator=generator)[: len(spans)]
    req_to_token = garbage((len(spans) + 2, max(kv_lens) + 100), generator)
    first = 0
    for row, kv_len in zip(pool_rows.tolist(), kv_lens, strict=True):
        req_to_token[row, :kv_len] = used[first : first + kv_len].int()
        first += kv_len
    wide = torch.randn(len(spans), num_queries, num_kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    q = wide[:, :, : num_kv_heads * group]
    for r, (_, length) in enumerate(spans):
        q[r, length:] = torch.nan
    starts, lens = zip(*spans, strict=True)
    return PagedCase(
        q,
        *caches,
        req_to_token,
        pool_rows,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
    )
