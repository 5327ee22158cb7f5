"""Rows of logits over a vocabulary: what is known of each after one pass, and the checks that the row ops share.

Logits come as [R, W, V]: W rows of each request, which share its temperature. Invariant: nothing is ever copied to
make rows contiguous, and only the last dimension has to be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_sparsespec.ops._checks import (
    FLOAT_DTYPES,
    check_dense_rows,
    check_device,
    check_dtype,
    check_index,
    check_shape,
)


class RowStats(NamedTuple):
    """What turns the logits of a row into probabilities: ``p(v) = exp((l(v) - top) / T) / mass``.

    The log-sum-exp of ``l / T`` is ``top / T + log(mass)``. The two are kept apart because float32 holds their sum
    at a temperature of 0.01 to three digits only.
    """

    best: torch.Tensor
    """int64, the token of the highest logit, the lowest among ties."""
    top: torch.Tensor
    """float32, its logit."""
    mass: torch.Tensor
    """float32, the sum over the row of ``exp((l - top) / T)``; at least 1."""
    floor: torch.Tensor | None = None
    """float32, the lowest logit that counts: those below have probability 0 and no part in `mass`. None: all count."""


def check_rows(name: str, logits: torch.Tensor, num_reqs: int | None = None) -> None:
    """Logits of requests, [R, W, V] with V of at least 1."""
    check_shape(name, logits, (num_reqs, None, None))
    check_dtype(name, logits, FLOAT_DTYPES)
    check_dense_rows(name, logits)
    if logits.shape[2] == 0:
        raise ValueError(f"{name}: expected a vocabulary of at least 1 token, got shape {list(logits.shape)}.")


def check_of_requests(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    steps: torch.Tensor | None = None,
    is_greedy: torch.Tensor | None = None,
) -> None:
    """One value per request of `logits`."""
    num_reqs = logits.shape[0]
    check_shape("temperatures", temperatures, (num_reqs,))
    check_dtype("temperatures", temperatures, (torch.float32,))
    check_device("temperatures", temperatures, logits.device)
    if steps is not None:
        check_index("steps", steps, (num_reqs,), logits.device)
    if is_greedy is not None:
        check_shape("is_greedy", is_greedy, (num_reqs,))
        check_dtype("is_greedy", is_greedy, (torch.bool,))
        check_device("is_greedy", is_greedy, logits.device)


def check_stats(name: str, stats: RowStats, expected: tuple[int, ...], device: torch.device) -> None:
    """As `row_stats` returned them, for as many rows."""
    for field, values in stats._asdict().items():
        if field == "floor" and values is None:
            continue
        check_shape(f"{name}.{field}", values, expected)
        check_dtype(f"{name}.{field}", values, (torch.int64 if field == "best" else torch.float32,))
        check_device(f"{name}.{field}", values, device)
        if not values.is_contiguous():
            raise ValueError(f"{name}.{field}: expected a contiguous tensor, as row_stats returns it.")
