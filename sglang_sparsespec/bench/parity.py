"""Is the output of one server, at temperature 0, that of another?

The reference is recorded with `return_logprob` and `top_logprobs_num`, so that a difference can be judged: where the
other server's token is within float error of the reference's best, both are right. In bfloat16 three or more logits
tie now and then, so more than two are recorded.
Pure functions on recorded responses.
Invariant: tokens behind a request's first divergence are not compared; they answer another prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

RECORDING = {"return_logprob": True, "top_logprobs_num": 8}
"""Options that a /generate payload needs for its response to serve as a reference."""


class Verdict(Enum):
    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class ReferenceOutput:
    """A greedy output and, for each of its tokens, the best next tokens with their log-probabilities, best first."""

    token_ids: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]

    def __post_init__(self) -> None:
        assert len(self.top) == len(self.token_ids), (len(self.top), len(self.token_ids))

    def gap(self, position: int) -> float:
        """Log-probability of the best token over that of the second, nats."""
        return self.top[position][0][1] - self.top[position][1][1]

    def lead_over(self, token: int, position: int) -> float | None:
        """Log-probability of the best token over that of `token`, nats; None if `token` was not recorded."""
        best = self.top[position][0][1]
        return next((best - logprob for candidate, logprob in self.top[position] if candidate == token), None)


@dataclass(frozen=True)
class RequestParity:
    index: int
    verdict: Verdict
    num_equal: int
    """Tokens up to the first difference."""
    reference_token: int | None = None
    """None where the reference had ended."""
    token: int | None = None
    """None where the output had ended."""
    gap: float | None = None

    def __str__(self) -> str:
        if self.verdict is Verdict.IDENTICAL:
            return f"request {self.index}: identical, {self.num_equal} tokens"
        gap = "" if self.gap is None else f", the reference's two best differ by {self.gap:.3g}"
        return (
            f"request {self.index}: {self.verdict.value} after {self.num_equal} tokens: "
            f"{self.token} instead of {self.reference_token}{gap}"
        )


@dataclass(frozen=True)
class ParityReport:
    requests: tuple[RequestParity, ...]
    tol: float

    @property
    def ok(self) -> bool:
        """Nothing but near-ties differs."""
        return not self.with_verdict(Verdict.DIVERGED)

    def with_verdict(self, verdict: Verdict) -> tuple[RequestParity, ...]:
        return tuple(request for request in self.requests if request.verdict is verdict)

    @property
    def num_compared(self) -> int:
        """Tokens found equal, over all requests."""
        return sum(request.num_equal for request in self.requests)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.with_verdict(verdict))} {verdict.value}" for verdict in Verdict)
        lines = [f"{len(self.requests)} requests: {counts} (tolerance {self.tol:g}); {self.num_compared} equal tokens"]
        lines += [str(request) for request in self.requests if request.verdict is not Verdict.IDENTICAL]
        return "\n".join(lines)


def reference_output(response: Mapping[str, Any]) -> ReferenceOutput:
    """From a /generate response to a payload with the RECORDING options."""
    meta = response["meta_info"]
    recorded = meta.get("output_top_logprobs") or []
    num_tokens = len(response["output_ids"])
    if len(recorded) != num_tokens:
        raise ValueError(
            f"the response has {len(recorded)} top logprobs for {num_tokens} tokens; "
            f"a reference is recorded with {RECORDING}."
        )
    top = tuple(tuple((int(token), float(logprob)) for logprob, token, *_ in candidates) for candidates in recorded)
    return ReferenceOutput(tuple(response["output_ids"]), top)


def compare_greedy(
    reference: Sequence[ReferenceOutput | Mapping[str, Any]],
    outputs: Sequence[Sequence[int] | Mapping[str, Any]],
    *,
    tol: float = 1e-4,
) -> ParityReport:
    """Compare greedy outputs with the reference's, request by request.

    Args:
        reference: recorded outputs, or /generate responses with the RECORDING options.
        outputs: token ids, or /generate responses, in the order of `reference`.
        tol: nats; a first difference is a near-tie when the reference recorded the output's token, this close to its
            best.
    """
    if len(reference) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs for {len(reference)} reference outputs; they must correspond.")
    requests = []
    for index, (expected, output) in enumerate(zip(reference, outputs, strict=True)):
        if not isinstance(expected, ReferenceOutput):
            expected = reference_output(expected)
        token_ids = output["output_ids"] if isinstance(output, Mapping) else output
        requests.append(_compare_one(index, expected, tuple(token_ids), tol))
    return ParityReport(tuple(requests), tol)


def _compare_one(index: int, expected: ReferenceOutput, token_ids: tuple[int, ...], tol: float) -> RequestParity:
    shared = min(len(expected.token_ids), len(token_ids))
    num_equal = next((i for i in range(shared) if expected.token_ids[i] != token_ids[i]), shared)
    if num_equal == len(expected.token_ids) == len(token_ids):
        return RequestParity(index, Verdict.IDENTICAL, num_equal)
    if num_equal == shared:
        # one is a prefix of the other: whatever ended it, it was not a choice between two tokens
        longer = expected.token_ids[num_equal:] or (None,)
        extra = token_ids[num_equal:] or (None,)
        return RequestParity(index, Verdict.DIVERGED, num_equal, longer[0], extra[0])
    gap = expected.gap(num_equal)
    lead = expected.lead_over(token_ids[num_equal], num_equal)
    verdict = Verdict.NEAR_TIE if lead is not None and lead <= tol else Verdict.DIVERGED
    return RequestParity(index, verdict, num_equal, expected.token_ids[num_equal], token_ids[num_equal], gap)
