"""What is compared: the cross of option values, without settings that differ in options without effect."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import read_anchors, weights_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sglang_sparsespec.acceptance.model import PagedModel

EVERY_LAYER = "every-layer"
"""In the place of an anchors file: each layer chooses its own blocks."""


@dataclass(frozen=True)
class Setting:
    """One way to verify; the defaults leave nothing out.

    Raises:
        ConfigError: for a value out of its bounds.
    """

    num_steps: int = 8
    """k: a verify runs k + 1 tokens, and they share the blocks that the first one chose."""
    attention_ratio: float = 1.0
    """rho, share of the tokens beyond `dense_below` that are read."""
    dense_below: int = 4096
    """L0, tokens."""
    block_size: int = 16
    """Tokens."""
    anchors: str = EVERY_LAYER
    """An anchors file, or EVERY_LAYER."""
    ffn_threshold: float = 0.0
    """tau; channels below it are dropped."""
    moe_thresholds: tuple[float, ...] = ()
    """beta_1 .. beta_m of `sparsity.experts.skipped_experts`."""
    moe_top_k: int = 0
    """Experts of a token that are kept, the heaviest; 0: those that the model says."""
    dense_every: int = 0
    """Each n-th verify leaves nothing out; 0: none."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_steps", 1, math.inf),
            ("attention_ratio", 0, 1),
            ("dense_below", 0, math.inf),
            ("block_size", 1, math.inf),
            ("ffn_threshold", 0, math.inf),
            ("moe_top_k", 0, math.inf),
            ("dense_every", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                allowed = f"{low} to {high}" if high < math.inf else f"at least {low}"
                raise ConfigError(option(name), value, allowed, "Change it.")
        if any(not threshold >= 0 for threshold in self.moe_thresholds):
            raise ConfigError(option("moe_thresholds"), self.moe_thresholds, "at least 0 each", "Change it.")
        if self.dense_every == 1:
            raise ConfigError(option("dense_every"), 1, "0 or at least 2", "With 1 every verify would be dense.")

    @property
    def thins_attention(self) -> bool:
        return self.attention_ratio < 1

    @property
    def is_dense(self) -> bool:
        return not (self.thins_attention or self.ffn_threshold or self.moe_thresholds or self.moe_top_k)

    def options(self) -> dict[str, Any]:
        """What tells this setting from others; an option without effect has the value None."""
        thins = self.thins_attention
        return {
            "attention_ratio": self.attention_ratio,
            "dense_below": self.dense_below if thins else None,
            "block_size": self.block_size if thins else None,
            "anchors": self.anchors if thins else None,
            "ffn_threshold": self.ffn_threshold,
            "moe_thresholds": self.moe_thresholds or None,
            "moe_top_k": self.moe_top_k or None,
            "dense_every": None if self.is_dense else self.dense_every,
            # it also says which tokens a round has
            "num_steps": self.num_steps,
        }

    def choosing_layers(self, model: PagedModel) -> Sequence[int]:
        """[layers]: whose blocks each layer reads.

        Raises:
            ConfigError: for a file that cannot be read, or one of another model or block size.
        """
        if self.anchors == EVERY_LAYER:
            return range(model.num_layers)
        found = read_anchors(Path(self.anchors))
        found.check(model.model.config.to_dict(), self.block_size)
        if found.calibration is not None:
            found.check_weights(weights_digest(model.model, model.num_layers, model.head_dim))
        return found.sources()


def option(field: str) -> str:
    return "--" + field.replace("_", "-")


def cross(values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of `values` (fields of Setting), each effect once, a dense setting for each k first.

    Raises:
        ConfigError: for a value out of its bounds, or anchors where no attention is thinned.
    """
    found: dict[tuple[Any, ...], Setting] = {}
    dense = [Setting(num_steps=k) for k in values["num_steps"]]
    combinations = (dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))
    for setting in itertools.chain(dense, (Setting(**combination) for combination in combinations)):
        found.setdefault(tuple(setting.options().values()), setting)
    if not any(setting.thins_attention for setting in found.values()) and set(values["anchors"]) != {EVERY_LAYER}:
        raise ConfigError(option("anchors"), values["anchors"], "left out with --attention-ratio 1", "Lower the ratio.")
    return sorted(found.values(), key=lambda setting: setting.num_steps)
