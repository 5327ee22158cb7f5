"""Chi-square tests that speculation leaves the target's distribution alone, each with wrong rules it must reject.

A bigram model over a tiny vocabulary stands for the target and another one for the draft; thousands of requests are
generated at once, and the tokens that come out are counted against exact probabilities. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats

from sglang_sparsespec.speculation.acceptance import Acceptance, accept_chain
from sglang_sparsespec.speculation.distribution import target_probs

# A right rule gives p-values uniform in [0, 1]; a wrong one must fall below this on the same number of requests.
THRESHOLD = 1e-6
NUM_REQS = 6_000
NUM_STEPS = 3


# drafts, p, coins, final coins, q: `accept_chain` and its planted variants
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], Acceptance]


@dataclass(frozen=True)
class Models:
    """Next-token distributions after each token: of the target, of the draft, and of the draft before its filters."""

    target: torch.Tensor
    draft: torch.Tensor
    draft_unfiltered: torch.Tensor


def _models(vocab_size: int, *, filters: str, mismatch: float) -> Models:
    generator = torch.Generator().manual_seed(11)
    target_logits = torch.randn(vocab_size, vocab_size, generator=generator) * 1.5
    noise = torch.randn(vocab_size, vocab_size, generator=generator) * 1.5
    draft_logits = (1 - mismatch) * target_logits + mismatch * noise
    options = {
        "none": (1 << 30, 1.0, 0.0),
        "top_k": (3, 1.0, 0.0),
        "top_p": (1 << 30, 0.7, 0.0),
        "min_p": (1 << 30, 1.0, 0.15),
        "all": (5, 0.8, 0.05),
    }

    def probs(logits: torch.Tensor, name: str) -> torch.Tensor:
        top_k, top_p, min_p = options[name]
        return target_probs(
            logits,
            temperatures=torch.full((vocab_size, 1), 0.9),
            top_ks=torch.full((vocab_size,), top_k, dtype=torch.int32),
            top_ps=torch.full((vocab_size,), top_p),
            min_ps=torch.full((vocab_size,), min_p),
            need_top_k=True,
            need_top_p=True,
            need_min_p=True,
        )

    return Models(probs(target_logits, filters), probs(draft_logits, filters), probs(draft_logits, "none"))


def _generate(
    models: Models,
    rule: Rule,
    *,
    num_tokens: int,
    drafting: str = "sampled",
    num_reqs: int = NUM_REQS,
    claimed_draft: torch.Tensor | None = None,
    shared_coin: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [num_reqs, num_tokens] that come out of rounds from token 0, and the accept lengths of the first round.

    `claimed_draft` is the q that the rule is told, if not the one that the drafts come from.
    """
    generator = torch.Generator().manual_seed(12)
    tokens = torch.zeros(num_reqs, num_tokens + NUM_STEPS + 2, dtype=torch.int64)
    lens = torch.ones(num_reqs, dtype=torch.int64)  # token 0 is the prompt
    first_lens = None
    while lens.min() <= num_tokens:
        current = tokens.gather(1, lens.unsqueeze(1) - 1).squeeze(1)
        chain = [current]
        for _ in range(NUM_STEPS):
            if drafting == "sampled":
                chain.append(torch.multinomial(models.draft[chain[-1]], 1, generator=generator).squeeze(1))
            elif drafting == "argmax":
                chain.append(models.draft[chain[-1]].argmax(dim=-1))
            else:  # a draft that knows nothing, impossible tokens included
                chain.append((chain[-1] + 1) % models.draft.shape[0])
        contexts = torch.stack(chain, dim=1)
        claimed = models.draft if claimed_draft is None else claimed_draft
        coins = torch.rand(num_reqs, NUM_STEPS, generator=generator)
        final_coins = coins[:, 0] if shared_coin else torch.rand(num_reqs, generator=generator)
        result = rule(
            contexts[:, 1:],
            models.target[contexts],
            coins,
            final_coins,
            claimed[contexts[:, :-1]] if drafting == "sampled" or claimed_draft is not None else None,
        )
        first_lens = result.accept_lens if first_lens is None else first_lens
        # requests that are done keep their tokens
        columns = lens.unsqueeze(1) + torch.arange(NUM_STEPS + 1)
        is_live = lens <= num_tokens
        columns = torch.where(is_live.unsqueeze(1), columns, tokens.shape[1] - 1).clamp(max=tokens.shape[1] - 1)
        tokens.scatter_(1, columns, result.accept_tokens)
        lens += torch.where(is_live, result.accept_lens.long(), 0)
    assert first_lens is not None
    return tokens[:, 1 : num_tokens + 1], first_lens


def _pvalue(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square over the cells expected at least 5 times; 0 if an impossible token came out."""
    counts, expected = counts.flatten().double(), expected.flatten().double() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    common = expected >= 5
    rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
    counts, expected = counts[common], expected[common]
    if rest[1] >= 5:
        counts, expected = torch.cat([counts, rest[:1]]), torch.cat([expected, rest[1:]])
    expected *= counts.sum() / expected.sum()
    return float(stats.chisquare(counts.numpy(), expected.numpy()).pvalue) if len(counts) > 1 else 1.0


def _first_pvalue(models: Models, tokens: torch.Tensor) -> float:
    return _pvalue(torch.bincount(tokens[:, 0], minlength=models.target.shape[0]), models.target[0])


def _joint_pvalue(models: Models, tokens: torch.Tensor) -> float:
    """Of the first two tokens together: the second may come from the same round or from the next."""
    vocab_size = models.target.shape[0]
    counts = torch.bincount(tokens[:, 0] * vocab_size + tokens[:, 1], minlength=vocab_size**2)
    joint = models.target[0].double().unsqueeze(1) * models.target.double()
    return _pvalue(counts, joint)


# the close draft matters where much is accepted; single filters with it are covered by "all"
@pytest.mark.parametrize(
    ("filters", "mismatch"),
    [("none", 0.2), ("all", 0.2), ("none", 1.0), ("top_k", 1.0), ("top_p", 1.0), ("min_p", 1.0), ("all", 1.0)],
)
@pytest.mark.parametrize("drafting", ["sampled", "argmax", "arbitrary"])
def test_accept_chain_keeps_the_targets_distribution(filters: str, mismatch: float, drafting: str) -> None:
    """Without it, sampled requests could be biased towards the draft, which no single output would show."""
    models = _models(8, filters=filters, mismatch=mismatch)
    tokens, accept_lens = _generate(models, accept_chain, num_tokens=2, drafting=drafting)
    assert _first_pvalue(models, tokens) > THRESHOLD
    assert _joint_pvalue(models, tokens) > THRESHOLD
    # a rule that accepts less than it may would be lossless too: the first draft passes with probability
    # sum(min(p, q)), or p(draft) for a chosen draft
    p, q = models.target[0], models.draft[0]
    chosen = q.argmax() if drafting == "argmax" else torch.tensor(1)
    expected = torch.minimum(p, q).sum() if drafting == "sampled" else p[chosen]
    num_correct = int((accept_lens > 1).sum())
    assert stats.binomtest(num_correct, NUM_REQS, min(1.0, float(expected))).pvalue > THRESHOLD


def test_accept_chain_keeps_the_joint_distribution_of_a_whole_round() -> None:
    """Without it, the bonus token after num_steps accepted drafts could come from the wrong row."""
    models = _models(4, filters="none", mismatch=0.3)
    tokens, accept_lens = _generate(models, accept_chain, num_tokens=NUM_STEPS + 1, num_reqs=15_000)
    assert (accept_lens == NUM_STEPS + 1).double().mean() > 0.2
    assert _whole_round_pvalue(models, tokens) > THRESHOLD


def _whole_round_pvalue(models: Models, tokens: torch.Tensor) -> float:
    vocab_size = models.target.shape[0]
    p = models.target.double()
    joint = torch.einsum("a,ab,bc,cd->abcd", p[0], p, p, p)
    cell = ((tokens[:, 0] * vocab_size + tokens[:, 1]) * vocab_size + tokens[:, 2]) * vocab_size + tokens[:, 3]
    return _pvalue(torch.bincount(cell, minlength=vocab_size**4), joint)


def _planted(bug: str) -> Rule:
    """The chain rule written plainly, with one mistake, or with "none"."""

    def rule(
        drafts: torch.Tensor,
        p: torch.Tensor,
        coins: torch.Tensor,
        final_coins: torch.Tensor,
        q: torch.Tensor | None,
    ) -> Acceptance:
        num_reqs, num_steps = drafts.shape
        q = torch.nn.functional.one_hot(drafts, p.shape[2]).float() if q is None else q
        judged = p[:, 1:] if bug == "draft judged by the next row" else p[:, :-1]
        ratio = judged.gather(2, drafts.unsqueeze(2)).squeeze(2) / q.gather(2, drafts.unsqueeze(2)).squeeze(2)
        passed = coins < ratio
        if bug == "accepts half as eagerly again":
            passed = coins < ratio * 1.5
        if bug == "continues after a rejection":
            num_correct = passed.long().sum(dim=1)
        else:
            num_correct = passed.long().cumprod(dim=1).sum(dim=1)
        reqs = torch.arange(num_reqs)
        stop = num_correct
        if bug == "residual from the row before":
            stop = torch.where(num_correct < num_steps, (num_correct - 1).clamp(min=0), num_correct)
        if bug == "last bonus from the row before":
            stop = num_correct.clamp(max=num_steps - 1)
        final = p[reqs, stop].clone()
        if bug != "bonus from p":
            residual = (p[reqs, stop] - q[reqs, num_correct.clamp(max=num_steps - 1)]).clamp(min=0)
            residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, final)
            final = torch.where((num_correct < num_steps).unsqueeze(1), residual, final)
            if bug == "residual after full acceptance":
                final = residual
        cdf = final.double().cumsum(dim=1)
        bonus = (cdf <= (final_coins * cdf[:, -1]).unsqueeze(1)).sum(dim=1).clamp(max=p.shape[2] - 1)
        columns = torch.arange(num_steps + 1)
        padded = torch.nn.functional.pad(drafts, (0, 1)) * (columns < num_correct.unsqueeze(1))
        accept_tokens = torch.where(columns == num_correct.unsqueeze(1), bonus.unsqueeze(1), padded)
        return Acceptance(accept_tokens, (num_correct + 1).int(), bonus)

    return rule


def test_the_plain_rule_without_a_mistake_passes() -> None:
    """Power: without it, the planted rules below could fail for a reason other than their mistake."""
    for filters in ("none", "all"):
        models = _models(8, filters=filters, mismatch=0.5)
        for drafting in ("sampled", "argmax"):
            tokens, _ = _generate(models, _planted("none"), num_tokens=2, drafting=drafting)
            assert _first_pvalue(models, tokens) > THRESHOLD
            assert _joint_pvalue(models, tokens) > THRESHOLD
    models = _models(4, filters="none", mismatch=0.3)
    tokens, _ = _generate(models, _planted("none"), num_tokens=NUM_STEPS + 1, num_reqs=15_000)
    assert _whole_round_pvalue(models, tokens) > THRESHOLD


@pytest.mark.parametrize("drafting", ["sampled", "argmax"])
@pytest.mark.parametrize(
    "bug",
    ["bonus from p", "draft judged by the next row", "continues after a rejection", "residual from the row before"],
)
def test_the_joint_test_rejects_a_planted_mistake(bug: str, drafting: str) -> None:
    """Power: without it, the lossless test could be too small to see a wrong residual or a shifted row."""
    models = _models(8, filters="none", mismatch=0.5)
    tokens, _ = _generate(models, _planted(bug), num_tokens=2, drafting=drafting)
    assert _joint_pvalue(models, tokens) < THRESHOLD


@pytest.mark.parametrize("bug", ["bonus from p", "draft judged by the next row", "accepts half as eagerly again"])
def test_the_first_token_test_rejects_a_planted_mistake(bug: str) -> None:
    """Power: without it, the test of the first token alone could be blind."""
    models = _models(8, filters="all", mismatch=0.5)
    tokens, _ = _generate(models, _planted(bug), num_tokens=1)
    assert _first_pvalue(models, tokens) < THRESHOLD


@pytest.mark.parametrize("bug", ["last bonus from the row before", "residual after full acceptance"])
def test_the_whole_round_test_rejects_a_wrong_last_bonus(bug: str) -> None:
    """Power: without it, the whole-round test could miss the one row that only full acceptance reaches."""
    models = _models(4, filters="none", mismatch=0.3)
    tokens, _ = _generate(models, _planted(bug), num_tokens=NUM_STEPS + 1, num_reqs=15_000)
    assert _whole_round_pvalue(models, tokens) < THRESHOLD


def test_the_test_rejects_a_q_without_its_filters() -> None:
    """Power: without it, passing the draft's unfiltered softmax as q would look lossless."""
    models = _models(8, filters="top_k", mismatch=0.5)
    tokens, _ = _generate(models, accept_chain, num_tokens=2, claimed_draft=models.draft_unfiltered)
    assert _joint_pvalue(models, tokens) < THRESHOLD


def test_the_test_rejects_a_soft_q_for_chosen_drafts() -> None:
    """Power: without it, argmax drafts judged as if they had been sampled from q would look lossless."""
    models = _models(8, filters="none", mismatch=0.5)
    tokens, _ = _generate(models, accept_chain, num_tokens=2, drafting="argmax", claimed_draft=models.draft)
    assert _joint_pvalue(models, tokens) < THRESHOLD


def test_the_test_rejects_a_bonus_coin_shared_with_the_acceptance() -> None:
    """Power: without it, spending one coin twice would look lossless."""
    models = _models(8, filters="none", mismatch=0.5)
    tokens, _ = _generate(models, accept_chain, num_tokens=2, shared_coin=True)
    assert _joint_pvalue(models, tokens) < THRESHOLD


LIMITS = torch.arange(NUM_REQS) % (NUM_STEPS + 1)


def _limited(mistake: str | None = None) -> Rule:
    """accept_chain with limits that differ from request to request; or a limit taken for a rejection, planted."""

    def rule(
        drafts: torch.Tensor, p: torch.Tensor, coins: torch.Tensor, final_coins: torch.Tensor, q: torch.Tensor | None
    ) -> Acceptance:
        if mistake is None:
            return accept_chain(drafts, p, coins, final_coins, q, LIMITS)
        # coins that nothing beats reject the draft at the limit
        beyond = torch.arange(drafts.shape[1]) >= LIMITS[:, None]
        return accept_chain(drafts, p, coins.masked_fill(beyond, 1e9), final_coins, q)

    return rule


@pytest.mark.parametrize("drafting", ["sampled", "argmax", "arbitrary"])
@pytest.mark.parametrize("filters", ["none", "all"])
def test_limits_keep_the_targets_distribution(drafting: str, filters: str) -> None:
    """A request that is limited must not avoid, or prefer, the token that was drafted where it stops."""
    models = _models(8, filters=filters, mismatch=0.5)
    tokens, accept_lens = _generate(models, _limited(), num_tokens=2, drafting=drafting)
    assert (accept_lens <= LIMITS + 1).all()
    assert (accept_lens[LIMITS == NUM_STEPS] == NUM_STEPS + 1).any() or drafting == "arbitrary"
    assert _first_pvalue(models, tokens) > THRESHOLD
    assert _joint_pvalue(models, tokens) > THRESHOLD
    # of those that may use no draft at all, alone: a fault in a quarter of the requests would be diluted
    assert _first_pvalue(models, tokens[LIMITS == 0]) > THRESHOLD


@pytest.mark.parametrize("drafting", ["sampled", "argmax"])
def test_the_test_rejects_a_limit_taken_for_a_rejection(drafting: str) -> None:
    """Power: the residual in the place of the target where a request stops by its own wish."""
    models = _models(8, filters="none", mismatch=0.5)
    tokens, _ = _generate(models, _limited("residual"), num_tokens=2, drafting=drafting)
    assert _first_pvalue(models, tokens[LIMITS == 0]) < THRESHOLD
