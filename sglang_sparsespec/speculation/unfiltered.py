"""Drawing and accepting where nothing is filtered: straight from logits, by ops that read them once per pass.

Without top-k, top-p and min-p a probability needs its own logit and two numbers of its row, so no distribution is ever
written. The rule is that of `chunked`, whose functions call these. Invariant: nothing here waits for the device, and
what is made beside the result is a few bytes per thousand logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_sparsespec.ops.row_stats import row_stats, token_probs
from sglang_sparsespec.ops.sample_rows import sample_rows
from sglang_sparsespec.speculation.acceptance import Acceptance, assemble, count_correct

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_sparsespec.speculation.distribution import SamplingRule


def draw(logits: Tensor, rule: SamplingRule, coins: Tensor) -> tuple[Tensor, Tensor]:
    """`chunked.draw` for a rule without filters; arguments and result are its own."""
    rows = logits.unsqueeze(1)
    temperatures = rule.temperatures.flatten()
    return sample_rows(rows, row_stats(rows, temperatures), temperatures, coins, is_greedy=_is_greedy(rule))


def accept(
    draft_tokens: Tensor,
    target_logits: Tensor,
    rule: SamplingRule,
    coins: Tensor,
    final_coins: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
) -> Acceptance:
    """`chunked.accept` for a rule without filters; arguments and result are its own."""
    temperatures, is_greedy = rule.temperatures.flatten(), _is_greedy(rule)
    stats = row_stats(target_logits, temperatures)
    p_drafts = token_probs(target_logits, stats, temperatures, draft_tokens, is_greedy=is_greedy)
    num_correct = count_correct(p_drafts, draft_probs, coins)
    drafts: dict[str, Any] = {}
    if draft_tokens.shape[1] > 0:
        drafts = {"draft_tokens": draft_tokens}
        if draft_logits is not None:
            # of the first rejected draft; of the last, and not used, where none was
            draft_stats = row_stats(draft_logits, temperatures, steps=num_correct)
            drafts = {"draft_logits": draft_logits, "draft_stats": draft_stats}
    bonus_tokens, _ = sample_rows(
        target_logits, stats, temperatures, final_coins, steps=num_correct, is_greedy=is_greedy, **drafts
    )
    return assemble(draft_tokens, num_correct, bonus_tokens)


def _is_greedy(rule: SamplingRule) -> Tensor | None:
    return rule.top_ks <= 1 if rule.has_greedy else None
