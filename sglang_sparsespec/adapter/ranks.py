"""Tensor parallelism: the tokens that one rank draws, all ranks hold.

Logits are the same bytes on every rank, because SGLang all-gathers them, and lengths on the host follow from tokens.
In between each rank samples for itself: coins, sorts and sums that nothing promises to be the same on every card. A
rank that drew another token would verify another chain than its neighbours, or see a request end in another round, and
the next collective would mix or never return. So rank 0's word counts wherever tokens are chosen: after a prefill, once
for the drafts of a round, and for its acceptance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.speculation.acceptance import Acceptance

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator


class Ranks:
    """The tensor-parallel ranks of a server; with one rank nothing here does anything.

    Broadcasts run in stream order, beside captured graphs, and no host waits for them on a GPU.

    Args:
        group: SGLang's group of them.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group

    @property
    def num_ranks(self) -> int:
        return self._group.world_size

    def agree(self, tokens: torch.Tensor) -> torch.Tensor:
        """Overwrite `tokens`, contiguous and of one shape on all ranks, with those of rank 0; returns them."""
        return self._group.broadcast(tokens, src=0)

    def agree_on_acceptance(self, acceptance: Acceptance) -> Acceptance:
        """Rank 0's acceptance, in one broadcast."""
        if self.num_ranks == 1:
            return acceptance
        tokens, lens = acceptance.accept_tokens, acceptance.accept_lens
        packed = self.agree(torch.cat([tokens.flatten(), lens.to(tokens.dtype)]))
        tokens, lens = packed[: tokens.numel()].view_as(tokens), packed[tokens.numel() :]
        # the bonus token is the last accepted one
        bonus = tokens.gather(1, (lens - 1).unsqueeze(1)).squeeze(1)
        return Acceptance(tokens, lens.to(acceptance.accept_lens.dtype), bonus)
