"""paged_attention against its reference; the inputs of kv_cases.py make every out-of-contract read visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from kv_cases import (
    DTYPES,
    PagedCase,
    assert_output_close,
    assert_scores_close,
    make_paged_case,
    skip_unless_interpretable,
)

from sglang_sparsespec.ops import _paged
from sglang_sparsespec.ops.paged_attention import paged_attention
from sglang_sparsespec.ops.paged_attention.reference import anchored_scores_reference, paged_attention_reference
from sglang_sparsespec.ops.paged_attention.torch_impl import paged_attention_torch

if TYPE_CHECKING:
    from collections.abc import Callable

# (query_start, query_len): nothing cached, padding, one query, fewer than T, lengths around the tiles of 32 and 64
SPANS = [(0, 4), (70, 0), (0, 1), (30, 3), (60, 4), (61, 4), (124, 3)]


def implementation(backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if backend == "triton":
        from sglang_sparsespec.ops.paged_attention.triton_impl import paged_attention_triton

        return paged_attention_triton
    return paged_attention if backend == "cpu" else paged_attention_torch


def check(backend: str, device: torch.device, case: PagedCase, max_len: int, **options: float) -> None:
    """Once without scores and once with them."""
    options["scale"] = case.q.shape[-1] ** -0.5
    score_lens = case.query_starts + 1
    run, moved = implementation(backend), case.to(device)
    plain, no_scores = run(*moved, max_len=max_len, **options)
    out, scores = run(*moved, max_len=max_len, score_lens=score_lens.to(device), **options)
    options.pop("num_splits", None)
    expected, expected_scores = paged_attention_reference(*case, max_len=max_len, score_lens=score_lens, **options)
    assert no_scores is None
    assert scores is not None
    assert expected_scores is not None
    assert plain.dtype == out.dtype == case.q.dtype
    assert_output_close(plain.cpu(), expected)
    assert_output_close(out.cpu(), expected)
    assert_scores_close(scores.cpu(), expected_scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_over_ragged_requests(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A causal bound off by one, padding that is read or written, or a request put back in another's row would pass."""
    skip_unless_interpretable(backend, device, dtype)
    case = make_paged_case(SPANS, num_queries=4, num_kv_heads=2, group=3, head_dim=64, dtype=dtype)
    check(backend, device, case, max_len=131)


@pytest.mark.parametrize(
    ("group", "head_dim", "num_queries"), [(1, 64, 1), (4, 80, 3), (8, 96, 9), (16, 128, 2), (1, 256, 2)]
)
def test_matches_reference_for_each_head_shape(
    backend: str, device: torch.device, group: int, head_dim: int, num_queries: int
) -> None:
    """Query rows beyond one tile, and padding of rows or of the head dim that leaks into sums, would pass."""
    spans = [(20, num_queries), (3, max(1, num_queries - 1))]
    case = make_paged_case(
        spans, num_queries=num_queries, num_kv_heads=1, group=group, head_dim=head_dim, dtype=torch.float16
    )
    check(backend, device, case, max_len=40)


@pytest.mark.parametrize("layout", ["interleaved", "padded"])
def test_caps_logits_and_reads_strided_pools(backend: str, device: torch.device, layout: str) -> None:
    """A cap forgotten in one of the paths, or a pool taken for contiguous, would pass."""
    case = make_paged_case(
        [(40, 3), (5, 2)], num_queries=3, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32, layout=layout
    )
    check(backend, device, case, max_len=43, logit_cap=0.5)
    check(backend, device, case, max_len=43)


def test_writes_where_it_is_told(backend: str, device: torch.device) -> None:
    """A part of an output that several calls fill: what is left unwritten, or written next to it."""
    case = make_paged_case(SPANS, num_queries=4, num_kv_heads=2, group=3, head_dim=64, dtype=torch.float32)
    options = {"scale": 0.125, "max_len": 131}
    whole = torch.full((len(SPANS) + 2, *case.q.shape[1:]), torch.nan, device=device)
    out, _ = implementation(backend)(*case.to(device), out=whole[1:-1], **options)
    assert out.data_ptr() == whole[1].data_ptr()
    expected, _ = paged_attention_reference(*case, **options)
    assert_output_close(whole[1:-1].cpu(), expected)
    assert whole[[0, -1]].isnan().all()
    if backend == "cpu":
        strided = torch.empty(*case.q.shape[:-1], 2 * case.q.shape[-1])[..., ::2]
        with pytest.raises(ValueError, match="out: expected a contiguous"):
            paged_attention(*case, out=strided, **options)


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("num_splits", [1, 4])
def test_splits_merge_to_the_same_result(backend: str, device: torch.device, num_splits: int) -> None:
    """A share that early queries do not see at all was never written; reading it would pass with one split."""
    spans = [(62, 5), (126, 5), (0, 2)]
    case = make_paged_case(spans, num_queries=5, num_kv_heads=1, group=2, head_dim=64, dtype=torch.float16)
    check(backend, device, case, max_len=135, num_splits=num_splits)


@pytest.mark.only_backend("cpu", "torch-cuda")
@pytest.mark.parametrize("step_bytes", [1, 100_000])
def test_steps_do_not_change_the_result(
    backend: str, device: torch.device, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splitting by rows, heads or queries happens at sizes that no other test reaches; a bug in it would pass."""
    monkeypatch.setattr(_paged, "CPU_STEP_BYTES", step_bytes)
    monkeypatch.setattr(_paged, "DEVICE_STEP_BYTES", step_bytes)
    spans = [(0, 20), (25, 18), (9, 20), (100, 1)]
    case = make_paged_case(spans, num_queries=20, num_kv_heads=2, group=1, head_dim=64, dtype=torch.float32)
    check(backend, device, case, max_len=105)


def test_matches_dense_prefill_of_torch() -> None:
    """The reference shares our reading of positions; torch's own causal attention does not."""
    case = make_paged_case([(0, 33)], num_queries=33, num_kv_heads=3, group=3, head_dim=64, dtype=torch.float32)
    out, _ = paged_attention(*case, scale=0.125, max_len=33)
    slots = case.req_to_token[case.req_pool_indices[0], :33].long()
    k, v = (cache[slots].transpose(0, 1)[None] for cache in (case.k_cache, case.v_cache))
    q = case.q.transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    assert_output_close(out, expected.transpose(1, 2))


def test_no_queries_at_all(backend: str, device: torch.device) -> None:
    """A launch over an empty grid would pass."""
    case = make_paged_case([(4, 0), (0, 0)], num_queries=2, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    check(backend, device, case, max_len=8)


def test_groups_bound_padding() -> None:
    """Padding a short request to the longest of the batch would pass every test of values."""
    kv_lens = [8000, 7000, 500, 450, 8000, 6500, 30, 0, 90]
    groups = _paged.group_requests([1, 1, 1, 1, 1, 1, 1, 0, 1], kv_lens)
    assert sorted(r for group in groups for r in group.rows) == [0, 1, 2, 3, 4, 5, 6, 8]
    for group in groups:
        assert group.kv_len == max(kv_lens[r] for r in group.rows)
        padding = sum(group.kv_len - kv_lens[r] for r in group.rows)
        assert padding <= max(0.25 * sum(kv_lens[r] for r in group.rows), 64 * len(group.rows))
    assert len(groups) == 3


def test_groups_separate_prefill_from_decode() -> None:
    """One prefill in the batch would pad every decode to its query length."""
    groups = _paged.group_requests([1, 2048, 1, 2000], [3000, 3000, 3000, 2900])
    assert [(group.rows, group.num_queries) for group in groups] == [([1, 3], 2048), ([0, 2], 1)]


def check_anchored(backend: str, device: torch.device, case: PagedCase, max_len: int, **options: float) -> None:
    """The output as without scores, and scores below each query_start, one request after the other in a buffer."""
    options["scale"] = case.q.shape[-1] ** -0.5
    lens = case.query_starts.long()
    # with a gap before each, in another order than the requests
    starts = (lens + 3).flip(0).cumsum(0).flip(0) - lens
    wide = torch.full((3, case.k_cache.shape[1], int(lens.sum()) + 3 * len(lens) + 3), torch.nan, device=device)
    arguments = {"anchored_scores": wide[1], "score_starts": starts.to(device), "max_len": max_len, **options}
    out, no_scores = implementation(backend)(*case.to(device), **arguments)
    options.pop("num_splits", None)
    expected, _ = paged_attention_reference(*case, max_len=max_len, **options)
    expected_scores = anchored_scores_reference(*case.without_value(), max_len=max_len, **options)
    assert_output_close(out.cpu(), expected)
    assert no_scores is None
    assert wide[[0, 2]].isnan().all()
    for r, (start, length) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        if case.query_lens[r]:
            actual = wide[1, :, start : start + length].cpu()
            # relative to a sum over at most 64 anchors, computed in another order: a few ulp more than a softmax
            torch.testing.assert_close(actual, expected_scores[r, :, :length], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchored_scores_match_reference(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """An anchor twice, past the start or missing, a padded row in the mean, or a write beside the buffer would pass."""
    skip_unless_interpretable(backend, device, dtype)
    spans = [*SPANS, (63, 4), (64, 2), (65, 1), (16, 4), (1, 4)]
    case = make_paged_case(spans, num_queries=4, num_kv_heads=2, group=3, head_dim=64, dtype=dtype)
    check_anchored(backend, device, case, max_len=131)


@pytest.mark.parametrize(("group", "head_dim", "num_queries"), [(1, 64, 1), (8, 80, 9), (16, 64, 5), (2, 256, 2)])
def test_anchored_scores_for_each_head_shape(
    backend: str, device: torch.device, group: int, head_dim: int, num_queries: int
) -> None:
    """Query rows beyond one tile would be lost from the mean, or counted in each."""
    spans = [(70, num_queries), (3, max(1, num_queries - 1))]
    case = make_paged_case(
        spans, num_queries=num_queries, num_kv_heads=1, group=group, head_dim=head_dim, dtype=torch.float16
    )
    check_anchored(backend, device, case, max_len=90)
    check_anchored(backend, device, case, max_len=90, logit_cap=2.0)


@pytest.mark.only_backend("triton")
def test_anchored_scores_do_not_depend_on_splits(backend: str, device: torch.device) -> None:
    """A normaliser that a share made from what it saw itself would pass with one split."""
    case = make_paged_case([(200, 3), (0, 2)], num_queries=3, num_kv_heads=1, group=2, head_dim=64, dtype=torch.float16)
    for num_splits in (1, 4):
        check_anchored(backend, device, case, max_len=210, num_splits=num_splits)


def test_anchored_scores_are_bounded(backend: str, device: torch.device) -> None:
    """A position far above all anchors would overflow to infinity, and infinity times zero to NaN."""
    case = make_paged_case([(128, 2)], num_queries=2, num_kv_heads=1, group=2, head_dim=64, dtype=torch.float32)
    case.q.mul_(40.0)
    scores = torch.full((1, 130), torch.nan, device=device)
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    implementation(backend)(*case.to(device), max_len=130, anchored_scores=scores, score_starts=starts, scale=1.0)
    assert (scores[:, :128] >= 0).all()
    assert (scores[:, :128] <= 1).all()
    assert scores[:, :128].max() > 0.2


def test_a_kv_head_can_be_a_request_of_its_own(backend: str, device: torch.device) -> None:
    """A sparse verify reads other positions in each head: one page table per head, and the pool's heads end to end."""
    case = make_paged_case(SPANS, num_queries=4, num_kv_heads=2, group=3, head_dim=64, dtype=torch.float32)
    table = case.req_to_token[case.req_pool_indices][:, None] * 2 + torch.arange(2, dtype=torch.int32)[:, None]
    by_head = PagedCase(
        case.q.unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1),
        case.k_cache.flatten(0, 1)[:, None],
        case.v_cache.flatten(0, 1)[:, None],
        table.flatten(0, 1),
        torch.arange(2 * len(SPANS)),
        case.query_starts.repeat_interleave(2),
        case.query_lens.repeat_interleave(2),
    )
    out, _ = implementation(backend)(*by_head.to(device), max_len=131, scale=0.125)
    expected, _ = paged_attention_reference(*case, max_len=131, scale=0.125)
    assert_output_close(out.cpu().unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3), expected)
    check_anchored(backend, device, by_head, max_len=131)


def test_refuses_two_kinds_of_scores() -> None:
    """One of the two would be left out without a word."""
    case = make_paged_case([(4, 1)], num_queries=1, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    anchored = {"anchored_scores": torch.zeros(1, 8), "score_starts": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="score_lens"):
        paged_attention(*case, scale=1.0, max_len=8, score_lens=case.query_starts, **anchored)
    with pytest.raises(ValueError, match="score_starts"):
        paged_attention(*case, scale=1.0, max_len=8, anchored_scores=anchored["anchored_scores"])
    with pytest.raises(ValueError, match="anchored_scores"):
        paged_attention(*case, scale=1.0, max_len=8, **{**anchored, "anchored_scores": torch.zeros(2, 8)})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_refuses_a_scale_that_turns_logits_around(scale: float) -> None:
    """The kernel takes the maximum before it scales."""
    case = make_paged_case([(4, 1)], num_queries=1, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="scale: expected a factor above 0"):
        paged_attention(*case, scale=scale, max_len=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 9, 40])
def test_public_function_matches_reference_at_size(dtype: torch.dtype, num_queries: int) -> None:
    """Dispatch to the kernel, or to torch for a prefill, and the choice of splits would go untested."""
    spans = [(2000, num_queries), (0, 0), (1023, num_queries), (0, 1)]
    case = make_paged_case(spans, num_queries=num_queries, num_kv_heads=2, group=4, head_dim=128, dtype=dtype)
    case = case.to(torch.device("cuda"))
    options = {"scale": 128**-0.5, "max_len": 2100, "score_lens": case.query_starts}
    out, scores = paged_attention(*case, **options)
    expected, expected_scores = paged_attention_reference(*case, **options)
    assert_output_close(out, expected)
    assert_scores_close(scores, expected_scores)


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths() -> None:
    """A length or grid fixed at capture would pass every eager test."""
    case = make_paged_case(
        [(500, 9), (90, 9)], num_queries=9, num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16
    ).to(torch.device("cuda"))
    options = {"scale": 128**-0.5, "max_len": 600, "score_lens": case.query_starts}
    paged_attention(*case, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, scores = paged_attention(*case, **options)
    case.query_starts.copy_(torch.tensor([77, 0]))
    case.query_lens.copy_(torch.tensor([4, 0]))
    graph.replay()
    expected, expected_scores = paged_attention_reference(*case, **options)
    assert_output_close(out, expected)
    assert_scores_close(scores, expected_scores)
