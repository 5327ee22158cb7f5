"""What drafts of the explorer do without: small channels, a selection of each round, a selection of each layer."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.acceptance import cli
from sglang_sparsespec.acceptance.channels import MAX_ROWS, ChannelDrop
from sglang_sparsespec.acceptance.measure import measure_forced
from sglang_sparsespec.acceptance.model import PagedModel
from sglang_sparsespec.acceptance.rounds import Drafter, Prompts, RoundLogits, prefill
from sglang_sparsespec.acceptance.settings import Setting
from sglang_sparsespec.config import SparseSpecConfig

if TYPE_CHECKING:
    from pathlib import Path

LENS = [70, 33, 5]
MAX_LEN = 150
SMALL = {"min_budget": 16, "budget_ratio": 0.01, "recent_window": 2, "sink": 1, "num_steps": 3}


@pytest.fixture
def windows() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(MAX_LEN)] for _ in LENS]


@pytest.fixture
def loaded(tiny_qwen3_path: Path, windows: list[list[int]]) -> tuple[PagedModel, Prompts]:
    model = PagedModel(tiny_qwen3_path, device="cpu", dtype=torch.float32)
    model.allocate(len(LENS), MAX_LEN)
    return model, prefill(model, [window[:n] for window, n in zip(windows, LENS, strict=True)], keep=9)


def setting(refresh_every: int = 1, anchor_every: int = 1, **options: object) -> Setting:
    config = SparseSpecConfig(**{**SMALL, **options})  # type: ignore[arg-type]
    return Setting(config, refresh_every=refresh_every, anchor_every=anchor_every)


def walk(drafter: Drafter, prompts: Prompts, windows: list[list[int]], number: int) -> RoundLogits:
    """Round `number`, from 0 on, along the text."""
    committed = prompts.lens + 4 * number
    ahead = torch.tensor([w[n : n + 4] for w, n in zip(windows, committed.tolist(), strict=True)])
    return drafter.round(torch.arange(len(LENS)), committed, ahead[:, 0], lambda step, _: ahead[:, step + 1])


@pytest.mark.parametrize(("threshold", "is_same"), [(1e-30, True), (1e9, False)])
def test_channels_are_dropped_in_drafts_alone(
    loaded: tuple[PagedModel, Prompts], windows: list[list[int]], threshold: float, is_same: bool
) -> None:
    """A verify without channels is another model: its agreement with the drafts means nothing."""
    model, prompts = loaded
    expected = walk(Drafter(model, setting(), prompts), prompts, windows, 0)
    drafter = Drafter(model, setting(draft_ffn_threshold=threshold), prompts)
    found = walk(drafter, prompts, windows, 0)
    assert torch.equal(found.drafts, expected.drafts) is is_same
    assert torch.equal(found.target, expected.target)
    shares = drafter.channels.shares()
    assert shares is not None
    assert shares.dropped == pytest.approx(0.0 if is_same else 1.0, abs=1e-3)
    assert not any(module._forward_pre_hooks for module in model.down_projections)


def test_without_a_threshold_nothing_is_counted(loaded: tuple[PagedModel, Prompts], windows: list[list[int]]) -> None:
    """A share of 0 beside a setting that has no threshold would read as a finding."""
    model, prompts = loaded
    m = measure_forced(model, setting(), prompts, windows, [0.0], new_tokens=8)[0]
    assert m.channels is None


def test_shares_are_those_of_the_rows() -> None:
    """Counted rows against brute force: a mean over the wrong axis is a share too."""
    threshold, widths = 0.7, (5, 9)
    modules = [torch.nn.Linear(width, 3) for width in widths]
    drop = ChannelDrop(modules, threshold)
    batches = [[torch.randn(rows, 1, width) for width in widths] for rows in (3, 4, 1)]
    for batch in batches:
        with drop.applied():
            for module, hidden in zip(modules, batch, strict=True):
                kept = torch.where(hidden.abs() < threshold, 0.0, hidden)
                expected = torch.nn.functional.linear(kept, module.weight, module.bias)
                assert torch.equal(module(hidden), expected)
    small = [torch.cat([batch[layer][:, 0] for batch in batches]).abs() < threshold for layer in range(2)]
    shares = drop.shares()
    assert shares is not None
    assert shares.dropped == pytest.approx(sum(float(mask.double().mean()) for mask in small) / 2)
    # 8 rows: all of them
    assert set(shares.by_all) == {1, 8}
    assert shares.by_all[8] == pytest.approx(sum(float(mask.all(0).double().mean()) for mask in small) / 2)
    assert abs(shares.by_all[1] - shares.dropped) < 0.2


def test_remembered_rows_are_bounded() -> None:
    """Masks of a long run would fill the memory."""
    module = torch.nn.Linear(2, 2)
    drop = ChannelDrop([module], 1.0)
    with drop.applied():
        module(torch.zeros(MAX_ROWS - 1, 1, 2))
        # past the bound: counted as dropped or not, remembered no more
        module(torch.full((9, 1, 2), 5.0))
    shares = drop.shares()
    assert shares is not None
    assert shares.dropped == pytest.approx((MAX_ROWS - 1) / (MAX_ROWS + 8))
    assert sum(map(len, drop._masks[0])) == MAX_ROWS


def test_selections_grow_old(loaded: tuple[PagedModel, Prompts], windows: list[list[int]]) -> None:
    """Every second verify makes the selections that every verify would have made then, the others none."""
    model, prompts = loaded
    fresh, old = Drafter(model, setting(), prompts), Drafter(model, setting(refresh_every=2), prompts)
    for number in range(4):
        before = old.store.positions.clone(), old.store.until.clone()
        walk(fresh, prompts, windows, number)
        walk(old, prompts, windows, number)
        if number % 2:
            assert torch.equal(old.store.positions, fresh.store.positions)
            assert torch.equal(old.store.until, fresh.store.until)
        else:
            assert torch.equal(old.store.positions, before[0])
            assert torch.equal(old.store.until, before[1])
    assert not torch.equal(old.store.positions, before[0])


@pytest.mark.parametrize("capture", ["policy", "anchored"])
def test_layers_share_the_first_ones_selection(
    loaded: tuple[PagedModel, Prompts], windows: list[list[int]], capture: str
) -> None:
    """A group whose layers take the last one's selection, or keep the prompt's."""
    model, prompts = loaded
    config = SparseSpecConfig(**SMALL)  # type: ignore[arg-type]
    alone, shared = (Drafter(model, Setting(config, capture, anchor_every=n), prompts) for n in (1, 2))
    for number in range(2):
        walk(alone, prompts, windows, number)
        walk(shared, prompts, windows, number)
        for layer in range(model.num_layers):
            assert torch.equal(shared.store.positions[layer], alone.store.positions[layer // 2 * 2])
    assert not torch.equal(alone.store.positions[0], alone.store.positions[1])


@pytest.mark.parametrize("reuse", [{"refresh_every": 3}, {"anchor_every": 2}], ids=str)
def test_old_selections_and_everything_since_are_everything(
    loaded: tuple[PagedModel, Prompts], windows: list[list[int]], reuse: dict[str, int]
) -> None:
    """Lists that are too short for what came since lose the newest tokens, and their drafts with them."""
    model, prompts = loaded
    everything = setting(**reuse, min_budget=MAX_LEN)  # type: ignore[arg-type]
    for m in measure_forced(model, everything, prompts, windows, [0.0, 1.0], new_tokens=60):
        assert m.accept_rates == pytest.approx([1.0] * 3, abs=2e-3)


def test_command_reports_what_drafts_went_without(
    tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that reach no draft, or no report."""
    lines = tmp_path / "a.jsonl"
    command = f"{tiny_qwen3_path} --requests 2 --length 40 --new-tokens 8 --min-budget 16 --num-steps 3 --device cpu"
    options = "--threads 1 --text forced --temperature 0 --draft-ffn-threshold 0 0.5 --refresh-every 1 2"
    assert cli.main([*command.split(), *options.split(), "--selection", "pillar", "--output", str(lines)]) == 0
    header, _, *rows = (row for row in capsys.readouterr().out.splitlines() if row.startswith("|"))
    assert "| channels dropped | by all of 8 rows | by all of 32 rows | by all of 128 rows |" in header
    assert len(rows) == 4
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert "draft ffn threshold 0.5" in rows[1]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    found = [(record["refresh_every"], record["draft_ffn_threshold"]) for record in records]
    assert found == [(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)]
    for record in records:
        if record["draft_ffn_threshold"] == 0:
            assert "channels_dropped" not in record
        else:
            assert 0 < record["channels_dropped_by_all"]["8"] < record["channels_dropped"] < 1
    assert cli.main([*command.split(), "--anchor-every", "0"]) == 2
    assert "--anchor-every is 0; it must be at least 1" in capsys.readouterr().err
