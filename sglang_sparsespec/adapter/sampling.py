"""Sampling of a round: SGLang's per-batch sampling parameters applied to draft logits and to verify logits.

The distributions and the acceptance rule are pure functions in `speculation/`; here they meet the host's batches.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.speculative import spec_utils

from sglang_sparsespec.speculation import chunked
from sglang_sparsespec.speculation.acceptance import Acceptance, accept_greedy, accept_simulated
from sglang_sparsespec.speculation.distribution import MAX_TOP_K, SamplingRule

if TYPE_CHECKING:
    from sglang.srt.constrained.base_grammar_backend import GrammarMask
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_sparsespec.adapter.penalties import PenalisedRows


class KeptDrafts:
    """What drafts were sampled from, by page-table row: memory that outlives a round, made when it is first needed.

    Args:
        num_rows: of the page table.
        num_steps: K.
    """

    def __init__(self, num_rows: int, num_steps: int) -> None:
        self._shape = (num_rows, num_steps)
        self._logits: torch.Tensor | None = None
        self._probs: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor, steps: torch.Tensor, logits: torch.Tensor, probs: torch.Tensor) -> None:
        """Keep one draft of some requests.

        Args:
            rows: [num_reqs], int64, their rows.
            steps: [num_reqs], int64, which of its drafts it is.
            logits: [num_reqs, vocab_size], what it was sampled from.
            probs: [num_reqs], float32, what it was sampled with.
        """
        kept_logits, kept_probs = self._tensors(logits.shape[-1], logits.dtype, logits.device)
        kept_logits[rows, steps] = logits
        kept_probs[rows, steps] = probs

    def drafts(self, rows: torch.Tensor, tokens: torch.Tensor, *, are_sampled: bool) -> Drafts:
        """The drafts of some requests ([num_reqs], int64), whose tokens are [num_reqs, K]."""
        drafts = Drafts(tokens.shape[0], tokens.shape[1], tokens.device)
        drafts.tokens = tokens
        if are_sampled and self._logits is not None and self._probs is not None:
            drafts.logits, drafts.probs = self._logits[rows], self._probs[rows]
        return drafts

    def lend(
        self, num_reqs: int, num_steps: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory by place in a batch, for a round that holds nothing: [num_reqs, num_steps, vocab_size] of
        `dtype`, and [num_reqs, num_steps] float32."""
        kept_logits, kept_probs = self._tensors(vocab_size, dtype, device)
        count = num_reqs * num_steps
        return (
            kept_logits.flatten()[: count * vocab_size].view(num_reqs, num_steps, vocab_size),
            kept_probs.flatten()[:count].view(num_reqs, num_steps),
        )

    def _tensors(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._logits is None or self._probs is None:
            self._logits, self._probs = _blank(self._shape, vocab_size, dtype, device)
        return self._logits, self._probs


def _blank(
    shape: tuple[int, int], vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and probabilities of drafts before there are any: never NaN, for drafts that are never made are read where
    a request has fewer than others."""
    logits = torch.zeros((*shape, vocab_size), dtype=dtype, device=device)
    return logits, torch.ones(shape, dtype=torch.float32, device=device)


class Drafts:
    """What a draft phase proposes, filled step by step.

    Args:
        num_reqs: requests.
        num_steps: k.
        device: of everything.
        memory: where to keep logits; None: in memory of its own.
    """

    def __init__(
        self, num_reqs: int, num_steps: int, device: torch.device | str, memory: KeptDrafts | None = None
    ) -> None:
        self._memory = memory
        self.tokens = torch.empty((num_reqs, num_steps), dtype=torch.int64, device=device)
        """[num_reqs, num_steps], int64."""
        self.probs: torch.Tensor | None = None
        """[num_reqs, num_steps], float32, what each was sampled with; None: argmax drafts."""
        self.logits: torch.Tensor | None = None
        """[num_reqs, num_steps, vocab_size], in the model's dtype, what each was sampled from; None: argmax drafts."""
        self.counts: torch.Tensor | None = None
        """[num_reqs], int64, how many of them there are; None: all. The others may be verified, and do not stand."""

    def keep(self, step: int, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Keep [num_reqs, vocab_size] logits of a step as `dtype`, and return them as they are kept."""
        if self.logits is None:
            num_reqs, num_steps = self.tokens.shape
            vocab_size, device = logits.shape[-1], logits.device
            if self._memory is not None:
                self.logits, self.probs = self._memory.lend(num_reqs, num_steps, vocab_size, dtype, device)
            else:
                self.logits = torch.empty((num_reqs, num_steps, vocab_size), dtype=dtype, device=device)
                self.probs = torch.empty((num_reqs, num_steps), dtype=torch.float32, device=device)
        self.logits[:, step] = logits
        return self.logits[:, step]

    def keep_some(self, steps: torch.Tensor, logits: torch.Tensor, probs: torch.Tensor) -> None:
        """Keep what some drafts of each request were sampled from.

        Args:
            steps: [num_reqs, n], int64, which drafts they are; num_steps: none of them.
            logits: [num_reqs, n, vocab_size].
            probs: [num_reqs, n], float32.
        """
        num_reqs, num_steps = self.tokens.shape
        if self.logits is None or self.probs is None:
            self.logits, self.probs = _blank((num_reqs, num_steps), logits.shape[-1], logits.dtype, logits.device)
        reqs = torch.arange(num_reqs, device=logits.device)
        for i in range(steps.shape[1]):
            at, is_one = steps[:, i].clamp(max=num_steps - 1), steps[:, i] < num_steps
            self.logits[reqs, at] = torch.where(is_one[:, None], logits[:, i], self.logits[reqs, at])
            self.probs[reqs, at] = torch.where(is_one, probs[:, i], self.probs[reqs, at])


class RoundSampler:
    """Draws drafts and decides on them; owns the coins.

    Args:
        draft_sampling: `sampled` or `greedy` (config).
        sampling_backend: the host's, which decides how top-k and top-p combine with min-p.
        seed: of the coins.
        device: of the logits.
    """

    def __init__(self, *, draft_sampling: str, sampling_backend: str, seed: int, device: torch.device | str) -> None:
        self._samples_drafts = draft_sampling == "sampled"
        self._flashinfer = sampling_backend == "flashinfer"
        self._generator = torch.Generator(device).manual_seed(seed)
        self._simulation = random.Random(seed)

    def rule(self, batch: ScheduleBatch) -> SamplingRule:
        """How the requests of a batch sample; nothing is read from the device."""
        info = batch.sampling_info
        top_ks = [req.sampling_params.top_k for req in batch.reqs]
        max_top_k = max(top_ks)
        return SamplingRule(
            temperatures=info.temperatures,
            top_ks=info.top_ks,
            top_ps=info.top_ps,
            min_ps=info.min_ps,
            # to the host a greedy request has a top-k of 1; to us its row is one-hot, with no filter
            need_top_k=info.need_top_k_sampling and any(1 < top_k < TOP_K_ALL for top_k in top_ks),
            need_top_p=info.need_top_p_sampling,
            need_min_p=info.need_min_p_sampling,
            filter_order="sequential" if self._flashinfer and info.need_min_p_sampling else "joint",
            # FlashInfer keeps every tie at a boundary, the host's torch sampler the lowest ids
            ties="all" if self._flashinfer else "first",
            max_top_k=max_top_k if max_top_k <= MAX_TOP_K else None,
            has_greedy=info.is_any_greedy,
        )

    def draft(
        self,
        step: int,
        logits: torch.Tensor,
        drafts: Drafts,
        info: SamplingBatchInfo,
        rule: SamplingRule,
        penalised: PenalisedRows | None,
        current: torch.Tensor,
    ) -> torch.Tensor:
        """Choose one draft per request and note it in `drafts`.

        Args:
            step: of the draft phase.
            logits: [num_reqs, vocab_size]; float32 ones are changed in place by penalties and logit bias.
            drafts: of the round.
            info: the batch's sampling parameters.
            rule: the same, as `rule` returned it.
            penalised: rows with penalties.
            current: [num_reqs], int64, the token that was fed.

        Returns:
            [num_reqs], int64, also in `drafts`.
        """
        dtype = logits.dtype
        if penalised is not None or info.logit_bias is not None:
            logits = logits.float()
        if penalised is not None:
            penalised.penalise_draft(logits, current)
        if info.logit_bias is not None:
            logits.add_(info.logit_bias)
        if self.samples(info):
            # what is kept is rounded, so it is what the draft has to come from
            logits = drafts.keep(step, logits, dtype)
        tokens, probs = self.choose(logits, info, rule)
        drafts.tokens[:, step] = tokens
        if probs is not None:
            assert drafts.probs is not None
            drafts.probs[:, step] = probs
        return drafts.tokens[:, step]

    def sample(self, logits: torch.Tensor, info: SamplingBatchInfo, rule: SamplingRule) -> torch.Tensor:
        """The next token of each request, by the model's own distribution.

        Args:
            logits: [num_reqs, vocab_size], adjusted; not changed.
            info: the batch's sampling parameters.
            rule: the same, as `rule` returned it.

        Returns:
            [num_reqs], int64.
        """
        if info.is_all_greedy:
            return logits.argmax(dim=-1)
        return chunked.draw(logits, rule, self._coins(logits.shape[0]))[0]

    def samples(self, info: SamplingBatchInfo) -> bool:
        """Whether the drafts of a batch are sampled; else they are argmaxes."""
        return self._samples_drafts and not info.is_all_greedy

    def choose(
        self, logits: torch.Tensor, info: SamplingBatchInfo, rule: SamplingRule, reqs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token per row, and how probable it was where it was sampled: [num_rows] int64, and float32 or None.

        Args:
            logits: [num_rows, vocab_size], not changed.
            info: the batch's sampling parameters.
            rule: the same, as `rule` returned it.
            reqs: [num_rows], int64, which request each row is of; None: one row each, in order.
        """
        if not self.samples(info):
            return logits.argmax(dim=-1), None
        rule = rule if reqs is None else rule.of(reqs)
        return chunked.draw(logits, rule, self._coins(logits.shape[0]))

    def adjust(
        self,
        logits: torch.Tensor,
        info: SamplingBatchInfo,
        chain: torch.Tensor,
        penalised: PenalisedRows | None,
        grammar_mask: GrammarMask | None,
    ) -> torch.Tensor:
        """Apply what the host applies to logits before sampling, to every position of a verify.

        Args:
            logits: [num_reqs * num_draft_tokens, vocab_size]; float32 ones are changed in place.
            info: the batch's sampling parameters.
            chain: [num_reqs, num_draft_tokens], int64, the current token and the drafts.
            penalised: rows with penalties.
            grammar_mask: over the rows of `logits`.

        Returns:
            The logits, widened to float32 if there was anything to apply.

        Reference: SamplingBatchInfo.apply_logits_bias, whose order this is.
        """
        if penalised is None and grammar_mask is None and info.logit_bias is None:
            return logits
        logits = logits.float()
        by_request = logits.view(*chain.shape, -1)
        if penalised is not None:
            penalised.penalise_verify(by_request, chain)
        if grammar_mask is not None:
            grammar_mask.apply(logits)
        if info.logit_bias is not None:
            by_request.add_(info.logit_bias[:, None])
        return logits

    def accept(
        self,
        logits: torch.Tensor,
        drafts: Drafts,
        info: SamplingBatchInfo,
        rule: SamplingRule,
        limits: torch.Tensor | None = None,
    ) -> Acceptance:
        """Decide which drafts stand and which token follows them.

        Args:
            logits: [num_reqs * (num_steps + 1), vocab_size], adjusted.
            drafts: what was proposed.
            info: the batch's sampling parameters.
            rule: the same, as `rule` returned it.
            limits: [num_reqs], int64, drafts that may stand; None: all.
        """
        acceptance = self._accept(logits, drafts, info, rule, limits)
        if spec_utils.SIMULATE_ACC_LEN > 0:
            # in the place of the real one, which has cost what it costs
            num_correct = self._simulated_num_correct(acceptance)
            return accept_simulated(drafts.tokens, acceptance.bonus_tokens, num_correct, limits)
        return acceptance

    def _accept(
        self,
        logits: torch.Tensor,
        drafts: Drafts,
        info: SamplingBatchInfo,
        rule: SamplingRule,
        limits: torch.Tensor | None,
    ) -> Acceptance:
        num_reqs, num_steps = drafts.tokens.shape
        if info.is_all_greedy:
            return accept_greedy(drafts.tokens, logits.argmax(dim=-1).view(num_reqs, num_steps + 1), limits)
        return chunked.accept(
            drafts.tokens,
            logits.view(num_reqs, num_steps + 1, -1),
            rule,
            self._coins(num_reqs, num_steps),
            self._coins(num_reqs),
            drafts.probs,
            drafts.logits,
            limits,
        )

    def _coins(self, *shape: int) -> torch.Tensor:
        # float64: float32 coins cannot resolve probabilities below 2**-24
        return torch.rand(shape, generator=self._generator, device=self._generator.device, dtype=torch.float64)

    def _simulated_num_correct(self, acceptance: Acceptance) -> torch.Tensor:
        """One draw a batch around SGLANG_SIMULATE_ACC_LEN (bonus counted), like the host's own simulation."""
        length = spec_utils.SIMULATE_ACC_LEN
        accept_len = int(length) + (self._simulation.random() < length - int(length))
        return torch.full_like(acceptance.bonus_tokens, accept_len - 1)
