"""Quest: pages whose key bounds promise the most to the query at hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_sparsespec.ops.page_bounds import page_bounds
from sglang_sparsespec.selection.step import StepPolicy

if TYPE_CHECKING:
    from sglang_sparsespec.selection.step import LayerKeys

# positions; Quest's own, where --sparsespec-granularity leaves the choice
PAGE_SIZE = 16


class QuestPolicy(StepPolicy):
    """Upper bounds of a page's logits, from the largest and smallest value of each key channel in it.

    Reference: Quest (arXiv:2406.10774).
    Deviations: bounds are made anew once a round, which reads every key once, instead of kept beside the cache. Query
    heads that share a selection are compared by softmax over pages, of which the mean is taken (in logarithms, so that
    small ones keep their order); for a head alone the order is Quest's. Sinks and recent window are kept as everywhere.
    """

    name: ClassVar[str] = "quest"

    @property
    def page_size(self) -> int:
        """A block, where blocks are selected; Quest's own page otherwise."""
        return PAGE_SIZE if self.config.granularity == "token" else self.config.block_size

    def prepare(self, keys: LayerKeys) -> torch.Tensor:
        return page_bounds(
            keys.k_cache, keys.req_to_token, keys.rows, keys.kv_lens, page_size=self.page_size, max_len=keys.max_len
        )

    def score(
        self,
        query: torch.Tensor,
        query_positions: torch.Tensor,
        keys: LayerKeys,
        prepared: torch.Tensor | None,
    ) -> torch.Tensor:
        assert prepared is not None, "quest scores bounds"
        num_reqs, num_kv_heads, num_pages = prepared.shape[:3]
        grouped = query.float().view(num_reqs, num_kv_heads, -1, query.shape[-1])
        # sum_d max(q u, q l) = max(q, 0) . u + min(q, 0) . l
        signed = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], dim=-1)
        # [num_reqs, num_kv_heads, group, num_pages]
        bound = signed @ prepared.flatten(3).float().transpose(2, 3) * keys.scale
        if keys.logit_cap > 0.0:
            bound = keys.logit_cap * torch.tanh(bound / keys.logit_cap)
        first = torch.arange(num_pages, device=query.device) * self.page_size
        bound.masked_fill_((first >= keys.kv_lens[:, None])[:, None, None], -math.inf)
        by_head = torch.log_softmax(bound, dim=-1)
        if self.config.sharing == "layer":
            by_head = by_head.flatten(1, 2)[:, None]
        return torch.logsumexp(by_head, dim=2).repeat_interleave(self.page_size, dim=-1)[..., : keys.max_len]
