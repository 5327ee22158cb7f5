"""Anchor layers: which layers choose KV blocks for themselves and for the layers behind them (arXiv:2512.21911).

The paper chooses them by the Jaccard similarity of what layers choose, on calibration text, and lets the other layers
reuse the nearest anchor. Here that is the nearest one at or before a layer, for a later one has not chosen yet when a
layer runs, and the anchors are those whose summed similarity with the layers that reuse them is largest.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def jaccard(kept: torch.Tensor) -> torch.Tensor:
    """Similarity of what layers keep: size of the intersection over size of the union, mean over cases.

    Args:
        kept: [layers, cases, blocks], bool: what a layer keeps in a case, such as a KV head at a position of a text.

    Returns:
        [layers, layers], float64, 1 on the diagonal. Two empty sets are equal.
    """
    found = kept.double()
    shared = torch.einsum("icn,jcn->ijc", found, found)
    sizes = found.sum(-1)
    union = sizes[:, None] + sizes[None] - shared
    return torch.where(union > 0, shared / union.clamp(min=1), torch.ones_like(shared)).mean(-1)


def jaccard_by_chance(num_kept: float, num_blocks: float) -> float:
    """Similarity of two random choices that both hold the first and the last block, to within their spread."""
    if num_blocks <= 2:
        return 1.0
    shared = 2 + (num_kept - 2) ** 2 / (num_blocks - 2)
    return shared / (2 * num_kept - shared)


def choose_anchors(similarity: Sequence[Sequence[float]], num_anchors: int) -> tuple[int, ...]:
    """The anchors whose summed similarity with the layers that reuse them is largest.

    Args:
        similarity: [layers][layers]; entry i, j says how well layer j is served by what layer i chose.
        num_anchors: 1 to the number of layers.

    Returns:
        Ascending, the first is 0. Of equally good ones those that come first.

    Raises:
        ValueError: for another number of anchors.
    """
    num_layers = len(similarity)
    if not 1 <= num_anchors <= num_layers:
        raise ValueError(f"{num_anchors} anchors of {num_layers} layers; expected 1 to {num_layers}.")
    # served[a][end]: what anchor a is worth to layers a .. end - 1
    served = [[0.0] * (a + 1) + list(itertools.accumulate(similarity[a][a:])) for a in range(num_layers)]
    # best[start]: worth and anchors of layers start .. , whose first anchor is start
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        start: (served[start][num_layers], (start,)) for start in range(num_layers)
    }
    for _ in range(num_anchors - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start in range(num_layers):
            ends = [end for end in range(start + 1, num_layers) if end in best]
            if ends:
                # max takes the first of equals
                end = max(ends, key=lambda end: served[start][end] + best[end][0])
                longer[start] = (served[start][end] + best[end][0], (start, *best[end][1]))
        best = longer
    return best[0][1]
