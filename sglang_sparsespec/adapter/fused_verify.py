"""Verify attention of our own: one pass that attends and scores, and one selection for several layers.

The kernel reads K once; the scores are anchored (`ops.paged_attention`), so no second pass follows. Scores of a few
layers wait in a buffer until one call selects for all of them. Nothing here depends on lengths that the host knows,
so a verify can be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_sparsespec.ops.paged_attention import paged_attention
from sglang_sparsespec.selection import SelectionPolicy
from sglang_sparsespec.speculation.memory import num_score_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_sparsespec.selection.base import Policy
    from sglang_sparsespec.selection.store import SelectionStore


def verify_groups(len_bounds: Sequence[int], num_columns: int) -> list[slice]:
    """Requests in as few runs as fit the score buffer, each for a verify of its own.

    Lengths add up to more than the pool where requests share a prefix, which is there once and scored for each.

    Args:
        len_bounds: tokens of each request, at least what is committed; one request always fits.
        num_columns: of the buffer, a token of a request each.
    """
    groups, start, total = [], 0, 0
    for i, length in enumerate(len_bounds):
        if i > start and total + length > num_columns:
            groups.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*groups, slice(start, len(len_bounds))]


class FusedPlan(NamedTuple):
    """Whose tokens one verify runs over. All tensors may be padded: padding has no queries."""

    rows: torch.Tensor
    """[num_reqs], int64, page-table rows."""
    committed_lens: torch.Tensor
    """[num_reqs], int32; the first query stands there, and positions from there on are not selectable."""
    num_queries: torch.Tensor
    """[num_reqs], int32; the round's k + 1, or 0 in padding."""
    width: int
    """Columns of the queries: at least k + 1; those past it are padding too."""
    max_len: int
    """Bound of all positions, known to the host."""
    is_sparse: bool = False
    """Whether it may leave something out (`sparse_verify`); otherwise it is the model's own."""
    refreshes: bool = True
    """Whether selections are made from it; a plain decode makes none."""


class FusedVerify:
    """Attends, scores and selects, layer by layer.

    Args:
        model_runner: of the served model; pools must exist.
        policy: if it scores by attention, then by that of all verify queries; else there is nothing to score here.
        store: where selections go.
        num_columns: capacity of the score buffer: committed tokens of a round, summed over its requests.
    """

    def __init__(self, model_runner: ModelRunner, policy: Policy, store: SelectionStore, num_columns: int) -> None:
        self.num_columns = num_columns
        self._policy = policy if isinstance(policy, SelectionPolicy) and policy.needs_attention else None
        self._store = store
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        self._kv_pool = model_runner.token_to_kv_pool
        self._num_layers = store.positions.shape[0]
        num_heads = self._kv_pool.head_num
        layers = num_score_layers(self._num_layers, num_heads, num_columns)
        # [layers that wait, KV heads, columns]
        shape = (layers, num_heads, 0 if self._policy is None else num_columns)
        self._scores = torch.zeros(shape, device=store.positions.device)
        self._plan: FusedPlan | None = None
        self._score_starts = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Of the score buffer."""
        return self._scores.numel() * self._scores.element_size()

    @property
    def num_tokens(self) -> int:
        """Of the verify that was planned last, padding included."""
        assert self._plan is not None, "a verify before it was planned"
        return self._plan.rows.shape[0] * self._plan.width

    def begin(self, plan: FusedPlan) -> None:
        """Before the first layer of a verify."""
        self._plan = plan
        if not plan.refreshes:
            return
        lens = plan.committed_lens.long()
        self._score_starts = lens.cumsum(0) - lens

    def attend(self, q: torch.Tensor, layer: RadixAttention, out: torch.Tensor | None = None) -> torch.Tensor:
        """One layer's attention, flat; with the last layer that waits, the selections too. All KV is written.

        Args:
            q: [num_tokens, ...], the queries, flat or by head.
            layer: of the model.
            out: [num_tokens, num_q_heads, head_dim], contiguous; where it is written if given.
        """
        plan = self._plan
        assert plan is not None, "a verify before it was planned"
        waiting = layer.layer_id % self._scores.shape[0]
        scores = self._scores[waiting] if self._policy is not None and plan.refreshes else None
        queries = q.reshape(-1, plan.width, layer.tp_q_head_num, layer.qk_head_dim)
        attended = self._attend(queries, layer, scores, None if out is None else out.view(queries.shape))
        is_last = layer.layer_id == self._num_layers - 1
        if scores is not None and (is_last or waiting == self._scores.shape[0] - 1):
            self._select(layer.layer_id - waiting, waiting + 1)
        return attended.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend(
        self, queries: torch.Tensor, layer: RadixAttention, scores: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of [num_reqs, width, num_q_heads, head_dim], in the same shape.

        Args:
            queries: of all requests.
            layer: of the model.
            scores: [num_kv_heads, columns], float32, to fill with anchored scores from `_score_starts` on; None: none
                are wanted.
            out: where the result is written if given.
        """
        plan = self._plan
        assert plan is not None
        attended, _ = paged_attention(
            queries,
            self._kv_pool.get_key_buffer(layer.layer_id),
            self._kv_pool.get_value_buffer(layer.layer_id),
            self._req_to_token,
            plan.rows,
            plan.committed_lens,
            plan.num_queries,
            scale=layer.scaling,
            max_len=plan.max_len,
            anchored_scores=scores,
            score_starts=None if scores is None else self._score_starts,
            logit_cap=layer.logit_cap,
            out=out,
        )
        return attended

    def _select(self, first_layer: int, num_layers: int) -> None:
        plan = self._plan
        assert plan is not None
        assert self._policy is not None
        # the policy's score is the attention itself
        selection = self._policy.keep(self._scores[:num_layers], plan.committed_lens, plan.max_len, self._score_starts)
        self._store.write_layers(first_layer, plan.rows, selection)
