"""quest and oracle against a plain-Python reading of their rules, and what a draft step then reads.

Every slot that no visible position names holds NaN; every page-table entry past the visible positions is out of range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES, StepPolicy
from sglang_sparsespec.selection.step import LayerKeys, StepDraftKV

# committed tokens: a padded row, one token, around pages and the budget of 24, odd sizes
COMMITTED = [0, 1, 2, 15, 16, 17, 23, 24, 25, 63, 65, 200]
NUM_KV_HEADS, HEAD_DIM = 2, 20
NUM_DRAFTED = 3
SCALE = HEAD_DIM**-0.5
INT_MAX = 2**31 - 1


class Case(NamedTuple):
    query: torch.Tensor
    keys: LayerKeys
    query_positions: torch.Tensor

    def visible_keys(self, r: int) -> torch.Tensor:
        """[num_kv_heads, committed + drafted, head_dim]."""
        slots = self.keys.req_to_token[int(self.keys.rows[r]), : COMMITTED[r] + NUM_DRAFTED].long()
        return self.keys.k_cache[slots].transpose(0, 1)


def make_case(group: int, logit_cap: float = 0.0) -> Case:
    visible = [n + NUM_DRAFTED for n in COMMITTED]
    num_slots = 2 * sum(visible) + 1
    k_cache = torch.full((num_slots, NUM_KV_HEADS, HEAD_DIM), torch.nan)
    used = 1 + torch.randperm(num_slots - 1)[: sum(visible)]
    # keys have a taste of their own, so that pages differ by more than luck
    k_cache[used] = 2.0 * torch.randn(sum(visible), NUM_KV_HEADS, HEAD_DIM)
    req_to_token = torch.where(torch.rand(len(COMMITTED) + 2, 230) < 0.5, INT_MAX, -1).to(torch.int32)
    rows = torch.randperm(len(COMMITTED) + 2)[: len(COMMITTED)]
    for row, slots in zip(rows.tolist(), used.split(visible), strict=True):
        req_to_token[row, : len(slots)] = slots.int()
    committed = torch.tensor(COMMITTED, dtype=torch.int32)
    keys = LayerKeys(k_cache, req_to_token, rows, committed, 209, SCALE, logit_cap)
    return Case(torch.randn(len(COMMITTED), NUM_KV_HEADS * group, HEAD_DIM), keys, committed + NUM_DRAFTED - 1)


def logits_of(case: Case, r: int, head: int) -> list[list[float]]:
    """One list over visible positions for every query head of a KV head."""
    group = case.query.shape[1] // NUM_KV_HEADS
    query = case.query[r, head * group : (head + 1) * group]
    logits = (query @ case.visible_keys(r)[head].T * SCALE).tolist()
    cap = case.keys.logit_cap
    return [[cap * math.tanh(x / cap) if cap else x for x in row] for row in logits]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def oracle_scores(case: Case, r: int, config: SparseSpecConfig) -> list[list[float]]:
    by_head = [mean([softmax(row) for row in logits_of(case, r, head)]) for head in range(NUM_KV_HEADS)]
    return [mean(by_head)] if config.sharing == "layer" else by_head


def quest_scores(case: Case, r: int, config: SparseSpecConfig) -> list[list[float]]:
    page_size = 16 if config.granularity == "token" else config.block_size
    group = case.query.shape[1] // NUM_KV_HEADS
    n, cap = COMMITTED[r], case.keys.logit_cap
    by_query: list[list[list[float]]] = []
    for head in range(NUM_KV_HEADS):
        k = case.visible_keys(r)[head][:n].tolist()
        pages = [k[i : i + page_size] for i in range(0, n, page_size)]
        by_query.append([])
        for query in case.query[r, head * group : (head + 1) * group].tolist():
            bounds = []
            for page in pages:
                channels = list(zip(*page, strict=True))
                bound = SCALE * sum(max(q * max(c), q * min(c)) for q, c in zip(query, channels, strict=True))
                bounds.append(cap * math.tanh(bound / cap) if cap else bound)
            by_query[-1].append([p for p in softmax(bounds) for _ in range(page_size)][:n])
    if config.sharing == "layer":
        return [mean([row for rows in by_query for row in rows])]
    return [mean(rows) for rows in by_query]


SCORES = {"oracle": oracle_scores, "quest": quest_scores}


def assert_keeps_the_best(kept: list[int], scores: list[float], n: int, config: SparseSpecConfig) -> None:
    """Sinks, recent blocks, then the highest block sums; equal sums may fall either way."""
    g = config.block_size
    num_blocks = n // g
    num_kept = min(max(config.min_budget, math.ceil(round(config.budget_ratio * n, 9))) // g, num_blocks)
    blocks = {p // g for p in kept}
    assert len(kept) == len(set(kept)) == num_kept * g
    assert {b * g + i for b in blocks for i in range(g)} == set(kept)
    sinks = [b for b in range(num_blocks) if b * g < config.sink]
    recent = [b for b in reversed(range(num_blocks)) if (b + 1) * g > num_blocks * g - config.recent_window]
    forced = set(list(dict.fromkeys([*sinks, *recent]))[:num_kept])
    assert forced <= blocks
    value = [sum(scores[b * g : (b + 1) * g]) for b in range(num_blocks)]
    chosen = [value[b] for b in blocks - forced]
    dropped = [value[b] for b in range(num_blocks) if b not in blocks]
    if chosen and dropped:
        assert min(chosen) >= max(dropped) * (1 - 1e-4)


def make(name: str, **options: object) -> StepPolicy:
    config = SparseSpecConfig(selection=name, **{"min_budget": 24, "budget_ratio": 0.2, **options})  # type: ignore[arg-type]
    policy = POLICIES[name](config)
    assert isinstance(policy, StepPolicy)
    return policy


@pytest.mark.parametrize("granularity", ["token", "4", "8", "16"])
@pytest.mark.parametrize("sharing", ["head", "layer"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("name", ["oracle", "quest"])
def test_selects_what_the_rule_says(name: str, group: int, sharing: str, granularity: str) -> None:
    """Wrong bounds, a mean over the wrong heads, a query of another group, or a key past the length would pass."""
    policy = make(name, sharing=sharing, granularity=granularity, sink=2, recent_window=5)
    case = make_case(group, logit_cap=20.0 if group == 4 else 0.0)
    selection = policy.select(case.query, case.query_positions, case.keys, policy.prepare(case.keys))
    assert selection.positions.shape[:2] == (len(COMMITTED), 1 if sharing == "layer" else NUM_KV_HEADS)
    for r, n in enumerate(COMMITTED):
        assert selection.until[r] == n // policy.config.block_size * policy.config.block_size
        for head, scores in enumerate(SCORES[name](case, r, policy.config)):
            row = selection.positions[r, head].tolist()
            num = int(selection.num_selected[r])
            assert row[num:] == [-1] * (len(row) - num)
            assert_keeps_the_best(row[:num], scores, n, policy.config)


@pytest.mark.parametrize("name", ["oracle", "quest"])
def test_small_scores_keep_their_order(name: str) -> None:
    """Probabilities below float32's range tie at 0, and everything after the first page is picked by luck."""
    policy = make(name, sharing="head", granularity="16", min_budget=64, sink=0, recent_window=0)
    k_cache = torch.zeros(161, 1, 4)
    # logits fall from 400 to 50 over ten pages; the farthest probability is exp(-350)
    order = torch.randperm(10)
    k_cache[1:, 0, 0] = (400.0 - 39.0 * order.float()).repeat_interleave(16)
    if name == "oracle":
        k_cache /= 8.0
    table = torch.arange(1, 161, dtype=torch.int32)[None]
    keys = LayerKeys(k_cache, table, torch.tensor([0]), torch.tensor([159], dtype=torch.int32), 160, 1.0, 0.0)
    query = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    selection = policy.select(query, torch.tensor([159], dtype=torch.int32), keys, policy.prepare(keys))
    whole_pages = [page for page in order.argsort().tolist() if page != 9]
    assert {p // 16 for p in selection.positions[0, 0].tolist()} == set(whole_pages[:4])


@pytest.mark.parametrize("granularity", ["token", "16"])
@pytest.mark.parametrize("name", ["oracle", "quest"])
def test_draft_step_reads_the_selection_and_everything_since(name: str, granularity: str) -> None:
    """A step that misses the token just drafted, or reads the tail of the step before, still drafts something."""
    policy = make(name, granularity=granularity, num_steps=5)
    case = make_case(group=2)
    # the layer's own number keys what the steps share
    kv = StepDraftKV(policy, case.keys.rows, case.keys.kv_lens, case.keys.req_to_token, max(COMMITTED))
    first = kv.advanced()
    first.layer_kv(7, case.query, case.keys.k_cache, scale=SCALE, logit_cap=0.0)
    third = first.advanced().advanced()
    slots, lens = third.layer_kv(7, case.query, case.keys.k_cache, scale=SCALE, logit_cap=0.0)
    assert slots.dtype == torch.int32
    expected = policy.select(case.query, case.query_positions, case.keys, policy.prepare(case.keys))
    for r, n in enumerate(COMMITTED):
        table = case.keys.req_to_token[int(case.keys.rows[r])]
        num = int(expected.num_selected[r])
        tail = table[int(expected.until[r]) : n + NUM_DRAFTED].tolist()
        for head in range(slots.shape[1]):
            selected = [int(table[p]) for p in expected.positions[r, head, :num].tolist()]
            listed = slots[r, head, : int(lens[r])].tolist()
            assert (sorted(listed[:num]), listed[num:]) == (sorted(selected), tail)


def test_quest_shares_bounds_between_steps_of_a_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds made in every step read all keys k times; bounds of another layer select at random."""
    policy = make("quest")
    prepared = []
    prepare = policy.prepare
    monkeypatch.setattr(policy, "prepare", lambda keys: prepared.append(keys.k_cache) or prepare(keys))
    case = make_case(group=1)
    caches = [case.keys.k_cache, case.keys.k_cache.clone()]
    kv = StepDraftKV(policy, case.keys.rows, case.keys.kv_lens, case.keys.req_to_token, max(COMMITTED))
    for _ in range(3):
        kv = kv.advanced()
        for layer, k_cache in enumerate(caches):
            kv.layer_kv(layer, case.query, k_cache, scale=SCALE, logit_cap=0.0)
    assert len(prepared) == 2
    assert prepared[0] is caches[0]
    assert prepared[1] is caches[1]
