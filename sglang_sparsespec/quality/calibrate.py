"""How alike layers choose KV blocks, on calibration text, and the anchor layers that follow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.quality.rounds import VerifyRound
from sglang_sparsespec.quality.rules import observe_weights
from sglang_sparsespec.sparsity.anchors import choose_anchors, jaccard, jaccard_by_chance

if TYPE_CHECKING:
    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.settings import Setting
    from sglang_sparsespec.quality.walk import Requests


@dataclass(frozen=True)
class Similarity:
    """What calibration found."""

    matrix: list[list[float]]
    """[layers][layers]: Jaccard similarity of what two layers choose, mean over rounds, texts and KV heads."""
    by_chance: float
    """The same of random choices of as many blocks."""
    num_rounds: int

    def anchors(self, num_anchors: int) -> tuple[int, ...]:
        return choose_anchors(self.matrix, num_anchors)

    def with_anchor(self, sources: tuple[int, ...]) -> list[float]:
        """Of each layer that reuses: its similarity with the anchor whose blocks it reads."""
        return [self.matrix[source][layer] for layer, source in enumerate(sources) if source != layer]

    def at_distance(self, distance: int) -> float:
        """Mean over pairs of layers so far apart."""
        layers = range(len(self.matrix) - distance)
        return statistics.fmean(self.matrix[layer][layer + distance] for layer in layers)


def similarity(model: PagedModel, setting: Setting, requests: Requests, ahead: torch.Tensor) -> Similarity:
    """Dense rounds along `ahead` [R, T]; in each the first token's query chooses in every layer.

    Every context must be longer than the setting's `dense_below`: below it nothing is chosen.
    """
    width = setting.num_steps + 1
    matrices, chances = [], []
    for start in range(0, ahead.shape[1], width):
        tokens = ahead[:, start : start + width]
        positions = requests.lens[:, None] + torch.arange(start, start + tokens.shape[1], device=tokens.device)
        verify = VerifyRound(
            model,
            requests.rows,
            requests.lens + start,
            range(model.num_layers),
            ratio=setting.attention_ratio,
            dense_below=setting.dense_below,
            block_size=setting.block_size,
            apply=False,
        )
        verify.feed(tokens, positions)
        kept = torch.stack([verify.kept[layer] for layer in range(model.num_layers)])
        matrices.append(jaccard(kept.flatten(1, 2)))
        num_blocks = -(-verify.committed_lens // setting.block_size)
        pairs = zip(verify.num_kept.tolist(), num_blocks.tolist(), strict=True)
        chances.append(statistics.fmean(jaccard_by_chance(*pair) for pair in pairs))
    return Similarity(torch.stack(matrices).mean(0).tolist(), statistics.fmean(chances), len(matrices))


def median_expert_ratios(model: PagedModel, requests: Requests, ahead: torch.Tensor) -> list[float]:
    """beta_1 .. beta_(K-1) of the paper: medians over tokens and layers of the weight of the j lowest experts of a
    token, relative to that of the others. Empty for a model without experts."""
    found: list[torch.Tensor] = []

    def observe(weights: torch.Tensor) -> None:
        below = weights.float().sort(dim=1).values.cumsum(1)
        found.append(below[:, :-1] / (below[:, -1:] - below[:, :-1]))

    handles = observe_weights(model, observe)
    positions = requests.lens[:, None] + torch.arange(ahead.shape[1], device=ahead.device)
    everything = VerifyRound(
        model, requests.rows, requests.lens, range(model.num_layers), ratio=1.0, dense_below=0, block_size=1
    )
    everything.feed(ahead, positions)
    for handle in handles:
        handle.remove()
    medians: list[float] = torch.cat(found).median(0).values.tolist() if found else []
    return medians
