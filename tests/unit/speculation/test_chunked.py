"""Drafts and acceptance from logits: equal to acceptance between whole distributions, in a fraction of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_sparsespec.speculation import chunked, distribution
from sglang_sparsespec.speculation.acceptance import accept_chain
from sglang_sparsespec.speculation.distribution import SamplingRule

TOP_K_ALL = 1 << 30
NUM_REQS, NUM_STEPS, VOCAB = 96, 4, 97

FILTERS = {
    "none": {},
    "top_k": {"top_k": 7},
    "top_k, bounded": {"top_k": 7, "max_top_k": 7},
    "all": {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
    "all, as flashinfer": {"top_k": 9, "top_p": 0.8, "min_p": 0.02, "filter_order": "sequential", "ties": "all"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rule_of(num_reqs: int, *, top_k: int = TOP_K_ALL, top_p: float = 1.0, min_p: float = 0.0, **options: Any) -> Any:
    """Every request with a temperature of its own, every fourth greedy."""
    top_ks = torch.full((num_reqs,), top_k, dtype=torch.int32)
    top_ks[::4] = 1
    return SamplingRule(
        temperatures=torch.linspace(0.3, 1.2, num_reqs).unsqueeze(1),
        top_ks=top_ks,
        top_ps=torch.full((num_reqs,), top_p),
        min_ps=torch.full((num_reqs,), min_p),
        need_top_k=top_k != TOP_K_ALL,
        need_top_p=top_p != 1.0,
        need_min_p=min_p > 0,
        **options,
    )


def logits_of(num_reqs: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a target and of a draft that is close to it."""
    generator = torch.Generator().manual_seed(21)
    target = torch.randn(num_reqs, NUM_STEPS + 1, vocab_size, generator=generator) * 2
    noise = torch.randn(num_reqs, NUM_STEPS, vocab_size, generator=generator)
    return target.to(dtype), (target[:, :NUM_STEPS] + 0.5 * noise).to(dtype)


def drawn(draft_logits: torch.Tensor, rule: SamplingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and q of them, both [num_reqs, num_steps]."""
    generator = torch.Generator().manual_seed(22)
    coins = torch.rand(draft_logits.shape[:2], generator=generator, dtype=torch.float64)
    steps = [chunked.draw(draft_logits[:, step], rule, coins[:, step]) for step in range(NUM_STEPS)]
    tokens, probs = zip(*steps, strict=True)
    return torch.stack(tokens, dim=1), torch.stack(probs, dim=1)


def coins_of(num_reqs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(23)
    return torch.rand(num_reqs, NUM_STEPS, generator=generator), torch.rand(num_reqs, generator=generator)


@pytest.mark.parametrize("are_sampled", [True, False], ids=["sampled", "chosen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS)
def test_accept_equals_the_chain_rule_between_whole_distributions(
    monkeypatch: pytest.MonkeyPatch, filters: str, dtype: torch.dtype, are_sampled: bool
) -> None:
    """Without it, q could be recomputed for another step, request or rule than the draft was sampled by."""
    target_logits, draft_logits = logits_of(NUM_REQS, VOCAB, dtype)
    rule = rule_of(NUM_REQS, **FILTERS[filters])
    tokens, probs = drawn(draft_logits, rule)
    p, q = rule.probs(target_logits), rule.probs(draft_logits)
    assert torch.equal(probs, q.gather(2, tokens.unsqueeze(2)).squeeze(2))
    if not are_sampled:
        tokens = draft_logits.argmax(dim=-1)
    coins, final_coins = coins_of(NUM_REQS)
    expected = accept_chain(tokens, p, coins, final_coins, q if are_sampled else None)
    assert len(set(expected.accept_lens.tolist())) == NUM_STEPS + 1, "every stop, and none at all"
    kept = (probs, draft_logits) if are_sampled else ()
    for reqs_per_chunk in (1, 7, NUM_REQS):
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", reqs_per_chunk * (NUM_STEPS + 1) * VOCAB)
        actual = chunked.accept(tokens, target_logits, rule, coins, final_coins, *kept)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("filters", FILTERS)
def test_draw_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, filters: str) -> None:
    """Without it, requests after the first chunk could draw by another request's rule or coin."""
    _, draft_logits = logits_of(NUM_REQS, VOCAB, torch.bfloat16)
    rule = rule_of(NUM_REQS, **FILTERS[filters])
    whole = drawn(draft_logits, rule)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5 * VOCAB)
    for ours, theirs in zip(drawn(draft_logits, rule), whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_requests_of_a_mixed_batch_follow_the_argmax(dtype: torch.dtype) -> None:
    """Without it, temperature 0 would depend on who else is in the batch, ties of narrow logits above all."""
    target_logits, draft_logits = (logits.round() for logits in logits_of(NUM_REQS, VOCAB, dtype))
    best = target_logits.float().argmax(dim=-1)
    assert (target_logits == target_logits.amax(dim=-1, keepdim=True)).sum() > best.numel(), "nothing is tied"
    assert torch.equal(target_logits.argmax(dim=-1), best)
    rule = rule_of(NUM_REQS)
    tokens, probs = drawn(draft_logits, rule)
    result = chunked.accept(tokens, target_logits, rule, *coins_of(NUM_REQS), probs, draft_logits)
    for row in range(0, NUM_REQS, 4):
        num_accepted = int(result.accept_lens[row])
        assert result.accept_tokens[row, :num_accepted].tolist() == best[row, :num_accepted].tolist()
        if num_accepted <= NUM_STEPS:
            assert tokens[row, num_accepted - 1] != best[row, num_accepted - 1]


def test_inputs_are_left_alone() -> None:
    """Without it, a chunk's filters could write through a view into the logits that logprobs are read from."""
    target_logits, draft_logits = logits_of(NUM_REQS, VOCAB, torch.float32)
    before = target_logits.clone(), draft_logits.clone()
    rule = rule_of(NUM_REQS, top_k=5, top_p=0.7, min_p=0.1)
    tokens, probs = drawn(draft_logits, rule)
    chunked.accept(tokens, target_logits, rule, *coins_of(NUM_REQS), probs, draft_logits)
    assert torch.equal(target_logits, before[0])
    assert torch.equal(draft_logits, before[1])


class _Watcher(TorchDispatchMode):
    """The largest tensor that any operation made, in elements and in bytes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.numel())
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("filters", FILTERS)
def test_nothing_larger_than_a_chunk_is_made(monkeypatch: pytest.MonkeyPatch, filters: str) -> None:
    """Without it, one widened copy of all logits would take 700 MB at batch 128, and only a full GPU show it."""
    num_reqs, vocab_size = 40, 2_000
    target_logits, draft_logits = logits_of(num_reqs, vocab_size, torch.bfloat16)
    rule = rule_of(num_reqs, **FILTERS[filters])
    chunk = 4 * (NUM_STEPS + 1) * vocab_size
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(distribution, "_CHUNK_ELEMENTS", chunk // 2)
    with _Watcher() as watcher:
        tokens, probs = drawn(draft_logits, rule)
        chunked.accept(tokens, target_logits, rule, *coins_of(num_reqs), probs, draft_logits)
    assert chunk // 2 <= watcher.elements <= chunk
    assert watcher.bytes <= 4 * chunk


def test_the_watcher_sees_whole_distributions() -> None:
    """Power: without it, the bound above could hold because the watcher looks away."""
    target_logits, draft_logits = logits_of(40, 2_000, torch.bfloat16)
    rule = rule_of(40)
    tokens = draft_logits.argmax(dim=-1)
    with _Watcher() as watcher:
        accept_chain(tokens, rule.probs(target_logits), *coins_of(40), None)
    assert watcher.elements == target_logits.numel()
    assert watcher.bytes == 4 * target_logits.numel()
