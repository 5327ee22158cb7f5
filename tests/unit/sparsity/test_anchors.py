"""The choice of anchor layers against every choice there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from sglang_sparsespec.sparsity import anchors


def worth(similarity: list[list[float]], chosen: tuple[int, ...]) -> float:
    layers = range(len(similarity))
    return sum(similarity[max(a for a in chosen if a <= layer)][layer] for layer in layers)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_is_better(num_layers: int, seed: int) -> None:
    """A greedy choice, or a slip in the recurrence, gives plausible anchors that are not the best."""
    similarity = torch.rand(num_layers, num_layers, generator=torch.Generator().manual_seed(seed)).tolist()
    for num_anchors in range(1, num_layers + 1):
        found = anchors.choose_anchors(similarity, num_anchors)
        others = [(0, *rest) for rest in itertools.combinations(range(1, num_layers), num_anchors - 1)]
        assert found in others
        assert worth(similarity, found) == pytest.approx(max(worth(similarity, other) for other in others))


def test_anchors_stand_where_the_choice_changes() -> None:
    """Three groups of layers that agree among themselves."""
    groups = [0, 0, 0, 1, 1, 2, 2, 2]
    similarity = [[1.0 if a == b else 0.1 for b in groups] for a in groups]
    assert anchors.choose_anchors(similarity, 3) == (0, 3, 5)


def test_equal_choices_are_settled_by_order() -> None:
    """Anchors that depend on the order of a dictionary would differ between two machines."""
    assert anchors.choose_anchors([[1.0] * 5] * 5, 3) == (0, 1, 2)


@pytest.mark.parametrize("num_anchors", [0, 4])
def test_a_number_of_anchors_that_layers_do_not_have(num_anchors: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        anchors.choose_anchors([[1.0] * 3] * 3, num_anchors)


def test_jaccard_by_hand() -> None:
    """Mean over cases, not over blocks; empty sets are equal."""
    kept = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    found = anchors.jaccard(kept)
    assert found[0, 1].item() == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [1.0, 1.0]


def test_similarity_by_chance_is_that_of_random_choices() -> None:
    """What a similarity has to beat to mean anything."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(2, 4000, 40, dtype=torch.bool)
    for layer in kept:
        layer[:, 0] = layer[:, -1] = True
        order = torch.rand(4000, 38, generator=generator).argsort(1)[:, :8] + 1
        layer.scatter_(1, order, True)
    assert anchors.jaccard(kept)[0, 1].item() == pytest.approx(anchors.jaccard_by_chance(10, 40), abs=0.01)
    assert anchors.jaccard_by_chance(2, 2) == 1.0
