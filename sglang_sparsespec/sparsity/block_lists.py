"""What a sparse verify reads, as lists of positions: the chosen blocks of the committed context, then its own tokens.

The batched form of `attention`, whose rule it is tested against: shapes follow from what the host knows, lengths stay
on the device, and nothing waits for it. Source: arXiv:2512.21911, attention.
Invariant: a list ascends, so that the causal order of the verify's own tokens is that of their places in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_sparsespec.ops.select_positions import select_positions
from sglang_sparsespec.sparsity.attention import num_kept_blocks

_INT_MAX = 2**31 - 1


class BlockRule(NamedTuple):
    """How much of a context is read."""

    ratio: float
    """rho: share of the tokens beyond `dense_below` that is read, in [0, 1]."""
    dense_below: int
    """L0: contexts of at most so many tokens are read whole."""
    block_size: int
    """B, tokens."""

    def num_blocks(self, max_len: int) -> int:
        """Blocks that a request of at most `max_len` tokens may read at most: the width of a list."""
        lengths = torch.tensor([max_len, min(max_len, self.dense_below)])
        return int(num_kept_blocks(lengths, **self._asdict()).max())

    def list_len(self, max_len: int, width: int) -> int:
        """Places of a list, where a verify has `width` tokens of its own."""
        return self.num_blocks(max_len) * self.block_size + width


class BlockLists(NamedTuple):
    """What each request's KV heads read."""

    positions: torch.Tensor
    """[R, H, S], int32, ascending; from place num_read[r] on the verify's own tokens, from the committed length on."""
    num_read: torch.Tensor
    """[R], int32: committed tokens in a list, the same for all heads of a request."""


def list_positions(
    scores: torch.Tensor, lengths: torch.Tensor, rule: BlockRule, *, width: int, max_len: int, max_position: int
) -> BlockLists:
    """Choose the best blocks of each head and list their positions, and those of the verify's tokens behind them.

    Args:
        scores: [R, H, ceil(max_len / block_size)], float32, as `ops.block_scores` gives them.
        lengths: [R], int32 or int64, committed tokens; 0 for padding.
        rule: how much is read. Of blocks with equal scores any may be read.
        width: tokens that a request verifies, at most.
        max_len: tokens, on the host; at least every length, may be loose.
        max_position: the highest position that may stand in a list; places that nobody reads hold at most this.
    """
    block_size = rule.block_size
    lengths = lengths.long()
    num_blocks = -(-lengths // block_size)
    kept = num_kept_blocks(lengths, **rule._asdict())
    capacity = rule.num_blocks(max_len)
    if scores.shape[-1] == 0:
        blocks = lengths.new_zeros((*scores.shape[:2], 1))
    else:
        chosen, _ = select_positions(
            scores,
            num_blocks,
            kept,
            max_budget=capacity,
            sink=1,
            recent_window=1,
            pooling=0,
            granularity=1,
        )
        blocks = chosen.masked_fill(chosen < 0, _INT_MAX).sort(dim=-1).values.long()
    # the last block, which may be broken, is always kept and stands last
    num_read = lengths - (num_blocks - kept) * block_size
    place = torch.arange(capacity * block_size + width, device=scores.device)
    in_blocks = blocks.index_select(2, (place // block_size).clamp(max=blocks.shape[2] - 1))
    committed = in_blocks * block_size + place % block_size
    own = (lengths - num_read)[:, None, None] + place
    positions = committed.where(place < num_read[:, None, None], own)
    return BlockLists(positions.clamp_(max=max_position).int(), num_read.int())
