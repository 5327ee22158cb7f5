"""What a sparse server should have written: its rounds again, in the explorer, which computes them another way.

The explorer (`quality/`) runs a transformers model and masks what a verify does not read; the server gathers lists.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.acceptance.rounds import prefill
from sglang_sparsespec.quality.rounds import VerifyRound
from sglang_sparsespec.quality.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.settings import Setting
    from tests.support.watched_rounds import Round


def replay(
    model: PagedModel, setting: Setting, prompt: Sequence[int], output: Sequence[int], rounds: Sequence[Round]
) -> list[float]:
    """Run a request again: a dense prefill, then each round with the tokens that the server accepted in it.

    What was rejected leaves no trace: its KV is overwritten by the next round.

    Returns:
        By token of the output: the best logit less that of the server's token; 0 where it is the best one.
    """
    model.allocate(1, len(prompt) + len(output) + 1)
    first = prefill(model, [list(prompt)], keep=1).next_logits
    gaps = [_gap(first[0], output[0])]
    rules = Rules(model, setting)
    for committed_len, accept_len, is_sparse, _ in rounds:
        start = committed_len - len(prompt)
        assert start == len(gaps) - 1, "rounds follow each other"
        wanted = output[start + 1 : start + 1 + accept_len]
        if not wanted:
            break
        fed = torch.tensor([output[start : start + len(wanted)]])
        positions = committed_len + torch.arange(len(wanted))[None]
        verify = VerifyRound(
            model,
            range(1),
            torch.tensor([committed_len]),
            setting.choosing_layers(model),
            ratio=setting.attention_ratio if is_sparse else 1.0,
            dense_below=setting.dense_below,
            block_size=setting.block_size,
        )
        with rules if is_sparse else nullcontext():
            logits = verify.feed(fed, positions)[0]
        gaps += [_gap(row, token) for row, token in zip(logits, wanted, strict=True)]
    assert len(gaps) == len(output), "a token that no round wrote"
    return gaps


def _gap(logits: torch.Tensor, token: int) -> float:
    return (logits.max() - logits[token]).item()
