"""Channels and experts left out of SGLang's own modules: exactly the rules, and in the forwards that ask alone."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import HostContractError
from sglang_sparsespec.sparsity.experts import skipped_experts, smaller_top_k, without_skipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_context")]

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 4, 16, 12


@pytest.fixture
def _context(server_args: Callable[..., Any]) -> Iterator[None]:
    from sglang.srt import runtime_context

    runtime_context.publish(server_args(), role="test")
    yield
    runtime_context.reset_context()


class Block(torch.nn.Module):
    """A dense network and a mixture of experts, of the modules and functions that SGLang's models use on a CPU."""

    def __init__(self, renormalize: bool = True) -> None:
        from sglang.srt.layers.activation import SiluAndMul
        from sglang.srt.layers.moe.topk import TopK

        super().__init__()
        self.gate_up = torch.nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.act_fn = SiluAndMul()
        self.down = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.router = torch.nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.topk = TopK(top_k=TOP_K, renormalize=renormalize)
        self.experts = SimpleNamespace(
            num_experts=NUM_EXPERTS,
            w13_weight=torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN),
            w2_weight=torch.randn(NUM_EXPERTS, HIDDEN, WIDTH),
        )

    def mixture(self, x: torch.Tensor, chosen: Any) -> torch.Tensor:
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

        config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None)
        return moe_forward_native(self.experts, x, chosen, config)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.act_fn(self.gate_up(x)))
        return self.mixture(x, self.topk(x, self.router(x)))

    def weigh(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The mixture by one dense weight per expert, [num_tokens, num_experts]."""
        gate, up = torch.einsum("ti,eoi->teo", x, self.experts.w13_weight).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        return torch.einsum("teo,eio,te->ti", hidden, self.experts.w2_weight, weights)


def layers(model: torch.nn.Module, **rules: Any) -> Any:
    from sglang_sparsespec.adapter.sparse_layers import LayerRules, SparseLayers

    return SparseLayers(model, LayerRules(**rules))


def tokens() -> torch.Tensor:
    return 3 * torch.randn(40, HIDDEN)


@pytest.mark.parametrize(
    "rules", [{}, {"ffn_threshold": 1e-30}, {"num_experts": TOP_K}, {"expert_thresholds": (0.0,)}], ids=str
)
def test_rules_that_leave_nothing_out_change_no_bit(rules: dict[str, Any]) -> None:
    """A rule that rounds, or scales weights that sum to 1 already, would be lossy in a verify at any setting."""
    block, x = Block(), tokens()
    expected = block(x)
    with layers(block, **rules).applied():
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    "rules", [{"ffn_threshold": 1e9}, {"num_experts": 1}, {"expert_thresholds": (9.0, 9.0)}], ids=str
)
def test_outside_the_model_is_untouched(rules: dict[str, Any]) -> None:
    """A hook or a top-k that stays behind makes the next verify lossy without a word; so would a failed forward's."""
    block, x = Block(), tokens()
    expected = block(x)
    sparse = layers(block, **rules)
    for _ in range(2):
        with sparse.applied():
            assert not torch.equal(block(x), expected)
        assert torch.equal(block(x), expected)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), sparse.applied():
        block(x[:, :3])
    assert torch.equal(block(x), expected)
    assert not block.act_fn._forward_hooks
    assert not block.topk._forward_hooks
    assert block.topk.topk_config.top_k == TOP_K


class Mixture(Block):
    """A mixture without a dense network before it."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixture(x, self.topk(x, self.router(x)))


def test_small_channels_of_experts_are_dropped() -> None:
    """Between the products of each expert of a token, by its own gate; and nothing stays behind."""
    from sglang.srt.layers.moe import fused_moe_native

    block, x = Mixture(), tokens()
    activation = fused_moe_native.SiluAndMul
    chosen = block.topk(x, block.router(x))
    gate, up = torch.einsum("ti,eoi->teo", x, block.experts.w13_weight).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    threshold = hidden.abs().median().item()
    weights = torch.zeros(len(x), NUM_EXPERTS).scatter_(1, chosen.topk_ids.long(), chosen.topk_weights)
    kept = torch.where(hidden.abs() < threshold, 0.0, hidden)
    expected = torch.einsum("teo,eio,te->ti", kept, block.experts.w2_weight, weights)
    before = block(x)
    with layers(block, ffn_threshold=threshold).applied():
        found = block(x)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(found, before, atol=0.1)
    assert torch.equal(block(x), before)
    assert fused_moe_native.SiluAndMul is activation


def test_small_channels_are_dropped_in_the_host_s_triton_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the activation is a function of SGLang's module, which writes into a buffer; here it is put there."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor, expert_ids: Any = None) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    monkeypatch.setattr(fused_moe, "silu_and_mul", silu_and_mul, raising=False)
    gate_up, dense, found = torch.randn(30, 2 * WIDTH), torch.empty(30, WIDTH), torch.empty(30, WIDTH)
    silu_and_mul(gate_up, dense)
    with layers(Mixture(), ffn_threshold=0.1).applied():
        fused_moe.silu_and_mul(gate_up, found, expert_ids=None)
    assert torch.equal(found, torch.where(dense.abs() < 0.1, 0.0, dense))
    assert fused_moe.silu_and_mul is silu_and_mul
    source = inspect.getsource(fused_moe)
    assert source.count(" silu_and_mul(") >= 3, "SGLang calls another function: its channels would be kept"


def test_small_channels_are_dropped() -> None:
    """Channels of another place, signs that are mixed up, or the value just at the threshold."""
    block, gate_up = Block(), 2 * torch.randn(30, 2 * WIDTH)
    hidden = torch.nn.functional.silu(gate_up[:, :WIDTH]) * gate_up[:, WIDTH:]
    # exactly one of the values that occur
    threshold = hidden.abs().median().item()
    with layers(block, ffn_threshold=threshold).applied():
        found = block.act_fn(gate_up)
    assert torch.equal(found, torch.where(hidden.abs() < threshold, 0.0, hidden))
    assert torch.equal((found == 0).sum(), (hidden.abs() < threshold).sum())
    assert (found.abs() == threshold).any()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_fewer_experts_are_the_heaviest(num_experts: int, renormalize: bool) -> None:
    """The mixture of the rule in `sparsity`, as the router itself weighs it; and only that many are computed."""
    block, x = Block(renormalize), tokens()
    dense = block.router(x).softmax(-1)
    kept = dense.masked_fill(smaller_top_k(dense, num_experts), 0)
    expected = block.weigh(x, kept / kept.sum(1, keepdim=True) if renormalize else kept)
    with layers(block, num_experts=num_experts).applied():
        chosen = block.topk(x, block.router(x))
        assert chosen.topk_ids.shape == (len(x), num_experts)
        torch.testing.assert_close(block.mixture(x, chosen), expected, atol=1e-4, rtol=1e-4)


def test_light_experts_are_skipped() -> None:
    """The rule of `sparsity` on the mixture itself: some tokens skip none, some one, some two."""
    block, x, thresholds = Block(), tokens(), (0.1, 0.3)
    chosen = block.topk(x, block.router(x))
    skipped = skipped_experts(chosen.topk_weights, thresholds)
    assert set(skipped.sum(1).tolist()) == {0, 1, 2}
    weights = torch.zeros(len(x), NUM_EXPERTS)
    weights.scatter_(1, chosen.topk_ids.long(), without_skipped(chosen.topk_weights, skipped))
    with layers(block, expert_thresholds=thresholds).applied():
        found = block.mixture(x, block.topk(x, block.router(x)))
    torch.testing.assert_close(found, block.weigh(x, weights), atol=1e-4, rtol=1e-4)


def test_shared_experts_are_never_skipped() -> None:
    """Every token visits them, so SGLang puts them behind the chosen ones, often with a small weight: they would be the
    first to go."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    weights = torch.tensor([[0.6, 0.3, 0.1, 0.05], [0.4, 0.35, 0.35, 0.5]])
    ids = torch.tensor([[2, 5, 1, 8], [0, 3, 4, 8]], dtype=torch.int32)
    chosen = StandardTopKOutput(weights, ids, torch.empty(0))
    block = Block()
    config = block.topk.topk_config
    block.topk.forward = lambda *_: chosen
    for num_shared, skips in ((1, [[2], []]), (0, [[3], []])):
        config.num_fused_shared_experts = num_shared
        with layers(block, expert_thresholds=(0.2,)).applied():
            found = block.topk(None, None)
        assert [row.nonzero()[:, 0].tolist() for row in found.topk_weights == 0] == skips
        assert torch.equal(found.topk_ids, ids)
        torch.testing.assert_close(found.topk_weights[1], weights[1])
    # the routed ones grow to their own sum
    config.num_fused_shared_experts = 1
    with layers(block, expert_thresholds=(0.2,)).applied():
        found = block.topk(None, None)
    torch.testing.assert_close(found.topk_weights[0], torch.tensor([2 / 3, 1 / 3, 0.0, 0.05]))


def test_ids_on_a_gpu_name_no_further_expert() -> None:
    """An expert that only skipped places name would be read for nothing; one that is kept must not lose its place."""
    from sglang_sparsespec.adapter.sparse_layers import reading_no_others

    block, x = Block(), tokens()
    chosen = block.topk(x, block.router(x))
    skipped = skipped_experts(chosen.topk_weights, (0.1, 0.3))
    ids = reading_no_others(chosen.topk_ids, chosen.topk_weights, skipped)
    assert ids.dtype == chosen.topk_ids.dtype
    for before, after, weights, drop in zip(chosen.topk_ids, ids, chosen.topk_weights, skipped, strict=True):
        assert torch.equal(before[~drop], after[~drop])
        assert set(after.tolist()) == set(before[~drop].tolist())
        assert torch.equal(after[drop], before[weights.argmax()].expand(int(drop.sum())))
    # a token's places of one expert add up: what a kernel over (token, place) pairs computes stays the same
    weights = without_skipped(chosen.topk_weights, skipped)
    dense, other = (
        torch.zeros(len(x), NUM_EXPERTS).scatter_add_(1, which.long(), weights) for which in (chosen.topk_ids, ids)
    )
    assert torch.equal(dense, other)


@pytest.mark.parametrize(
    "rules",
    [{"ffn_threshold": 0.1}, {"num_experts": 1}, {"expert_thresholds": (0.5,)}],
    ids=str,
)
def test_rules_without_a_module_are_refused(rules: dict[str, Any]) -> None:
    """A model whose networks have another class would be served as if nothing had been asked for."""
    with pytest.raises(HostContractError, match="Linear has no"):
        layers(torch.nn.Linear(2, 2), **rules)


@pytest.mark.parametrize("rules", [{"num_experts": TOP_K + 1}, {"expert_thresholds": (0.5,) * TOP_K}], ids=str)
def test_more_experts_than_there_are(rules: dict[str, Any]) -> None:
    """A draft with more experts than the model has, or a token that is left with none."""
    with pytest.raises(HostContractError, match=f"chooses {TOP_K} experts"):
        layers(Block(), **rules)


def test_options_become_rules() -> None:
    """An option that is accepted and ignored."""
    from sglang_sparsespec.adapter.sparse_layers import LayerRules, draft_rules

    assert draft_rules(SparseSpecConfig()) == LayerRules()
    config = SparseSpecConfig(draft_ffn_threshold=0.5, draft_experts=3)
    assert draft_rules(config) == LayerRules(ffn_threshold=0.5, num_experts=3)
