"""Random selection: deliberately bad drafts, so that tests reach every rejection path."""

from __future__ import annotations

from typing import ClassVar

import torch

from sglang_sparsespec.selection.base import SelectionPolicy


class RandomPolicy(SelectionPolicy):
    """Uniform random scores. Output stays exact; acceptance does not."""

    name: ClassVar[str] = "random"
    caution: ClassVar[str | None] = "drafts are bad on purpose; for tests only"
    needs_attention: ClassVar[bool] = False

    def score(self, attention: torch.Tensor | None, kv_lens: torch.Tensor, max_len: int) -> torch.Tensor:
        return torch.rand(kv_lens.shape[0], 1, max_len, device=kv_lens.device)
