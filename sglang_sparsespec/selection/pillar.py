"""PillarAttn: keep what the last verification looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sglang_sparsespec.selection.base import SelectionPolicy

if TYPE_CHECKING:
    import torch


class PillarPolicy(SelectionPolicy):
    """Attention scores of the verify queries, averaged over queries and GQA group.

    Reference: SparseSpec (arXiv:2512.01278), PillarAttn.
    Deviation: scores are pooled forward (`--sparsespec-score-pooling`), because a draft needs the tokens after those
    that past queries looked at; 0 gives the paper's rule.
    """

    name: ClassVar[str] = "pillar"
    needs_attention: ClassVar[bool] = True

    @property
    def pooling(self) -> int:
        return self.config.score_pooling

    def score(self, attention: torch.Tensor | None, kv_lens: torch.Tensor, max_len: int) -> torch.Tensor:
        assert attention is not None, "pillar scores are captured attention"
        return attention
