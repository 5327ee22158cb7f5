"""capture_scores against its reference; the inputs of kv_cases.py make every out-of-contract read visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kv_cases import DTYPES, PagedCase, assert_scores_close, make_paged_case, skip_unless_interpretable

from sglang_sparsespec.ops.score_capture import capture_scores
from sglang_sparsespec.ops.score_capture.reference import capture_scores_reference
from sglang_sparsespec.ops.score_capture.torch_impl import capture_scores_torch

if TYPE_CHECKING:
    from collections.abc import Callable

# (query_start, query_len): nothing cached, padding, one query, fewer than T, lengths around the tiles of 32 and 64
SPANS = [(0, 4), (70, 0), (0, 1), (30, 3), (60, 4), (61, 4), (124, 3)]


def implementation(backend: str) -> Callable[..., torch.Tensor]:
    if backend == "triton":
        from sglang_sparsespec.ops.score_capture.triton_impl import capture_scores_triton

        return capture_scores_triton
    return capture_scores if backend == "cpu" else capture_scores_torch


def check(
    backend: str, device: torch.device, case: PagedCase, score_lens: torch.Tensor, max_len: int, **options: float
) -> torch.Tensor:
    options["scale"] = case.q.shape[-1] ** -0.5
    moved = case.to(device).without_value()
    actual = implementation(backend)(*moved, score_lens.to(device), max_len=max_len, **options).cpu()
    options.pop("num_splits", None)
    expected = capture_scores_reference(*case.without_value(), score_lens, max_len=max_len, **options)
    assert_scores_close(actual, expected)
    for r, score_len in enumerate(score_lens.tolist()):
        last_query = int(case.query_starts[r] + (case.query_lens[r] - 1) * options.get("query_step", 1))
        end = min(score_len, last_query + 1) if case.query_lens[r] else 0
        assert (actual[r, :, end:] == 0).all()
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_over_ragged_requests(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A causal bound off by one, a mean over padded queries, or a read past a length would pass without it."""
    skip_unless_interpretable(backend, device, dtype)
    case = make_paged_case(SPANS, num_queries=4, num_kv_heads=2, group=3, head_dim=64, dtype=dtype)
    check(backend, device, case, case.query_starts + 2, max_len=131)


def test_scores_of_a_request_sum_to_one(backend: str, device: torch.device) -> None:
    """A wrong divisor would pass where it cancels; with every position scored, probabilities must sum to 1."""
    spans = [(10, 4), (0, 3), (90, 4)]
    case = make_paged_case(spans, num_queries=4, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float16)
    actual = check(backend, device, case, case.query_starts + case.query_lens, max_len=94)
    torch.testing.assert_close(actual.sum(-1), torch.ones(3, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("group", "head_dim", "num_queries"), [(1, 64, 1), (4, 80, 3), (8, 96, 9), (16, 128, 2), (1, 256, 2)]
)
def test_matches_reference_for_each_head_shape(
    backend: str, device: torch.device, group: int, head_dim: int, num_queries: int
) -> None:
    """Query rows beyond one tile, and padding of rows or of the head dim that leaks into the mean, would pass."""
    spans = [(20, num_queries), (3, max(1, num_queries - 1))]
    case = make_paged_case(
        spans, num_queries=num_queries, num_kv_heads=1, group=group, head_dim=head_dim, dtype=torch.float16
    )
    check(backend, device, case, case.query_starts, max_len=40)


def test_score_len_zero_and_past_the_end(backend: str, device: torch.device) -> None:
    """Scores past the request's end, or a request with no scored position, would pass."""
    spans = [(12, 3), (12, 3), (12, 3)]
    case = make_paged_case(spans, num_queries=3, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32)
    check(backend, device, case, torch.tensor([0, 15, 100], dtype=torch.int32), max_len=90)


def test_loose_max_len_and_int64_lengths(backend: str, device: torch.device) -> None:
    """A tile past every length that is left unwritten would pass under a tight max_len."""
    case = make_paged_case([(9, 2), (0, 0)], num_queries=2, num_kv_heads=1, group=3, head_dim=64, dtype=torch.float32)
    case = case._replace(query_starts=case.query_starts.long(), query_lens=case.query_lens.long())
    check(backend, device, case, case.query_starts, max_len=111)


def test_caps_logits_and_reads_strided_pools(backend: str, device: torch.device) -> None:
    """A cap left out of one of the two passes, or a pool taken for contiguous, would pass."""
    case = make_paged_case(
        [(40, 3), (5, 2)],
        num_queries=3,
        num_kv_heads=2,
        group=2,
        head_dim=64,
        dtype=torch.float32,
        layout="interleaved",
    )
    check(backend, device, case, case.query_starts, max_len=43, logit_cap=0.5)


@pytest.mark.parametrize(("query_step", "max_len"), [(2, 150), (8, 150), (70, 272)])
def test_queries_that_stand_apart(backend: str, device: torch.device, query_step: int, max_len: int) -> None:
    """A causal bound, an end or a grid that still counts neighbours would pass: all other cases step by 1."""
    spans = [(0, 3), (70, 0), (0, 1), (30, 3), (61, 2), (124, 3)]
    case = make_paged_case(
        spans, num_queries=3, num_kv_heads=2, group=3, head_dim=64, dtype=torch.float16, query_step=query_step
    )
    check(backend, device, case, case.query_starts + 2, max_len=max_len, query_step=query_step)
    # every position that some query sees
    scored = torch.full_like(case.query_starts, max_len)
    check(backend, device, case, scored, max_len=max_len, query_step=query_step)


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("num_splits", [1, 4])
def test_splits_merge_to_the_same_result(backend: str, device: torch.device, num_splits: int) -> None:
    """A share that early queries do not see has log-sum-exp -inf; weighing it wrongly would pass with one split."""
    spans = [(62, 5), (126, 5), (0, 2)]
    case = make_paged_case(spans, num_queries=5, num_kv_heads=1, group=2, head_dim=64, dtype=torch.float16)
    check(backend, device, case, case.query_starts + case.query_lens, max_len=135, num_splits=num_splits)


def test_no_queries_at_all(backend: str, device: torch.device) -> None:
    """A launch over an empty grid would pass."""
    case = make_paged_case([(4, 0), (0, 0)], num_queries=2, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    check(backend, device, case, case.query_starts, max_len=8)
    check(backend, device, case, case.query_starts, max_len=0)


def test_rejects_too_small_max_len_on_cpu() -> None:
    """Scores cut off silently would pass."""
    case = make_paged_case([(10, 2)], num_queries=2, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="max_len: expected at least 12"):
        capture_scores(*case.without_value(), case.query_starts, scale=1.0, max_len=11)
    with pytest.raises(ValueError, match="max_len: expected at least 13"):
        capture_scores(*case.without_value(), case.query_starts, scale=1.0, max_len=12, query_step=2)
    with pytest.raises(ValueError, match="score_lens"):
        capture_scores(*case.without_value(), case.query_starts.float(), scale=1.0, max_len=12)
    with pytest.raises(ValueError, match="query_step"):
        capture_scores(*case.without_value(), case.query_starts, scale=1.0, max_len=12, query_step=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_refuses_a_scale_that_turns_logits_around(scale: float) -> None:
    """The kernel takes the maximum before it scales."""
    case = make_paged_case([(4, 1)], num_queries=1, num_kv_heads=1, group=1, head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="scale: expected a factor above 0"):
        capture_scores(*case.without_value(), case.query_starts, scale=scale, max_len=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_function_matches_reference_at_size(dtype: torch.dtype) -> None:
    """Dispatch to the kernel and its own choice of splits would go untested."""
    spans = [(4000, 9), (0, 0), (1023, 9), (0, 1)]
    case = make_paged_case(spans, num_queries=9, num_kv_heads=2, group=4, head_dim=128, dtype=dtype)
    case = case.to(torch.device("cuda"))
    options = {"scale": 128**-0.5, "max_len": 4100}
    actual = capture_scores(*case.without_value(), case.query_starts, **options)
    assert_scores_close(actual, capture_scores_reference(*case.without_value(), case.query_starts, **options))


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths() -> None:
    """A length or grid fixed at capture would pass every eager test."""
    case = make_paged_case(
        [(500, 9), (90, 9)], num_queries=9, num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16
    ).to(torch.device("cuda"))
    options = {"scale": 128**-0.5, "max_len": 600}
    capture_scores(*case.without_value(), case.query_starts, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = capture_scores(*case.without_value(), case.query_starts, **options)
    case.query_starts.copy_(torch.tensor([77, 0]))
    case.query_lens.copy_(torch.tensor([4, 0]))
    graph.replay()
    # the rows that became invalid hold finite numbers, which must not count either
    assert_scores_close(actual, capture_scores_reference(*case.without_value(), case.query_starts, **options))
