"""Requests of a round that verify together where the scores of all do not fit."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from sglang_sparsespec.adapter.fused_verify import verify_groups


@pytest.mark.parametrize(
    ("len_bounds", "num_columns", "expected"),
    [
        ([5, 5, 5, 5], 20, [(0, 4)]),
        ([5, 5, 5, 5], 19, [(0, 3), (3, 4)]),
        ([5, 5, 5, 5], 5, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([9, 9, 1, 1], 10, [(0, 1), (1, 3), (3, 4)]),
        # one long request does not split the others
        ([10, 10, 10, 300], 300, [(0, 3), (3, 4)]),
        ([7], 7, [(0, 1)]),
        # what the host counts for one request may pass the pool by what its rounds reserve
        ([8], 7, [(0, 1)]),
    ],
)
def test_groups(len_bounds: list[int], num_columns: int, expected: list[tuple[int, int]]) -> None:
    """A request left out is never verified; one too many writes scores past the buffer."""
    assert [(group.start, group.stop) for group in verify_groups(len_bounds, num_columns)] == expected


def test_groups_cover_all_and_fit() -> None:
    rng = random.Random(0)
    for _ in range(300):
        bounds = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
        num_columns = rng.randint(50, 400)
        groups = verify_groups(bounds, num_columns)
        assert [index for group in groups for index in range(len(bounds))[group]] == list(range(len(bounds)))
        assert all(0 < sum(bounds[group]) <= num_columns for group in groups)
        # no two neighbours would fit together
        assert all(sum(bounds[a.start : b.stop]) > num_columns for a, b in pairwise(groups))
