"""Acceptance: how many drafts survive a verify, and which token follows them.

Pure functions on tensors. Knows nothing of KV, of scheduling, or of how drafts and distributions came about.
Paper: chain rejection sampling of Leviathan et al. 2023 (arXiv:2211.17192); SparseSpec (arXiv:2512.01278) keeps it, so
the output distribution is the target's. Invariant: accept_lens == number of correct drafts + 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_sparsespec.speculation.distribution import sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Acceptance(NamedTuple):
    """The outcome of one verify."""

    accept_tokens: Tensor
    """[num_reqs, num_steps + 1], int64: correct drafts, then the bonus token, then zeros."""
    accept_lens: Tensor
    """[num_reqs], int32: valid entries of `accept_tokens`, bonus included; 1 .. num_steps + 1."""
    bonus_tokens: Tensor
    """[num_reqs], int64: the last valid entry of each row; the next round's current token."""


def accept_greedy(draft_tokens: Tensor, target_tokens: Tensor, limits: Tensor | None = None) -> Acceptance:
    """Accept drafts up to the first that differs from the target's argmax; the target's token there is the bonus.

    Args:
        draft_tokens: [num_reqs, num_steps], integer.
        target_tokens: [num_reqs, num_steps + 1], integer; entry i is the target's choice after drafts 0 .. i - 1.
        limits: as in `stop_at`.
    """
    num_steps = draft_tokens.shape[1]
    num_correct, _ = stop_at(_leading(draft_tokens == target_tokens[:, :num_steps]), num_steps, limits)
    return assemble(draft_tokens, num_correct, target_tokens.gather(1, num_correct.unsqueeze(1)).squeeze(1))


def accept_chain(
    draft_tokens: Tensor,
    target_probs: Tensor,
    coins: Tensor,
    final_coins: Tensor,
    draft_probs: Tensor | None,
    limits: Tensor | None = None,
) -> Acceptance:
    """Chain rejection sampling: the accepted tokens are distributed as if each had been sampled from the target.

    Draft d_i is accepted when ``coins_i * q_i(d_i) < p_i(d_i)``. At the first rejection the bonus token is sampled from
    ``norm(max(p_i - q_i, 0))``; after num_steps accepted drafts, from the last row of the target.

    Args:
        draft_tokens: [num_reqs, num_steps], integer, d_i sampled from q_i.
        target_probs: [num_reqs, num_steps + 1, vocab_size], float32, p; row i follows drafts 0 .. i - 1.
        coins: [num_reqs, num_steps], in [0, 1), independent of the drafts.
        final_coins: [num_reqs], in [0, 1), for the bonus token; independent of `coins` and of the drafts.
        draft_probs: [num_reqs, num_steps, vocab_size], float32, q: the distribution the draft was really sampled from,
            filters included. None for drafts that were chosen, not sampled (argmax, n-gram): q is one-hot, so a draft
            is accepted with probability p_i(d_i).
        limits: as in `stop_at`.

    Reference: Leviathan et al. 2023, algorithm 1. Deviation: see `sample_bonus`.
    """
    if draft_probs is None:
        return accept_rows(draft_tokens, target_probs, coins, final_coins, limits=limits)
    reqs = torch.arange(draft_tokens.shape[0], device=draft_tokens.device)
    q_drafts = draft_probs.gather(2, draft_tokens.to(torch.int64).unsqueeze(2)).squeeze(2)
    return accept_rows(
        draft_tokens, target_probs, coins, final_coins, q_drafts, lambda steps: draft_probs[reqs, steps], limits
    )


def accept_rows(
    draft_tokens: Tensor,
    target_probs: Tensor,
    coins: Tensor,
    final_coins: Tensor,
    q_drafts: Tensor | None = None,
    q_rows: Callable[[Tensor], Tensor] | None = None,
    limits: Tensor | None = None,
) -> Acceptance:
    """`accept_chain` for a caller that has q at the drafts, and whole rows of it on demand.

    Args:
        draft_tokens, target_probs, coins, final_coins: as there.
        q_drafts: [num_reqs, num_steps], float32, q_i(d_i). None, like `q_rows`: the drafts were chosen.
        q_rows: takes one step of each request, [num_reqs] int64, and returns q of it, [num_reqs, vocab_size] float32.
            Called once, for the rejected drafts; the row of a request without one is not used.
        limits: as in `stop_at`.
    """
    num_reqs, num_steps = draft_tokens.shape
    drafts = draft_tokens.to(torch.int64)
    p_drafts = target_probs[:, :num_steps].gather(2, drafts.unsqueeze(2)).squeeze(2)
    num_correct, was_rejected = stop_at(count_correct(p_drafts, q_drafts, coins), num_steps, limits)
    p_stop = target_probs[torch.arange(num_reqs, device=drafts.device), num_correct]
    if num_steps == 0:
        return assemble(drafts, num_correct, sample(p_stop, final_coins))
    rejected = num_correct.clamp(max=num_steps - 1)
    if q_rows is None:
        q_stop = torch.zeros_like(p_stop).scatter_(1, drafts.gather(1, rejected.unsqueeze(1)), 1.0)
    else:
        q_stop = q_rows(rejected)
    return assemble(drafts, num_correct, sample_bonus(p_stop, q_stop, was_rejected, final_coins))


def count_correct(p_drafts: Tensor, q_drafts: Tensor | None, coins: Tensor) -> Tensor:
    """How many drafts stand, [num_reqs] int64: those before the first that its coin rejects.

    Args:
        p_drafts: [num_reqs, num_steps], float32, the target's probability of each draft.
        q_drafts: likewise the probability that it was sampled with; None if it was chosen.
        coins: [num_reqs, num_steps], in [0, 1).
    """
    threshold = coins if q_drafts is None else coins * q_drafts
    return _leading((threshold < p_drafts) & (p_drafts > 0))


def stop_at(num_correct: Tensor, num_steps: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many drafts stand when a request may use only its first few, and whether the draft after them was rejected.

    A request that reaches its limit stops there as if nothing had been drafted beyond: its bonus token comes from the
    target itself, so the output distribution stays the target's. A limit known before the round is not a rejection.

    Args:
        num_correct: [num_reqs], int64, drafts that stand without limits.
        num_steps: drafts of the round.
        limits: [num_reqs], int64, at least 0; drafts that may stand. None: all of them.

    Returns:
        [num_reqs] int64 and [num_reqs] bool.
    """
    if limits is None:
        return num_correct, num_correct < num_steps
    stopped = torch.minimum(num_correct, limits)
    return stopped, stopped < limits.clamp(max=num_steps)


def sample_bonus(p_stop: Tensor, q_stop: Tensor, was_rejected: Tensor, coins: Tensor) -> Tensor:
    """The token after the drafts that stand, [num_reqs] int64: from the residual of p, or from p itself.

    Args:
        p_stop: [num_reqs, vocab_size], float32, the target where the request stopped.
        q_stop: [num_reqs, vocab_size], float32, what the draft there was sampled from.
        was_rejected: [num_reqs], bool; False: every draft that may stand does, and q_stop is not used.
        coins: [num_reqs], in [0, 1).

    Deviation from Leviathan et al.: if the residual is 0 everywhere although a draft was rejected (p == q up to
    rounding), the token is sampled from p.
    """
    residual = (p_stop - q_stop * was_rejected.unsqueeze(1)).clamp_(min=0.0)
    has_mass = residual.amax(dim=-1, keepdim=True) > 0
    return sample(torch.where(has_mass, residual, p_stop), coins)


def accept_simulated(
    draft_tokens: Tensor, bonus_tokens: Tensor, num_correct_drafts: Tensor, limits: Tensor | None = None
) -> Acceptance:
    """SIMULATED acceptance, for benchmarks only: accept a given number of drafts, right or wrong.

    The output is not the target's. It shows what a round costs at an accept length that is set, not earned.

    Args:
        draft_tokens: [num_reqs, num_steps], integer.
        bonus_tokens: [num_reqs], integer, of the acceptance that this one replaces.
        num_correct_drafts: [num_reqs], integer; clamped to 0 .. num_steps.
        limits: as in `stop_at`.
    """
    num_steps = draft_tokens.shape[1]
    num_correct, _ = stop_at(num_correct_drafts.to(torch.int64).clamp(min=0, max=num_steps), num_steps, limits)
    return assemble(draft_tokens, num_correct, bonus_tokens)


def _leading(passed: Tensor) -> Tensor:
    """How many of each row passed before the first that did not, [num_reqs] int64."""
    return passed.to(torch.int64).cumprod(dim=1).sum(dim=1)


def assemble(draft_tokens: Tensor, num_correct: Tensor, bonus_tokens: Tensor) -> Acceptance:
    """The outcome where the first drafts stand and a token follows them.

    Args:
        draft_tokens: [num_reqs, num_steps], integer.
        num_correct: [num_reqs], int64, in 0 .. num_steps.
        bonus_tokens: [num_reqs], integer.
    """
    bonus = bonus_tokens.to(torch.int64)
    columns = torch.arange(draft_tokens.shape[1] + 1, device=draft_tokens.device)
    drafts = torch.nn.functional.pad(draft_tokens.to(torch.int64), (0, 1))
    drafts = drafts * (columns < num_correct.unsqueeze(1))
    accept_tokens = torch.where(columns == num_correct.unsqueeze(1), bonus.unsqueeze(1), drafts)
    return Acceptance(accept_tokens, (num_correct + 1).to(torch.int32), bonus)
