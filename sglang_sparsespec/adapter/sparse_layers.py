"""Channels and experts left out of SGLang's own modules, in the forwards that ask for it and in no other.

Source: arXiv:2512.21911, FFN and MoE; the rules themselves are in `sparsity/`. A forward runs inside `applied()` or it
does not, so a CUDA graph has the rules of the forward that it was captured from. Invariant: outside `applied()` the
model's modules are as SGLang built them: no hook, the model's own top-k.
"""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK

from sglang_sparsespec.errors import HostContractError
from sglang_sparsespec.sparsity.experts import skipped_experts, without_skipped
from sglang_sparsespec.sparsity.ffn import drop_channels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

    from sglang_sparsespec.config import SparseSpecConfig


class LayerRules(NamedTuple):
    """What a kind of forward leaves out; the defaults leave out nothing."""

    ffn_threshold: float = 0.0
    """tau: channels of a gated activation below it are 0."""
    num_experts: int = 0
    """Experts of a token, chosen by the model's router; 0: as many as the model has."""
    expert_thresholds: tuple[float, ...] = ()
    """beta_1 .. beta_m: how light a token's lightest experts are that it does without."""


def draft_rules(config: SparseSpecConfig) -> LayerRules:
    """What draft forwards of a server leave out."""
    return LayerRules(ffn_threshold=config.draft_ffn_threshold, num_experts=config.draft_experts)


def verify_rules(config: SparseSpecConfig) -> LayerRules:
    """What sparse verifies of a server leave out: its output is then not the model's."""
    return LayerRules(
        ffn_threshold=config.verify_ffn_threshold,
        num_experts=config.verify_experts,
        expert_thresholds=config.verify_expert_thresholds,
    )


class SparseLayers:
    """Rules, and the modules of a loaded model that they act on.

    Args:
        model: as SGLang loaded it.
        rules: of one kind of forward.

    Raises:
        HostContractError: if a rule finds no module to act on, or more experts are asked for than a router gives.
    """

    def __init__(self, model: torch.nn.Module, rules: LayerRules) -> None:
        self._rules = rules
        # of dense networks; experts have theirs between the two products of a fused function (`_in_experts`)
        self._activations = [module for module in model.modules() if isinstance(module, SiluAndMul)]
        self._routers = [module for module in model.modules() if isinstance(module, TopK)]
        if rules.ffn_threshold > 0 and not self._activations and not self._routers:
            raise HostContractError(f"{type(model).__name__} has no SiluAndMul whose channels could be dropped")
        if (rules.num_experts > 0 or rules.expert_thresholds) and not self._routers:
            raise HostContractError(f"{type(model).__name__} has no TopK that chooses experts")
        fewest = min((_routed(router) for router in self._routers), default=0)
        if max(rules.num_experts, len(rules.expert_thresholds) + 1) > fewest > 0:
            raise HostContractError(f"a router of {type(model).__name__} chooses {fewest} experts: too few for {rules}")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Everything that the model computes inside follows the rules."""
        handles: list[RemovableHandle] = []
        changed: list[tuple[Any, int]] = []
        inside = contextlib.ExitStack()
        try:
            if self._rules.ffn_threshold > 0:
                handles += [module.register_forward_hook(self._drop) for module in self._activations]
                if self._routers:
                    inside.enter_context(_in_experts(self._rules.ffn_threshold))
            if self._rules.expert_thresholds:
                handles += [module.register_forward_hook(self._skip) for module in self._routers]
            if self._rules.num_experts > 0:
                for router in self._routers:
                    config = router.topk_config
                    changed.append((config, config.top_k))
                    # kernels of experts take their number from the width of what the router returns
                    config.top_k = self._rules.num_experts + config.num_fused_shared_experts
            yield
        finally:
            inside.close()
            for config, top_k in changed:
                config.top_k = top_k
            for handle in handles:
                handle.remove()

    def _drop(self, module: torch.nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        return drop_channels(hidden, self._rules.ffn_threshold)

    def _skip(self, module: torch.nn.Module, args: Any, chosen: Any) -> StandardTopKOutput:
        if not isinstance(chosen, StandardTopKOutput):
            raise HostContractError(f"{type(chosen).__name__} does not say which experts a token visits")
        num_shared = int(module.topk_config.num_fused_shared_experts)  # type: ignore[arg-type,union-attr]
        return skip_experts(chosen, self._rules.expert_thresholds, num_shared)


@contextmanager
def _in_experts(threshold: float) -> Iterator[None]:
    """Small channels between the two products of SGLang's experts count as 0, on a CPU and in its Triton runner.

    Both look the activation up in their module when they run: a class that is made per call, and a function that writes
    into what it is given. Another runner is refused at start (adapter/support.py).
    """

    class DroppingSiluAndMul(SiluAndMul):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return drop_channels(super().forward(*args, **kwargs), threshold)

    swapped: list[tuple[Any, str, Any]] = [(fused_moe_native, "SiluAndMul", DroppingSiluAndMul)]
    if hasattr(fused_moe, "silu_and_mul"):
        multiply = fused_moe.silu_and_mul

        def multiply_and_drop(gate_up: torch.Tensor, out: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            multiply(gate_up, out, *args, **kwargs)
            out.masked_fill_(out.abs() < threshold, 0)

        swapped.append((fused_moe, "silu_and_mul", multiply_and_drop))
    originals = [getattr(module, name) for module, name, _ in swapped]
    for module, name, replacement in swapped:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(swapped, originals, strict=True):
            setattr(module, name, original)


def _routed(router: TopK) -> int:
    """Experts of a token that its router chooses: shared ones are not for choice."""
    return int(router.topk_config.top_k) - int(router.topk_config.num_fused_shared_experts)


def skip_experts(chosen: StandardTopKOutput, thresholds: tuple[float, ...], num_shared: int = 0) -> StandardTopKOutput:
    """A router's choice without the experts that `skipped_experts` names, in the same shape.

    A skipped expert has weight 0. On a GPU its place in the list goes to the token's heaviest expert, whose weights are
    read anyway; SGLang's kernels have no mark for "nobody" where all experts are on one rank (an id of -1 is looked at
    with expert parallelism only, and read out of bounds otherwise). SGLang's path on a CPU counts a token once per
    expert, so that an id that stands there twice mixes tokens up: there ids stay, and nothing is saved.

    Args:
        chosen: topk_weights and topk_ids, [num_tokens, top_k].
        thresholds: beta_1 .. beta_m.
        num_shared: columns at the end that hold shared experts, which every token visits: they stay, and count in no
            ratio.
    """
    num_routed = chosen.topk_ids.shape[1] - num_shared
    weights, ids = chosen.topk_weights[:, :num_routed], chosen.topk_ids[:, :num_routed]
    skipped = skipped_experts(weights, thresholds)
    if ids.device.type != "cpu":
        ids = reading_no_others(ids, weights, skipped)
    kept = torch.cat([without_skipped(weights, skipped), chosen.topk_weights[:, num_routed:]], dim=1)
    return chosen._replace(topk_weights=kept, topk_ids=torch.cat([ids, chosen.topk_ids[:, num_routed:]], dim=1))


def reading_no_others(ids: torch.Tensor, weights: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """Expert ids, [num_tokens, top_k], with each token's heaviest expert in the place of those that are skipped."""
    heaviest = ids.gather(1, weights.argmax(dim=1, keepdim=True))
    return torch.where(skipped, heaviest, ids)
