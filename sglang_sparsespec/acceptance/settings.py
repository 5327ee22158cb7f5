"""What is compared: the cross of option values, without settings that differ in options that their policy ignores."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.selection import POLICIES, SelectionPolicy, StepPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sglang_sparsespec.selection import Policy
    from sglang_sparsespec.speculation.cost_model import RoundCost

CAPTURES: Final = ("policy", "all", "anchored", "first-last", "first", "last")
"""Which verify queries are captured. `policy`: those that the policy asks for. `anchored`: all of them, by the scores
that come out of the attention pass itself (`ops.paged_attention`)."""


@dataclass(frozen=True)
class Setting:
    """One way to draft."""

    config: SparseSpecConfig
    capture: str = "policy"
    refresh_every: int = 1
    """Rounds from one selection to the next; in between drafts see the old one and everything since."""
    anchor_every: int = 1
    """Layers that share a selection: that of the first of them."""

    def __post_init__(self) -> None:
        for name in ("refresh_every", "anchor_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), "at least 1", "1 reuses nothing.")

    @property
    def draft_tail(self) -> int:
        """`SparseSpecConfig.draft_tail`, of selections that may be `refresh_every` rounds old."""
        return self.config.draft_tail + (self.refresh_every - 1) * self.config.num_draft_tokens

    def refreshes(self, number: int, layer: int) -> bool:
        """Whether the verify of round `number`, from 1 on, makes a selection in this layer; 0: after the prefill."""
        if self.captures:
            return number % self.refresh_every == 0 and layer % self.anchor_every == 0
        return True

    @property
    def captures(self) -> bool:
        """Whether the policy scores by captured attention: what reuse could save."""
        policy = self.make_policy()
        return isinstance(policy, SelectionPolicy) and policy.needs_attention

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

    def cost(self, cost: RoundCost) -> RoundCost:
        """Of rounds that capture and select where this setting makes a selection: the most that reuse can save."""
        share = cost.capture_share / (self.refresh_every * self.anchor_every)
        return dataclasses.replace(cost, capture_share=share)

    def read_share(self, kv_len: int) -> float:
        """Share of `kv_len` KV tokens that a draft step selects."""
        return min(self.make_policy().budget(kv_len), kv_len) / kv_len

    def options(self) -> dict[str, Any]:
        """What tells this setting from others; an option without effect has the value None."""
        policy: Policy = self.make_policy()
        captures = self.captures
        # heads cannot differ where scores do not
        by_head = captures or isinstance(policy, StepPolicy)
        return {
            "selection": self.config.selection,
            "num_steps": self.config.num_steps,
            "budget_ratio": self.config.budget_ratio,
            "min_budget": self.config.min_budget,
            "score_pooling": policy.pooling if isinstance(policy, SelectionPolicy) and captures else None,
            "granularity": self.config.granularity,
            "sharing": self.config.sharing if by_head else None,
            "recent_window": self.config.recent_window,
            "sink": self.config.sink,
            "capture": self.capture if captures else None,
            "refresh_every": self.refresh_every if captures else None,
            "anchor_every": self.anchor_every if captures else None,
            "draft_ffn_threshold": self.config.draft_ffn_threshold,
        }


def cross(values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of `values` (fields of the config and of Setting), in order, each effect once.

    Raises:
        ConfigError: for a combination that no server would take.
    """
    fields = {field.name for field in dataclasses.fields(SparseSpecConfig)}
    own = {field.name for field in dataclasses.fields(Setting)}
    found: dict[tuple[Any, ...], Setting] = {}
    for combination in itertools.product(*values.values()):
        options = dict(zip(values, combination, strict=True))
        config = SparseSpecConfig(**{name: value for name, value in options.items() if name in fields})
        setting = Setting(config, **{name: value for name, value in options.items() if name in own})
        found.setdefault(tuple(setting.options().values()), setting)
    return list(found.values())
