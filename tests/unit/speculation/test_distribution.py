from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from sglang_sparsespec.speculation.distribution import sample, target_probs

TOP_K_ALL = 1 << 30
ALMOST_ONE = 1 - 2**-24


def _probs(logits: torch.Tensor, **options: Any) -> torch.Tensor:
    """target_probs with one temperature, top_k, top_p and min_p for all rows, or a list per row."""

    def column(value: float | list[float], dtype: torch.dtype) -> torch.Tensor:
        values = value if isinstance(value, list) else [value] * logits.shape[0]
        return torch.tensor(values, dtype=dtype)

    top_ks = column(options.pop("top_k", TOP_K_ALL), torch.int32)
    top_ps = column(options.pop("top_p", 1.0), torch.float32)
    min_ps = column(options.pop("min_p", 0.0), torch.float32)
    return target_probs(
        logits,
        temperatures=column(options.pop("temperature", 1.0), torch.float32).unsqueeze(1),
        top_ks=top_ks,
        top_ps=top_ps,
        min_ps=min_ps,
        need_top_k=bool((top_ks != TOP_K_ALL).any()),
        need_top_p=bool((top_ps != 1.0).any()),
        need_min_p=bool((min_ps > 0).any()),
        **options,
    )


def _naive(row: list[float], top_k: int, top_p: float, min_p: float, order: str, ties: str) -> list[float]:
    """One row by the definition, in Python floats."""
    ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
    kept = ranked[:top_k]
    if ties == "all":
        kept = [token for token in ranked if row[token] >= row[kept[-1]]]
    norm = sum(row[token] for token in kept) if order == "sequential" else 1.0
    above = 0.0
    prefix: list[int] = []
    for token in kept:
        if above / norm > top_p + 1e-7:
            if not (ties == "all" and row[token] == row[prefix[-1]]):
                break
        else:
            above += row[token]
        prefix.append(token)
    final = [token for token in prefix if row[token] >= row[ranked[0]] * min_p * (1 - 1e-6)]
    mass = sum(row[token] for token in final)
    return [row[token] / mass if token in final else 0.0 for token in range(len(row))]


FILTERS = [
    pytest.param(TOP_K_ALL, 1.0, 0.0, id="none"),
    pytest.param(3, 1.0, 0.0, id="top_k"),
    pytest.param(40, 1.0, 0.0, id="top_k above V"),
    pytest.param(TOP_K_ALL, 0.7, 0.0, id="top_p"),
    pytest.param(TOP_K_ALL, 1e-9, 0.0, id="top_p tiny"),
    pytest.param(TOP_K_ALL, 1.0, 0.2, id="min_p"),
    pytest.param(TOP_K_ALL, 1.0, 1.0, id="min_p 1"),
    pytest.param(5, 0.8, 0.0, id="top_k and top_p"),
    pytest.param(4, 0.6, 0.3, id="all"),
    pytest.param(2, 0.9, 0.05, id="all, narrow"),
]


@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("ties", ["first", "all"])
@pytest.mark.parametrize("bound", [False, True], ids=["sorted", "max_top_k"])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_target_probs_equals_the_definition(
    top_k: int, top_p: float, min_p: float, bound: bool, ties: str, order: str
) -> None:
    """Without it, a filter could keep one token too many, or normalise by the wrong mass."""
    torch.manual_seed(1)
    logits = torch.randn(64, 11) * 2
    logits[32:] = logits[32:].round()  # ties, at the boundary too
    # "all" in sequence is FlashInfer's renormalise-then-renormalise; only untied rows are promised for it
    rows = slice(0, 32) if (ties, order) == ("all", "sequential") else slice(0, 64)
    plain = torch.softmax(logits[rows] / 0.8, dim=-1)
    actual = _probs(
        logits[rows],
        temperature=0.8,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        filter_order=order,
        ties=ties,
        max_top_k=top_k if bound else None,
    )
    expected = torch.tensor([_naive(row, top_k, top_p, min_p, order, ties) for row in plain.tolist()])
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_orders_differ_where_top_k_and_top_p_interact() -> None:
    """Power: without it, filter_order could be ignored and the tests above still pass on tame rows."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    joint = _probs(logits, top_k=2, top_p=0.5)
    sequential = _probs(logits, top_k=2, top_p=0.5, filter_order="sequential")
    assert (joint > 0).tolist() == [[True, True, False, False]]
    assert (sequential > 0).tolist() == [[True, False, False, False]]


def test_ties_at_the_boundary_go_to_the_lowest_ids() -> None:
    """Without it, bfloat16 logits, which tie often, would keep other tokens than the host's stable sort."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]])
    for bound in (None, 4):
        kept = _probs(logits, top_k=4, max_top_k=bound) > 0
        assert kept.tolist() == [[True, True, False, True, False, True, False]]
    assert (_probs(logits, top_k=4, ties="all") > 0).all()


def test_greedy_rows_are_one_hot_at_the_first_argmax_whatever_the_others_do() -> None:
    """Without it, temperature 0 would not be deterministic in a batch with sampled rows, or pick another tied token."""
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).repeat(4, 1)
    expected = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for need in (True, False):
        probs = target_probs(
            logits,
            temperatures=torch.tensor([[1.0], [0.5], [1.0], [1.0]]),
            top_ks=torch.tensor([1, TOP_K_ALL, 0, 2], dtype=torch.int32),
            top_ps=torch.tensor([0.3, 1.0, 1.0, 1.0]),
            min_ps=torch.tensor([0.9, 0.0, 0.0, 0.0]),
            need_top_k=need,
            need_top_p=need,
            need_min_p=need,
        )
        assert torch.equal(probs[0], expected)
        assert torch.equal(probs[2], expected)
        assert (probs[1] > 0).all()
        assert (probs[1, 1] == probs[1, 2]).all()


def test_without_greedy_rows_nothing_is_left_out() -> None:
    """Without it, skipping the one-hot rows could skip a filter as well."""
    logits = torch.randn(5, 9)
    for options in ({}, {"top_k": 3}, {"top_k": 4, "top_p": 0.7, "min_p": 0.1}):
        assert torch.equal(_probs(logits, **options, has_greedy=False), _probs(logits, **options))


def test_greedy_rows_ignore_ties_that_the_softmax_makes() -> None:
    """Without it, greedy would be taken from probabilities, where near logits merge, and differ from the host."""
    logits = torch.tensor([[20.0, 20.0 + 2e-6, 0.0]])
    assert logits[0, 1] > logits[0, 0]
    assert _probs(logits, top_k=1).tolist() == [[0.0, 1.0, 0.0]]


def test_target_probs_leaves_the_logits_alone() -> None:
    """Without it, logprobs computed afterwards would be those of the filtered distribution."""
    logits = torch.randn(3, 7)
    before = logits.clone()
    _probs(logits, temperature=0.5, top_k=2, top_p=0.5, min_p=0.1)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_target_probs_computes_in_float32(dtype: torch.dtype) -> None:
    """Without it, half-precision logits would give probabilities with eight bits."""
    logits = (torch.randn(3, 50) * 4).to(dtype)
    probs = _probs(logits, temperature=0.7)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, torch.softmax(logits.float() / 0.7, dim=-1))


def test_masked_and_extreme_logits_give_no_nan() -> None:
    """Without it, a grammar mask, a huge temperature or a vanishing one could spread NaN over the row."""
    logits = torch.tensor([[float("-inf"), 3.0], [float("-inf"), -80.0], [1e4, -1e4], [0.0, 1.0]])
    probs = _probs(logits, temperature=[1.0, 0.01, 1.0, 1e6], top_k=[2, 5, 2, 2], top_p=0.9, min_p=[0.1, 1.0, 0.0, 0.0])
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(4))
    assert probs[:2].tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, rows after the first chunk could be filtered with another row's parameters."""
    torch.manual_seed(2)
    logits = torch.randn(10, 33)
    options = dict(top_k=[1 + i for i in range(10)], top_p=[0.1 * (i + 1) for i in range(10)], min_p=[0.01] * 10)
    whole = _probs(logits, **options)
    monkeypatch.setattr("sglang_sparsespec.speculation.distribution._CHUNK_ELEMENTS", 100)
    assert torch.equal(_probs(logits, **options), whole)


@pytest.mark.parametrize("vocab_size", [2, 511, 512, 513, 1024, 152_064])
@pytest.mark.parametrize("coin", [0.0, 2.0**-24, 0.5, ALMOST_ONE, 1 - 2**-53])
def test_sample_never_returns_an_impossible_token(vocab_size: int, coin: float) -> None:
    """Without it, a coin at the edge could give the first or last token, although the filters dropped it."""
    torch.manual_seed(3)
    probs = torch.rand(6, vocab_size) ** 8
    probs[0] = 0.0
    probs[0, vocab_size // 2] = 1.0
    probs[1, : vocab_size // 2] = 0.0
    probs[2, vocab_size // 2 + 1 :] = 0.0
    probs[3, 1:] = 0.0
    probs[3, 0] = 1e-38
    probs[4, :-1] = 0.0
    probs[4, -1] = 3e-39  # subnormal
    tokens = sample(probs, torch.full((6,), coin, dtype=torch.float64))
    assert tokens.dtype == torch.int64
    assert (probs.gather(1, tokens.unsqueeze(1)) > 0).all()
    assert tokens[0] == vocab_size // 2
    assert tokens[3] == 0
    assert tokens[4] == vocab_size - 1


def test_sample_inverts_the_cumulative_distribution() -> None:
    """Without it, boundaries could belong to the wrong token: probability would leak to the neighbour."""
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).repeat(6, 1)
    coins = torch.tensor([0.0, 0.25 - 2**-24, 0.25, 0.75 - 2**-24, 0.75, ALMOST_ONE])
    assert sample(probs, coins).tolist() == [0, 0, 2, 2, 3, 3]
    assert sample(probs * 3, coins).tolist() == [0, 0, 2, 2, 3, 3]


def test_sample_at_a_large_vocabulary_is_as_exact_as_float64() -> None:
    """Without it, a float32 cumulative sum over 152K tokens could shift the boundaries by whole tokens."""
    torch.manual_seed(4)
    probs = torch.softmax(torch.randn(4, 152_064) * 0.01, dim=-1)  # nearly flat: the hardest
    cdf = probs.double().cumsum(dim=1)
    for coin in torch.rand(50, dtype=torch.float64).tolist():
        tokens = sample(probs, torch.full((4,), coin, dtype=torch.float64)).unsqueeze(1)
        mass = coin * cdf[:, -1:]
        assert (cdf.gather(1, tokens) > mass - 1e-12).all()
        assert (cdf.gather(1, tokens) - probs.gather(1, tokens) <= mass + 1e-12).all()


def test_sample_follows_the_distribution() -> None:
    """Without it, a block boundary could swallow tokens: 1100 of them span two blocks and a rest."""
    generator = torch.Generator().manual_seed(5)
    probs = torch.zeros(1, 1100)
    probs[0, ::50] = torch.rand(22, generator=generator) + 0.1
    probs /= probs.sum()
    tokens = sample(probs.expand(20_000, -1), torch.rand(20_000, generator=generator))
    counts = torch.bincount(tokens, minlength=1100)[::50]
    assert counts.sum() == 20_000
    assert stats.chisquare(counts.numpy(), (probs[0, ::50].double() * 20_000).numpy(), sum_check=False).pvalue > 1e-6


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [float("nan"), 0.5, 0.5]], ids=["zero", "nan"])
def test_sample_stays_in_range_on_a_broken_row(row: list[float]) -> None:
    """Without it, a NaN logit upstream would become an illegal address downstream instead of a wrong token."""
    assert 0 <= sample(torch.tensor([row]), torch.tensor([0.5])).item() < 3
