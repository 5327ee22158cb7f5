"""The worker that SGLang drives: one draft-verify round per scheduler iteration.

Paper: SparseSpec (arXiv:2512.01278). `_round` reads like it: plan, draft, verify (which refreshes the selection layer
by layer), accept, commit. Invariant: KV below a request's committed length was written by a verify or a prefill.
"""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask, record_stream_for_v2_verify

import sglang_sparsespec.patches as patches
from sglang_sparsespec.adapter.adaptive import RoundSteps, StepPlan
from sglang_sparsespec.adapter.assist import NgramAssist
from sglang_sparsespec.adapter.attention_backend import SparseSpecAttnBackend
from sglang_sparsespec.adapter.cpu_attention import TorchPagedAttnBackend
from sglang_sparsespec.adapter.fused_verify import FusedPlan, FusedVerify, verify_groups
from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.adapter.memory import block_rule, identity, model_shape, round_shape
from sglang_sparsespec.adapter.metrics import RoundMetrics
from sglang_sparsespec.adapter.moves import RequestState
from sglang_sparsespec.adapter.offload import Offloader
from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics
from sglang_sparsespec.adapter.padded_forward import PaddedForward
from sglang_sparsespec.adapter.penalties import Penalties
from sglang_sparsespec.adapter.ranks import Ranks
from sglang_sparsespec.adapter.sampling import Drafts, KeptDrafts, RoundSampler
from sglang_sparsespec.adapter.sparse_layers import SparseLayers, draft_rules, verify_rules
from sglang_sparsespec.adapter.sparse_verify import SparseVerify
from sglang_sparsespec.adapter.spec_input import SparseSpecDraftInput, SparseSpecDraftStep, SparseSpecVerifyInput
from sglang_sparsespec.adapter.static_round import StaticRound, dense_columns
from sglang_sparsespec.adapter.unified import MixedForward, UnifiedRounds
from sglang_sparsespec.adapter.unified_state import UnifiedState
from sglang_sparsespec.selection import POLICIES, SelectionPolicy, StepPolicy
from sglang_sparsespec.selection.step import StepDraftKV
from sglang_sparsespec.selection.store import SelectionStore
from sglang_sparsespec.sparsity.anchors_file import read_anchors, weights_digest
from sglang_sparsespec.speculation.acceptance import Acceptance
from sglang_sparsespec.speculation.cost_model import ROOFLINES, ServerCost, roofline_of
from sglang_sparsespec.speculation.memory import fit_pool, plan_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.speculative.spec_info import SpecInput

    from sglang_sparsespec.adapter.penalties import PenalisedRows
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.selection.store import DraftKV, SavedSelection
    from sglang_sparsespec.speculation.distribution import SamplingRule
    from sglang_sparsespec.speculation.memory import MemoryPlan, ModelShape, RoundShape

logger = logging.getLogger(__name__)


class RoundPlan(NamedTuple):
    """Where the tokens of one round go. n is a request's committed length; k, the round's own, is at most K.

    [0, n)          committed: KV is exact
    [n, n + k)      draft KV, inexact; the verify overwrites it
    [n, n + k]      the verify's tokens: the bonus token of the last round and the k drafts
    """

    steps: StepPlan
    """k; 0 is a plain decode. And whose drafts stop earlier."""
    rows: torch.Tensor
    """[num_reqs], int64, page-table rows."""
    committed_lens: torch.Tensor
    """[num_reqs], int64, n."""
    positions: torch.Tensor
    """[num_reqs, K + 1], int64, from n on."""
    slots: torch.Tensor
    """[num_reqs, K + 1], int64, KV slots of those positions."""
    max_committed_len: int
    """Bound of n, known to the host without asking the device."""
    len_bounds: list[int]
    """Bound of each n, likewise."""
    batch_size: int
    """What the round is padded to."""
    rule: SamplingRule
    """How the requests sample."""
    penalised: PenalisedRows | None
    """Requests with penalties."""
    is_sparse: bool
    """Whether the verify may leave something out, and the output is then not the model's."""


class PlainRoundResult(GenerationBatchResult):
    """Of a round without drafts: SGLang takes every token but one of a round for a draft that stood."""

    @property
    def num_correct_drafts(self) -> int:
        return 0

    @num_correct_drafts.setter
    def num_correct_drafts(self, count: int) -> None:
        pass

    @property
    def num_correct_drafts_per_req_cpu(self) -> list[int] | None:
        return None if self.accept_lens is None else [0] * len(self.accept_lens)

    @num_correct_drafts_per_req_cpu.setter
    def num_correct_drafts_per_req_cpu(self, counts: list[int] | None) -> None:
        pass


def length_bound(req: Req, num_draft_tokens: int) -> int:
    """Tokens that the device may have committed of a request of this round, at most.

    A request may have ended after the round's batch was made: where SGLang does without overlap for a batch (grammars),
    it looks at the last result just before. Its slots are gone then, and what this round makes of it is dropped.
    """
    return req.seqlen + num_draft_tokens if req.kv is None else req.kv.kv_allocated_len


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
        scopes = ("sparsespec", "offload") if self.config.host_memory_bytes > 0 else ("sparsespec",)
        patches.verify(patch for patch in patches.LEDGER if patch.scope in scopes)
        self._server_args = server_args
        self._gpu_id = gpu_id
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
        self._host_ranks = HostRanks()
        if ps.tp_size > 1:
            self._host_ranks = HostRanks(get_tp_group().cpu_group, ps.tp_rank, ps.tp_size)
        self._offload_metrics = None
        if self.config.host_memory_bytes > 0:
            self._offload_metrics = OffloadMetrics(server_args, is_reporting_rank=self._host_ranks.leads)
        self._metrics = RoundMetrics(
            server_args,
            self.config.num_steps,
            is_reporting_rank=self._host_ranks.leads,
            is_fused=self.config.verify_attention == "fused",
            is_lossy=bool(self.config.verify_sparsity),
            on_report=None if self._offload_metrics is None else self._offload_metrics.report,
        )
        self._penalties = Penalties(self._model_runner.model_config.vocab_size, self.device)
        self._memory: MemoryPlan | None = None
        # SGLang sizes the KV pool next; a CPU's memory is not shared out
        patches.install_reserve(self._reserve if self.device == "cuda" else None)
        self._step_kv: StepDraftKV | None = None
        self._unified: UnifiedRounds | None = None
        self._assist: NgramAssist | None = None
        self._plain_step: PaddedForward | None = None
        self._kept: KeptDrafts | None = None
        self._round_ct = 0
        self._offsets = torch.arange(self.config.num_draft_tokens, device=self.device)
        self._steps = RoundSteps(
            self.config,
            self._identity(),
            ranks=self._host_ranks,
            cost=self._cost() if self.config.schedule == "auto" or self.config.adaptive else None,
        )
        self._metrics.watch(lambda: self._steps.status, lambda: self._steps.schedule_status)

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
        self._steps.interrupted()
        result = self._target_worker.forward_batch_generation(batch, capture_hidden_mode=CaptureHiddenMode.NULL)
        lens = batch.seq_lens.to(torch.int32)
        self._backend.select_after_prefill(batch.req_pool_indices, lens, int(batch.seq_lens_cpu.max()))
        self._ranks.agree(result.next_token_ids)
        result.new_seq_lens = batch.seq_lens
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = SparseSpecDraftInput(bonus_tokens=result.next_token_ids)
        self._penalties.start(batch, result.next_token_ids)
        if self._assist is not None:
            self._assist.start(batch.reqs)
        return result

    def _round(self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None) -> GenerationBatchResult:
        record_stream_for_v2_verify(batch, None, torch.get_device_module(self.device).current_stream())
        plan = self._plan(batch)
        current = batch.spec_info.bonus_tokens.long()
        is_unified = self._runs_unified(batch, plan)
        if is_unified:
            run = self._run_unified
        elif plan.steps.plain_steps > 0:
            run = self._run_plain
        else:
            run = self._run_lockstep
        acceptance, logits_output = run(batch, plan)
        verified = self._unified.num_verified if is_unified and self._unified is not None else None
        self._steps.runs("unified" if is_unified else "lockstep", verified)
        if self._assist is not None:
            self._assist.commit(plan, current, acceptance)
        return self._commit(batch, plan, logits_output, acceptance, on_publish)

    def _runs_unified(self, batch: ScheduleBatch, plan: RoundPlan) -> bool:
        if self._unified is None:
            return False
        assert self._backend.fused is not None
        num_columns = self._backend.fused.num_columns
        if plan.steps.schedule == "unified" and self._unified.takes(batch, plan, num_columns):
            return True
        self._unified.forget()
        return False

    def _run_lockstep(self, batch: ScheduleBatch, plan: RoundPlan) -> tuple[Acceptance, LogitsProcessorOutput]:
        """All draft together, then all verify together."""
        drafts = self._draft(batch, plan)
        logits_output = self._verify(batch, plan, drafts)
        limits = plan.steps.limits_on(self.device)
        if drafts.counts is not None:
            limits = drafts.counts if limits is None else torch.minimum(limits, drafts.counts)
        acceptance = self._sampler.accept(
            logits_output.next_token_logits, drafts, batch.sampling_info, plan.rule, limits
        )
        return self._ranks.agree_on_acceptance(acceptance), logits_output

    def _run_plain(self, batch: ScheduleBatch, plan: RoundPlan) -> tuple[Acceptance, LogitsProcessorOutput]:
        """The model itself says a few tokens, one after the other: without drafts, verifies, selections and the host.

        Every token stands, and its KV is exact.
        """
        assert self._plain_step is not None
        self._bound_verify(plan)
        self._load(plan, batch.req_to_token_pool.req_to_token)
        current = batch.spec_info.bonus_tokens.long()
        num_reqs, num_tokens = plan.rows.shape[0], plan.steps.plain_steps
        tokens = torch.empty((num_reqs, num_tokens), dtype=torch.int64, device=self.device)
        kept: list[torch.Tensor] = []
        for step in range(num_tokens):
            self._static.begin_step(step, current, plan.batch_size)
            logits = self._plain_step(plan.batch_size)[:num_reqs]
            logits = self._sampler.adjust(logits, batch.sampling_info, current[:, None], None, None)
            if batch.return_logprob:
                # the next forward writes in the same place
                kept.append(logits.clone())
            # each token's KV stays, so ranks must agree on it before it is fed
            current = self._ranks.agree(self._sampler.sample(logits, batch.sampling_info, plan.rule))
            tokens[:, step] = current
        lens = torch.full((num_reqs,), num_tokens, dtype=torch.int32, device=self.device)
        all_logits = torch.stack(kept, dim=1).flatten(0, 1) if kept else None
        return Acceptance(tokens, lens, current), LogitsProcessorOutput(next_token_logits=all_logits)

    def _run_unified(self, batch: ScheduleBatch, plan: RoundPlan) -> tuple[Acceptance, LogitsProcessorOutput]:
        """Some verify while the others draft, k + 1 times."""
        assert self._unified is not None
        self._bound_verify(plan)
        acceptance, logits = self._unified.run(batch, plan)
        return acceptance, LogitsProcessorOutput(next_token_logits=logits)

    def _plan(self, batch: ScheduleBatch) -> RoundPlan:
        kv_lens = [req.kv_committed_len for req in batch.reqs]
        penalised = self._penalties.rows_of(batch)
        # penalties and grammars have something to say between two tokens
        allows_plain = self._plain_step is not None and penalised is None and not batch.has_grammar
        steps = self._steps.next_round(batch.reqs, sum(kv_lens), allows_plain=allows_plain)
        self._metrics.plan(kv_lens, [self._policy.budget(kv_len) for kv_len in kv_lens])
        committed_lens = batch.seq_lens.long()
        positions = committed_lens[:, None] + self._offsets
        slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], positions].long()
        if batch.seq_lens_cpu is not None:
            bounds = batch.seq_lens_cpu.tolist()
        else:
            # the device is ahead of the host by one round; what is allocated covers that
            bounds = [length_bound(req, self.config.num_draft_tokens) for req in batch.reqs]
        # what is allocated may pass the table; what a round writes does not
        limit = batch.req_to_token_pool.req_to_token.shape[1] - self.config.num_draft_tokens
        # the same on all ranks: each counts every round
        self._round_ct += 1
        return RoundPlan(
            steps=steps,
            rows=batch.req_pool_indices,
            committed_lens=committed_lens,
            positions=positions,
            slots=slots,
            max_committed_len=min(max(bounds), limit),
            len_bounds=bounds,
            batch_size=self._draft_step.padded(len(bounds)),
            rule=self._sampler.rule(batch),
            penalised=penalised,
            is_sparse=self.config.is_sparse_round(self._round_ct),
        )

    def _draft(self, batch: ScheduleBatch, plan: RoundPlan) -> Drafts:
        """k steps of one token per request, each seeing the selected KV and everything since."""
        self._load(plan, batch.req_to_token_pool.req_to_token)
        num_reqs = plan.rows.shape[0]
        drafts = Drafts(num_reqs, plan.steps.num_steps, self.device, self._kept)
        current = batch.spec_info.bonus_tokens.long()
        if self._assist is not None and self._assist.takes(batch, plan):
            num_forwards = self._assist.num_forwards(plan.steps.num_steps)
            if num_forwards > 0:
                return self._draft_with_guesses(batch, plan, drafts, num_forwards)
        for step in range(plan.steps.num_steps):
            self._begin_step(step, current, plan.batch_size)
            logits = self._draft_step(plan.batch_size)[:num_reqs]
            current = self._sampler.draft(step, logits, drafts, batch.sampling_info, plan.rule, plan.penalised, current)
        if plan.steps.num_steps > 0:
            # once for all steps: the verify writes the KV of drafts again; what they were drafted from need not agree
            drafts.tokens = self._ranks.agree(drafts.tokens)
        return drafts

    def _draft_with_guesses(self, batch: ScheduleBatch, plan: RoundPlan, drafts: Drafts, num_forwards: int) -> Drafts:
        assert self._assist is not None
        counts = self._assist.draft(batch, plan, drafts, batch.spec_info.bonus_tokens.long(), num_forwards)
        agreed = self._ranks.agree(torch.cat([drafts.tokens, counts[:, None]], dim=1))
        drafts.tokens, drafts.counts = agreed[:, :-1], agreed[:, -1]
        self._steps.drafted(drafts.counts)
        return drafts

    def _load(self, plan: RoundPlan, req_to_token: torch.Tensor) -> None:
        """Put the round, and what its drafts read, where the forwards look for it."""
        draft_kv = None
        if isinstance(self._policy, StepPolicy):
            self._step_kv = StepDraftKV(
                self._policy, plan.rows, plan.committed_lens.int(), req_to_token, plan.max_committed_len
            )
        elif plan.steps.num_steps > 0:
            draft_kv = self._list_slots(plan.rows, plan.committed_lens, plan.max_committed_len)
        self._static.load(
            plan.rows,
            plan.committed_lens,
            plan.positions,
            plan.slots,
            draft_kv,
            plan.batch_size,
            num_queries=plan.steps.num_steps + 1,
        )

    def _list_slots(self, rows: torch.Tensor, committed_lens: torch.Tensor, max_committed_len: int) -> DraftKV:
        """What drafts of the requests at `rows` see, from their selections on."""
        return self._store.draft_kv(
            rows,
            committed_lens,
            self.req_to_token_pool.req_to_token,
            max_selected=min(self._policy.max_budget(max_committed_len), self._max_budget),
            tail=self.config.draft_tail,
        )

    def _begin_step(self, step: int, tokens: torch.Tensor, batch_size: int) -> None:
        self._static.begin_step(step, tokens, batch_size)
        if self._step_kv is not None:
            self._step_kv = self._step_kv.advanced()

    def _draft_body(self, batch_size: int) -> torch.Tensor:
        """Feed one token per request; returns logits [batch_size, vocab_size]."""
        static = self._static
        self._backend.plan_drafts(static.draft_kv(batch_size) if self._step_kv is None else self._step_kv)
        positions = static.step_positions[:batch_size]
        return self.run_draft(
            ForwardMode.DECODE,
            static.step_tokens[:batch_size],
            positions,
            static.step_slots[:batch_size],
            SparseSpecDraftStep(positions=positions),
            rows=static.rows[:batch_size],
            lens=static.committed_lens[:batch_size],
        )

    def _plain_body(self, batch_size: int) -> torch.Tensor:
        """The model's own next token; returns logits [batch_size, vocab_size]."""
        static = self._static
        positions = static.step_positions[:batch_size]
        plan = FusedPlan(
            static.rows[:batch_size],
            positions.to(torch.int32),
            static.num_queries[:batch_size],
            1,
            self._verify_max_len,
            refreshes=False,
        )
        return self._run_fused(plan, static.step_tokens[:batch_size], positions, static.step_slots[:batch_size])

    def _verify_body(self, width: int, is_sparse: bool, batch_size: int) -> torch.Tensor:
        """Our own verify of `width` tokens per request; returns logits [batch_size * width, vocab_size]."""
        static = self._static
        plan = FusedPlan(
            static.rows[:batch_size],
            static.committed_lens[:batch_size],
            static.num_queries[:batch_size],
            width,
            self._verify_max_len,
            is_sparse,
        )
        return self._run_fused(plan, *static.verified(batch_size, width))

    def _run_fused(
        self, plan: FusedPlan, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Feed `plan.width` tokens per request with full attention by our own verify; returns their logits."""
        assert self._backend.fused is not None
        self._backend.fused.begin(plan)
        run = self._run_sparse_verify if plan.is_sparse else self.run_model
        return run(
            ForwardMode.TARGET_VERIFY,
            tokens,
            positions,
            slots,
            SparseSpecVerifyInput(draft_token=tokens, positions=positions, draft_token_num=plan.width, is_fused=True),
            rows=plan.rows,
            lens=plan.committed_lens,
        )

    def run_model(
        self,
        mode: ForwardMode,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        out_cache_loc: torch.Tensor,
        spec_info: SpecInput,
        *,
        rows: torch.Tensor,
        lens: torch.Tensor,
    ) -> torch.Tensor:
        """The model over static tensors, past SGLang's runners, whose graphs know their own algorithms only.

        Args:
            mode: of the forward.
            input_ids: [num_tokens], int64.
            positions: [num_tokens], int64.
            out_cache_loc: [num_tokens], int64, KV slots.
            spec_info: tells our attention backend what this is.
            rows: [batch_size], page-table rows, as SGLang wants to know them.
            lens: [batch_size], likewise.

        Returns:
            Logits of every token, [num_tokens, vocab_size].
        """
        forward_batch = ForwardBatch(
            forward_mode=mode,
            batch_size=rows.shape[0],
            input_ids=input_ids,
            req_pool_indices=rows,
            seq_lens=lens,
            out_cache_loc=out_cache_loc,
            seq_lens_sum=0,
            positions=positions,
            spec_algorithm=self._model_runner.spec_algorithm,
            spec_info=spec_info,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            next_token_logits_buffer=self._narrow_logits,
        )
        with forward_context(ForwardContext(attn_backend=self._backend)):
            output = self._model_runner.model.forward(input_ids, positions, forward_batch)
        return output.next_token_logits

    def run_draft(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`run_model` for a forward that holds drafts and nothing else: it may leave out channels and experts."""
        with self._draft_layers.applied():
            return self.run_model(*args, **kwargs)

    def _run_sparse_verify(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`run_model` without the channels and experts that --sparsespec-verify-sparsity names: lossy."""
        with self._verify_layers.applied():
            return self.run_model(*args, **kwargs)

    def _verify(self, batch: ScheduleBatch, plan: RoundPlan, drafts: Drafts) -> LogitsProcessorOutput:
        """One dense pass over the current token and the drafts; every layer refreshes its selection on the way.

        Overwrites the KV of positions [n, n + k] with exact values. Neither holds with --sparsespec-verify-sparsity.
        """
        chain = torch.cat([batch.spec_info.bonus_tokens.long()[:, None], drafts.tokens], dim=1)
        grammar_tree = GrammarTree.from_linear_chain(chain) if batch.has_grammar else None
        fused = self._backend.fused
        if fused is None:
            output = self._verify_with_backend(batch, plan, chain)
        else:
            logits = self._verify_fused(plan, chain, fused.num_columns)
            output = LogitsProcessorOutput(next_token_logits=logits)
        grammar_mask = None
        if grammar_tree is not None:
            grammar_mask = build_grammar_vocab_mask(
                reqs=batch.reqs,
                tree=grammar_tree,
                sampling_info=batch.sampling_info,
                device=self.device,
                barrier=None,
            )
        output.next_token_logits = self._sampler.adjust(
            output.next_token_logits, batch.sampling_info, chain, plan.penalised, grammar_mask
        )
        return output

    def _verify_fused(self, plan: RoundPlan, chain: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Our own verify of a round; in groups where its scores do not fit `num_columns` together.

        Returns:
            [num_reqs * (k + 1), vocab_size].
        """
        self._bound_verify(plan)
        groups = verify_groups(plan.len_bounds, num_columns)
        self._metrics.verified_in(len(groups))
        if len(groups) == 1:
            logits = self._verify_static(plan, chain, plan.batch_size)
        else:
            logits = self._verify_groups(plan, chain, groups)
        if isinstance(self._policy, SelectionPolicy) and not self._policy.needs_attention:
            self._backend.select_without_attention(plan.rows, plan.committed_lens.int(), plan.max_committed_len)
        return logits

    def _verify_groups(self, plan: RoundPlan, chain: torch.Tensor, groups: list[slice]) -> torch.Tensor:
        num_reqs, num_tokens = chain.shape
        logits: torch.Tensor | None = None
        for group in groups:
            rows = plan.rows[group]
            batch_size = self._draft_step.padded(rows.shape[0])
            self._static.load(
                rows,
                plan.committed_lens[group],
                plan.positions[group],
                plan.slots[group],
                None,
                batch_size,
                num_queries=plan.steps.num_steps + 1,
            )
            # read before the next group's forward, which writes in the same place
            part = self._verify_static(plan, chain[group], batch_size)
            if logits is None:
                logits = part.new_empty(num_reqs, num_tokens, part.shape[-1])
            logits[group] = part.view(-1, num_tokens, part.shape[-1])
        assert logits is not None, "a round without requests"
        return logits.flatten(0, 1)

    def _verify_static(self, plan: RoundPlan, chain: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The verify of `chain` for the requests that the static tensors hold, [num_reqs * (k + 1), vocab_size]."""
        # at a width that was captured; what a request has no token for is padding
        num_reqs, num_tokens = chain.shape
        # where no context is long enough to lose anything, choosing all of it would cost and gain nothing
        is_sparse = plan.is_sparse and plan.max_committed_len > self.config.dense_up_to
        forwards = self._sparse_forwards if is_sparse else self._verify_forwards
        width = min(width for width in forwards if width >= num_tokens)
        self._static.set_chain(chain, batch_size)
        logits = forwards[width](batch_size)[: num_reqs * width]
        if width > num_tokens:
            logits = logits.view(num_reqs, width, -1)[:, :num_tokens].flatten(0, 1)
        return logits

    def _bound_verify(self, plan: RoundPlan) -> None:
        if self.device == "cpu":
            # a tighter bound than the context's, where nothing is captured
            self._verify_max_len = plan.max_committed_len + self.config.num_draft_tokens

    def _verify_with_backend(self, batch: ScheduleBatch, plan: RoundPlan, chain: torch.Tensor) -> LogitsProcessorOutput:
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = chain.flatten()
        batch.out_cache_loc = dense_columns(plan.slots, chain.shape[1])
        batch.spec_info = SparseSpecVerifyInput(
            draft_token=batch.input_ids,
            positions=dense_columns(plan.positions, chain.shape[1]),
            draft_token_num=chain.shape[1],
            max_committed_len=plan.max_committed_len,
        )
        forward_batch = ForwardBatch.init_new(
            batch,
            self._model_runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        forward_batch.next_token_logits_buffer = self._narrow_logits
        return self._target_worker.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True
        ).logits_output

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
        # of a plain round [0, n + accept_len) is committed, and nothing was rejected
        new_seq_lens = plan.committed_lens + acceptance.accept_lens
        if plan.penalised is not None:
            self._penalties.append(plan.penalised, acceptance)
        if on_publish is not None:
            on_publish(new_seq_lens)
        predicted = acceptance.accept_tokens.to(torch.int32).flatten()
        if batch.return_logprob:
            logits_output.next_token_logits = logits_output.next_token_logits.float()
            accept_index = torch.arange(predicted.numel(), device=predicted.device).view_as(acceptance.accept_tokens)
            num_steps = acceptance.accept_tokens.shape[1] - 1
            compute_spec_v2_logprobs(batch, logits_output, predicted, accept_index, num_steps)
        result = PlainRoundResult if plan.steps.plain_steps > 0 else GenerationBatchResult
        return result(
            logits_output=logits_output,
            next_token_ids=predicted,
            accept_lens=acceptance.accept_lens,
            new_seq_lens=new_seq_lens,
            next_draft_input=SparseSpecDraftInput(bonus_tokens=acceptance.bonus_tokens),
            # the stride of this result; slots and lengths stay those of K
            speculative_num_draft_tokens=acceptance.accept_tokens.shape[1],
            can_run_cuda_graph=self._draft_step.is_captured(plan.batch_size),
            extra_keep_alive_refs=[plan, acceptance],
        )

    # What SGLang asks of a worker beside rounds

    def prepare_for_kv_cache_release(self, req: Req) -> None:
        """A request ended, one way or another."""
        self._penalties.drop(req.rid)
        if self._unified is not None:
            self._unified.drop(req.rid)

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
        return {forward.name: forward.memory_gb for forward in self._forwards}

    @property
    def graph_time_usage(self) -> dict[str, float]:
        return {forward.name: forward.capture_s for forward in self._forwards}

    @property
    def _forwards(self) -> list[PaddedForward]:
        """In the order in which they are captured: the widest verify first, for all share its memory."""
        forwards: list[PaddedForward] = []
        if self._backend.fused is not None:
            # of two verifies of one width the sparse one holds more
            forwards += [*self._sparse_forwards.values(), *self._verify_forwards.values()]
        if self._unified is not None:
            forwards.append(self._unified.forward)
        if self._assist is not None:
            forwards.append(self._assist.forward)
        if self._plain_step is not None:
            forwards.append(self._plain_step)
        return [*forwards, self._draft_step]

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
        self._ranks = Ranks(get_tp_group())
        model = runner.model_config
        # no request is longer than the pool
        max_len = min(model.context_len, self.token_to_kv_pool_allocator.size)
        self._max_budget = self._policy.max_budget(max_len)
        self._store = SelectionStore(
            num_layers=model.num_hidden_layers,
            num_rows=self.req_to_token_pool.req_to_token.shape[0],
            num_heads=1 if self._shares_heads else runner.token_to_kv_pool.head_num,
            max_budget=0 if isinstance(self._policy, StepPolicy) else self._max_budget,
            device=self.device,
        )
        fused = None
        if self.config.verify_attention == "fused":
            fused = self._make_fused()
        dense = TorchPagedAttnBackend(runner) if self.device == "cpu" else runner.attn_backend
        self._backend = SparseSpecAttnBackend(
            dense,
            runner,
            self._policy,
            self._store,
            num_queries=self.config.num_draft_tokens,
            timer=self._metrics.refresh,
            fused=fused,
        )
        runner.attn_backend = self._backend
        self._make_forwards()
        self._install_offloader()
        if self.device == "cuda":
            self._report_memory()
        logger.info(
            "SPARSESPEC: k=%d, budget=max(%d, %.3g n), selection=%s over %s, selection state %.1f MiB",
            self.config.num_steps,
            self.config.min_budget,
            self.config.budget_ratio,
            self.config.selection,
            "layers" if self._shares_heads else "KV heads",
            self._store.num_bytes / 2**20,
        )
        if self.config.verify_sparsity and self._host_ranks.leads:
            logger.warning(
                "SPARSESPEC is LOSSY: verifies leave out %s (--sparsespec-verify-sparsity), so the output is not the "
                "model's own. docs/lossy.md says when not to use it.",
                ", ".join(self.config.verify_sparsity),
            )
        if self._policy.caution is not None:
            logger.warning("SPARSESPEC: --sparsespec-selection %s: %s.", self.config.selection, self._policy.caution)

    def _make_forwards(self) -> None:
        """Static tensors and the two forwards of a round over them."""
        runner = self._model_runner
        max_reqs = self.req_to_token_pool.size
        batch_sizes = self._batch_sizes(max_reqs)
        self._static = StaticRound(
            max_reqs=max_reqs,
            num_draft_tokens=self.config.num_draft_tokens,
            store=self._store,
            tail=self.config.draft_tail,
            device=self.device,
        )
        # holds nothing: it asks SGLang's head for logits as they are (patches/logits.py)
        self._narrow_logits: torch.Tensor | None = None
        if self.device != "cpu":
            self._narrow_logits = torch.empty(
                (0, runner.model_config.vocab_size), dtype=self._logits_dtype, device=self.device
            )
        self._verify_max_len = self.req_to_token_pool.req_to_token.shape[1]
        self._draft_layers = SparseLayers(runner.model, draft_rules(self.config))
        self._verify_layers = SparseLayers(runner.model, verify_rules(self.config))
        self._draft_step = PaddedForward("draft", self._draft_body, batch_sizes)
        if self.config.most_plain_steps > 0 and not isinstance(self._policy, StepPolicy):
            self._plain_step = PaddedForward("plain decode", self._plain_body, batch_sizes)
        # the widest first: what it needs of the graphs' memory serves the others
        has_sparse = bool(self.config.verify_sparsity)
        has_dense = self.config.has_dense_verify
        self._verify_forwards = self._make_verifies(batch_sizes, is_sparse=False) if has_dense else {}
        self._sparse_forwards = self._make_verifies(batch_sizes, is_sparse=True) if has_sparse else {}
        if self.config.has_unified:
            self._unified = self._make_unified(max_reqs, batch_sizes)
        if self.config.ngram_assist > 0:
            self._assist = NgramAssist(
                self.config.ngram_assist,
                num_steps=self.config.num_steps,
                page_table=self.req_to_token_pool.req_to_token,
                static=self._static,
                sampler=self._sampler,
                batch_sizes=batch_sizes,
                plan_drafts=self._backend.plan_drafts,
                run_model=self.run_draft,
            )

    def _make_verifies(self, batch_sizes: list[int], is_sparse: bool) -> dict[int, PaddedForward]:
        """By width, the widest first."""
        name = "sparse verify" if is_sparse else "verify"
        return {
            steps + 1: PaddedForward(
                name if steps == self.config.num_steps else f"{name} k={steps}",
                partial(self._verify_body, steps + 1, is_sparse),
                batch_sizes,
            )
            for steps in reversed(self.config.step_choices)
        }

    def _make_fused(self) -> FusedVerify:
        num_columns = self.token_to_kv_pool_allocator.size
        rule = block_rule(self.config)
        if rule is None:
            return FusedVerify(self._model_runner, self._policy, self._store, num_columns)
        anchors = None if self.config.verify_anchors is None else self._read_anchors(self.config.verify_anchors)
        return SparseVerify(self._model_runner, self._policy, self._store, num_columns, rule=rule, anchors=anchors)

    def _read_anchors(self, path: str) -> tuple[int, ...]:
        found, model = read_anchors(path), self._model_runner.model_config
        if self._host_ranks.leads:
            # the digest is of the first head, which is rank 0's
            if found.calibration is not None:
                found.check_weights(weights_digest(self._model_runner.model, model.num_hidden_layers, model.head_dim))
            doubts = found.doubts(self.config.verify_kv_ratio, self.config.verify_dense_below)
            if doubts:
                logger.warning("SPARSESPEC: the anchors of %s are %s.", path, doubts)
        return found.anchors

    def _make_unified(self, max_reqs: int, batch_sizes: list[int]) -> UnifiedRounds:
        req_to_token = self.req_to_token_pool.req_to_token
        self._kept = KeptDrafts(req_to_token.shape[0], self.config.num_steps)
        return UnifiedRounds(
            UnifiedState(
                num_rows=req_to_token.shape[0],
                max_reqs=max_reqs,
                num_steps=self.config.num_steps,
                lists=self._static.draft_slots,
            ),
            MixedForward(self._backend, self.run_model, req_to_token, lambda: self._verify_max_len),
            batch_sizes,
            num_steps=self.config.num_steps,
            sampler=self._sampler,
            kept=self._kept,
            ranks=self._ranks,
            list_slots=self._list_slots,
        )

    @property
    def _logits_dtype(self) -> torch.dtype:
        """What the model's head computes, or float32 where logits are capped."""
        for module in self._model_runner.model.modules():
            if isinstance(module, LogitsProcessor) and (module.final_logit_softcapping or module.use_fp32_lm_head):
                return torch.float32
        return self._model_runner.model_config.dtype

    def _batch_sizes(self, max_reqs: int) -> list[int]:
        if isinstance(self._policy, StepPolicy):
            # for analysis: selects with bounds that the host knows, and makes tensors as it goes
            return []
        return [size for size in self._server_args.sparsespec_batch_sizes if size <= max_reqs]

    # Memory beside the KV pool

    def _reserve(self, pool_bytes: int, activation_bytes: int, tokens_in: Callable[[int], int]) -> int:
        model, rounds = self._shapes(self._server_args.max_running_requests)
        return fit_pool(model, rounds, pool_bytes=pool_bytes, activation_bytes=activation_bytes, tokens_in=tokens_in)

    def _shapes(self, max_reqs: int) -> tuple[ModelShape, RoundShape]:
        model = self._model_runner.model_config
        rounds = round_shape(
            model,
            self.config,
            self._policy,
            max_reqs=max_reqs,
            batch_sizes=self._batch_sizes(max_reqs),
            shares_heads=self._shares_heads,
            logits_dtype=self._logits_dtype,
            device=torch.device(self.device, self._gpu_id),
        )
        return model_shape(model, self._host_ranks.size), rounds

    def _report_memory(self) -> None:
        # what was reserved before the pool was sized is at least this: the pool may have become smaller
        self._memory = plan_memory(*self._shapes(self.req_to_token_pool.size), self.token_to_kv_pool_allocator.size)
        self._metrics.reserved(self._memory.total)
        logger.info("SPARSESPEC memory: %s", self._memory.describe())

    def _install_offloader(self) -> None:
        """Hand requests that lose their slots to host memory, where there is any for KV."""
        if self._offload_metrics is None:
            return

        def save(req: Req, copy: Callable[[torch.Tensor], torch.Tensor]) -> SavedSelection:
            saved = self._store.save(req.req_pool_idx, self._policy.max_budget(req.kv_committed_len), copy)
            return saved._replace(is_stale=self._steps.is_stale)

        def load(req: Req, selection: SavedSelection) -> None:
            self._store.load(req.req_pool_idx, selection)
            self._steps.brought_back(is_stale=selection.is_stale)
            self._penalties.resume(req)
            if self._assist is not None:
                self._assist.start([req])

        patches.install_offloader(
            Offloader(
                # a total for the server, which its ranks share
                num_bytes=self.config.host_memory_bytes // self._host_ranks.size,
                tokens_per_round=self.config.num_draft_tokens,
                model_runner=self._model_runner,
                server_args=self._server_args,
                state=RequestState(save=save, load=load, forget=self.prepare_for_kv_cache_release),
                metrics=self._offload_metrics,
                ranks=self._host_ranks,
            )
        )

    @property
    def _shares_heads(self) -> bool:
        is_scored_by_head = isinstance(self._policy, StepPolicy) or self._policy.needs_attention
        return self.config.sharing == "layer" or not is_scored_by_head

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """The outcome of an earlier round has arrived on the host."""
        self._steps.verified(num_correct_drafts_per_req)
        self._metrics.verified(num_correct_drafts_per_req)

    def describe_rounds(self) -> dict[str, Any]:
        """For /server_info (patches/server_info.py)."""
        described = self._steps.describe()
        described["lossy"] = self.config.describe_loss()
        if self._assist is not None:
            described["ngram_assist"] = self._assist.describe()
        return described

    def _cost(self) -> ServerCost:
        """What rounds should take on this machine; on one that nobody measured, as on an H100: proportions count."""
        device = torch.device(self.device, self._gpu_id)
        card = roofline_of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        return ServerCost.of(
            model_shape(self._model_runner.model_config, self._host_ranks.size),
            card or ROOFLINES["H100"],
            budget_ratio=self.config.budget_ratio,
            min_budget=self.config.min_budget,
        )

    def _identity(self) -> dict[str, str]:
        """What a profile of round times holds for."""
        backend = str(self._server_args.attention_backend)
        device = torch.device(self.device, self._gpu_id)
        return identity(self._model_runner.model_config, self.config, backend, device, self._host_ranks.size)

    def clear_cache_pool(self) -> None:
        """SGLang flushed its cache: nothing runs, so nothing of ours is in use."""
        self._penalties = Penalties(self._model_runner.model_config.vocab_size, self.device)

    def init_cuda_graphs(self) -> None:
        """Capture a draft step, and the verify where it is our own; on a CPU there is nothing to capture."""
        if self.device == "cpu":
            return
        # memory of a graph serves the next one only if both were captured on one stream
        stream = torch.cuda.Stream()
        for forward in self._forwards:
            forward.capture(stream)
        if self._memory is not None:
            logger.info(
                "SPARSESPEC memory: graphs and their forwards took %.2f GiB, %.2f were reserved",
                sum(self.graph_memory_usage.values()),
                self._memory.captured / 2**30,
            )

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        return self._target_worker.update_weights_from_tensor(recv_req)

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        return True, "The target's weights are the draft's."

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        return True, "The target's weights are the draft's."
