"""Which KV tokens a draft may see. One policy per file; docs/selection_policy.md tells how to add one."""

from __future__ import annotations

from sglang_sparsespec.selection.base import SelectionPolicy
from sglang_sparsespec.selection.pillar import PillarPolicy
from sglang_sparsespec.selection.random import RandomPolicy
from sglang_sparsespec.selection.window import WindowPolicy

POLICIES: dict[str, type[SelectionPolicy]] = {
    policy.name: policy for policy in (PillarPolicy, WindowPolicy, RandomPolicy)
}

__all__ = ["POLICIES", "SelectionPolicy"]
