"""Rounds by the unified schedule: k + 1 mixed forwards, in each of which some requests verify and the others draft.

Paper: SparseSpec (arXiv:2512.01278), unified batch and delayed verification. SGLang sees a round like any other: every
request is verified once in it, whatever its phase (`speculation/phases.py`), so nothing of the host's accounting
changes, and it is asked once for k + 1 forwards. A request that has been verified drafts in the very next forward,
from what the device holds; nobody waits for the host. What it drafts until the round ends it verifies in the next.

Invariant: held drafts are hints. A request whose drafts are forgotten (`forget`, `drop`) loses those and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_sparsespec.adapter.fused_verify import FusedPlan
from sglang_sparsespec.adapter.padded_forward import PaddedForward
from sglang_sparsespec.adapter.spec_input import SparseSpecMixedStep
from sglang_sparsespec.adapter.transfer import to_device
from sglang_sparsespec.adapter.unified_state import RoundInputs, UnifiedState
from sglang_sparsespec.selection.store import DraftKV
from sglang_sparsespec.speculation.acceptance import Acceptance
from sglang_sparsespec.speculation.phases import assign, held_after, load_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_sparsespec.adapter.ranks import Ranks
    from sglang_sparsespec.adapter.sampling import KeptDrafts, RoundSampler
    from sglang_sparsespec.adapter.worker import RoundPlan


class Held(NamedTuple):
    """What is known on the host of a request's drafts on the device."""

    row: int
    num_drafts: int


class MixedForward(NamedTuple):
    """What a mixed forward is made of: parts of the worker."""

    backend: Any
    """SparseSpecAttnBackend with a fused verify."""
    run_model: Callable[..., torch.Tensor]
    """SparseSpecWorker.run_model: logits of tokens."""
    req_to_token: torch.Tensor
    """[num_rows, max_context], int32: the page table."""
    max_len: Callable[[], int]
    """Bound of all positions that a verify sees, known to the host."""


class UnifiedRounds:
    """Runs rounds of k + 1 mixed forwards.

    Args:
        state: on the device.
        forward: the model and its attention.
        batch_sizes: to capture and to pad to, ascending.
        num_steps: K; rounds of another k are not for this schedule.
        sampler: draws drafts and accepts.
        kept: what drafts were sampled from, by page-table row.
        ranks: agree on tokens.
        list_slots: lays out what the drafts of some requests see: rows, committed lengths and a bound of those ->
            DraftKV.
    """

    def __init__(
        self,
        state: UnifiedState,
        forward: MixedForward,
        batch_sizes: Sequence[int],
        *,
        num_steps: int,
        sampler: RoundSampler,
        kept: KeptDrafts,
        ranks: Ranks,
        list_slots: Callable[[torch.Tensor, torch.Tensor, int], DraftKV],
    ) -> None:
        self._state, self._parts = state, forward
        self._num_steps = num_steps
        self._sampler, self._kept, self._ranks = sampler, kept, ranks
        self._list_slots = list_slots
        self.forward = PaddedForward("unified", self._body, batch_sizes)
        self._held: dict[str, Held] = {}
        self._q_rule: str | None = None
        """By which rule the drafts that are held were sampled; None: they were not."""
        # of the last round: a steady batch has the same again
        self._inputs: tuple[Any, RoundInputs] | None = None

    @property
    def num_verified(self) -> list[int]:
        """Drafts that each request of the last round had to verify, in the order of the batch."""
        assert self._inputs is not None, "no round has run"
        return self._inputs[1].num_verified

    def takes(self, batch: ScheduleBatch, plan: RoundPlan, num_columns: int) -> bool:
        """Whether a round can run by this schedule.

        Penalties and grammars change a chain's logits token by token, and drafts made for another k would be cut. The
        scores of those that verify together must fit the buffer's `num_columns`, whoever they are.
        """
        verifying = sorted(plan.len_bounds)[-load_of(plan.batch_size, self._num_steps).verify_reqs :]
        return (
            sum(verifying) <= num_columns
            and plan.steps.num_steps == self._num_steps
            and plan.penalised is None
            and not batch.has_grammar
            and batch.sampling_info.logit_bias is None
        )

    def forget(self) -> None:
        """Drafts that anybody holds are gone: a round of the other schedule follows."""
        self._held.clear()

    def drop(self, rid: str) -> None:
        """A request ended, or loses its row."""
        self._held.pop(rid, None)

    # A round

    def run(self, batch: ScheduleBatch, plan: RoundPlan) -> tuple[Acceptance, torch.Tensor | None]:
        """One round of every request.

        Returns:
            The outcome of the verifies, in the order of the batch; and if the batch asks for log-probabilities, the
            logits of all of them, [num_reqs * (k + 1), vocab_size].
        """
        current = batch.spec_info.bonus_tokens.long()
        state, rows = self._state, plan.rows
        state.begin(rows, plan.committed_lens, current)
        # q is computed again from logits when it is asked for, by the rule of the batch
        q_rule = plan.rule.filter_order if self._sampler.samples(batch.sampling_info) else None
        held = self._take_held(batch.reqs, q_rule)
        fresh = [req for req, num_drafts in enumerate(held) if num_drafts is None]
        if fresh:
            reqs = to_device(torch.tensor(fresh), rows.device)
            self._lay_out(rows[reqs], plan.committed_lens[reqs], plan.max_committed_len)
        inputs = self._round_inputs([num_drafts or 0 for num_drafts in held], batch, plan.batch_size)
        outcome = _Outcome(plan, batch.return_logprob, self._num_steps)
        packed = inputs.packed(rows)
        for number in range(self._num_steps + 1):
            self._agree(inputs, number, rows)
            state.load(packed[number])
            logits = self.forward(plan.batch_size)
            self._draft(batch, plan, inputs, number, logits)
            self._verify(batch, plan, inputs, number, logits[inputs.load.draft_reqs :], outcome)
        return outcome.acceptance, outcome.logits

    def _take_held(self, reqs: Sequence[Req], q_rule: str | None) -> list[int | None]:
        """Drafts that each request has from the last round; None for those whose lists are to be laid out first."""
        if q_rule != self._q_rule:
            # drafts that were chosen, or sampled by another rule: q would not be what they came from
            self._held = {rid: held._replace(num_drafts=0) for rid, held in self._held.items()}
            self._q_rule = q_rule
        found = [self._held.get(req.rid) for req in reqs]
        return [
            None if held is None or held.row != req.req_pool_idx else held.num_drafts
            for req, held in zip(reqs, found, strict=True)
        ]

    def _round_inputs(self, held: list[int], batch: ScheduleBatch, batch_size: int) -> RoundInputs:
        phases = assign(held, self._num_steps)
        key = (held, phases, batch_size)
        if self._inputs is None or self._inputs[0] != key:
            inputs = RoundInputs(held, phases, self._num_steps, batch_size, self._state.lists.device)
            self._inputs = (key, inputs)
        # requests that sit this round out are forgotten with the old dictionary
        after = held_after(phases, self._num_steps)
        self._held = {
            req.rid: Held(req.req_pool_idx, num_drafts) for req, num_drafts in zip(batch.reqs, after, strict=True)
        }
        return self._inputs[1]

    def _agree(self, inputs: RoundInputs, number: int, rows: torch.Tensor) -> None:
        """Ranks verify the same chains; what they drafted from need not agree."""
        if self._ranks.num_ranks == 1:
            return
        reqs, _ = inputs.verifying(number)
        chains = self._state.chains
        if reqs.numel() > 0:
            chains[rows[reqs]] = self._ranks.agree(chains[rows[reqs]])

    def _draft(
        self, batch: ScheduleBatch, plan: RoundPlan, inputs: RoundInputs, number: int, logits: torch.Tensor
    ) -> None:
        reqs, offsets = inputs.drafting(number)
        if reqs.numel() == 0:
            return
        rows = plan.rows[reqs]
        logits = logits[: reqs.shape[0]]
        tokens, probs = self._sampler.choose(logits, batch.sampling_info, plan.rule, reqs)
        if probs is not None:
            self._kept.keep(rows, offsets, logits, probs)
        self._state.chains[rows, offsets + 1] = tokens

    def _verify(
        self,
        batch: ScheduleBatch,
        plan: RoundPlan,
        inputs: RoundInputs,
        number: int,
        logits: torch.Tensor,
        outcome: _Outcome,
    ) -> None:
        """Accept, commit, and let the next forward draft from what was committed."""
        state = self._state
        reqs, num_drafts = inputs.verifying(number)
        if reqs.numel() == 0:
            return
        rows = plan.rows[reqs]
        logits = logits[: reqs.shape[0] * (self._num_steps + 1)]
        if outcome.limits is not None:
            num_drafts = torch.minimum(num_drafts, outcome.limits[reqs])
        are_sampled = self._sampler.samples(batch.sampling_info)
        drafts = self._kept.drafts(rows, state.chains[rows, 1:], are_sampled=are_sampled)
        rule = plan.rule.of(reqs)
        acceptance = self._sampler.accept(logits, drafts, batch.sampling_info, rule, num_drafts)
        acceptance = self._ranks.agree_on_acceptance(acceptance)
        outcome.put(reqs, acceptance, logits)
        committed_lens = state.committed_lens[rows]
        if not self._parts.backend.policy.needs_attention:
            self._parts.backend.select_without_attention(rows, committed_lens.int(), plan.max_committed_len)
        committed_lens = committed_lens + acceptance.accept_lens
        state.begin(rows, committed_lens, acceptance.bonus_tokens)
        self._lay_out(rows, committed_lens, plan.max_committed_len)

    def _lay_out(self, rows: torch.Tensor, committed_lens: torch.Tensor, max_committed_len: int) -> None:
        """What the drafts of some requests ([num_reqs] each) see from now on."""
        draft_kv = self._list_slots(rows, committed_lens, max_committed_len)
        self._state.lists[:, rows, :, : draft_kv.slots.shape[-1]] = draft_kv.slots
        self._state.list_lens[rows] = draft_kv.lens

    # A forward

    def _body(self, batch_size: int) -> torch.Tensor:
        """One token of each drafting request, then k + 1 of each verifying one; returns their logits."""
        state, width = self._state, self._num_steps + 1
        inputs = state.inputs(batch_size)
        num_drafting = load_of(batch_size, self._num_steps).draft_reqs
        tokens = state.chains[inputs.token_rows, inputs.token_offsets]
        positions = state.committed_lens[inputs.token_rows] + inputs.token_offsets
        slots = self._parts.req_to_token[inputs.token_rows, positions].long()
        draft_rows = inputs.token_rows[:num_drafting]
        # what the lists hold before the current token, the tokens since, and the one that is fed
        lens = state.list_lens[draft_rows] + inputs.token_offsets[:num_drafting].int() + 1
        verify = FusedPlan(
            inputs.verify_rows,
            state.committed_lens[inputs.verify_rows].int(),
            inputs.num_queries.int(),
            width,
            self._parts.max_len(),
        )
        self._parts.backend.plan_mixed(DraftKV(state.lists, lens, places=draft_rows), verify)
        return self._parts.run_model(
            ForwardMode.DECODE,
            tokens,
            positions,
            slots,
            SparseSpecMixedStep(positions=positions),
            rows=inputs.token_rows,
            lens=positions,
        )


class _Outcome:
    """Acceptances of a round, put together in the order of the batch."""

    def __init__(self, plan: RoundPlan, keeps_logits: bool, num_steps: int) -> None:
        num_reqs, device = plan.rows.shape[0], plan.rows.device
        self.acceptance = Acceptance(
            torch.zeros((num_reqs, num_steps + 1), dtype=torch.int64, device=device),
            torch.zeros(num_reqs, dtype=torch.int32, device=device),
            torch.zeros(num_reqs, dtype=torch.int64, device=device),
        )
        self.limits = plan.steps.limits_on(device.type)
        self.logits: torch.Tensor | None = None
        self._keeps_logits = keeps_logits

    def put(self, reqs: torch.Tensor, acceptance: Acceptance, logits: torch.Tensor) -> None:
        for whole, part in zip(self.acceptance, acceptance, strict=True):
            whole[reqs] = part
        if self._keeps_logits:
            num_reqs, width = self.acceptance.accept_tokens.shape
            if self.logits is None:
                self.logits = logits.new_empty((num_reqs * width, logits.shape[-1]))
            self.logits.view(num_reqs, width, -1)[reqs] = logits.view(-1, width, logits.shape[-1])
