"""Hierarchical drafting: n-gram guesses, checked by the sparse model inside the draft phase, checked by the verify.

A draft forward feeds one token of a request and m guesses behind it, so it may yield m + 1 drafts; a round then needs
fewer of them. What a forward draws does not depend on the guesses, so drafts are distributed as ever, and the verify
does not know. Source: TriForce (arXiv:2404.11912), whose levels these are; SparseSpec (arXiv:2512.01278) for the two
others. Invariant: nothing here waits for the device, and what it has counted is read when it has arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_sparsespec.adapter.padded_forward import PaddedForward
from sglang_sparsespec.adapter.spec_input import SparseSpecDraftStep
from sglang_sparsespec.adapter.transfer import ToHost, to_device, to_host
from sglang_sparsespec.speculation.memory import num_bytes
from sglang_sparsespec.speculation.ngram import Pace, matched, propose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_sparsespec.adapter.sampling import Drafts, RoundSampler
    from sglang_sparsespec.adapter.static_round import StaticRound
    from sglang_sparsespec.adapter.worker import RoundPlan
    from sglang_sparsespec.speculation.acceptance import Acceptance


class NgramAssist:
    """Drafts with guesses.

    Args:
        num_guesses: of each forward and request, m.
        num_steps: K.
        page_table: [num_rows, max_context], int32.
        static: the round's inputs; what drafts see is laid out there.
        sampler: draws.
        batch_sizes: to capture and to pad to, ascending.
        plan_drafts: tells the attention backend what draft tokens see.
        run_model: SparseSpecWorker.run_draft.
    """

    def __init__(
        self,
        num_guesses: int,
        *,
        num_steps: int,
        page_table: torch.Tensor,
        static: StaticRound,
        sampler: RoundSampler,
        batch_sizes: Sequence[int],
        plan_drafts: Callable[[Any], None],
        run_model: Callable[..., torch.Tensor],
    ) -> None:
        self.pace = Pace(num_guesses)
        self._width, self._num_steps = num_guesses + 1, num_steps
        self._static, self._sampler = static, sampler
        self._plan_drafts, self._run_model = plan_drafts, run_model
        self.forward = PaddedForward("assisted draft", self._body, batch_sizes)
        device = page_table.device
        self._history = torch.zeros_like(page_table)
        """[num_rows, max_context], int32: tokens by page-table row and position."""
        num_tokens = static.max_reqs * self._width

        def zeros(dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(num_tokens, dtype=dtype, device=device)

        self._tokens, self._positions, self._slots, self._places = zeros(), zeros(), zeros(), zeros()
        self._lens = zeros(torch.int32)
        self._counted: list[ToHost] = []
        """Of rounds, [2] int64: drafts, and forwards in which they were wanted."""

    @property
    def num_bytes(self) -> int:
        """Of what is held here."""
        return num_bytes(tensor for tensor in vars(self).values() if torch.is_tensor(tensor))

    def describe(self) -> dict[str, Any]:
        """For /server_info."""
        return {"guesses": self._width - 1, "drafts_per_forward": round(self.pace.drafts_per_forward, 3)}

    # What a request has said

    def start(self, reqs: Sequence[Req]) -> None:
        """Take in the prompts and outputs of requests that have been prefilled, or have come back."""
        for req in reqs:
            tokens = torch.tensor([*req.origin_input_ids, *req.output_ids], dtype=torch.int32)
            self._history[req.req_pool_idx, : len(tokens)] = to_device(tokens, self._history.device)

    def commit(self, plan: RoundPlan, current: torch.Tensor, acceptance: Acceptance) -> None:
        """Take in what a round fed and accepted; what lies behind that is written again before it is read.

        Args:
            plan: of the round.
            current: [num_reqs], int64, the token at the committed length: behind a prefill nobody else has written it.
            acceptance: of the round.
        """
        tokens = torch.cat([current[:, None], acceptance.accept_tokens], dim=1)
        behind = torch.arange(tokens.shape[1], device=tokens.device)
        positions = (plan.committed_lens[:, None] + behind).clamp(max=self._history.shape[1] - 1)
        self._history[plan.rows[:, None], positions] = tokens.to(torch.int32)

    # A draft phase

    def takes(self, batch: ScheduleBatch, plan: RoundPlan) -> bool:
        """Whether a round may guess: penalties and biases change logits token by token."""
        return plan.steps.num_steps > 0 and plan.penalised is None and batch.sampling_info.logit_bias is None

    def draft(
        self, batch: ScheduleBatch, plan: RoundPlan, drafts: Drafts, current: torch.Tensor, num_forwards: int
    ) -> torch.Tensor:
        """Fill `drafts`, as far as the forwards reach.

        Args:
            batch: of the round.
            plan: of the round, which is loaded into the static inputs.
            drafts: of the round.
            current: [num_reqs], int64, the token at the committed length.
            num_forwards: at least 1.

        Returns:
            [num_reqs], int64: drafts of each request, at least 1 and at most k.
        """
        num_reqs, num_steps = drafts.tokens.shape
        width, device = self._width, current.device
        lasts, ahead = plan.committed_lens, torch.arange(width, device=device)
        history = self._history[plan.rows, : min(self._history.shape[1], plan.max_committed_len + num_steps + width)]
        history.scatter_(1, lasts[:, None], current[:, None].to(torch.int32))
        # one column more takes what does not stand
        chain = torch.zeros((num_reqs, num_steps + 1), dtype=torch.int64, device=device)
        counts = torch.zeros_like(current)
        wanted = torch.zeros_like(current)
        reqs = torch.arange(num_reqs, device=device).repeat_interleave(width)
        fed = current
        for _ in range(num_forwards):
            is_wanted = counts < num_steps
            wanted += is_wanted
            guesses = propose(history, lasts + counts, width - 1)
            offsets = counts[:, None] + ahead
            is_known = torch.nn.functional.pad((guesses >= 0).long().cumprod(dim=1) > 0, (1, 0), value=True)
            is_fed = is_known & (offsets < num_steps)
            self._load(plan, torch.cat([fed[:, None], guesses], dim=1), offsets, is_fed)
            logits = self.forward(plan.batch_size)[: num_reqs * width]
            tokens, probs = self._sampler.choose(logits, batch.sampling_info, plan.rule, reqs)
            tokens = tokens.view(num_reqs, width)
            num_new = torch.minimum(matched(guesses.masked_fill(~is_fed[:, 1:], -1), tokens), num_steps - counts)
            steps = torch.where(ahead < num_new[:, None], offsets, num_steps)
            chain.scatter_(1, steps, tokens)
            if probs is not None:
                drafts.keep_some(steps, logits.view(num_reqs, width, -1), probs.view(num_reqs, width))
            places = (lasts[:, None] + 1 + steps).clamp(max=history.shape[1] - 1)
            history.scatter_(1, places, tokens.to(torch.int32))
            counts = counts + num_new
            fed = chain.gather(1, (counts - 1)[:, None])[:, 0]
        drafts.tokens = chain[:, :num_steps].contiguous()
        self._counted.append(to_host(torch.stack([counts.sum(), wanted.sum()])))
        return counts

    def _load(self, plan: RoundPlan, tokens: torch.Tensor, offsets: torch.Tensor, is_fed: torch.Tensor) -> None:
        """Inputs of a forward; a token that is not fed is padding: slot 0, and a list of nothing."""
        num_reqs, width = tokens.shape
        columns = offsets.clamp(max=plan.positions.shape[1] - 1)
        base = self._static.draft_kv(num_reqs).lens[:, None]
        places = torch.arange(num_reqs, device=tokens.device)[:, None].expand(-1, width)
        pairs = (
            (self._tokens, tokens),
            (self._positions, plan.positions.gather(1, columns)),
            (self._slots, plan.slots.gather(1, columns)),
            (self._lens, base + offsets + 1),
            (self._places, places),
        )
        count, padded = num_reqs * width, plan.batch_size * width
        for target, value in pairs:
            target[:count].copy_(value.masked_fill(~is_fed, 0).flatten())
            target[count:padded].zero_()

    def _body(self, batch_size: int) -> torch.Tensor:
        """Feed one token and m guesses per request; returns logits [batch_size * (m + 1), vocab_size]."""
        count = batch_size * self._width
        positions = self._positions[:count]
        lists = self._static.draft_kv(batch_size)
        self._plan_drafts(lists._replace(lens=self._lens[:count], places=self._places[:count]))
        return self._run_model(
            ForwardMode.DECODE,
            self._tokens[:count],
            positions,
            self._slots[:count],
            SparseSpecDraftStep(positions=positions),
            rows=self._places[:count],
            lens=positions,
        )

    # What it was worth

    def num_forwards(self, num_steps: int) -> int:
        """Forwards of the next round, by what earlier ones yielded as far as the host knows; 0: without guesses."""
        while self._counted and self._counted[0].is_there:
            num_drafts, num_forwards = self._counted.pop(0).read()
            self.pace.observe(num_drafts, num_forwards)
        return self.pace.forwards(num_steps)
