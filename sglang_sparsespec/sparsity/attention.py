"""Which KV blocks a sparse verify reads: arXiv:2512.21911, attention.

Blocks are aligned: block i holds positions [i * block_size, (i + 1) * block_size) of the committed context. The newest
tokens, those of the verify itself, are always read and belong to no block here.
"""

from __future__ import annotations

from fractions import Fraction

import torch

# of a ratio: with a length below 2^31 the product fits in 64 bits
_MAX_DENOMINATOR = 10**9


def num_kept_blocks(lengths: torch.Tensor, *, ratio: float, dense_below: int, block_size: int) -> torch.Tensor:
    """N of the paper: floor((L - L0) ratio + L0) / B blocks where L > L0, all of them otherwise.

    Args:
        lengths: [R], committed tokens of each request, integers.
        ratio: rho, in [0, 1]: share of the tokens beyond `dense_below` that are read.
        dense_below: L0, tokens.
        block_size: B, tokens.

    Returns:
        [R], int64. A block that the formula would cut counts as a whole one. The first and the last block are always
        kept, so it is at least two wherever there are two.
    """
    lengths = lengths.long()
    num_blocks = -(-lengths // block_size)
    # as the decimal that was given: 0.29 of 100 tokens are 29, and its double times 100 is a little less
    share = Fraction(repr(float(ratio))).limit_denominator(_MAX_DENOMINATOR)
    kept_tokens = (lengths - dense_below) * share.numerator // share.denominator + dense_below
    kept = (-(-kept_tokens // block_size)).clamp(min=2)
    return torch.where(lengths > dense_below, torch.minimum(kept, num_blocks), num_blocks)


def block_scores(query: torch.Tensor, keys: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """Score of each block of one request: the mean over its tokens and the query heads of a group of q . k.

    Args:
        query: [HQ, D], of the first token that is verified, rotated.
        keys: [L, H, D], with L >= length.
        length: committed tokens; those behind are not looked at.
        block_size: B, tokens.

    Returns:
        [H, ceil(length / B)], float32; unscaled, for only their order matters.
    """
    num_kv_heads = keys.shape[1]
    mean_query = query.float().view(num_kv_heads, -1, query.shape[-1]).mean(1)
    dots = torch.einsum("hd,lhd->hl", mean_query, keys[:length].float())
    num_blocks = -(-length // block_size)
    padded = torch.nn.functional.pad(dots, (0, num_blocks * block_size - length))
    sizes = torch.full((num_blocks,), float(block_size), device=dots.device)
    if num_blocks:
        sizes[-1] = length - (num_blocks - 1) * block_size
    return padded.view(num_kv_heads, num_blocks, block_size).sum(-1) / sizes


def choose_blocks(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The `num_kept` best blocks of each head, ascending, the first and the last always among them.

    Args:
        scores: [H, N], float32. Ties go to the lower block.
        num_kept: from `num_kept_blocks`, at most N.

    Returns:
        [H, num_kept], int64.
    """
    scores = scores.clone()
    if scores.shape[1]:
        scores[:, 0] = scores[:, -1] = float("inf")
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=1).values
