"""What every selection policy shares: budget, sharing, top-k, sink and recent window.

A policy scores; this module selects. Knows nothing of SGLang or of attention kernels.
Invariant: a selection holds positions below the length it was made for, so a rejected draft is never selectable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from sglang_sparsespec.ops.select_positions import select_positions
from sglang_sparsespec.speculation.budget import budget_tensor, budget_tokens

if TYPE_CHECKING:
    import torch

    from sglang_sparsespec.config import SparseSpecConfig


class Selection(NamedTuple):
    """The KV tokens that drafts of some requests may see in one layer, beside everything from `until` on."""

    positions: torch.Tensor
    """[num_reqs, num_kv_heads or 1, max_budget], int32, -1 past `num_selected`."""
    num_selected: torch.Tensor
    """[num_reqs], int32, tokens; the same for all heads."""
    until: torch.Tensor
    """[num_reqs], int32: first position that was not selectable. Drafts see all positions from here to themselves."""


class Policy(ABC):
    """From scores to a selection; `SelectionPolicy` scores once a round, `step.StepPolicy` for every draft step."""

    name: ClassVar[str]
    """Value of --sparsespec-selection."""
    caution: ClassVar[str | None] = None
    """What a server that runs with this policy says about it at start, where it is not meant for serving."""

    def __init__(self, config: SparseSpecConfig) -> None:
        self.config = config

    @property
    def pooling(self) -> int:
        """Forward window in tokens over which scores spread before top-k; 0 for none."""
        return 0

    def keep(
        self, scores: torch.Tensor, kv_lens: torch.Tensor, max_len: int, score_starts: torch.Tensor | None = None
    ) -> Selection:
        """Keep the budget's worth of best positions below `kv_lens`, in whole blocks.

        Args:
            scores: [num_reqs, num_kv_heads or 1, max_len], float32; higher means keep.
            kv_lens: [num_reqs], int32: selectable length; scores at and past it are ignored.
            max_len: an upper bound of `kv_lens`, known to the host.
            score_starts: [num_reqs], integer; given, `scores` are those of several layers, [num_layers, num_kv_heads,
                num_columns], where a request's columns begin, and so are the positions of the selection.
        """
        config = self.config
        max_budget = self.max_budget(max_len)
        budgets = budget_tensor(kv_lens, ratio=config.budget_ratio, min_budget=config.min_budget, max_budget=max_budget)
        positions, num_selected = select_positions(
            scores,
            kv_lens,
            budgets,
            max_budget=max_budget,
            sink=config.sink,
            recent_window=config.recent_window,
            pooling=self.pooling,
            granularity=config.block_size,
            share_heads=config.sharing == "layer",
            score_starts=score_starts,
            max_len=None if score_starts is None else max_len,
        )
        return Selection(positions, num_selected, kv_lens // config.block_size * config.block_size)

    def max_budget(self, max_len: int) -> int:
        """Tokens that the longest of some requests may select, given a bound of their lengths."""
        return max(min(self.budget(max_len), max_len), self.config.block_size)

    def budget(self, kv_len: int) -> int:
        """Tokens that a request of `kv_len` tokens may select."""
        return budget_tokens(kv_len, ratio=self.config.budget_ratio, min_budget=self.config.min_budget)


class SelectionPolicy(Policy):
    """Scores KV tokens once a round, when the verify runs; all draft steps of the next round see the same selection."""

    needs_attention: ClassVar[bool]
    """Whether `score` reads captured attention. If not, nothing is captured."""

    def captured_queries(self, num_queries: int) -> range:
        """Which of a verify's `num_queries` queries are captured, by their index; evenly spaced, so a range.

        A prompt's last queries are all captured: it happens once a request.
        """
        return range(num_queries)

    @abstractmethod
    def score(self, attention: torch.Tensor | None, kv_lens: torch.Tensor, max_len: int) -> torch.Tensor:
        """Score every position of every request.

        Args:
            attention: [num_reqs, num_kv_heads, max_len], float32: attention probability that the captured queries of
                the last verify (after a prefill: the last prompt queries) gave each position, averaged over queries
                and the heads of the group; None unless `needs_attention`.
            kv_lens: [num_reqs], int32: selectable length; scores at and past it are ignored.
            max_len: an upper bound of `kv_lens`, known to the host.

        Returns:
            [num_reqs, num_kv_heads or 1, max_len], float32.
        """

    def select(self, attention: torch.Tensor | None, kv_lens: torch.Tensor, max_len: int) -> Selection:
        """Score, and keep the best; arguments as in `score`."""
        return self.keep(self.score(attention, kv_lens, max_len), kv_lens, max_len)
