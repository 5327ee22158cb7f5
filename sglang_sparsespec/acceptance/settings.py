"""What is compared: the cross of option values, without settings that differ in options that their policy ignores."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES, SelectionPolicy, StepPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sglang_sparsespec.selection import Policy

CAPTURES: Final = ("policy", "all", "anchored", "first-last", "first", "last")
"""Which verify queries are captured. `policy`: those that the policy asks for. `anchored`: all of them, by the scores
that come out of the attention pass itself (`ops.paged_attention`)."""


@dataclass(frozen=True)
class Setting:
    """One way to draft."""

    config: SparseSpecConfig
    capture: str = "policy"

    def make_policy(self) -> SelectionPolicy | StepPolicy:
        return POLICIES[self.config.selection](self.config)

    def captured_queries(self) -> range:
        """Captured queries of a verify, by index; all of them where the policy captures nothing."""
        num_queries = self.config.num_draft_tokens
        rules = {
            "all": range(num_queries),
            "anchored": range(num_queries),
            "first-last": range(0, num_queries, num_queries - 1),
            "first": range(1),
            "last": range(num_queries - 1, num_queries),
        }
        policy = self.make_policy()
        if self.capture != "policy":
            return rules[self.capture]
        return policy.captured_queries(num_queries) if isinstance(policy, SelectionPolicy) else rules["all"]

    @property
    def is_by_head(self) -> bool:
        """Whether each KV head has a selection of its own."""
        policy = self.make_policy()
        scores_heads = isinstance(policy, StepPolicy) or policy.needs_attention
        return scores_heads and self.config.sharing == "head"

    @property
    def knows_cost(self) -> bool:
        """Whether `speculation.cost_model` describes a round: a StepPolicy reads keys in its draft steps too."""
        return not isinstance(self.make_policy(), StepPolicy)

    def read_share(self, kv_len: int) -> float:
        """Share of `kv_len` KV tokens that a draft step selects."""
        return min(self.make_policy().budget(kv_len), kv_len) / kv_len

    def options(self) -> dict[str, Any]:
        """What tells this setting from others; an option without effect has the value None."""
        policy: Policy = self.make_policy()
        captures = isinstance(policy, SelectionPolicy) and policy.needs_attention
        # heads cannot differ where scores do not
        by_head = captures or isinstance(policy, StepPolicy)
        return {
            "selection": self.config.selection,
            "num_steps": self.config.num_steps,
            "budget_ratio": self.config.budget_ratio,
            "min_budget": self.config.min_budget,
            "score_pooling": policy.pooling if captures else None,
            "granularity": self.config.granularity,
            "sharing": self.config.sharing if by_head else None,
            "recent_window": self.config.recent_window,
            "sink": self.config.sink,
            "capture": self.capture if captures else None,
        }


def cross(values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of `values` (config fields, and `capture`), in order, each effect once.

    Raises:
        ConfigError: for a combination that no server would take.
    """
    fields = {field.name for field in dataclasses.fields(SparseSpecConfig)}
    found: dict[tuple[Any, ...], Setting] = {}
    for combination in itertools.product(*values.values()):
        options = dict(zip(values, combination, strict=True))
        config = SparseSpecConfig(**{name: value for name, value in options.items() if name in fields})
        setting = Setting(config, options.get("capture", "policy"))
        found.setdefault(tuple(setting.options().values()), setting)
    return list(found.values())
