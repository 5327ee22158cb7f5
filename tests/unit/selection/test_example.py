"""The example of docs/selection_policy.md, taken from the page and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec import config as cfg
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES, SelectionPolicy

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "selection_policy.md"


def test_example_policy_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose example no longer fits the base class teaches the wrong thing."""
    [code] = re.findall(r"<!-- example: [^\n]*-->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict[str, object] = {"__name__": "fading"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    [policy_class] = [
        value
        for value in namespace.values()
        if isinstance(value, type) and issubclass(value, SelectionPolicy) and value is not SelectionPolicy
    ]
    # steps 2 and 3 of the page
    monkeypatch.setitem(POLICIES, policy_class.name, policy_class)
    monkeypatch.setattr(cfg, "SELECTIONS", (*cfg.SELECTIONS, policy_class.name))
    config = SparseSpecConfig(
        selection=policy_class.name, min_budget=16, budget_ratio=0.001, sink=2, recent_window=4, sharing="head"
    )
    policy = POLICIES[config.selection](config)

    num_heads, max_len = 3, 5000
    kv_lens = torch.tensor([4900, 7], dtype=torch.int32)
    # even attention: only age is left to choose by
    selection = policy.select(torch.full((2, num_heads, max_len), 1e-3), kv_lens, max_len)
    assert selection.positions.shape[:2] == (2, num_heads)
    for head in range(num_heads):
        assert set(selection.positions[0, head, :16].tolist()) == {0, 1, *range(4900 - 14, 4900)}
        assert set(selection.positions[1, head, :7].tolist()) == set(range(7))
