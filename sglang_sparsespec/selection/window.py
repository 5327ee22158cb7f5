"""Sink and recent window: no scores at all."""

from __future__ import annotations

from typing import ClassVar

import torch

from sglang_sparsespec.selection.base import SelectionPolicy


class WindowPolicy(SelectionPolicy):
    """The first `sink` tokens and the newest ones, as far as the budget goes.

    Reference: StreamingLLM (arXiv:2309.17453), the draft of MagicDec (arXiv:2408.11049).
    """

    name: ClassVar[str] = "window"
    needs_attention: ClassVar[bool] = False

    def score(self, attention: torch.Tensor | None, kv_lens: torch.Tensor, max_len: int) -> torch.Tensor:
        newest_highest = torch.arange(1, max_len + 1, device=kv_lens.device, dtype=torch.float32) / max_len
        return newest_highest.expand(kv_lens.shape[0], 1, max_len)
