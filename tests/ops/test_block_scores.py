"""block_scores against its reference; the inputs of kv_cases.py make every out-of-contract read visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kv_cases import DTYPES, PagedCase, make_paged_case

from sglang_sparsespec.ops import _paged
from sglang_sparsespec.ops.block_scores import block_scores, torch_impl
from sglang_sparsespec.ops.block_scores.reference import block_scores_reference
from sglang_sparsespec.sparsity import attention as rule

if TYPE_CHECKING:
    from collections.abc import Callable

# lengths: padding, one, around blocks of 16 and 24, odd sizes
KV_LENS = [0, 1, 15, 16, 24, 33, 70]
# sums of up to 160 products of size about 1; float32 sums in another order
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def implementation(backend: str) -> Callable[..., torch.Tensor]:
    if backend == "cpu":
        return block_scores
    if backend == "torch-cuda":
        return torch_impl.block_scores_torch
    from sglang_sparsespec.ops.block_scores.triton_impl import block_scores_triton

    return block_scores_triton


def make_case(
    dtype: torch.dtype = torch.float32, layout: str = "plain", group: int = 2, head_dim: int = 20, kv_heads: int = 2
) -> PagedCase:
    """Every slot and page-table entry that no valid position names holds NaN or an index out of range."""
    spans = [(kv_len - 1, 1) if kv_len else (0, 0) for kv_len in KV_LENS]
    case = make_paged_case(
        spans, num_queries=1, num_kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype, layout=layout
    )
    case.q[0] = 0.0  # padding feeds something finite
    return case


def arguments(case: PagedCase) -> tuple[torch.Tensor, ...]:
    kv_lens = torch.tensor(KV_LENS, dtype=torch.int32, device=case.q.device)
    return case.q[:, 0], case.k_cache, case.req_to_token, case.req_pool_indices, kv_lens


def check(backend: str, device: torch.device, case: PagedCase, block_size: int, max_len: int) -> torch.Tensor:
    actual = implementation(backend)(*arguments(case.to(device)), block_size=block_size, max_len=max_len).cpu()
    expected = block_scores_reference(*arguments(case), block_size=block_size, max_len=max_len)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    for r, kv_len in enumerate(KV_LENS):
        assert (actual[r, :, -(-kv_len // block_size) :] == 0).all()
    return actual


@pytest.mark.parametrize(
    ("dtype", "block_size"), [*((dtype, 16) for dtype in DTYPES), (torch.float32, 3), (torch.float32, 24)], ids=str
)
def test_matches_reference_over_ragged_requests(
    backend: str, device: torch.device, dtype: torch.dtype, block_size: int
) -> None:
    """A mean over positions past the length, or a block that is cut at a tile's edge, would pass without it."""
    check(backend, device, make_case(dtype), block_size, max_len=70)


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(7, 80, 100), (16, 128, 32)])
def test_matches_reference_for_each_head_shape(
    backend: str, device: torch.device, group: int, head_dim: int, block_size: int
) -> None:
    """Query heads of the next group, padding of the head dim, or a block longer than a tile."""
    check(backend, device, make_case(group=group, head_dim=head_dim, kv_heads=2), block_size, max_len=70)


@pytest.mark.parametrize("max_len", [77, 161])
def test_loose_bound_and_strided_pools(backend: str, device: torch.device, max_len: int) -> None:
    """Blocks past every length that are left unwritten, or a pool taken for contiguous, would pass."""
    check(backend, device, make_case(layout="interleaved"), 16, max_len)


@pytest.mark.only_backend("cpu")
def test_steps_do_not_change_the_result(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block lost between two steps would pass where all fit into one."""
    for step_bytes in (1, 200_000, _paged.CPU_STEP_BYTES):
        monkeypatch.setattr(torch_impl, "CPU_STEP_BYTES", step_bytes)
        check(backend, device, make_case(), 16, max_len=83)


@pytest.mark.only_backend("cpu")
def test_is_the_rule_of_one_request(backend: str) -> None:
    """The op would score by another rule than the one that the quality of a sparse verify was measured with."""
    q, k_cache, table, rows, lens = arguments(make_case())
    scores = block_scores(q, k_cache, table, rows, lens, block_size=16, max_len=70)
    for r, kv_len in enumerate(KV_LENS):
        keys = k_cache[table[rows[r], :kv_len].long()]
        expected = rule.block_scores(q[r], keys, kv_len, 16)
        torch.testing.assert_close(scores[r, :, : expected.shape[1]], expected, **TOLERANCE)


def test_nothing_to_score(backend: str, device: torch.device) -> None:
    """An empty batch or context must not launch over nothing."""
    q, k_cache, table, rows, lens = arguments(make_case().to(device))
    run = implementation(backend)
    assert run(q[:0], k_cache, table, rows[:0], lens[:0], block_size=4, max_len=9).shape == (0, 2, 3)
    assert run(q, k_cache, table, rows, lens * 0, block_size=4, max_len=0).shape == (len(KV_LENS), 2, 0)


def test_rejects_wrong_arguments() -> None:
    """A block of no positions, a table that is too narrow, or lengths that are no integers would go through."""
    q, k_cache, table, rows, lens = arguments(make_case())
    with pytest.raises(ValueError, match="block_size"):
        block_scores(q, k_cache, table, rows, lens, block_size=0, max_len=9)
    with pytest.raises(ValueError, match="max_len"):
        block_scores(q, k_cache, table, rows, lens, block_size=4, max_len=table.shape[1] + 1)
    with pytest.raises(ValueError, match="kv_lens"):
        block_scores(q, k_cache, table, rows, lens.float(), block_size=4, max_len=9)
    with pytest.raises(ValueError, match="k_cache"):
        block_scores(q.half(), k_cache, table, rows, lens, block_size=4, max_len=9)
