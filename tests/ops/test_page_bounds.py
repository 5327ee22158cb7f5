"""page_bounds against its reference, and the one property that a page's bounds are for."""

from __future__ import annotations

import pytest
import torch
from kv_cases import DTYPES, PagedCase, make_paged_case

from sglang_sparsespec.ops import _paged
from sglang_sparsespec.ops.page_bounds import page_bounds, torch_impl
from sglang_sparsespec.ops.page_bounds.reference import page_bounds_reference

# lengths: padding, one, around pages of 4, 8 and 16, odd sizes
KV_LENS = [0, 1, 3, 4, 15, 16, 17, 33, 100]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make_case(dtype: torch.dtype = torch.float32, layout: str = "plain") -> PagedCase:
    """Every slot and page-table entry that no valid position names holds NaN or an index out of range."""
    spans = [(kv_len - 1, 1) if kv_len else (0, 0) for kv_len in KV_LENS]
    return make_paged_case(spans, num_queries=1, num_kv_heads=3, group=2, head_dim=20, dtype=dtype, layout=layout)


def arguments(case: PagedCase) -> tuple[torch.Tensor, ...]:
    kv_lens = torch.tensor(KV_LENS, dtype=torch.int32, device=case.q.device)
    return case.k_cache, case.req_to_token, case.req_pool_indices, kv_lens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 8, 16])
@pytest.mark.parametrize("layout", ["plain", "interleaved"])
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, page_size: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that counts positions past the length, a page cut at a step's edge, or a lost page would pass."""
    case = make_case(dtype, layout).to(device)
    for max_len in (100, 107, 113):
        expected = page_bounds_reference(*arguments(case), page_size=page_size, max_len=max_len)
        for step_bytes in (1, 200_000, _paged.CPU_STEP_BYTES):
            monkeypatch.setattr(torch_impl, "CPU_STEP_BYTES", step_bytes)
            monkeypatch.setattr(torch_impl, "DEVICE_STEP_BYTES", step_bytes)
            actual = page_bounds(*arguments(case), page_size=page_size, max_len=max_len)
            assert actual.dtype == dtype
            assert torch.equal(actual, expected)
    assert not torch.isnan(expected).any()


def test_bounds_every_logit_of_the_page() -> None:
    """Upper and lower swapped, or a bound of the wrong head, would pass against a reference with the same slip."""
    case = make_case()
    query = torch.randn(len(KV_LENS), 3, 20)
    upper, lower = page_bounds(*arguments(case), page_size=16, max_len=100).unbind(dim=3)
    bound = torch.maximum(query[:, :, None] * upper, query[:, :, None] * lower).sum(-1)
    for r, kv_len in enumerate(KV_LENS):
        slots = case.req_to_token[int(case.req_pool_indices[r]), :kv_len].long()
        logits = torch.einsum("nhd,hd->hn", case.k_cache[slots], query[r])
        for p in range(kv_len):
            assert (logits[:, p] <= bound[r, :, p // 16] + 1e-5).all()


def test_nothing_to_bound(device: torch.device) -> None:
    """An empty batch or context must not launch over nothing."""
    k_cache, req_to_token, rows, kv_lens = arguments(make_case().to(device))
    assert page_bounds(k_cache, req_to_token, rows[:0], kv_lens[:0], page_size=4, max_len=9).shape == (0, 3, 3, 2, 20)
    assert page_bounds(k_cache, req_to_token, rows, kv_lens * 0, page_size=4, max_len=0).shape == (9, 3, 0, 2, 20)


def test_rejects_wrong_arguments() -> None:
    """A page of no positions, or a table that is too narrow, would go through."""
    k_cache, req_to_token, rows, kv_lens = arguments(make_case())
    with pytest.raises(ValueError, match="page_size"):
        page_bounds(k_cache, req_to_token, rows, kv_lens, page_size=0, max_len=9)
    with pytest.raises(ValueError, match="max_len"):
        page_bounds(k_cache, req_to_token, rows, kv_lens, page_size=4, max_len=req_to_token.shape[1] + 1)
    with pytest.raises(ValueError, match="kv_lens"):
        page_bounds(k_cache, req_to_token, rows, kv_lens.float(), page_size=4, max_len=9)
