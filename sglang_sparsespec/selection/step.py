"""Policies that select anew in every layer of every draft step, from the query at hand.

`SelectionPolicy` predicts what the drafts will look at; a `StepPolicy` is told. It pays for that in every draft step.
Knows nothing of SGLang. Invariant: selectable are the committed tokens, so no selection outlives its step.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.selection.base import Policy, Selection
from sglang_sparsespec.selection.store import lay_out

if TYPE_CHECKING:
    import torch


class LayerKeys(NamedTuple):
    """The keys of one layer that a draft step may select from."""

    k_cache: torch.Tensor
    """[num_slots, num_kv_heads, head_dim]."""
    req_to_token: torch.Tensor
    """[num_rows, max_context], int32, position -> slot."""
    rows: torch.Tensor
    """[num_reqs], int64, page-table rows."""
    kv_lens: torch.Tensor
    """[num_reqs], int32: selectable length. What follows, the drafts of this round, is visible in any case."""
    max_len: int
    """Bound of `kv_lens` and of the drafts' positions + 1, known to the host."""
    scale: float
    """Factor on the logits."""
    logit_cap: float
    """Soft cap of the logits; 0 is off."""


class StepPolicy(Policy):
    """Scores the KV tokens of one layer for one draft step; nothing is captured from verifies."""

    def prepare(self, keys: LayerKeys) -> torch.Tensor | None:
        """What the draft steps of a round share in this layer; asked for once, at the first step."""
        return None

    @abstractmethod
    def score(
        self,
        query: torch.Tensor,
        query_positions: torch.Tensor,
        keys: LayerKeys,
        prepared: torch.Tensor | None,
    ) -> torch.Tensor:
        """Score every position of every request.

        Args:
            query: [num_reqs, num_q_heads, head_dim], of this draft step, rotated.
            query_positions: [num_reqs], int32; its own K is in the cache already.
            keys: what it may select from.
            prepared: what `prepare` returned.

        Returns:
            [num_reqs, num_kv_heads or 1, keys.max_len], float32.
        """

    def select(
        self,
        query: torch.Tensor,
        query_positions: torch.Tensor,
        keys: LayerKeys,
        prepared: torch.Tensor | None = None,
    ) -> Selection:
        """Score, and keep the best; arguments as in `score`."""
        return self.keep(self.score(query, query_positions, keys, prepared), keys.kv_lens, keys.max_len)


@dataclasses.dataclass(frozen=True)
class StepDraftKV:
    """What the draft steps of one round read under a StepPolicy; stands where `store.DraftKV` does.

    Args:
        policy: selects.
        rows: [num_reqs], int64, page-table rows.
        committed_lens: [num_reqs], int32: tokens whose KV is exact; the first drafted token goes there.
        req_to_token: [num_rows, max_context], int32.
        max_committed_len: bound of `committed_lens`, known to the host.
        num_drafted: drafted tokens that are visible, the one being fed included.
        prepared: by layer, what the steps of the round share.
    """

    policy: StepPolicy
    rows: torch.Tensor
    committed_lens: torch.Tensor
    req_to_token: torch.Tensor
    max_committed_len: int
    num_drafted: int = 0
    prepared: dict[int, torch.Tensor | None] = dataclasses.field(default_factory=dict)

    @property
    def places(self) -> None:
        """Each query has a selection of its own."""
        return

    def advanced(self) -> StepDraftKV:
        """One more drafted token is visible."""
        return dataclasses.replace(self, num_drafted=self.num_drafted + 1)

    def layer_kv(
        self, layer: int, query: torch.Tensor, k_cache: torch.Tensor, *, scale: float, logit_cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `store.DraftKV.layer_kv`; the query counts."""
        num_new = self.policy.config.num_draft_tokens
        # positions past the page table hold nothing that may be read
        max_len = min(self.max_committed_len + num_new, self.req_to_token.shape[1])
        keys = LayerKeys(k_cache, self.req_to_token, self.rows, self.committed_lens, max_len, scale, logit_cap)
        if layer not in self.prepared:
            self.prepared[layer] = self.policy.prepare(keys)
        query_positions = self.committed_lens + (self.num_drafted - 1)
        selection = self.policy.select(query, query_positions, keys, self.prepared[layer])
        slots = lay_out(
            selection.positions,
            selection.num_selected,
            selection.until,
            self.rows,
            self.req_to_token,
            tail=num_new + self.policy.config.block_size,
        )
        num_since = self.committed_lens - selection.until + self.num_drafted
        return slots, selection.num_selected + num_since
