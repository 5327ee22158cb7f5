"""Which KV tokens a draft may see. One policy per file; docs/selection_policy.md tells how to add one."""

from __future__ import annotations

from sglang_sparsespec.selection.base import Policy, SelectionPolicy
from sglang_sparsespec.selection.first_last import FirstLastPolicy
from sglang_sparsespec.selection.oracle import OraclePolicy
from sglang_sparsespec.selection.pillar import PillarPolicy
from sglang_sparsespec.selection.quest import QuestPolicy
from sglang_sparsespec.selection.random import RandomPolicy
from sglang_sparsespec.selection.step import StepPolicy
from sglang_sparsespec.selection.window import WindowPolicy

POLICIES: dict[str, type[SelectionPolicy] | type[StepPolicy]] = {
    policy.name: policy
    for policy in (PillarPolicy, FirstLastPolicy, WindowPolicy, QuestPolicy, OraclePolicy, RandomPolicy)
}

__all__ = ["POLICIES", "Policy", "SelectionPolicy", "StepPolicy"]
