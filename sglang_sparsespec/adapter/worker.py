"""The worker that SGLang drives: one draft-verify round per scheduler iteration.

Paper: SparseSpec (arXiv:2512.01278). `_round` reads like it: plan, draft, verify (which refreshes the selection layer
by layer), accept, commit. Invariant: KV below a request's committed length was written by a verify or a prefill.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask, record_stream_for_v2_verify

import sglang_sparsespec.patches as patches
from sglang_sparsespec.adapter.attention_backend import SparseSpecAttnBackend
from sglang_sparsespec.adapter.cpu_attention import TorchPagedAttnBackend
from sglang_sparsespec.adapter.metrics import RoundMetrics
from sglang_sparsespec.adapter.offload import Offloader, RequestState
from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics
from sglang_sparsespec.adapter.penalties import Penalties
from sglang_sparsespec.adapter.sampling import Drafts, RoundSampler
from sglang_sparsespec.adapter.spec_input import SparseSpecDraftInput, SparseSpecDraftStep, SparseSpecVerifyInput
from sglang_sparsespec.selection import POLICIES
from sglang_sparsespec.selection.store import SelectionStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker

    from sglang_sparsespec.adapter.penalties import PenalisedRows
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.selection.store import SavedSelection
    from sglang_sparsespec.speculation.acceptance import Acceptance

logger = logging.getLogger(__name__)


class RoundPlan(NamedTuple):
    """Where the tokens of one round go. n is a request's committed length.

    [0, n)          committed: KV is exact
    [n, n + k)      draft KV, inexact; the verify overwrites it
    [n, n + k]      the verify's tokens: the bonus token of the last round and the k drafts
    """

    rows: torch.Tensor
    """[num_reqs], int64, page-table rows."""
    committed_lens: torch.Tensor
    """[num_reqs], int64, n."""
    positions: torch.Tensor
    """[num_reqs, k + 1], int64."""
    slots: torch.Tensor
    """[num_reqs, k + 1], int64, KV slots of those positions."""
    max_committed_len: int
    """Bound of n, known to the host without asking the device."""
    penalised: PenalisedRows | None
    """Requests with penalties."""


class SparseSpecWorker(BaseSpecWorker):
    """Drafts with sparse attention over the served model's own weights and KV, and verifies with full attention.

    Args: as SGLang passes them to every speculative worker.

    Raises:
        HostContractError: if a patch that the algorithm stands on is not in force in this process.
    """

    def __init__(
        self,
        server_args: SparseSpecServerArgs,
        gpu_id: int,
        ps: ParallelState,
        nccl_port: int,
        target_worker: TpModelWorker,
    ) -> None:
        super().__init__()
        assert server_args.sparsespec_config is not None, "SPARSESPEC's options were not resolved"
        self.config = server_args.sparsespec_config
        scopes = ("sparsespec", "offload") if self.config.host_memory_gb > 0 else ("sparsespec",)
        patches.verify(patch for patch in patches.LEDGER if patch.scope in scopes)
        self._server_args = server_args
        self.device = server_args.device
        self._target_worker = target_worker
        self._model_runner = target_worker.model_runner
        self._policy = POLICIES[self.config.selection](self.config)
        self._sampler = RoundSampler(
            draft_sampling=self.config.draft_sampling,
            sampling_backend=server_args.sampling_backend,
            seed=server_args.random_seed,
            device=self.device,
        )
        self._num_ranks = ps.tp_size
        self._offload_metrics = None
        if self.config.host_memory_gb > 0:
            self._offload_metrics = OffloadMetrics(server_args, is_reporting_rank=ps.tp_rank == 0)
        self._metrics = RoundMetrics(
            server_args,
            self.config.num_steps,
            is_reporting_rank=ps.tp_rank == 0,
            on_report=None if self._offload_metrics is None else self._offload_metrics.report,
        )
        self._penalties = Penalties(self._model_runner.model_config.vocab_size, self.device)
        self._offsets = torch.arange(self.config.num_draft_tokens, device=self.device)

    # The round

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None = None
    ) -> GenerationBatchResult:
        """One scheduler iteration: a prefill, or a whole round of every running request."""
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        return self._round(batch, on_publish)

    def _prefill(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        result = self._target_worker.forward_batch_generation(batch, capture_hidden_mode=CaptureHiddenMode.NULL)
        result.new_seq_lens = batch.seq_lens
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = SparseSpecDraftInput(bonus_tokens=result.next_token_ids)
        self._penalties.start(batch, result.next_token_ids)
        return result

    def _round(self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None) -> GenerationBatchResult:
        record_stream_for_v2_verify(batch, None, torch.get_device_module(self.device).current_stream())
        plan = self._plan(batch)
        drafts = self._draft(batch, plan)
        logits_output = self._verify(batch, plan, drafts)
        acceptance = self._sampler.accept(logits_output.next_token_logits, drafts, batch.sampling_info)
        return self._commit(batch, plan, logits_output, acceptance, on_publish)

    def _plan(self, batch: ScheduleBatch) -> RoundPlan:
        kv_lens = [req.kv_committed_len for req in batch.reqs]
        self._metrics.plan(kv_lens, [self._policy.budget(kv_len) for kv_len in kv_lens])
        committed_lens = batch.seq_lens.long()
        positions = committed_lens[:, None] + self._offsets
        slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], positions].long()
        if batch.seq_lens_cpu is not None:
            bound = int(batch.seq_lens_cpu.max())
        else:
            # the device is ahead of the host by one round; what is allocated covers that
            bound = max(req.kv.kv_allocated_len for req in batch.reqs)
        return RoundPlan(
            batch.req_pool_indices, committed_lens, positions, slots, bound, self._penalties.rows_of(batch)
        )

    def _draft(self, batch: ScheduleBatch, plan: RoundPlan) -> Drafts:
        """k steps of one token per request, each seeing the selected KV and everything since."""
        self._backend.plan_drafts(
            self._store.draft_kv(
                plan.rows,
                plan.committed_lens,
                batch.req_to_token_pool.req_to_token,
                max_selected=min(self._policy.max_budget(plan.max_committed_len), self._max_budget),
                tail=2 * self.config.num_draft_tokens + self.config.block_size,
            )
        )
        forward_batch = self._draft_forward_batch(batch, plan)
        tokens, probs = [], []
        current = batch.spec_info.bonus_tokens.long()
        for step in range(self.config.num_steps):
            self._backend.advance_draft()
            logits = self._draft_step(forward_batch, plan, step, current)
            current, distribution = self._sampler.draft(logits, batch.sampling_info, plan.penalised, current)
            tokens.append(current)
            probs.append(distribution)
        sampled = [distribution for distribution in probs if distribution is not None]
        return Drafts(torch.stack(tokens, dim=1), torch.stack(sampled, dim=1) if sampled else None)

    def _draft_step(
        self, forward_batch: ForwardBatch, plan: RoundPlan, step: int, current: torch.Tensor
    ) -> torch.Tensor:
        """Feed one token per request at position n + step; returns logits [num_reqs, vocab_size]."""
        forward_batch.input_ids = current
        # kernels read both as dense arrays
        forward_batch.positions = plan.positions[:, step].contiguous()
        forward_batch.out_cache_loc = plan.slots[:, step].contiguous()
        forward_batch.seq_lens = plan.committed_lens + step + 1
        with forward_context(ForwardContext(attn_backend=self._backend)):
            output = self._model_runner.model.forward(current, forward_batch.positions, forward_batch)
        return output.next_token_logits

    def _draft_forward_batch(self, batch: ScheduleBatch, plan: RoundPlan) -> ForwardBatch:
        verify_info = batch.spec_info
        batch.forward_mode = ForwardMode.DECODE
        batch.input_ids = verify_info.bonus_tokens
        batch.out_cache_loc = plan.slots[:, 0]
        batch.spec_info = SparseSpecDraftStep(positions=plan.positions[:, 0])
        return_logprob, batch.return_logprob = batch.return_logprob, False
        try:
            return ForwardBatch.init_new(
                batch,
                self._model_runner,
                capture_hidden_mode=CaptureHiddenMode.NULL,
                return_hidden_states_before_norm=False,
            )
        finally:
            batch.spec_info = verify_info
            batch.return_logprob = return_logprob

    def _verify(self, batch: ScheduleBatch, plan: RoundPlan, drafts: Drafts) -> LogitsProcessorOutput:
        """One dense pass over the current token and the drafts; every layer refreshes its selection on the way.

        Overwrites the KV of positions [n, n + k] with exact values.
        """
        chain = torch.cat([batch.spec_info.bonus_tokens.long()[:, None], drafts.tokens], dim=1)
        grammar_tree = GrammarTree.from_linear_chain(chain) if batch.has_grammar else None
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = chain.flatten()
        batch.out_cache_loc = plan.slots.flatten()
        batch.spec_info = SparseSpecVerifyInput(
            draft_token=batch.input_ids,
            positions=plan.positions.flatten(),
            draft_token_num=self.config.num_draft_tokens,
            max_committed_len=plan.max_committed_len,
        )
        forward_batch = ForwardBatch.init_new(
            batch,
            self._model_runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        output = self._target_worker.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True
        ).logits_output
        grammar_mask = None
        if grammar_tree is not None:
            grammar_mask = build_grammar_vocab_mask(
                reqs=batch.reqs,
                tree=grammar_tree,
                sampling_info=batch.sampling_info,
                device=self.device,
                barrier=None,
            )
        self._sampler.adjust(output.next_token_logits, batch.sampling_info, chain, plan.penalised, grammar_mask)
        return output

    def _commit(
        self,
        batch: ScheduleBatch,
        plan: RoundPlan,
        logits_output: LogitsProcessorOutput,
        acceptance: Acceptance,
        on_publish: Callable[[torch.Tensor], None] | None,
    ) -> GenerationBatchResult:
        # [0, n)                      committed before
        # [n, n + accept_len)         committed now
        # [n + accept_len, n + k]     rejected: the slots stay with the request, the next round writes there again
        new_seq_lens = plan.committed_lens + acceptance.accept_lens
        if plan.penalised is not None:
            self._penalties.append(plan.penalised, acceptance)
        if on_publish is not None:
            on_publish(new_seq_lens)
        predicted = acceptance.accept_tokens.to(torch.int32).flatten()
        if batch.return_logprob:
            accept_index = torch.arange(predicted.numel(), device=predicted.device).view_as(acceptance.accept_tokens)
            compute_spec_v2_logprobs(batch, logits_output, predicted, accept_index, self.config.num_steps)
        return GenerationBatchResult(
            logits_output=logits_output,
            next_token_ids=predicted,
            accept_lens=acceptance.accept_lens,
            new_seq_lens=new_seq_lens,
            next_draft_input=SparseSpecDraftInput(bonus_tokens=acceptance.bonus_tokens),
            speculative_num_draft_tokens=self.config.num_draft_tokens,
            can_run_cuda_graph=False,
            extra_keep_alive_refs=[plan, acceptance],
        )

    # What SGLang asks of a worker beside rounds

    def prepare_for_kv_cache_release(self, req: Req) -> None:
        """A request ended, one way or another."""
        self._penalties.drop(req.rid)

    @property
    def draft_worker(self) -> Any:
        # there is no draft model: SGLang looks here for the draft's KV pool, runners and weights
        return SimpleNamespace(draft_runner=SimpleNamespace(token_to_kv_pool=None), draft_runners=[])

    @property
    def model_runner(self) -> Any:
        """The draft's runner, as SGLang sees it: the target's."""
        return self._model_runner

    @property
    def graph_memory_usage(self) -> dict[str, float]:
        return {}

    @property
    def graph_time_usage(self) -> dict[str, float]:
        return {}

    @property
    def weight_load_time(self) -> float:
        return 0.0

    def alloc_memory_pool(
        self, memory_pool_config: Any = None, req_to_token_pool: Any = None, token_to_kv_pool_allocator: Any = None
    ) -> None:
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator

    def init_attention_backends(self) -> None:
        runner = self._model_runner
        model = runner.model_config
        self._max_budget = self._policy.max_budget(model.context_len)
        self._store = SelectionStore(
            num_layers=model.num_hidden_layers,
            num_rows=self.req_to_token_pool.req_to_token.shape[0],
            num_heads=1 if self._shares_heads else runner.token_to_kv_pool.head_num,
            max_budget=self._max_budget,
            device=self.device,
        )
        dense = TorchPagedAttnBackend(runner) if self.device == "cpu" else runner.attn_backend
        self._backend = SparseSpecAttnBackend(
            dense,
            runner,
            self._policy,
            self._store,
            num_queries=self.config.num_draft_tokens,
            timer=self._metrics.refresh,
        )
        runner.attn_backend = self._backend
        logger.info(
            "SPARSESPEC: k=%d, budget=max(%d, %.3g n), selection=%s over %s, selection state %.1f MiB",
            self.config.num_steps,
            self.config.min_budget,
            self.config.budget_ratio,
            self.config.selection,
            "layers" if self._shares_heads else "KV heads",
            self._store.num_bytes / 2**20,
        )

        self._install_offloader()

    def _install_offloader(self) -> None:
        """Hand requests that lose their slots to host memory, where there is any for KV."""
        if self._offload_metrics is None:
            return

        def save(req: Req, copy: Callable[[torch.Tensor], torch.Tensor]) -> SavedSelection:
            return self._store.save(req.req_pool_idx, self._policy.max_budget(req.kv_committed_len), copy)

        def load(req: Req, selection: SavedSelection) -> None:
            self._store.load(req.req_pool_idx, selection)
            self._penalties.resume(req)

        patches.install_offloader(
            Offloader(
                num_bytes=int(self.config.host_memory_gb * 1e9 / self._num_ranks),
                tokens_per_round=self.config.num_draft_tokens,
                model_runner=self._model_runner,
                server_args=self._server_args,
                state=RequestState(save=save, load=load, forget=self.prepare_for_kv_cache_release),
                metrics=self._offload_metrics,
            )
        )

    @property
    def _shares_heads(self) -> bool:
        return self.config.sharing == "layer" or not self._policy.needs_attention

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """The outcome of an earlier round has arrived on the host."""
        self._metrics.verified(num_correct_drafts_per_req)

    def clear_cache_pool(self) -> None:
        """SGLang flushed its cache: nothing runs, so nothing of ours is in use."""
        self._penalties = Penalties(self._model_runner.model_config.vocab_size, self.device)

    def init_cuda_graphs(self) -> None:
        """Rounds run eagerly for now."""

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        return self._target_worker.update_weights_from_tensor(recv_req)

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        return True, "The target's weights are the draft's."

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        return True, "The target's weights are the draft's."
