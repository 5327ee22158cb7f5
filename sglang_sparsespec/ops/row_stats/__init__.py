"""What sampling has to know of a row of logits: its argmax and its normaliser, and from them single probabilities.

Knows logits and temperatures, not drafts or filters. Invariant: probabilities of a row are never written to memory.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.ops._checks import check_device, check_dtype, check_index, check_shape
from sglang_sparsespec.ops._rows import RowStats, check_of_requests, check_rows, check_stats
from sglang_sparsespec.ops.row_stats.reference import row_stats_reference, token_probs_reference

__all__ = ["RowStats", "row_stats", "token_probs"]


def row_stats(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    steps: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
) -> RowStats:
    """Argmax and softmax normaliser of rows of logits, read once.

    On CUDA nothing waits for the device, sums are float32, and the launches depend on shapes alone.

    Args:
        logits: [R, W, V], float32, float16 or bfloat16; may be strided, the last dimension contiguous. -inf is a token
            that cannot be sampled.
        temperatures: [R], float32, positive; of all rows of a request.
        steps: [R], int32 or int64: only row ``min(steps[r], W - 1)`` of each request.
        floors: [R, W], or [R] with `steps`, float32, contiguous: lower logits count as -inf. Must not exceed the
            highest logit of the row.

    Returns:
        `RowStats`, each [R, W], or [R] with `steps`; with the floors given, or without any.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride, an empty vocabulary, or `steps` into no rows.

    Not checked: that temperatures are positive, that steps are not negative, that floors are not too high, and that
    each row has a finite logit and neither NaN nor +inf. The statistics of a row that breaks the last two need not be
    finite, but `best` is a token.
    """
    check_rows("logits", logits)
    check_of_requests(logits, temperatures, steps=steps)
    if steps is not None and logits.shape[1] == 0:
        raise ValueError(f"steps: expected None for requests without rows, got {list(logits.shape)} logits.")
    if floors is not None:
        check_shape("floors", floors, logits.shape[:2] if steps is None else logits.shape[:1])
        check_dtype("floors", floors, (torch.float32,))
        check_device("floors", floors, logits.device)
        if not floors.is_contiguous():
            raise ValueError("floors: expected a contiguous tensor; call .contiguous().")
    if logits.is_cuda:
        # imported where it is used: a CPU install may lack Triton
        from sglang_sparsespec.ops.row_stats.triton_impl import row_stats_triton

        return row_stats_triton(logits, temperatures, steps, floors)
    return row_stats_reference(logits, temperatures, steps, floors)


def token_probs(
    logits: torch.Tensor,
    stats: RowStats,
    temperatures: torch.Tensor,
    tokens: torch.Tensor,
    *,
    is_greedy: torch.Tensor | None = None,
) -> torch.Tensor:
    """The probability of one token in each of the first rows of a request.

    Args:
        logits: [R, W, V], as `row_stats` got them.
        stats: of them, each [R, W].
        temperatures: [R], float32.
        tokens: [R, K], int32 or int64, K at most W; in [0, V). Entry k belongs to row k.
        is_greedy: [R], bool: the rows of such a request are one-hot at `stats.best`.

    Returns:
        [R, K], float32.

    Raises:
        ValueError: as `row_stats`.

    Not checked: that tokens lie in the vocabulary.
    """
    check_rows("logits", logits)
    check_of_requests(logits, temperatures, is_greedy=is_greedy)
    num_reqs, width, _ = logits.shape
    check_stats("stats", stats, (num_reqs, width), logits.device)
    check_index("tokens", tokens, (num_reqs, None), logits.device)
    if tokens.shape[1] > width:
        raise ValueError(f"tokens: expected at most {width} per request, one per row, got {tokens.shape[1]}.")
    if logits.is_cuda:
        from sglang_sparsespec.ops.row_stats.triton_impl import token_probs_triton

        return token_probs_triton(logits, stats, temperatures, tokens, is_greedy)
    return token_probs_reference(logits, stats, temperatures, tokens, is_greedy)
