"""Drawing and accepting by kernels equals the torch way, coin for coin. Here, so that the interpreter runs it too."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.speculation import chunked, from_logits
from sglang_sparsespec.speculation.distribution import SamplingRule

if TYPE_CHECKING:
    from sglang_sparsespec.speculation.acceptance import Acceptance

TOP_K_ALL = 1 << 30
NUM_REQS = 16
FILTERS = {
    "top_k": {"need_top_k": True},
    "top_k, top_p": {"need_top_k": True, "need_top_p": True},
    "all": {"need_top_k": True, "need_top_p": True, "need_min_p": True, "filter_order": "sequential"},
}
SHAPES = [(4, 97), (0, 97), (2, 1), (2, 7), (3, 600)]


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter tensors lie on the CPU, where the public functions take the reference."""
    if "backend" not in request.fixturenames or request.getfixturevalue("backend") != "triton":
        return
    from sglang_sparsespec.ops.row_stats.triton_impl import row_stats_triton, token_probs_triton
    from sglang_sparsespec.ops.sample_rows.triton_impl import sample_rows_triton

    def stats(logits: torch.Tensor, temperatures: torch.Tensor, **options: torch.Tensor | None) -> object:
        return row_stats_triton(logits, temperatures, options.get("steps"), options.get("floors"), block=512)

    def probs(*args: torch.Tensor, is_greedy: torch.Tensor | None) -> torch.Tensor:
        return token_probs_triton(*args, is_greedy)  # type: ignore[arg-type]

    monkeypatch.setattr(from_logits, "row_stats", stats)
    monkeypatch.setattr(from_logits, "token_probs", probs)
    monkeypatch.setattr(from_logits, "sample_rows", functools.partial(sample_rows_triton, block=512))


class Round:
    """Logits of a target with masked tokens and of drafts near it; coins; every fourth request greedy, or none."""

    def __init__(self, num_steps: int, vocab_size: int, dtype: torch.dtype, *, has_greedy: bool = True) -> None:
        generator = torch.Generator().manual_seed(41)
        target = torch.randn(NUM_REQS, num_steps + 1, vocab_size, generator=generator) * 2
        noise = torch.randn(NUM_REQS, num_steps, vocab_size, generator=generator)
        self.draft_logits = (target[:, :num_steps] + 0.7 * noise).to(dtype)
        # equal distributions, in which nothing can be rejected and no residual is left
        self.draft_logits[7] = target[7, :num_steps].to(dtype)
        if vocab_size > 1:
            target[9, :, ::2] = -torch.inf
        self.target_logits = target.to(dtype)
        self.draw_coins = torch.rand(NUM_REQS, num_steps, generator=generator, dtype=torch.float64)
        self.coins = torch.rand(NUM_REQS, num_steps, generator=generator, dtype=torch.float64)
        self.final_coins = torch.rand(NUM_REQS, generator=generator, dtype=torch.float64)
        top_ks = torch.full((NUM_REQS,), TOP_K_ALL, dtype=torch.int32)
        if has_greedy:
            top_ks[::4] = 1
        self.rule = SamplingRule(
            temperatures=torch.linspace(0.3, 1.2, NUM_REQS).unsqueeze(1),
            top_ks=top_ks,
            top_ps=torch.ones(NUM_REQS),
            min_ps=torch.zeros(NUM_REQS),
            need_top_k=False,
            need_top_p=False,
            need_min_p=False,
            has_greedy=has_greedy,
        )

    def drawn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and q of them, [num_reqs, num_steps], by torch on the CPU."""
        steps = [
            chunked.draw(self.draft_logits[:, step], self.rule, self.draw_coins[:, step])
            for step in range(self.draft_logits.shape[1])
        ]
        if not steps:
            return torch.zeros(NUM_REQS, 0, dtype=torch.int64), torch.zeros(NUM_REQS, 0)
        return torch.stack([tokens for tokens, _ in steps], 1), torch.stack([probs for _, probs in steps], 1)

    def rule_on(self, device: torch.device) -> SamplingRule:
        return self.rule._each(lambda values: values.to(device))


def assert_equal(actual: Acceptance, expected: Acceptance) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("has_greedy", [False, True], ids=["sampled", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_draws_equal_those_from_distributions(
    backend: str, device: torch.device, dtype: torch.dtype, has_greedy: bool
) -> None:
    """A greedy request that is sampled, or a step's rows read by the stride of another, would pass tests of the ops."""
    for num_steps, vocab_size in ((1, 1), (1, 7), (2, 600)):
        case = Round(num_steps, vocab_size, dtype, has_greedy=has_greedy)
        tokens, probs = case.drawn()
        on_device = case.draft_logits.to(device)
        for step in range(num_steps):
            coins = case.draw_coins[:, step].to(device)
            actual, q = from_logits.draw(on_device[:, step], case.rule_on(device), coins)
            assert actual.dtype == torch.int64
            assert torch.equal(actual.cpu(), tokens[:, step])
            torch.testing.assert_close(q.cpu(), probs[:, step], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("filters", FILTERS)
def test_floors_keep_what_the_filters_keep(backend: str, device: torch.device, filters: str) -> None:
    """A floor one rank off, of another request, or that forgets a tie would sample what the host would not, or less."""
    case = Round(3, 97, torch.bfloat16)
    for logits in (case.target_logits, case.draft_logits):
        # ties, at the floors too
        logits[10:16] = logits[10:16].round()
    top_ks = torch.where(case.rule.top_ks == 1, 1, torch.arange(NUM_REQS) % 11 + 2).to(torch.int32)
    case.rule = dataclasses.replace(
        case.rule,
        top_ks=top_ks,
        top_ps=torch.linspace(0.3, 1.0, NUM_REQS),
        min_ps=torch.linspace(0.3, 0.0, NUM_REQS),
        ties="all",
        max_top_k=int(top_ks.max()),
        **FILTERS[filters],
    )
    assert case.rule.has_floors
    q = case.rule.probs(case.draft_logits)
    num_kept = (q > 0).sum(dim=2)
    # a tie at a floor, and more than top-k at work
    assert (num_kept[10:16] > top_ks[10:16, None]).any() or filters == "all"
    assert (num_kept < top_ks[:, None]).any() == (filters != "top_k")
    tokens, probs = case.drawn()
    for step in range(3):
        coins = case.draw_coins[:, step].to(device)
        ours, ours_q = from_logits.draw(case.draft_logits[:, step].to(device), case.rule_on(device), coins)
        assert torch.equal(ours.cpu(), tokens[:, step])
        torch.testing.assert_close(ours_q.cpu(), probs[:, step], rtol=2e-5, atol=1e-9)
    # a chain that gets far: filters make the two differ more
    case.coins *= 0.2
    for kept in ((probs, case.draft_logits), (None, None)):
        expected = chunked.accept(tokens, case.target_logits, case.rule, case.coins, case.final_coins, *kept)
        assert {1, 4} < set(expected.accept_lens.tolist()), "stops at the start and later, and none at all"
        moved = [None if tensor is None else tensor.to(device) for tensor in kept]
        actual = from_logits.accept(
            tokens.to(device),
            case.target_logits.to(device),
            case.rule_on(device),
            case.coins.to(device),
            case.final_coins.to(device),
            *moved,
        )
        assert_equal(actual, expected)


@pytest.mark.parametrize("is_limited", [False, True], ids=["all", "limited"])
@pytest.mark.parametrize("are_sampled", [True, False], ids=["sampled", "chosen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_steps", "vocab_size"), SHAPES)
def test_acceptance_equals_that_between_distributions(
    backend: str,
    device: torch.device,
    num_steps: int,
    vocab_size: int,
    dtype: torch.dtype,
    are_sampled: bool,
    is_limited: bool,
) -> None:
    """The row where a request stopped, its q, or the rule after the last draft could be another's; a draft that a limit
    keeps out was not rejected, so its q must not be taken off."""
    case = Round(num_steps, vocab_size, dtype)
    tokens, probs = case.drawn()
    if not are_sampled:
        tokens = case.draft_logits.argmax(dim=-1)
        # else the chain seldom gets far: a chosen draft stands with probability p
        case.coins *= 0.2
    kept = (probs, case.draft_logits) if are_sampled else (None, None)
    limits = torch.arange(NUM_REQS) * 5 % (num_steps + 2) if is_limited else None
    expected = chunked.accept(tokens, case.target_logits, case.rule, case.coins, case.final_coins, *kept, limits)
    if vocab_size > 7 and num_steps > 1 and not is_limited:
        assert {1, num_steps + 1} < set(expected.accept_lens.tolist()), "stops at the start and later, and none at all"
    moved = [None if tensor is None else tensor.to(device) for tensor in kept]
    actual = from_logits.accept(
        tokens.to(device),
        case.target_logits.to(device),
        case.rule_on(device),
        case.coins.to(device),
        case.final_coins.to(device),
        *moved,
        None if limits is None else limits.to(device),
    )
    assert_equal(actual, expected)


def test_no_requests(backend: str, device: torch.device) -> None:
    """A launch over an empty grid fails."""
    empty = Round(3, 9, torch.float32).rule_on(device).of(slice(0, 0))
    coins = torch.zeros(0, 3, dtype=torch.float64, device=device)
    logits, tokens = torch.zeros(0, 4, 9, device=device), torch.zeros(0, 3, dtype=torch.int64, device=device)
    result = from_logits.accept(tokens, logits, empty, coins, coins[:, 0], coins.float(), logits[:, :3])
    assert result.accept_tokens.shape == (0, 4)
    assert from_logits.draw(logits[:, 0], empty, coins[:, 0])[0].shape == (0,)


def test_sorting_filters_and_the_cpu_keep_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a filter that went to the kernels would sample tokens that the filter drops."""
    case = Round(2, 9, torch.float32)

    class OnGpu(torch.Tensor):
        is_cuda = True

    seen = []
    monkeypatch.setattr(from_logits, "draw", lambda *args: seen.append("draw"))
    monkeypatch.setattr(from_logits, "accept", lambda *args: seen.append("accept"))
    tokens, probs = case.drawn()
    rest = (case.coins, case.final_coins, probs, case.draft_logits)
    chunked.accept(tokens, case.target_logits, case.rule, *rest)
    assert seen == []
    on_gpu = case.target_logits.as_subclass(OnGpu)
    for need in ("need_top_k", "need_top_p", "need_min_p"):
        rule = dataclasses.replace(case.rule, **{need: True})
        chunked.draw(on_gpu[:, 0], rule, case.final_coins)
        chunked.accept(tokens, on_gpu, rule, *rest)
    assert seen == []
    chunked.draw(on_gpu[:, 0], case.rule, case.final_coins)
    chunked.accept(tokens, on_gpu, case.rule, *rest)
    assert seen == ["draw", "accept"]
    bounded = dataclasses.replace(case.rule, need_top_k=True, max_top_k=5)
    chunked.draw(on_gpu[:, 0], bounded, case.final_coins)
    assert seen == ["draw", "accept"], "the lowest ids among ties are no floor"
    chunked.draw(on_gpu[:, 0], dataclasses.replace(bounded, ties="all"), case.final_coins)
    assert seen == ["draw", "accept", "draw"]
