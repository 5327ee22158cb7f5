"""Guesses at the next drafts from what a request has said before: the cheapest level of hierarchical drafting.

Looks for the last tokens of a request earlier in the same request, and proposes what followed there. Everything stays
on the device: a lookup on the host, such as SGLang's own n-gram corpus, would wait for each draft before the next one.
Source: prompt lookup decoding; TriForce (arXiv:2404.11912) for the hierarchy. Knows nothing of KV or of rounds.
Invariant: a guess is a guess; whoever takes one checks it (`matched`).
"""

from __future__ import annotations

import torch

MAX_MATCH = 3
"""A longer match is better up to this many tokens; of equal ones the most recent counts."""
MIN_MATCH = 2
"""One equal token says little."""


def propose(history: torch.Tensor, lasts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """What followed the last tokens of each request where they stood before.

    Args:
        history: [num_reqs, max_len], integer, tokens by position; anything past `lasts`.
        lasts: [num_reqs], int64, position of the last token.
        num_tokens: to propose.

    Returns:
        [num_reqs, num_tokens], int64; -1 where nothing was found, or no token is known that far.
    """
    max_len = history.shape[1]
    positions = torch.arange(max_len, device=history.device)
    equal = torch.ones_like(history, dtype=torch.bool)
    length = torch.zeros_like(history, dtype=torch.int64)
    for back in range(min(MAX_MATCH, max_len)):
        # the token `back` before the last one, beside the one `back` before each position
        key = history.gather(1, (lasts - back).clamp(min=0)[:, None])
        same = torch.nn.functional.pad(history[:, : max_len - back] == key, (back, 0))
        equal = equal & same & (lasts >= back)[:, None]
        length += equal
    length = length.masked_fill((length < MIN_MATCH) | (positions >= lasts[:, None]), 0)
    best, end = (length * max_len + positions).max(dim=1)
    following = end[:, None] + 1 + torch.arange(num_tokens, device=history.device)
    is_known = (best >= max_len)[:, None] & (following <= lasts[:, None])
    return torch.where(is_known, history.gather(1, following.clamp(max=max_len - 1)).long(), -1)


def matched(guesses: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens of a step stand, [num_reqs] int64: the first, and one after each guess that came true.

    Args:
        guesses: [num_reqs, m], int64; -1 is none.
        tokens: [num_reqs, m + 1], int64: what was drawn behind the token that was fed, then behind each guess. Drawn by
            the model's own distribution whatever was guessed, so what stands is distributed as if drawn one by one.
    """
    return 1 + (tokens[:, :-1] == guesses).long().cumprod(dim=1).sum(dim=1)


class Pace:
    """How many forwards the drafts of a round take with guesses, or whether guesses are worth their rows.

    Args:
        num_guesses: of each forward, m.
    """

    # what a forward yields at least, in drafts of a request, for its wider GEMMs and second read of the lists to pay.
    # Arbitrary: not measured on a GPU
    WORTH = 1.25
    # rounds between two that guess although it was not worth it
    PROBE_EVERY = 64
    # weight of the newest round
    SHARE = 0.1

    def __init__(self, num_guesses: int) -> None:
        self._most = num_guesses + 1
        self._rounds = 0
        self.drafts_per_forward = 1.0
        """Of a request that still wants drafts, as measured; 1: no guess came true."""

    def forwards(self, num_steps: int) -> int:
        """Forwards of the next round, for k drafts; 0: draft without guesses."""
        self._rounds += 1
        if num_steps == 0:
            return 0
        if self.drafts_per_forward < self.WORTH:
            # enough of them that a round which only asks loses nothing
            return num_steps if self._rounds % self.PROBE_EVERY == 1 else 0
        # half of the requests have all their drafts a little earlier, half a little later
        return min(num_steps, max(1, round(num_steps / self.drafts_per_forward)))

    def observe(self, num_drafts: int, num_forwards: int) -> None:
        """What a round yielded.

        Args:
            num_drafts: summed over its requests.
            num_forwards: likewise, those in which a request still wanted drafts.
        """
        if num_forwards == 0:
            return
        newest = min(num_drafts / num_forwards, self._most)
        # the first answer counts whole, or a text that repeats itself would be known as such only after many probes
        share = 1.0 if self.drafts_per_forward == 1.0 else self.SHARE
        self.drafts_per_forward += share * (newest - self.drafts_per_forward)
