"""Drawing and accepting straight from logits, by ops that read them once per pass.

A probability needs its own logit and two numbers of its row, so no distribution is ever written. Filters that keep all
logits from some value on are that value, a floor, found among the best few of a row. The rule is that of `chunked`,
whose functions call these. Invariant: nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.ops.row_stats import RowStats, row_stats, token_probs
from sglang_sparsespec.ops.sample_rows import sample_rows
from sglang_sparsespec.speculation.acceptance import Acceptance, assemble, count_correct, stop_at
from sglang_sparsespec.speculation.distribution import num_ranks_kept

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_sparsespec.speculation.distribution import SamplingRule


def draw(logits: Tensor, rule: SamplingRule, coins: Tensor) -> tuple[Tensor, Tensor]:
    """`chunked.draw` for a rule without filters, or with floors; arguments and result are its own."""
    rows = logits.unsqueeze(1)
    return sample_rows(rows, _stats(rows, rule), rule.temperatures.flatten(), coins, is_greedy=_is_greedy(rule))


def accept(
    draft_tokens: Tensor,
    target_logits: Tensor,
    rule: SamplingRule,
    coins: Tensor,
    final_coins: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
    limits: Tensor | None = None,
) -> Acceptance:
    """`chunked.accept` for a rule without filters, or with floors; arguments and result are its own."""
    temperatures, is_greedy = rule.temperatures.flatten(), _is_greedy(rule)
    stats = _stats(target_logits, rule)
    p_drafts = token_probs(target_logits, stats, temperatures, draft_tokens, is_greedy=is_greedy)
    num_steps = draft_tokens.shape[1]
    num_correct, was_rejected = stop_at(count_correct(p_drafts, draft_probs, coins), num_steps, limits)
    drafts: dict[str, Any] = {}
    if num_steps > 0:
        rejected = torch.where(was_rejected, num_correct, num_steps)
        drafts = {"draft_steps": rejected, "draft_tokens": draft_tokens}
        if draft_logits is not None:
            # of the first rejected draft; of the last, and not used, where none was
            stats_of_rejected = _stats(draft_logits, rule, rejected)
            drafts = {"draft_steps": rejected, "draft_logits": draft_logits, "draft_stats": stats_of_rejected}
    bonus_tokens, _ = sample_rows(
        target_logits, stats, temperatures, final_coins, steps=num_correct, is_greedy=is_greedy, **drafts
    )
    return assemble(draft_tokens, num_correct, bonus_tokens)


def _stats(logits: Tensor, rule: SamplingRule, steps: Tensor | None = None) -> RowStats:
    """Of all rows, or of one of each request."""
    temperatures = rule.temperatures.flatten()
    stats = row_stats(logits, temperatures, steps=steps)
    if not rule.is_filtered:
        return stats
    if steps is None:
        return row_stats(logits, temperatures, floors=_floors(logits, stats, rule))
    reqs = torch.arange(steps.shape[0], device=steps.device)
    rows = logits[reqs, steps.clamp(max=logits.shape[1] - 1)].unsqueeze(1)
    of_rows = RowStats(stats.best.unsqueeze(1), stats.top.unsqueeze(1), stats.mass.unsqueeze(1))
    return row_stats(logits, temperatures, steps=steps, floors=_floors(rows, of_rows, rule).squeeze(1))


def _floors(logits: Tensor, stats: RowStats, rule: SamplingRule) -> Tensor:
    """The lowest logit that the filters keep of each row, [num_reqs, num_rows] float32; stats are without floors."""
    assert rule.max_top_k is not None
    num_ranks = min(max(1, rule.max_top_k), logits.shape[2])
    ranked = logits.topk(num_ranks, dim=2).values.float()

    def per_row(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1)

    probs = ((ranked - stats.top.unsqueeze(2)) / per_row(rule.temperatures)).exp() / stats.mass.unsqueeze(2)
    num_kept = num_ranks_kept(
        probs,
        per_row(rule.top_ks) if rule.need_top_k else None,
        per_row(rule.top_ps) if rule.need_top_p else None,
        sequential=rule.filter_order == "sequential",
    )
    if rule.need_min_p:
        # a min-p of 1 keeps the best
        num_likely = (probs >= probs[..., :1] * per_row(rule.min_ps)).sum(dim=2, keepdim=True)
        num_kept = torch.minimum(num_kept, num_likely.clamp(min=1))
    return ranked.gather(2, num_kept - 1).squeeze(2)


def _is_greedy(rule: SamplingRule) -> Tensor | None:
    return rule.top_ks <= 1 if rule.has_greedy else None
