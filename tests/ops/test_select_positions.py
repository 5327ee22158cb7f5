"""select_positions against its reference, and by the properties that its callers lean on."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.ops.select_positions import GRANULARITIES, select_positions
from sglang_sparsespec.ops.select_positions.reference import select_positions_reference

DEFAULTS = {"sink": 0, "recent_window": 0, "pooling": 0, "granularity": 1}


def make_scores(kv_lens: torch.Tensor, num_rows: int, num_positions: int, seed: int = 0) -> torch.Tensor:
    """Distinct scores, NaN and infinities past the lengths."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(kv_lens), num_rows, num_positions, generator=generator)
    past = torch.arange(num_positions) >= kv_lens[:, None, None]
    junk = torch.tensor([torch.nan, torch.inf, 1e30])[torch.arange(num_positions) % 3]
    return torch.where(past, junk, scores)


def ravel(scores: torch.Tensor, kv_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, R, HS, N] -> [L, HS, C] without what lies past the lengths, requests in reverse order, NaN between them."""
    lens = kv_lens.long().cpu()
    starts = (lens + 2).flip(0).cumsum(0).flip(0) - lens
    ragged = torch.full((scores.shape[0], scores.shape[2], int(lens.sum()) + 2 * len(lens)), torch.nan)
    for r, (start, length) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        ragged[..., start : start + length] = scores[:, r, :, :length].cpu()
    return ragged.to(scores.device), starts.to(scores.device)


def select(backend: str, *args: torch.Tensor, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function, or the kernel."""
    if backend != "triton":
        return select_positions(*args, **options)
    from sglang_sparsespec.ops.select_positions.triton_impl import select_positions_triton

    scores, kv_lens, budgets = args
    layers = scores if scores.dim() == 4 else scores[None]
    ragged, starts = ravel(layers, kv_lens)
    # small blocks, so that small rows have several
    options = {"share_heads": False, "block": 64, "max_len": scores.shape[-1], **options}
    positions, num_selected = select_positions_triton(ragged, kv_lens, budgets, starts, **options)
    return positions if scores.dim() == 4 else positions[0], num_selected


def assert_same_blocks(actual: torch.Tensor, expected: torch.Tensor, granularity: int) -> None:
    """Equal but for the order of blocks; -1 is padding and stands last in both."""

    def blocks(positions: torch.Tensor) -> torch.Tensor:
        whole = positions.shape[-1] // granularity * granularity
        assert (positions[..., whole:] == -1).all()
        grouped = positions[..., :whole].unflatten(-1, (whole // granularity, granularity))
        return grouped.gather(-2, grouped[..., :1].argsort(dim=-2, stable=True).expand_as(grouped))

    assert actual.shape == expected.shape
    assert torch.equal(blocks(actual), blocks(expected))
    assert torch.equal(actual < 0, expected < 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_positions", [0, 1, 63, 130])
@pytest.mark.parametrize(("sink", "recent_window"), [(0, 0), (5, 40), (100, 100)])
@pytest.mark.parametrize("pooling", [0, 8])
def test_matches_reference(
    backend: str,
    device: torch.device,
    granularity: int,
    num_positions: int,
    sink: int,
    recent_window: int,
    pooling: int,
) -> None:
    """Reading past a length, rounding a length or budget wrongly, or dropping sinks for recent ones would pass."""
    generator = torch.Generator().manual_seed(num_positions)
    is_interpreted = backend == "triton" and device.type == "cpu"
    if is_interpreted and num_positions == 130 and granularity in (4, 16):
        pytest.skip("the interpreter takes half a second a launch; blocks of 8 stand for the others")
    for max_budget in (50,) if is_interpreted else (0, 3, 50, 200):
        kv_lens = torch.randint(0, num_positions + 1, (3,), generator=generator, dtype=torch.int32)
        budgets = torch.randint(0, max_budget + 1, (3,), generator=generator, dtype=torch.int32)
        kv_lens[0], budgets[0] = num_positions, max_budget
        scores = make_scores(kv_lens, 2, num_positions)
        options = {
            "max_budget": max_budget,
            "sink": sink,
            "recent_window": recent_window,
            "pooling": pooling,
            "granularity": granularity,
        }
        positions, num_selected = select(backend, scores.to(device), kv_lens.to(device), budgets.to(device), **options)
        expected, expected_num = select_positions_reference(scores, kv_lens, budgets, **options)
        assert positions.dtype == num_selected.dtype == torch.int32
        assert_same_blocks(positions.cpu(), expected, granularity)
        assert torch.equal(num_selected.cpu(), expected_num)


@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_layers_at_once_equal_layers_one_by_one(
    backend: str, device: torch.device, share_heads: bool, num_heads: int
) -> None:
    """Rows of another layer or request, a mean over the wrong dimension, or scratch shared by rows would pass."""
    kv_lens = torch.tensor([300, 0, 77, 420], dtype=torch.int32)
    budgets = torch.tensor([60, 10, 80, 80])
    layers = [make_scores(kv_lens, num_heads, 420, seed=seed) for seed in range(3)]
    options = {"max_budget": 80, "sink": 4, "recent_window": 16, "pooling": 4, "granularity": 4}
    positions, num_selected = select(
        backend,
        torch.stack(layers).to(device),
        kv_lens.to(device),
        budgets.to(device),
        share_heads=share_heads,
        **options,
    )
    for layer, scores in enumerate(layers):
        expected, expected_num = select_positions_reference(
            scores, kv_lens, budgets, share_heads=share_heads, **options
        )
        assert_same_blocks(positions[layer].cpu(), expected, 4)
        assert torch.equal(num_selected.cpu(), expected_num)


def test_ragged_scores_equal_padded_ones(device: torch.device) -> None:
    """Columns of the wrong request, or what lies between requests, would be selected."""
    kv_lens = torch.tensor([90, 0, 17, 64])
    scores = torch.stack([make_scores(kv_lens, 2, 90, seed=seed) for seed in range(2)]).to(device)
    kv_lens, budgets = kv_lens.to(device), torch.tensor([30, 30, 30, 7], device=device)
    options = {**DEFAULTS, "max_budget": 30, "pooling": 3, "share_heads": True}
    expected, expected_num = select_positions(scores, kv_lens, budgets, **options)
    ragged, starts = ravel(scores, kv_lens)
    positions, num_selected = select_positions(ragged, kv_lens, budgets, score_starts=starts, max_len=95, **options)
    assert torch.equal(positions, expected)
    assert torch.equal(num_selected, expected_num)
    with pytest.raises(ValueError, match="max_len"):
        select_positions(ragged, kv_lens, budgets, score_starts=starts, **options)


def test_keeps_the_highest_under_ties(backend: str, device: torch.device) -> None:
    """Against a reference ties are ambiguous; by the property they are not: min kept >= max dropped."""
    scores = (torch.arange(300) * 7 % 5).float().expand(1, 2, 300).contiguous()
    kv_lens, budgets = torch.tensor([300], dtype=torch.int32), torch.tensor([101], dtype=torch.int32)
    positions, _ = select(
        backend, scores.to(device), kv_lens.to(device), budgets.to(device), max_budget=128, **DEFAULTS
    )
    for h in range(2):
        kept = positions[0, h, :101].long().cpu()
        assert len(set(kept.tolist())) == 101
        is_kept = torch.zeros(300, dtype=torch.bool).index_fill(0, kept, True)
        assert scores[0, h][is_kept].min() >= scores[0, h][~is_kept].max()


def test_pooling_prefers_what_follows_a_peak(backend: str, device: torch.device) -> None:
    """A window on the wrong side of a position would pass against a reference that shares the mistake."""
    scores = torch.zeros(1, 1, 40)
    scores[0, 0, 10] = 1.0
    lens, budgets = torch.tensor([40], device=device), torch.tensor([5], device=device)
    options = {**DEFAULTS, "pooling": 4}
    positions, _ = select(backend, scores.to(device), lens, budgets, max_budget=5, **options)
    assert sorted(positions[0, 0].tolist()) == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_short_row_selects_every_whole_block(backend: str, device: torch.device, granularity: int) -> None:
    """A short context that is thinned although it fits the budget would pass a test of long ones."""
    scores = make_scores(torch.tensor([37]), 1, 64)
    lens, budgets = torch.tensor([37], device=device), torch.tensor([48], device=device)
    options = {**DEFAULTS, "granularity": granularity, "recent_window": 8}
    positions, num_selected = select(backend, scores.to(device), lens, budgets, max_budget=50, **options)
    count = 37 // granularity * granularity
    assert num_selected.tolist() == [count]
    assert sorted(positions[0, 0, :count].tolist()) == list(range(count))
    assert (positions[0, 0, count:] == -1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("pooling", [0, 3])
@pytest.mark.parametrize("granularity", [1, 4])
def test_non_finite_scores_still_fill_the_budget(
    backend: str, device: torch.device, value: float, pooling: int, granularity: int
) -> None:
    """NaN sorts above everything in torch: without it unselectable blocks could be picked, or positions repeated."""
    scores = torch.rand(3, 1, 64)
    scores[0] = value
    scores[1, 0, 20] = value
    lens, budgets = torch.tensor([64, 41, 64], device=device), torch.tensor([16, 16, 16], device=device)
    options = {"sink": 4, "recent_window": 4, "pooling": pooling, "granularity": granularity}
    positions, num_selected = select(backend, scores.to(device), lens, budgets, max_budget=16, **options)
    assert num_selected.tolist() == [16, 16, 16]
    for row, length in zip(positions[:, 0].tolist(), lens.tolist(), strict=True):
        assert len(set(row)) == 16
        assert set(range(4)) <= set(row)
        assert max(row) < length // granularity * granularity
        assert min(row) == 0
    assert (20 in positions[1, 0].tolist()) == (value == torch.inf)


def test_rejects_wrong_arguments() -> None:
    """A granularity that no caller handles, or scores of another dtype, would go through."""
    scores, lens = torch.zeros(1, 1, 8), torch.tensor([8])
    with pytest.raises(ValueError, match="granularity"):
        select_positions(scores, lens, lens, max_budget=8, **{**DEFAULTS, "granularity": 2})
    with pytest.raises(ValueError, match="sink"):
        select_positions(scores, lens, lens, max_budget=8, **{**DEFAULTS, "sink": -1})
    with pytest.raises(ValueError, match="scores"):
        select_positions(scores.half(), lens, lens, max_budget=8, **DEFAULTS)
    with pytest.raises(ValueError, match="budgets"):
        select_positions(scores, lens, lens[:0], max_budget=8, **DEFAULTS)


@pytest.mark.gpu
def test_can_be_captured_in_a_graph() -> None:
    """A hidden synchronisation would pass every eager test; capture refuses it."""
    scores = torch.rand(4, 2, 500, device="cuda")
    lens, budgets = torch.full((4,), 500, device="cuda"), torch.full((4,), 64, device="cuda")
    options = {"max_budget": 64, "sink": 4, "recent_window": 16, "pooling": 8, "granularity": 4}
    select_positions(scores, lens, budgets, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions, _ = select_positions(scores, lens, budgets, **options)
    lens.fill_(90)
    graph.replay()
    expected, _ = select_positions_reference(scores.cpu(), lens.cpu(), budgets.cpu(), **options)
    assert torch.equal(positions.cpu().sort(-1).values, expected.sort(-1).values)
