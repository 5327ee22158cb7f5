"""Attention under SPARSESPEC: the user's own backend for dense forwards, sparse decode for draft steps.

Wraps the backend that SGLang built. Prefill and verify go through it unchanged; afterwards, or in the same pass where
the backend can, the attention of the newest queries is captured and each layer refreshes its selection. A draft step
never reaches the wrapped backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_sparsespec.adapter.side_stream import SideStream
from sglang_sparsespec.adapter.spec_input import SparseSpecDraftStep, SparseSpecMixedStep, SparseSpecVerifyInput
from sglang_sparsespec.ops.score_capture import capture_scores
from sglang_sparsespec.ops.sparse_decode import sparse_decode
from sglang_sparsespec.selection import SelectionPolicy, StepPolicy
from sglang_sparsespec.selection.window import WindowPolicy
from sglang_sparsespec.speculation.memory import SCORE_BYTES

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_sparsespec.adapter.fused_verify import FusedPlan, FusedVerify
    from sglang_sparsespec.adapter.metrics import RefreshTimer
    from sglang_sparsespec.selection.step import StepDraftKV
    from sglang_sparsespec.selection.store import DraftKV, SelectionStore


class CapturePlan(NamedTuple):
    """Whose attention a dense forward captures, and up to which position it is selectable."""

    rows: torch.Tensor
    """[num_reqs], int64, page-table rows."""
    query_starts: torch.Tensor
    """[num_reqs], int32: position of the first captured query."""
    query_lens: torch.Tensor
    """[num_reqs], int32: captured queries."""
    selectable_lens: torch.Tensor
    """[num_reqs], int32: positions at and past it are not selectable (a verify's own tokens may yet be rejected)."""
    token_index: torch.Tensor | None
    """[num_reqs, num_queries], int64: rows of the flat queries; None where they are all of them, in order."""
    num_queries: int
    query_step: int
    """Positions from one captured query to the next."""
    max_len: int
    """Bound of all positions, known to the host."""

    def part(self, requests: slice) -> CapturePlan:
        """The same for some of the requests; their queries are picked already."""
        return self._replace(
            rows=self.rows[requests],
            query_starts=self.query_starts[requests],
            query_lens=self.query_lens[requests],
            selectable_lens=self.selectable_lens[requests],
            token_index=None,
        )


@runtime_checkable
class ScoringBackend(Protocol):
    """A dense backend whose verify yields attention scores in the same pass."""

    def forward_verify_with_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        plan: CapturePlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention output, flat, and scores [num_reqs, num_kv_heads, max_len] float32."""
        ...


class SparseSpecAttnBackend:
    """The user's backend with score capture around it and sparse draft steps beside it.

    Everything that is not defined here is the wrapped backend's (so this is no AttentionBackend by inheritance, whose
    defaults would hide the wrapped one's answers).

    Args:
        dense: the backend that serves prefill and verify.
        model_runner: of the served model; pools must exist.
        policy: scores and selects.
        store: where selections are kept.
        num_queries: queries captured at the end of a prompt (of a verify's own the policy says which).
        timer: of capture and selection.
        fused: attends in verifies that say so.
    """

    def __init__(
        self,
        dense: AttentionBackend,
        model_runner: ModelRunner,
        policy: SelectionPolicy | StepPolicy,
        store: SelectionStore,
        num_queries: int,
        timer: RefreshTimer,
        fused: FusedVerify | None = None,
    ) -> None:
        self.dense = dense
        self.policy = policy
        self.store = store
        self.num_queries = num_queries
        self.timer = timer
        self.fused = fused
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.draft_kv: DraftKV | StepDraftKV | None = None
        self._capture: CapturePlan | None = None
        self._beside = SideStream(store.positions.device)
        self._scored_in_pass = isinstance(dense, ScoringBackend)
        # what is selected without looking at attention
        self._unscored: SelectionPolicy = WindowPolicy(policy.config)
        if isinstance(policy, SelectionPolicy) and not policy.needs_attention:
            self._unscored = policy

    def __getattr__(self, name: str) -> Any:
        if name == "dense":
            raise AttributeError(name)
        return getattr(self.dense, name)

    @property
    def needs_cpu_seq_lens(self) -> bool:
        """Whether the host waits for the lengths of every round, as SGLang asks: our own kernels never need them."""
        return self.fused is None and getattr(self.dense, "needs_cpu_seq_lens", True)

    # Plans

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if isinstance(forward_batch.spec_info, SparseSpecDraftStep):
            return
        self._capture = self._plan_capture(forward_batch)
        self.dense.init_forward_metadata(forward_batch)

    def plan_drafts(self, draft_kv: DraftKV | StepDraftKV) -> None:
        """Set what draft steps read from now on; the step that has begun counts its own token."""
        self.draft_kv = draft_kv

    def plan_mixed(self, drafts: DraftKV, verify: FusedPlan) -> None:
        """Set what mixed forwards read from now on: their first tokens draft, one for each of `lens`."""
        assert self.fused is not None
        self.plan_drafts(drafts)
        self.fused.begin(verify)

    def select_without_attention(self, rows: torch.Tensor, kv_lens: torch.Tensor, max_len: int) -> None:
        """Refresh every layer, by a policy that asks no attention; they all get the same.

        Args:
            rows: [num_reqs], int64, page-table rows.
            kv_lens: [num_reqs], int32, selectable lengths.
            max_len: bound of them.
        """
        selection = self._unscored.select(None, kv_lens, max_len)
        positions = selection.positions.expand(self.store.positions.shape[0], *selection.positions.shape)
        self.store.write_layers(0, rows, selection._replace(positions=positions))

    def select_after_prefill(self, rows: torch.Tensor, kv_lens: torch.Tensor, max_len: int) -> None:
        """A first selection where prefills capture nothing: for one round; its verify makes the next one.

        Capturing the last queries of a prompt, layer by layer, held a prefill up by 15 to 20 ms on an H100, and all
        running requests with it (estimated from a load: docs/results.md, "Adaptive k").
        """
        if self.fused is not None and isinstance(self.policy, SelectionPolicy):
            self.select_without_attention(rows, kv_lens, max_len)

    def _plan_capture(self, forward_batch: ForwardBatch) -> CapturePlan | None:
        if isinstance(self.policy, StepPolicy):
            return None
        if forward_batch.forward_mode.is_target_verify():
            assert isinstance(forward_batch.spec_info, SparseSpecVerifyInput)
            return self._plan_verify_capture(forward_batch, forward_batch.spec_info)
        if forward_batch.forward_mode.is_extend() and self.fused is None:
            return self._plan_prompt_capture(forward_batch)
        return None

    def _plan_verify_capture(self, forward_batch: ForwardBatch, verify: SparseSpecVerifyInput) -> CapturePlan:
        assert isinstance(self.policy, SelectionPolicy)
        committed_lens = forward_batch.seq_lens.to(torch.int32)
        width = verify.draft_token_num
        captured = self.policy.captured_queries(width)
        token_index = None
        if len(captured) < width:
            first_token = torch.arange(len(committed_lens), device=committed_lens.device)[:, None] * width
            token_index = first_token + torch.arange(
                captured.start, captured.stop, captured.step, device=committed_lens.device
            )
        return CapturePlan(
            rows=forward_batch.req_pool_indices,
            query_starts=committed_lens + captured.start,
            query_lens=torch.full_like(committed_lens, len(captured)),
            selectable_lens=committed_lens,
            token_index=token_index,
            num_queries=len(captured),
            query_step=captured.step,
            max_len=verify.max_committed_len + verify.draft_token_num,
        )

    def _plan_prompt_capture(self, forward_batch: ForwardBatch) -> CapturePlan:
        """The last prompt queries stand in for a verify's, so that the first round drafts like the later ones."""
        seq_lens = forward_batch.seq_lens.to(torch.int32)
        extend_lens = forward_batch.extend_seq_lens.to(torch.int32)
        query_lens = extend_lens.clamp(max=self.num_queries)
        last_token = torch.cumsum(extend_lens, 0)
        offset = torch.arange(self.num_queries, device=seq_lens.device)
        token_index = (last_token - query_lens)[:, None] + offset
        return CapturePlan(
            rows=forward_batch.req_pool_indices,
            query_starts=seq_lens - query_lens,
            query_lens=query_lens,
            selectable_lens=seq_lens,
            token_index=token_index.clamp_(0, forward_batch.input_ids.shape[0] - 1),
            num_queries=self.num_queries,
            query_step=1,
            max_len=int(forward_batch.seq_lens_cpu.max()),
        )

    # Forwards

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One attention layer; RadixAttention calls this."""
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if isinstance(forward_batch.spec_info, SparseSpecVerifyInput) and forward_batch.spec_info.is_fused:
            assert self.fused is not None
            if save_kv_cache:
                self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
            return self.fused.attend(q, layer)
        plan = self._capture
        if plan is None:
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        assert isinstance(self.policy, SelectionPolicy)
        if not self.policy.needs_attention:
            out = self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            with self.timer.layer():
                self._refresh(layer, plan, None)
            return out
        if self._scored_in_pass and plan.token_index is None:
            out, scores = self.dense.forward_verify_with_scores(q, k, v, layer, forward_batch, plan)
            with self.timer.layer():
                self._refresh(layer, plan, scores)
        else:
            # some backends rotate or overwrite q in place: it is kept aside first
            queries = self._captured_queries(q, layer, plan)
            out = self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            # some requests at a time: scores are as wide as the longest of them
            num_reqs = plan.rows.shape[0]
            step = max(1, SCORE_BYTES // max(1, 4 * layer.tp_k_head_num * plan.max_len))
            with self.timer.layer():
                for first in range(0, num_reqs, step):
                    requests = slice(first, first + step)
                    part = plan.part(requests)
                    self._refresh(layer, part, self._capture_scores(queries[requests], layer, part))
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(forward_batch.spec_info, SparseSpecDraftStep):
            return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if isinstance(forward_batch.spec_info, SparseSpecMixedStep):
            return self._attend_mixed(queries, layer)
        return self._attend_drafts(queries, layer).flatten(1)

    def _attend_mixed(self, queries: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Sparse attention of the tokens that draft, which come first, beside that of a verify. All KV is written."""
        assert self.fused is not None
        num_drafting = queries.shape[0] - self.fused.num_tokens
        out = torch.empty_like(queries)
        # neither fills the device to its end
        with self._beside:
            self.fused.attend(queries[num_drafting:], layer, out[num_drafting:])
        self._attend_drafts(queries[:num_drafting], layer, out[:num_drafting])
        self._beside.join()
        return out.flatten(1)

    def _attend_drafts(
        self, queries: torch.Tensor, layer: RadixAttention, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sparse attention of tokens that draft, [num_tokens, num_q_heads, head_dim]. Their KV is written."""
        assert self.draft_kv is not None, "a draft step before its round was planned"
        k_cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_cache = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        options = {"scale": layer.scaling, "logit_cap": layer.logit_cap}
        slots, lens = self.draft_kv.layer_kv(layer.layer_id, queries, k_cache, **options)
        return sparse_decode(queries, k_cache, v_cache, slots, lens, kv_rows=self.draft_kv.places, out=out, **options)

    # Capture and refresh

    def _captured_queries(self, q: torch.Tensor, layer: RadixAttention, plan: CapturePlan) -> torch.Tensor:
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if plan.token_index is not None:
            return queries[plan.token_index]
        return queries.view(-1, plan.num_queries, layer.tp_q_head_num, layer.qk_head_dim)

    def _capture_scores(self, queries: torch.Tensor, layer: RadixAttention, plan: CapturePlan) -> torch.Tensor:
        return capture_scores(
            queries,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            plan.rows,
            plan.query_starts,
            plan.query_lens,
            plan.selectable_lens,
            scale=layer.scaling,
            max_len=plan.max_len,
            logit_cap=layer.logit_cap,
            query_step=plan.query_step,
        )

    def _refresh(self, layer: RadixAttention, plan: CapturePlan, scores: torch.Tensor | None) -> None:
        assert isinstance(self.policy, SelectionPolicy)
        selection = self.policy.select(scores, plan.selectable_lens, plan.max_len)
        self.store.write(layer.layer_id, plan.rows, selection)
