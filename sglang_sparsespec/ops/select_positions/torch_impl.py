"""select_positions as masks and one top-k, on any device and without waiting for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# keys of a block, highest first: sinks in (2e38, 3e38], recent in [1e38, 2e38), scored within +-3e37, unselectable -inf
_SINK_KEY = 3.0e38
_RECENT_KEY = 1.0e38
_KEY_SPAN = 0.9e38
_SCORE_BOUND = 3.0e37


def pool_forward(scores: torch.Tensor, pooling: int) -> torch.Tensor:
    """score(p) + mean(score(p - pooling .. p)), zeros before the start; [..., HS, N] -> [..., HS, N]."""
    if pooling == 0 or scores.numel() == 0:
        return scores
    padded = F.pad(scores, (pooling, 0)).flatten(0, -2)
    return scores + F.avg_pool1d(padded, kernel_size=pooling + 1, stride=1).view_as(scores)


def unravel(scores: torch.Tensor, score_starts: torch.Tensor, max_len: int) -> torch.Tensor:
    """[L, HS, C], one request's columns after another's -> [L, R, HS, max_len]; any columns past a request's own."""
    column = score_starts[:, None] + torch.arange(max_len, device=scores.device)
    return scores[:, :, column.clamp_(0, max(0, scores.shape[-1] - 1))].transpose(1, 2)


def select_positions_torch(
    scores: torch.Tensor,
    kv_lens: torch.Tensor,
    budgets: torch.Tensor,
    *,
    max_budget: int,
    sink: int,
    recent_window: int,
    pooling: int,
    granularity: int,
    share_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores are [L, R, HS, N] or [R, HS, N]."""
    num_positions = scores.shape[-1]
    g = granularity
    if share_heads and scores.shape[-2] > 1:
        scores = scores.mean(dim=-2, keepdim=True)
    num_blocks = num_positions // g
    # selectable and selected blocks: [R]
    block_lens = (kv_lens // g).clamp(0, num_blocks)
    num_kept = torch.minimum((budgets // g).clamp(0, max_budget // g), block_lens)
    num_selected = (num_kept * g).to(torch.int32)

    keys = pool_forward(scores, pooling)
    if g > 1:
        keys = keys[..., : num_blocks * g].unflatten(-1, (num_blocks, g)).sum(-1)
    keys = keys.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(-_SCORE_BOUND, _SCORE_BOUND)
    block = torch.arange(num_blocks, device=scores.device)
    # [R, 1, num_blocks]
    lens = block_lens[:, None, None]
    offset = block * (_KEY_SPAN / max(1, num_blocks))
    keys = torch.where((block + 1) * g > lens * g - recent_window, _RECENT_KEY + offset, keys)
    keys = torch.where(block * g < sink, _SINK_KEY - offset, keys)
    keys = torch.where(block < lens, keys, -math.inf)

    num_top = min(max_budget // g, num_blocks)
    top = keys.topk(num_top, dim=-1, sorted=True).indices
    members = (top * g)[..., None] + torch.arange(g, device=scores.device)
    is_kept = torch.arange(num_top, device=scores.device) < num_kept[:, None, None]
    members = members.masked_fill(~is_kept[..., None], -1).flatten(-2)
    positions = F.pad(members, (0, max_budget - num_top * g), value=-1)
    return positions.to(torch.int32), num_selected
