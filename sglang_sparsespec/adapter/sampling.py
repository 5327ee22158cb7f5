"""Sampling of a round: SGLang's per-batch sampling parameters applied to draft logits and to verify logits.

The distributions and the acceptance rule are pure functions in `speculation/`; here they meet the host's batches.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from sglang.srt.speculative import spec_utils

from sglang_sparsespec.speculation.acceptance import Acceptance, accept_chain, accept_greedy, accept_simulated
from sglang_sparsespec.speculation.distribution import sample, target_probs

if TYPE_CHECKING:
    from sglang.srt.constrained.base_grammar_backend import GrammarMask
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_sparsespec.adapter.penalties import PenalisedRows


class Drafts(NamedTuple):
    """What a draft phase proposes."""

    tokens: torch.Tensor
    """[num_reqs, num_steps], int64."""
    probs: torch.Tensor | None
    """[num_reqs, num_steps, vocab_size], float32, the distributions they were sampled from; None: argmax drafts."""


class RoundSampler:
    """Draws drafts and decides on them; owns the coins.

    Args:
        draft_sampling: `sampled` or `greedy` (config).
        sampling_backend: the host's, which decides how top-k and top-p combine with min-p.
        seed: of the coins.
        device: of the logits.
    """

    def __init__(self, *, draft_sampling: str, sampling_backend: str, seed: int, device: torch.device | str) -> None:
        self.samples_drafts = draft_sampling == "sampled"
        self._flashinfer = sampling_backend == "flashinfer"
        self._generator = torch.Generator(device).manual_seed(seed)
        self._simulation = random.Random(seed)

    def wants_probs(self, info: SamplingBatchInfo) -> bool:
        """Whether drafts of this batch are sampled, and their distributions kept for acceptance."""
        return self.samples_drafts and not info.is_all_greedy

    def draft(
        self, logits: torch.Tensor, info: SamplingBatchInfo, penalised: PenalisedRows | None, current: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose one draft per request.

        Args:
            logits: [num_reqs, vocab_size]; changed in place by penalties and logit bias.
            info: the batch's sampling parameters.
            penalised: rows with penalties.
            current: [num_reqs], int64, the token that was fed.

        Returns:
            [num_reqs] int64 and the distribution [num_reqs, vocab_size] float32 it came from, or None.
        """
        if penalised is not None:
            penalised.penalise_draft(logits, current)
        if info.logit_bias is not None:
            logits.add_(info.logit_bias)
        if not self.wants_probs(info):
            return logits.argmax(dim=-1), None
        probs = self._probs(logits, info, repeat=1)
        return sample(probs, self._coins(probs.shape[0])), probs

    def adjust(
        self,
        logits: torch.Tensor,
        info: SamplingBatchInfo,
        chain: torch.Tensor,
        penalised: PenalisedRows | None,
        grammar_mask: GrammarMask | None,
    ) -> None:
        """Apply what the host applies to logits before sampling, to every position of a verify, in place.

        Args:
            logits: [num_reqs * num_draft_tokens, vocab_size].
            info: the batch's sampling parameters.
            chain: [num_reqs, num_draft_tokens], int64, the current token and the drafts.
            penalised: rows with penalties.
            grammar_mask: over the rows of `logits`.

        Reference: SamplingBatchInfo.apply_logits_bias, whose order this is.
        """
        by_request = logits.view(*chain.shape, -1)
        if penalised is not None:
            penalised.penalise_verify(by_request, chain)
        if grammar_mask is not None:
            grammar_mask.apply(logits)
        if info.logit_bias is not None:
            by_request.add_(info.logit_bias[:, None])

    def accept(self, logits: torch.Tensor, drafts: Drafts, info: SamplingBatchInfo) -> Acceptance:
        """Decide which drafts stand and which token follows them.

        Args:
            logits: [num_reqs * (num_steps + 1), vocab_size], adjusted.
            drafts: what was proposed.
            info: the batch's sampling parameters.
        """
        num_reqs, num_steps = drafts.tokens.shape
        if spec_utils.SIMULATE_ACC_LEN > 0:
            return self._accept_simulated(logits, drafts)
        if info.is_all_greedy:
            return accept_greedy(drafts.tokens, logits.argmax(dim=-1).view(num_reqs, num_steps + 1))
        probs = self._probs(logits, info, repeat=num_steps + 1).view(num_reqs, num_steps + 1, -1)
        coins, final_coins = self._coins(num_reqs, num_steps), self._coins(num_reqs)
        return accept_chain(drafts.tokens, probs, coins, final_coins, drafts.probs)

    def _probs(self, logits: torch.Tensor, info: SamplingBatchInfo, repeat: int) -> torch.Tensor:
        def expand(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(repeat, dim=0) if repeat > 1 else values

        order: Literal["joint", "sequential"] = (
            "sequential" if self._flashinfer and info.need_min_p_sampling else "joint"
        )
        return target_probs(
            logits,
            temperatures=expand(info.temperatures),
            top_ks=expand(info.top_ks),
            top_ps=expand(info.top_ps),
            min_ps=expand(info.min_ps),
            need_top_k=info.need_top_k_sampling,
            need_top_p=info.need_top_p_sampling,
            need_min_p=info.need_min_p_sampling,
            filter_order=order,
            # FlashInfer keeps every tie at a boundary, the host's torch sampler the lowest ids
            ties="all" if self._flashinfer else "first",
        )

    def _coins(self, *shape: int) -> torch.Tensor:
        # float64: float32 coins cannot resolve probabilities below 2**-24
        return torch.rand(shape, generator=self._generator, device=self._generator.device, dtype=torch.float64)

    def _accept_simulated(self, logits: torch.Tensor, drafts: Drafts) -> Acceptance:
        """One draw a batch around SGLANG_SIMULATE_ACC_LEN (bonus counted), like the host's own simulation."""
        num_reqs, num_steps = drafts.tokens.shape
        length = spec_utils.SIMULATE_ACC_LEN
        accept_len = int(length) + (self._simulation.random() < length - int(length))
        num_correct = torch.full((num_reqs,), accept_len - 1, device=drafts.tokens.device)
        return accept_simulated(drafts.tokens, logits.argmax(dim=-1).view(num_reqs, num_steps + 1), num_correct)
