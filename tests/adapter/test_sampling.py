"""The round's sampler on a host batch: what it keeps of drafts, when it widens logits, and what comes out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from sglang_sparsespec.adapter.sampling import Drafts, RoundSampler

pytestmark = pytest.mark.adapter

TOP_K_ALL = 1 << 30
VOCAB, NUM_STEPS = 8, 3


def batch_of(
    num_reqs: int,
    *,
    top_k: int | list[int] = TOP_K_ALL,
    top_p: float = 1.0,
    temperature: float = 0.9,
    bias: torch.Tensor | None = None,
) -> Any:
    """The part of a ScheduleBatch that samples; top_k 1 is how the host marks a greedy request."""
    top_ks = top_k if isinstance(top_k, list) else [top_k] * num_reqs
    info = SimpleNamespace(
        temperatures=torch.full((num_reqs, 1), temperature),
        top_ks=torch.tensor(top_ks, dtype=torch.int32),
        top_ps=torch.full((num_reqs,), top_p),
        min_ps=torch.zeros(num_reqs),
        is_all_greedy=all(k <= 1 for k in top_ks),
        is_any_greedy=any(k <= 1 for k in top_ks),
        need_top_k_sampling=any(k != TOP_K_ALL for k in top_ks),
        need_top_p_sampling=top_p != 1.0,
        need_min_p_sampling=False,
        logit_bias=bias,
    )
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(top_k=k)) for k in top_ks]
    return SimpleNamespace(sampling_info=info, reqs=reqs)


def sampler_of(draft_sampling: str = "sampled") -> RoundSampler:
    return RoundSampler(draft_sampling=draft_sampling, sampling_backend="pytorch", seed=5, device="cpu")


@pytest.mark.parametrize(
    ("top_k", "bound"),
    [([20, 1, 50], 50), ([1024, 3], 1024), ([1025, 3], None), ([20, TOP_K_ALL], None), ([1, 1], 1)],
)
def test_the_host_bounds_top_k_where_every_request_has_one(top_k: list[int], bound: int | None) -> None:
    """A bound below one request's top_k would cut its distribution; none at all sorts the vocabulary each step."""
    assert sampler_of().rule(batch_of(len(top_k), top_k=top_k)).max_top_k == bound


@pytest.mark.parametrize(
    ("top_k", "is_filtered"), [([TOP_K_ALL, 1], False), ([1, 1], False), ([TOP_K_ALL, 2, 1], True), ([40, 40], True)]
)
def test_a_greedy_request_is_no_filter(top_k: list[int], is_filtered: bool) -> None:
    """One request at temperature 0 would send a sampled batch through a sort of every vocabulary row."""
    batch = batch_of(len(top_k), top_k=top_k)
    assert batch.sampling_info.need_top_k_sampling
    rule = sampler_of().rule(batch)
    assert rule.is_filtered == is_filtered
    logits = torch.randn(len(top_k), VOCAB)
    probs = rule.probs(logits)
    for row, k in enumerate(top_k):
        assert (probs[row] > 0).sum() == min(k, VOCAB)
    if 1 in top_k:
        assert probs[top_k.index(1)].argmax() == logits[top_k.index(1)].argmax()


@pytest.mark.parametrize(("draft_sampling", "top_k"), [("sampled", 1), ("greedy", TOP_K_ALL)])
@pytest.mark.parametrize("is_biased", [False, True])
def test_argmax_drafts_keep_nothing(draft_sampling: str, top_k: int, is_biased: bool) -> None:
    """Logits that nobody reads would be kept for every greedy batch: batch x k x vocabulary."""
    sampler, drafts = sampler_of(draft_sampling), Drafts(2, 1, "cpu")
    # only in float32 does the bias decide: 8 and 8.01 are one number in bfloat16
    logits = torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    logits[:, 3] = logits[:, 5] = 8.0
    bias = torch.zeros(2, VOCAB)
    bias[:, 5] = 0.01
    batch = batch_of(2, top_k=top_k, bias=bias if is_biased else None)
    tokens = sampler.draft(0, logits, drafts, batch.sampling_info, sampler.rule(batch), None, torch.zeros(2).long())
    assert tokens.tolist() == ([5, 5] if is_biased else [3, 3])
    assert drafts.tokens[:, 0].tolist() == tokens.tolist()
    assert drafts.logits is None
    assert drafts.probs is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_biased", [False, True])
def test_sampled_drafts_come_from_the_logits_that_are_kept(dtype: torch.dtype, is_biased: bool) -> None:
    """Drafts from unrounded logits would be judged by another q than theirs: a bias too small to see in any output."""
    num_reqs = 50
    bias = torch.randn(num_reqs, VOCAB) * 3 if is_biased else None
    batch = batch_of(num_reqs, top_k=5, bias=bias)
    sampler, drafts = sampler_of(), Drafts(num_reqs, NUM_STEPS, "cpu")
    rule = sampler.rule(batch)
    current = torch.zeros(num_reqs, dtype=torch.int64)
    for step in range(NUM_STEPS):
        logits = (torch.randn(num_reqs, VOCAB) * 2).to(dtype)
        before = logits.clone()
        current = sampler.draft(step, logits, drafts, batch.sampling_info, rule, None, current)
        kept = before if bias is None else (before.float() + bias).to(dtype)
        assert drafts.logits is not None
        assert drafts.probs is not None
        assert drafts.logits.dtype == dtype
        assert torch.equal(drafts.logits[:, step], kept)
        q = rule.probs(kept)
        assert torch.equal(drafts.probs[:, step], q.gather(1, current[:, None]).squeeze(1))
        assert (drafts.probs[:, step] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_verify_logits_are_widened_only_to_be_changed(dtype: torch.dtype) -> None:
    """Widening always would bring the second copy back; adding a bias to narrow logits would round the target's."""
    logits = (torch.randn(2 * (NUM_STEPS + 1), VOCAB) * 8).to(dtype)
    chain = torch.zeros(2, NUM_STEPS + 1, dtype=torch.int64)
    sampler = sampler_of()
    assert sampler.adjust(logits, batch_of(2).sampling_info, chain, None, None) is logits
    bias = torch.randn(2, VOCAB)
    expected = logits.float() + bias.repeat_interleave(NUM_STEPS + 1, dim=0)
    actual = sampler.adjust(logits.clone(), batch_of(2, bias=bias).sampling_info, chain, None, None)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def first_two_tokens(batch: Any, target: torch.Tensor, draft: torch.Tensor, *, keeps: str) -> torch.Tensor:
    """Two tokens of each request, [num_reqs, 2], from rounds of a bigram model after token 0.

    `target` and `draft` are [vocab, vocab] logits of the token after each; `keeps` names what the sampler is shown of
    the drafts when it accepts: "drafts" as they are, or a planted mistake.
    """
    num_reqs = len(batch.reqs)
    sampler = sampler_of()
    rule = sampler.rule(batch)
    tokens = torch.zeros(num_reqs, 2 * NUM_STEPS + 6, dtype=torch.int64)
    lens = torch.ones(num_reqs, dtype=torch.int64)
    while lens.min() <= 2:
        current = tokens.gather(1, lens[:, None] - 1).squeeze(1)
        drafts = Drafts(num_reqs, NUM_STEPS, "cpu")
        chain = [current]
        for step in range(NUM_STEPS):
            token = sampler.draft(step, draft[chain[-1]], drafts, batch.sampling_info, rule, None, chain[-1])
            chain.append(token)
        contexts = torch.stack(chain, dim=1)
        logits = sampler.adjust(target[contexts].flatten(0, 1), batch.sampling_info, contexts, None, None)
        assert drafts.logits is not None
        if keeps == "another step's logits":
            drafts.logits = drafts.logits.roll(1, dims=1)
        if keeps == "the target's logits":
            drafts.logits = target[contexts[:, :-1]]
        result = sampler.accept(logits, drafts, batch.sampling_info, rule)
        is_live = lens <= 2
        columns = lens[:, None] + torch.arange(NUM_STEPS + 1)
        columns = torch.where(is_live[:, None], columns, tokens.shape[1] - 1).clamp(max=tokens.shape[1] - 1)
        tokens.scatter_(1, columns, result.accept_tokens)
        lens += torch.where(is_live, result.accept_lens.long(), 0)
    return tokens[:, 1:3]


def pvalue(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square of pairs of tokens against `probs`, [vocab, vocab]; 0 if an impossible pair came out."""
    counts = torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2).double()
    joint = (probs[0].double()[:, None] * probs.double()).flatten()
    expected = joint / joint.sum() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(stats.chisquare(counts.numpy(), expected.numpy(), sum_check=False).pvalue)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_k": 6, "top_p": 0.8}], ids=["none", "top_k", "both"])
@pytest.mark.parametrize("is_biased", [False, True], ids=["plain", "biased"])
def test_bfloat16_rounds_keep_the_targets_distribution(filters: dict[str, Any], is_biased: bool) -> None:
    """Logits kept narrow, q computed again, p in chunks: any of them wrong moves sampled output, and nothing else."""
    num_reqs = 8_000
    generator = torch.Generator().manual_seed(31)
    target = (torch.randn(VOCAB, VOCAB, generator=generator) * 1.5).bfloat16()
    draft = (target + torch.randn(VOCAB, VOCAB, generator=generator)).bfloat16()
    bias = torch.randn(VOCAB, generator=generator) if is_biased else torch.zeros(VOCAB)
    batch = batch_of(num_reqs, **filters, bias=bias.expand(num_reqs, -1) if is_biased else None)
    one_each = batch_of(VOCAB, **filters)
    probs = sampler_of().rule(one_each).probs(target.float() + bias)
    assert pvalue(first_two_tokens(batch, target, draft, keeps="drafts"), probs) > 1e-6
    for mistake in ("another step's logits", "the target's logits"):
        assert pvalue(first_two_tokens(batch, target, draft, keeps=mistake), probs) < 1e-6, mistake
