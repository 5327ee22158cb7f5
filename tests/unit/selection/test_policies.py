"""Selection policies against a plain-Python reading of their rules."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES, SelectionPolicy

if TYPE_CHECKING:
    from sglang_sparsespec.selection.base import Selection


def make(name: str, config: SparseSpecConfig) -> SelectionPolicy:
    policy = POLICIES[name](config)
    assert isinstance(policy, SelectionPolicy)
    return policy


def selected(selection: Selection, r: int, head: int) -> list[int]:
    row = selection.positions[r, head].tolist()
    num = int(selection.num_selected[r])
    assert all(p == -1 for p in row[num:]), "padding must be -1"
    return row[:num]


def expected_pillar(config: SparseSpecConfig, attention: list[list[float]], kv_len: int) -> list[set[int]]:
    """The rule in the words of docs/configuration.md, one request: a set per score row."""
    g = config.block_size
    if config.sharing == "layer":
        attention = [[sum(column) / len(column) for column in zip(*attention, strict=True)]]
    pooled = []
    for row in attention:
        pool = config.score_pooling
        spread = [sum(row[max(0, p - pool) : p + 1]) / (pool + 1) if pool else 0.0 for p in range(kv_len)]
        pooled.append([row[p] + spread[p] for p in range(kv_len)])
    budget = max(config.min_budget, math.ceil(round(config.budget_ratio * kv_len, 9)))
    num_blocks = kv_len // g
    num_kept = min(budget // g, num_blocks)
    result = []
    for row in pooled:
        sinks = [b for b in range(num_blocks) if b * g < config.sink]
        recent = [b for b in reversed(range(num_blocks)) if (b + 1) * g > num_blocks * g - config.recent_window]
        rest = sorted(range(num_blocks), key=lambda b: -sum(row[b * g : (b + 1) * g]))
        order = list(dict.fromkeys([*sinks, *recent, *rest]))
        result.append({b * g + i for b in order[:num_kept] for i in range(g)})
    return result


CASES: list[dict[str, Any]] = [
    {"granularity": "token", "sharing": "head", "score_pooling": 0, "sink": 0, "recent_window": 0},
    {"granularity": "token", "sharing": "layer", "score_pooling": 8, "sink": 4, "recent_window": 7},
    {"granularity": "4", "sharing": "head", "score_pooling": 3, "sink": 2, "recent_window": 5},
    {"granularity": "16", "sharing": "layer", "score_pooling": 8, "sink": 4, "recent_window": 32},
    {"granularity": "4", "sharing": "layer", "score_pooling": 0, "budget_ratio": 1.0},
    {"granularity": "token", "sharing": "head", "score_pooling": 0, "sink": 50, "recent_window": 50},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{v}" for v in c.values()))
def test_pillar_selects_what_the_rule_says(case: dict[str, Any]) -> None:
    """Passes only if sharing, pooling, budget, sinks, recent window and blocks combine in the documented order."""
    config = SparseSpecConfig(**{"min_budget": 24, "budget_ratio": 0.2, **case})
    policy = make("pillar", config)
    kv_lens = [1, 3, 4, 17, 63, 64, 65, 200]
    max_len = 210
    attention = torch.rand(len(kv_lens), 3, max_len) ** 4
    given = attention.clone()
    for r, kv_len in enumerate(kv_lens):
        # what lies past the length may be anything
        given[r, :, kv_len:] = random.choice([math.nan, math.inf, 9.0])
    selection = policy.select(given, torch.tensor(kv_lens, dtype=torch.int32), max_len)
    num_rows = 1 if config.sharing == "layer" else 3
    assert selection.positions.shape[:2] == (len(kv_lens), num_rows)
    assert selection.positions.dtype == torch.int32
    for r, kv_len in enumerate(kv_lens):
        expected = expected_pillar(config, attention[r].tolist(), kv_len)
        assert selection.until[r] == kv_len // config.block_size * config.block_size
        for head in range(num_rows):
            actual = selected(selection, r, head)
            assert set(actual) == expected[head], (r, head)
            assert len(set(actual)) == len(actual)


ROUND_POLICIES = sorted(name for name, policy in POLICIES.items() if issubclass(policy, SelectionPolicy))


@pytest.mark.parametrize("name", ROUND_POLICIES)
@pytest.mark.parametrize("granularity", ["token", "4"])
def test_no_policy_selects_what_was_not_selectable(name: str, granularity: str) -> None:
    """A position at or past the length is a draft that may have been rejected, or another request's leftovers."""
    config = SparseSpecConfig(selection=name, granularity=granularity, min_budget=40, sink=4, recent_window=8)
    policy = make(name, config)
    kv_lens = torch.tensor([1, 2, 39, 40, 41, 300], dtype=torch.int32)
    attention = torch.rand(6, 2, 310) if policy.needs_attention else None
    selection = policy.select(attention, kv_lens, 310)
    for r, kv_len in enumerate(kv_lens.tolist()):
        g = config.block_size
        for head in range(selection.positions.shape[1]):
            positions = selected(selection, r, head)
            assert all(0 <= p < kv_len // g * g for p in positions)
            assert len(positions) == min(40 // g * g, kv_len // g * g)


def test_window_keeps_sinks_and_the_newest() -> None:
    """A score that rises the wrong way round would keep the oldest tokens and pass every test of bounds."""
    config = SparseSpecConfig(selection="window", min_budget=10, sink=3, recent_window=0, budget_ratio=0.001)
    selection = make("window", config).select(None, torch.tensor([100], dtype=torch.int32), 120)
    assert set(selected(selection, 0, 0)) == {0, 1, 2, *range(93, 100)}


def test_random_selection_differs_between_refreshes() -> None:
    """The policy exists to make drafts bad in ever new ways; a constant one would exercise one path only."""
    config = SparseSpecConfig(selection="random", min_budget=8, sink=0, recent_window=0, budget_ratio=0.001)
    policy = make("random", config)
    kv_lens = torch.tensor([1000], dtype=torch.int32)
    assert selected(policy.select(None, kv_lens, 1000), 0, 0) != selected(policy.select(None, kv_lens, 1000), 0, 0)


@pytest.mark.parametrize(("num_queries", "captured"), [(2, [0, 1]), (4, [0, 3]), (9, [0, 8])])
def test_first_last_captures_two_queries(num_queries: int, captured: list[int]) -> None:
    """A policy that is cheap by name and captures everything would only be seen on a bill."""
    assert list(make("first-last", SparseSpecConfig()).captured_queries(num_queries)) == captured
    assert list(make("pillar", SparseSpecConfig()).captured_queries(num_queries)) == list(range(num_queries))


def test_pooling_is_for_captured_attention() -> None:
    """Pooling a window score would shift the window."""
    config = SparseSpecConfig(score_pooling=8)
    assert make("pillar", config).pooling == make("first-last", config).pooling == 8
    assert make("window", config).pooling == make("random", config).pooling == 0


@pytest.mark.parametrize(("max_len", "expected"), [(1, 16), (100, 100), (192, 192), (4000, 200), (40000, 2000)])
def test_max_budget_bounds_every_shorter_request(max_len: int, expected: int) -> None:
    """The store is allocated by it; a bound that is too small cuts selections off."""
    policy = make("pillar", SparseSpecConfig(granularity="16"))
    assert policy.max_budget(max_len) == expected
    assert all(min(policy.budget(n), n) <= expected for n in range(max_len + 1))
