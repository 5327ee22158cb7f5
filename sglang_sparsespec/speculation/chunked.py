"""Drawing drafts and accepting them from logits: by kernels, or a few requests at a time.

On a GPU no distribution is made at all (`from_logits.py`), unless filters need a sort. Otherwise one over the
vocabulary takes 4 bytes per token of it, and acceptance looks at one probability per draft and at two rows per
request. So distributions are made for a chunk of requests, used and dropped. What is kept of a draft is its logits,
from which q is computed again where it was rejected. Invariant: neither the way nor the size of a chunk changes
anything (on a GPU, nothing beyond the rounding of a float32 sum).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.speculation import from_logits
from sglang_sparsespec.speculation.acceptance import Acceptance, accept_rows
from sglang_sparsespec.speculation.distribution import chunks, sample

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_sparsespec.speculation.distribution import SamplingRule

# probabilities of a chunk: 2**24 are 64 MiB, and 12 requests with 8 drafts and a 152K vocabulary
CHUNK_ELEMENTS = 1 << 24


def draw(logits: Tensor, rule: SamplingRule, coins: Tensor) -> tuple[Tensor, Tensor]:
    """One token per request, and how probable it was.

    Args:
        logits: [num_reqs, vocab_size], floating; not changed.
        rule: of the requests.
        coins: [num_reqs], in [0, 1).

    Returns:
        [num_reqs] int64 and [num_reqs] float32.
    """
    if _takes_kernels(logits, rule):
        return from_logits.draw(logits, rule, coins)
    tokens, probs = [], []
    for reqs in chunks(logits.shape[0], logits.shape[1], CHUNK_ELEMENTS):
        q = rule.of(reqs).probs(logits[reqs])
        tokens.append(sample(q, coins[reqs]))
        probs.append(q.gather(1, tokens[-1].unsqueeze(1)).squeeze(1))
    return torch.cat(tokens), torch.cat(probs)


def accept(
    draft_tokens: Tensor,
    target_logits: Tensor,
    rule: SamplingRule,
    coins: Tensor,
    final_coins: Tensor,
    draft_probs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    limits: Tensor | None = None,
) -> Acceptance:
    """Chain rejection sampling, `accept_chain`, between the distributions of `rule` over two sets of logits.

    Args:
        draft_tokens: [num_reqs, num_steps], integer.
        target_logits: [num_reqs, num_steps + 1, vocab_size], floating; not changed.
        rule: of the requests.
        coins: [num_reqs, num_steps], in [0, 1), independent of the drafts.
        final_coins: [num_reqs], in [0, 1); independent of `coins` and of the drafts.
        draft_probs: [num_reqs, num_steps], float32, as `draw` returned them. None, like `draft_logits`, for drafts
            that were chosen, not sampled.
        draft_logits: [num_reqs, num_steps, vocab_size], floating: what `draw` was given, in that dtype.
        limits: [num_reqs], int64, drafts that may stand (`acceptance.stop_at`); None: all.
    """
    if _takes_kernels(target_logits, rule):
        return from_logits.accept(
            draft_tokens, target_logits, rule, coins, final_coins, draft_probs, draft_logits, limits
        )
    _, num_positions, vocab_size = target_logits.shape
    parts = []
    for reqs in chunks(draft_tokens.shape[0], num_positions * vocab_size, CHUNK_ELEMENTS):
        chunk_rule = rule.of(reqs)
        parts.append(
            accept_rows(
                draft_tokens[reqs],
                chunk_rule.probs(target_logits[reqs]),
                coins[reqs],
                final_coins[reqs],
                None if draft_probs is None else draft_probs[reqs],
                None if draft_logits is None else partial(_q_rows, draft_logits[reqs], chunk_rule),
                None if limits is None else limits[reqs],
            )
        )
    return Acceptance(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _takes_kernels(logits: Tensor, rule: SamplingRule) -> bool:
    """Whether probabilities follow from logits one by one, on a device where that pays."""
    return logits.is_cuda and (not rule.is_filtered or rule.has_floors)


def _q_rows(draft_logits: Tensor, rule: SamplingRule, steps: Tensor) -> Tensor:
    """q of one step of each request, [num_reqs, vocab_size] float32."""
    reqs = torch.arange(steps.shape[0], device=steps.device)
    return rule.probs(draft_logits[reqs, steps])
