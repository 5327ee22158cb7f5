"""Channels and experts that a model's own layers do without, by hooks on its modules.

An emulation: a dropped channel is a zero that is multiplied, a skipped expert has weight zero.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.quality.settings import option
from sglang_sparsespec.sparsity.experts import skipped_experts, smaller_top_k, without_skipped
from sglang_sparsespec.sparsity.ffn import drop_channels, dropped_share

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.settings import Setting

# transformers 5: calling one gives (logits, weights [T, K], indices [T, K])
ROUTER_SUFFIX = "TopKRouter"


class _Replaced:
    """A module whose forward is ours until `remove()`."""

    def __init__(self, module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        self._module = module
        # an attribute of the instance hides the method of its class
        module.forward = partial(forward, module)

    def remove(self) -> None:
        del self._module.__dict__["forward"]


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The routers of a mixture of experts; none in a dense model."""
    return [module for module in model.modules() if type(module).__name__.endswith(ROUTER_SUFFIX)]


class Rules:
    """The rules of one setting on one model; in force inside `with`.

    Raises:
        ConfigError: for a rule that the model has no layers for.
    """

    def __init__(self, model: PagedModel, setting: Setting) -> None:
        self.setting = setting
        self.routers = routers(model.model)
        self.down_projections = [
            module for name, module in model.model.named_modules() if name.endswith(".mlp.down_proj")
        ]
        self.experts = [module for name, module in model.model.named_modules() if name.endswith(".mlp.experts")]
        self.kept: dict[str, list[float]] = {"channels": [], "experts": []}
        self._handles: list[Any] = []
        moe_rules = [name for name in ("moe_thresholds", "moe_top_k") if getattr(setting, name)]
        if moe_rules and not self.routers:
            value = getattr(setting, moe_rules[0])
            raise ConfigError(option(moe_rules[0]), value, "left out for a model without experts", "Drop it.")
        if len(moe_rules) == 2:
            raise ConfigError(option("moe_top_k"), setting.moe_top_k, "0 with --moe-thresholds", "They are rivals.")
        num_experts = int(getattr(model.model.config, "num_experts_per_tok", 0) or 0)
        for name, most in (("moe_top_k", num_experts), ("moe_thresholds", num_experts - 1)):
            count = setting.moe_top_k if name == "moe_top_k" else len(setting.moe_thresholds)
            if self.routers and count > most:
                advice = f"A token has {num_experts} experts."
                raise ConfigError(option(name), getattr(setting, name), f"at most {most} of them", advice)

    def __enter__(self) -> Rules:
        if self.setting.ffn_threshold:
            self._handles = [layer.register_forward_pre_hook(self._drop) for layer in self.down_projections]
            self._handles += [_Replaced(module, self._run_experts) for module in self.experts]
        if self.setting.moe_thresholds or self.setting.moe_top_k:
            self._handles += [router.register_forward_hook(self._skip) for router in self.routers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def kept_share(self, what: str) -> float:
        """Share of `channels` or `experts` kept, mean over layers and forwards under the rules; 1 without a rule."""
        return statistics.fmean(self.kept[what]) if self.kept[what] else 1.0

    def _drop(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        [hidden] = inputs
        self.kept["channels"].append(1.0 - dropped_share(hidden, self.setting.ffn_threshold))
        return (drop_channels(hidden, self.setting.ffn_threshold),)

    def _run_experts(
        self, experts: Any, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What a layer's experts add up to without small channels: hidden states [T, hidden] by the experts of a token
        [T, K] and their weights [T, K]."""
        out = torch.zeros_like(hidden_states)
        shares = []
        for number in indices.unique().tolist():
            tokens, places = torch.where(indices == number)
            gate_up = torch.nn.functional.linear(hidden_states[tokens], experts.gate_up_proj[number])
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = experts.act_fn(gate) * up
            shares += [dropped_share(hidden, self.setting.ffn_threshold)] * len(tokens)
            hidden = drop_channels(hidden, self.setting.ffn_threshold)
            states = torch.nn.functional.linear(hidden, experts.down_proj[number])
            out.index_add_(0, tokens, (states * weights[tokens, places, None]).to(out.dtype))
        self.kept["channels"].append(1.0 - statistics.fmean(shares))
        return out

    def _skip(self, router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, indices = output
        if self.setting.moe_top_k:
            skipped = smaller_top_k(weights, self.setting.moe_top_k)
            if not getattr(router, "norm_topk_prob", True):
                # a router that chooses fewer weighs them as before; only one that normalises lets them grow
                self._note_experts(skipped)
                return logits, weights.masked_fill(skipped, 0), indices
        else:
            skipped = skipped_experts(weights, self.setting.moe_thresholds)
        self._note_experts(skipped)
        # a token that skips nothing keeps its weights to the bit
        changed = skipped.any(1, keepdim=True)
        return logits, torch.where(changed, without_skipped(weights, skipped), weights), indices

    def _note_experts(self, skipped: torch.Tensor) -> None:
        self.kept["experts"].append(1.0 - skipped.double().mean().item())


def observe_weights(model: PagedModel, observe: Callable[[torch.Tensor], None]) -> list[Any]:
    """Show the weights [T, K] of each router call; returns handles to remove."""

    def hook(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        observe(output[1])

    return [router.register_forward_hook(hook) for router in routers(model.model)]
