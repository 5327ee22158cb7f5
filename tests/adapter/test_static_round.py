"""Rounds at fixed addresses: what a shorter round finds of a longer one before it, and what it is padded to."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.adapter.padded_forward import PaddedForward
from sglang_sparsespec.adapter.static_round import StaticRound
from sglang_sparsespec.selection.store import DraftKV, SelectionStore

pytestmark = pytest.mark.adapter

NUM_LAYERS, NUM_HEADS, MAX_BUDGET, TAIL, WIDTH = 3, 2, 8, 6, 4


@pytest.fixture
def static() -> StaticRound:
    store = SelectionStore(num_layers=NUM_LAYERS, num_rows=9, num_heads=NUM_HEADS, max_budget=MAX_BUDGET, device="cpu")
    return StaticRound(max_reqs=6, num_draft_tokens=WIDTH, store=store, tail=TAIL, device="cpu")


def load(static: StaticRound, num_reqs: int, batch_size: int, seed: int, width: int = MAX_BUDGET + TAIL) -> DraftKV:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(1, 100, shape, generator=generator)

    draft_kv = DraftKV(numbers(NUM_LAYERS, num_reqs, NUM_HEADS, width).int(), numbers(num_reqs).int())
    static.load(
        numbers(num_reqs), numbers(num_reqs), numbers(num_reqs, WIDTH), numbers(num_reqs, WIDTH), draft_kv, batch_size
    )
    return draft_kv


def test_padding_has_nothing_of_an_earlier_round(static: StaticRound) -> None:
    """A row, length or slot that stays would make padding write into the KV of a request that is alive."""
    load(static, 6, 6, seed=0)
    static.set_chain(torch.full((6, WIDTH), 5), 6)
    addresses = {name: tensor.data_ptr() for name, tensor in vars(static).items() if torch.is_tensor(tensor)}
    draft_kv = load(static, 2, 4, seed=1)
    static.set_chain(torch.full((2, WIDTH), 7), 4)
    for tensor in (static.rows, static.committed_lens, static.positions, static.slots, static.chain):
        assert (tensor[2:4] == 0).all()
        assert (tensor[:2] != 0).all()
    assert static.num_queries[:4].tolist() == [WIDTH, WIDTH, 0, 0]
    assert static.draft_kv(4).lens.tolist() == [*draft_kv.lens.tolist(), 0, 0]
    assert addresses == {name: tensor.data_ptr() for name, tensor in vars(static).items() if torch.is_tensor(tensor)}


def test_a_narrow_round_has_nothing_of_a_wide_one(static: StaticRound) -> None:
    """Tokens of an earlier round behind the last column would be verified, scored and written for nobody."""
    load(static, 3, 4, seed=0)
    static.set_chain(torch.full((3, WIDTH), 5), 4)
    rows = torch.ones(3, dtype=torch.int64)
    wide = torch.ones(3, WIDTH, dtype=torch.int64)
    static.load(rows, rows, wide, wide, None, 4, num_queries=2)
    static.set_chain(torch.full((3, 2), 7), 4)
    assert static.num_queries[:4].tolist() == [2, 2, 2, 0]
    assert static.chain[:4].tolist() == [[7, 7] + [0] * (WIDTH - 2)] * 3 + [[0] * WIDTH]


def test_steps_walk_through_the_round(static: StaticRound) -> None:
    """A step that reads another one's position, slot or length drafts from the wrong place, and only costs speed."""
    draft_kv = load(static, 2, 3, seed=2, width=5)
    for step in range(WIDTH - 1):
        static.begin_step(step, torch.tensor([40 + step, 50 + step]), 3)
        assert static.step_tokens[:2].tolist() == [40 + step, 50 + step]
        assert torch.equal(static.step_positions[:3], static.positions[:3, step])
        assert torch.equal(static.step_slots[:3], static.slots[:3, step])
        view = static.draft_kv(3)
        assert torch.equal(view.lens[:2], draft_kv.lens + step + 1)
        assert torch.equal(view.slots[:, :2, :, :5], draft_kv.slots)
        assert view.slots.shape == (NUM_LAYERS, 3, NUM_HEADS, MAX_BUDGET + TAIL)


def test_counts_its_bytes(static: StaticRound) -> None:
    """The start-up line says what a server pays."""
    slots = NUM_LAYERS * 9 * NUM_HEADS * (MAX_BUDGET + TAIL) * 4
    assert static.num_bytes == slots + 6 * (8 + 4 + 4 + 3 * 8 * WIDTH + 3 * 8 + 4)


@pytest.mark.parametrize(("num_reqs", "expected"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 9)])
def test_pads_to_the_next_batch_size(num_reqs: int, expected: int) -> None:
    """A batch that is cut to a smaller size would lose requests."""
    seen = []
    forward = PaddedForward("test", lambda batch_size: seen.append(batch_size) or torch.zeros(batch_size), [2, 8])
    assert forward.padded(num_reqs) == expected
    assert forward(expected).shape == (expected,)
    assert seen == [expected]


@pytest.mark.parametrize("width", range(1, WIDTH + 1))
def test_a_verify_of_any_width_is_dense(static: StaticRound, width: int) -> None:
    """Kernels read tokens, positions and slots one after the other; a single column of a table has gaps."""
    load(static, 3, 4, seed=0)
    static.set_chain(torch.full((3, WIDTH), 5), 4)
    for found, table in zip(static.verified(4, width), (static.chain, static.positions, static.slots), strict=True):
        assert found.is_contiguous()
        assert found.tolist() == table[:4, :width].flatten().tolist()
