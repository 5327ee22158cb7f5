"""SelectionStore.draft_kv against a plain-Python list of what a draft step may see."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES
from sglang_sparsespec.selection.base import Selection
from sglang_sparsespec.selection.store import SelectionStore

NUM_LAYERS = 3
NUM_STEPS = 4


def page_table(num_rows: int, width: int) -> torch.Tensor:
    """Distinct slots for every row and position, in no order."""
    return torch.randperm(num_rows * width).to(torch.int32).view(num_rows, width)


def garbage_store(num_rows: int, num_heads: int, max_budget: int) -> SelectionStore:
    """What earlier requests may have left behind in every row."""
    store = SelectionStore(
        num_layers=NUM_LAYERS, num_rows=num_rows, num_heads=num_heads, max_budget=max_budget, device="cpu"
    )
    store.positions.random_(-(2**31), 2**31 - 1)
    store.num_selected.random_(0, max_budget)
    store.until.random_(0, 1000)
    return store


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("since", [0, 1, 5], ids=lambda n: f"{n} since the selection")
def test_draft_kv_lists_the_selection_and_everything_since(granularity: int, num_heads: int, since: int) -> None:
    """Catches a lost or doubled token at the seam between selection and tail, and rows that are mixed up."""
    num_rows, width, max_budget = 9, 400, 32
    # the selection was made at these lengths; since then `since` tokens were committed
    made_at = [1, 2, 5, 8, 33, 100, 350]
    rows = torch.tensor([7, 1, 4, 2, 8, 3, 6])
    req_to_token = page_table(num_rows, width)
    store = garbage_store(num_rows, num_heads, max_budget)
    chosen: dict[tuple[int, int, int], list[int]] = {}
    until = [n // granularity * granularity for n in made_at]
    num_selected = [min(max_budget // granularity * granularity, u) for u in until]
    for layer in range(NUM_LAYERS):
        positions = torch.full((len(rows), num_heads, max_budget), -1, dtype=torch.int32)
        for r, (u, num) in enumerate(zip(until, num_selected, strict=True)):
            for head in range(num_heads):
                blocks = torch.randperm(u // granularity)[: num // granularity].tolist()
                kept = [b * granularity + i for b in blocks for i in range(granularity)]
                chosen[layer, r, head] = kept
                positions[r, head, :num] = torch.tensor(kept, dtype=torch.int32)
        store.write(
            layer,
            rows,
            Selection(positions, torch.tensor(num_selected, dtype=torch.int32), torch.tensor(until, dtype=torch.int32)),
        )
    committed = torch.tensor(made_at) + since
    tail = since + NUM_STEPS + granularity
    kv = store.draft_kv(rows, committed, req_to_token, max_selected=max_budget, tail=tail)
    assert kv.slots.dtype == torch.int32
    assert kv.slots.shape == (NUM_LAYERS, len(rows), num_heads, max_budget + tail)
    for (layer, r, head), kept in chosen.items():
        for step in range(NUM_STEPS):
            n = int(committed[r])
            visible = [*kept, *range(until[r], n + step + 1)]
            length = int(kv.lens[r]) + step + 1
            assert length == len(visible)
            slots = kv.slots[layer, r, head, :length].tolist()
            assert slots == [int(req_to_token[rows[r], p]) for p in visible]


def test_draft_kv_reads_only_the_page_table_past_the_lengths() -> None:
    """Garbage entries must still be slots of the request: a kernel may prefetch them."""
    store = garbage_store(4, 1, 16)
    rows = torch.tensor([2, 3])
    selection = Selection(
        torch.full((2, 1, 16), -1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    for layer in range(NUM_LAYERS):
        store.write(layer, rows, selection)
    req_to_token = page_table(4, 12)
    kv = store.draft_kv(rows, torch.tensor([1, 11]), req_to_token, max_selected=16, tail=8)
    for r, row in enumerate(rows.tolist()):
        assert set(kv.slots[:, r].flatten().tolist()) <= set(req_to_token[row].tolist())
    assert kv.lens.tolist() == [1, 11]


def test_write_leaves_other_rows_alone() -> None:
    """A write by layer and row that broadcasts would overwrite running requests."""
    store = garbage_store(5, 2, 8)
    before = store.positions.clone(), store.num_selected.clone(), store.until.clone()
    selection = Selection(
        torch.zeros(1, 2, 8, dtype=torch.int32),
        torch.full((1,), 7, dtype=torch.int32),
        torch.full((1,), 9, dtype=torch.int32),
    )
    store.write(1, torch.tensor([3]), selection)
    others = [0, 1, 2, 4]
    assert torch.equal(store.positions[:, others], before[0][:, others])
    assert torch.equal(store.positions[[0, 2]], before[0][[0, 2]])
    assert torch.equal(store.num_selected[others], before[1][others])
    assert torch.equal(store.until[others], before[2][others])
    assert (store.num_selected[3], store.until[3]) == (7, 9)


@pytest.mark.parametrize("budget_ratio", [0.05, 1.0])
def test_write_takes_a_selection_made_under_a_bound_past_the_context(budget_ratio: float) -> None:
    """A verify near the context limit bounds its lengths by limit + k + 1; the store is sized for the limit."""
    context_len = 4096
    policy = POLICIES["window"](SparseSpecConfig(selection="window", budget_ratio=budget_ratio))
    store = SelectionStore(
        num_layers=1, num_rows=2, num_heads=1, max_budget=policy.max_budget(context_len), device="cpu"
    )
    kv_lens = torch.tensor([context_len - 1], dtype=torch.int32)
    selection = policy.select(None, kv_lens, context_len + 9)
    store.write(0, torch.tensor([1]), selection)
    num = int(store.num_selected[1])
    assert num == min(policy.budget(context_len - 1), context_len - 1)
    assert torch.equal(store.positions[0, 1, :, :num], selection.positions[0, :, :num])


def test_num_bytes_counts_all_state() -> None:
    """The start-up log line says what a server pays."""
    store = SelectionStore(num_layers=2, num_rows=5, num_heads=3, max_budget=7, device="cpu")
    assert store.num_bytes == 4 * (2 * 5 * 3 * 7 + 5 + 5)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_saved_selection_means_the_same_in_another_row(num_heads: int) -> None:
    """A request that comes back from host memory gets another row; its drafts must see what they would have seen."""
    max_budget, length = 16, 40
    store = garbage_store(6, num_heads, max_budget)
    positions = torch.stack([torch.randperm(length)[:max_budget] for _ in range(num_heads)])[None].to(torch.int32)
    count, until = torch.tensor([12], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    for layer in range(NUM_LAYERS):
        store.write(layer, torch.tensor([2]), Selection(positions.roll(layer, dims=2), count, until))
    page_table = torch.arange(6 * 100, dtype=torch.int32).view(6, 100)
    page_table[5] = page_table[2]
    bounds = {"max_selected": max_budget, "tail": 8}
    before = store.draft_kv(torch.tensor([2]), torch.tensor([length + 3]), page_table, **bounds)
    saved = store.save(2, max_selected=14, copy=torch.clone)
    store.positions[:, 2], store.num_selected[2], store.until[2] = -1, 0, 0
    others = store.positions[:, [0, 1, 3, 4]].clone()
    store.load(5, saved)
    after = store.draft_kv(torch.tensor([5]), torch.tensor([length + 3]), page_table, **bounds)
    num_read = int(before.lens)
    assert torch.equal(after.lens, before.lens)
    assert torch.equal(after.slots[..., : num_read + 4], before.slots[..., : num_read + 4])
    assert torch.equal(store.positions[:, [0, 1, 3, 4]], others)


@pytest.mark.parametrize("limit", [0, 2 * 24 * 2 * 1 * 22, 10**9], ids=["one layer", "two layers", "all layers"])
def test_layers_are_laid_out_some_at_a_time(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The last group is smaller than the others, and must not be lost or doubled."""
    torch.manual_seed(0)
    store = garbage_store(4, 1, 16)
    store.positions.random_(0, 50)
    store.num_selected.fill_(16)
    store.until.fill_(45)
    arguments = (torch.tensor([2, 3]), torch.tensor([45, 46]), page_table(4, 60))
    expected = store.draft_kv(*arguments, max_selected=16, tail=6)
    monkeypatch.setattr("sglang_sparsespec.selection.store.LAYOUT_BYTES", limit)
    apart = store.draft_kv(*arguments, max_selected=16, tail=6)
    assert torch.equal(apart.slots, expected.slots)
    assert torch.equal(apart.lens, expected.lens)
