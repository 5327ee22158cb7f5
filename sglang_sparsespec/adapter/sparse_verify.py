"""A verify that leaves something out: attention over the KV blocks that score best, the same for all of its tokens.

Lossy: what such a verify commits is not what the model would have computed. Rule: arXiv:2512.21911, attention
(`sparsity.attention`); the first token verified scores the blocks, per KV head; layers that are no anchors reuse the
blocks of the anchor before them. A KV head is treated as a request of its own whose page table is its list, so the
kernels are those of a dense verify.
Invariant: a verify that is not planned as sparse is the dense one, untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_sparsespec.adapter.fused_verify import FusedVerify
from sglang_sparsespec.ops.block_scores import block_scores
from sglang_sparsespec.ops.paged_attention import paged_attention
from sglang_sparsespec.sparsity.block_lists import BlockRule, list_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_sparsespec.adapter.fused_verify import FusedPlan
    from sglang_sparsespec.selection.base import Policy
    from sglang_sparsespec.selection.store import SelectionStore


class _HeadLists(NamedTuple):
    """What the KV heads read, until the next anchor; R * H rows, requests first."""

    slots: torch.Tensor
    """[R * H, S], int32: `slot * H + head`, into the pool with its heads laid end to end."""
    positions: torch.Tensor
    """[R, H, S], int32."""
    num_read: torch.Tensor
    """[R * H], int32: committed tokens of a list."""


def heads_end_to_end(cache: torch.Tensor) -> torch.Tensor:
    """A pool [num_slots, H, D] as [num_slots * H, 1, D], a view.

    Raises:
        ValueError: if its heads are not evenly spaced in memory.
    """
    num_slots, num_heads, head_dim = cache.shape
    step = cache.stride(1) if num_heads > 1 else cache.stride(0)
    if cache.stride(0) != num_heads * step:
        raise ValueError(f"cache: expected evenly spaced heads, got strides {tuple(cache.stride())}.")
    return cache.as_strided((num_slots * num_heads, 1, head_dim), (step, head_dim, cache.stride(2)))


class SparseVerify(FusedVerify):
    """FusedVerify whose sparse plans read chosen blocks.

    Args:
        model_runner: of the served model; pools must exist.
        policy: as of FusedVerify. Positions that a sparse verify does not read score 0 in it.
        store: where selections go.
        num_columns: capacity of the score buffer.
        rule: how much is read.
        anchors: layers that choose blocks, ascending, the first of them 0; None: every layer.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        policy: Policy,
        store: SelectionStore,
        num_columns: int,
        *,
        rule: BlockRule,
        anchors: Sequence[int] | None,
    ) -> None:
        super().__init__(model_runner, policy, store, num_columns)
        self.rule = rule
        self.anchors = frozenset(range(self._num_layers) if anchors is None else anchors)
        self._lists: _HeadLists | None = None

    def begin(self, plan: FusedPlan) -> None:
        super().begin(plan)
        self._lists = None

    def _attend(
        self, queries: torch.Tensor, layer: RadixAttention, scores: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        plan = self._plan
        assert plan is not None
        if not plan.is_sparse:
            return super()._attend(queries, layer, scores, out)
        keys = self._kv_pool.get_key_buffer(layer.layer_id)
        if layer.layer_id in self.anchors:
            self._lists = self._choose(queries[:, 0], keys)
        lists = self._lists
        assert lists is not None, "a layer before the first anchor"
        num_reqs, width, head_dim = queries.shape[0], queries.shape[1], queries.shape[3]
        num_heads, list_len = keys.shape[1], lists.slots.shape[1]
        rows = torch.arange(num_reqs * num_heads, device=queries.device)
        # [R, T, H * G, D] -> [R * H, T, G, D]
        by_head = queries.view(num_reqs, width, num_heads, -1, head_dim).transpose(1, 2).flatten(0, 1)
        read_scores = None
        if scores is not None:
            read_scores = torch.empty((1, rows.shape[0] * list_len), dtype=torch.float32, device=queries.device)
        attended, _ = paged_attention(
            by_head,
            heads_end_to_end(keys),
            heads_end_to_end(self._kv_pool.get_value_buffer(layer.layer_id)),
            lists.slots,
            rows,
            lists.num_read,
            plan.num_queries[:, None].expand(-1, num_heads).reshape(-1),
            scale=layer.scaling,
            max_len=list_len,
            anchored_scores=read_scores,
            score_starts=None if scores is None else rows * list_len,
            logit_cap=layer.logit_cap,
        )
        if scores is not None and read_scores is not None:
            self._spread(read_scores.view(lists.positions.shape), lists, scores)
        attended = attended.unflatten(0, (num_reqs, num_heads)).transpose(1, 2).reshape(queries.shape)
        return attended if out is None else out.copy_(attended)

    def _choose(self, queries: torch.Tensor, keys: torch.Tensor) -> _HeadLists:
        """Blocks by the first token's queries, [R, HQ, D], as slots of each head."""
        plan = self._plan
        assert plan is not None
        max_len = min(plan.max_len, self._req_to_token.shape[1])
        scores = block_scores(
            queries,
            keys,
            self._req_to_token,
            plan.rows,
            plan.committed_lens,
            block_size=self.rule.block_size,
            max_len=max_len,
        )
        positions, num_read = list_positions(
            scores,
            plan.committed_lens,
            self.rule,
            width=plan.width,
            max_len=max_len,
            max_position=self._req_to_token.shape[1] - 1,
        )
        num_heads = keys.shape[1]
        slots = self._req_to_token[plan.rows[:, None, None], positions.long()]
        head = torch.arange(num_heads, device=keys.device, dtype=slots.dtype)[:, None]
        return _HeadLists(
            slots=(slots * num_heads + head).flatten(0, 1),
            positions=positions,
            num_read=num_read[:, None].expand(-1, num_heads).reshape(-1),
        )

    def _spread(self, read_scores: torch.Tensor, lists: _HeadLists, scores: torch.Tensor) -> None:
        """Put the scores of what was read, [R, H, S], where selections look for them; the rest scores 0."""
        num_columns = scores.shape[1]
        place = torch.arange(lists.positions.shape[2], device=scores.device)
        is_read = place < lists.num_read.view(lists.positions.shape[:2])[..., None]
        columns = self._score_starts[:, None, None] + lists.positions
        # what was not read adds 0 to some column
        columns = columns.where(is_read, place % max(1, num_columns))
        values = read_scores.where(is_read, 0.0)
        scores.zero_()
        scores.scatter_add_(1, columns.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1))
