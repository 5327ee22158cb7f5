"""The comparison that every end-to-end test of losslessness stands on."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_sparsespec.bench.parity import ReferenceOutput, Verdict, compare_greedy, reference_output


def reference(*tokens_and_gaps: tuple[int, float]) -> ReferenceOutput:
    """Tokens with the log-probability lead over the second best, which is always token + 1000."""
    token_ids = tuple(token for token, _ in tokens_and_gaps)
    return ReferenceOutput(token_ids, tuple(((t, -0.5), (t + 1000, -0.5 - gap)) for t, gap in tokens_and_gaps))


def response(token_ids: list[int], top_logprobs: list[Any] | None) -> dict[str, Any]:
    return {"output_ids": token_ids, "meta_info": {"output_top_logprobs": top_logprobs}}


@pytest.mark.parametrize(
    ("output", "verdict", "num_equal"),
    [
        ([1, 2, 3], Verdict.IDENTICAL, 3),
        ([1, 1002, 9], Verdict.NEAR_TIE, 1),
        ([1, 7, 3], Verdict.DIVERGED, 1),
        ([1001, 2, 3], Verdict.DIVERGED, 0),
        ([1, 2], Verdict.DIVERGED, 2),
        ([1, 2, 3, 4], Verdict.DIVERGED, 3),
        ([], Verdict.DIVERGED, 0),
    ],
    ids=["equal", "second_best_at_tie", "third_token_at_tie", "no_tie", "too_short", "too_long", "empty"],
)
def test_compare_greedy_judges_the_first_difference(output: list[int], verdict: Verdict, num_equal: int) -> None:
    """A report that called a wrong token a tie, or skipped a missing token, would hide a lossy change."""
    report = compare_greedy([reference((1, 0.3), (2, 5e-5), (3, 0.3))], [output], tol=1e-4)
    assert (report.requests[0].verdict, report.requests[0].num_equal) == (verdict, num_equal)
    assert report.ok == (verdict is not Verdict.DIVERGED)


@pytest.mark.parametrize(("token", "verdict"), [(7, Verdict.NEAR_TIE), (8, Verdict.DIVERGED), (9, Verdict.DIVERGED)])
def test_compare_greedy_knows_ties_of_three(token: int, verdict: Verdict) -> None:
    """In bfloat16 the third of three equal logits is as right as the second; one that is behind is not."""
    ties = ReferenceOutput((5,), (((5, -1.0), (6, -1.0), (7, -1.1), (8, -2.0)),))
    assert compare_greedy([ties], [[token]], tol=0.2).requests[0].verdict is verdict


def test_compare_greedy_report_names_position_tokens_and_gap() -> None:
    """Without these a failure in the nightly run cannot be traced."""
    report = compare_greedy([reference((1, 0.3)), reference((5, 0.25))], [[1], [6]])
    assert "2 requests: 1 identical, 0 near-tie, 1 diverged" in str(report)
    assert "request 1: diverged after 0 tokens: 6 instead of 5, the reference's two best differ by 0.25" in str(report)
    assert report.num_compared == 1


def test_compare_greedy_refuses_a_missing_output() -> None:
    """Zipping to the shorter list would pass a server that dropped a request."""
    with pytest.raises(ValueError, match="1 outputs for 2 reference outputs"):
        compare_greedy([reference((1, 1.0)), reference((2, 1.0))], [[1]])


def test_compare_greedy_reads_generate_responses() -> None:
    """The field layout of SGLang: (logprob, token id, text or None), best first."""
    top = [[[-0.1, 4, None], [-2.5, 8, None]], [[-0.7, 5, "x"], [-0.7, 6, "y"]]]
    parsed = reference_output(response([4, 5], top))
    assert parsed.top == (((4, -0.1), (8, -2.5)), ((5, -0.7), (6, -0.7)))
    report = compare_greedy([response([4, 5], top)], [response([4, 6], None)])
    assert report.requests[0].verdict is Verdict.NEAR_TIE


def test_reference_output_refuses_a_response_without_logprobs() -> None:
    """An unrecorded reference would otherwise have no ties, or crash far from the cause."""
    with pytest.raises(ValueError, match="top_logprobs_num"):
        reference_output(response([4, 5], None))
