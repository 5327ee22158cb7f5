"""scripts/bench/rows.py: which forwards it shows, and what it says of them."""

from __future__ import annotations

import json
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.scripts import load_script

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/rows.py", monkeypatch)


def rounds(script: ModuleType, num_rounds: int, num_reqs: int) -> list[Any]:
    """Lockstep with k = 3: drafts take 1 ms, verifies 3."""
    kinds = [("draft", num_reqs)] * 3 + [("verify", 4 * num_reqs)]
    return [
        script.Forward(6.0 * i + number, 1.0 if kind == "draft" else 3.0, rows, kind)
        for i in range(num_rounds)
        for number, (kind, rows) in enumerate(kinds)
    ]


def test_what_is_shown_has_the_whole_batch(script: ModuleType) -> None:
    """Not the requests that come, nor those that are left."""
    forwards = [*rounds(script, 9, 5), *rounds(script, 8, 16), *rounds(script, 12, 3)]
    shown = script.steady(forwards)
    assert {forward.rows for forward in shown} == {16, 64}
    assert len(shown) == 16


def test_rows_are_summed_up(script: ModuleType) -> None:
    """Unevenness is that of rows; the share is of time."""
    result = script.summary(rounds(script, 5, 16))
    assert result["rows"] == {"draft": 16, "verify": 64}
    assert result["rows_mean"] == 28
    assert result["rows_highest_over_mean"] == pytest.approx(64 / 28, abs=0.01)
    assert result["share_of_time_in_the_highest"] == 0.5


@pytest.mark.parametrize("by_time", [True, False])
def test_a_plot_is_drawn(script: ModuleType, tmp_path: Path, by_time: bool) -> None:
    pytest.importorskip("matplotlib")
    script.plot({"lockstep": rounds(script, 5, 16)}, tmp_path / "rows.png", 8, by_time=by_time)
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_forwards_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, with rows of the logits, on this machine's clock."""
    from sglang_sparsespec.adapter.padded_forward import PaddedForward

    server = load_script("bench/rows_server.py", monkeypatch)
    # undone with the test
    monkeypatch.setattr(PaddedForward, "__call__", PaddedForward.__call__)
    monkeypatch.setattr(server, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    file = tmp_path / "rows"
    file.touch()
    server.install(file)
    forward = PaddedForward("draft", lambda batch_size: torch.zeros(batch_size * 2, 7), [4])
    for num_reqs in (1, 4, 6):
        forward(forward.padded(num_reqs))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(rows, kind) for _, _, rows, kind in lines] == [(8, "draft"), (8, "draft"), (12, "draft")]
    assert lines[0][0] == 0
    assert all(a[0] + a[1] <= b[0] + 0.01 for a, b in pairwise(lines))
