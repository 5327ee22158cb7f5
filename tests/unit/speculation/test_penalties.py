from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.speculation.penalties import PenaltyLedger, PenaltyParams, penalise_chain

VOCAB = 7


def _params(
    num_reqs: int,
    *,
    frequency: float = 0.0,
    presence: float = 0.0,
    repetition: float = 1.0,
    min_new_tokens: int = 0,
    stop: list[list[int]] | None = None,
) -> PenaltyParams:
    return PenaltyParams(
        frequency=torch.full((num_reqs,), frequency),
        presence=torch.full((num_reqs,), presence),
        repetition=torch.full((num_reqs,), repetition),
        min_new_tokens=torch.full((num_reqs,), min_new_tokens, dtype=torch.int32),
        stop_token_ids=torch.tensor(stop or [[] for _ in range(num_reqs)], dtype=torch.int64).view(num_reqs, -1),
    )


def _row(params: PenaltyParams, row: int) -> PenaltyParams:
    return PenaltyParams(**{name: value[row : row + 1] for name, value in vars(params).items()})


def _naive(logits: list[float], outputs: list[int], params: PenaltyParams) -> list[float]:
    """One decode of one request by the definition, in Python floats."""
    penalised = []
    for token, logit in enumerate(logits):
        n = outputs.count(token)
        logit -= params.frequency.item() * n + (params.presence.item() if n else 0.0)
        if n:
            logit = logit * params.repetition.item() if logit < 0 else logit / params.repetition.item()
        if len(outputs) < params.min_new_tokens.item() and token in params.stop_token_ids[0].tolist():
            logit = float("-inf")
        penalised.append(logit)
    return penalised


@pytest.mark.parametrize("chain_len", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"frequency": 0.3}, id="frequency"),
        pytest.param({"presence": -0.5}, id="presence, negative"),
        pytest.param({"repetition": 1.7}, id="repetition"),
        pytest.param({"repetition": 0.6}, id="repetition below 1"),
        pytest.param({"min_new_tokens": 5}, id="min_new_tokens"),
        pytest.param({"frequency": 0.3, "presence": 0.5, "repetition": 1.3, "min_new_tokens": 6}, id="all"),
    ],
)
def test_penalise_chain_equals_one_decode_after_another(options: dict[str, float], chain_len: int) -> None:
    """Without it, a position could miss the drafts before it or see its own successor."""
    torch.manual_seed(0)
    stop = [[3, 5], [VOCAB, VOCAB], [VOCAB, 0], [6, 6]]
    params = _params(4, stop=stop, **options)  # type: ignore[arg-type]
    outputs = [[1], [2, 2, 2], [0, 4, 4, 6, 1], [3, 3]]
    chain = torch.randint(0, 3, (4, chain_len))  # few tokens, so that drafts repeat
    chain[:, 0] = torch.tensor([tokens[-1] for tokens in outputs])
    logits = torch.randn(4, chain_len, VOCAB) * 2
    before = logits.clone()
    counts = torch.stack([torch.bincount(torch.tensor(tokens), minlength=VOCAB) for tokens in outputs]).int()
    counts_before = counts.clone()
    output_lens = torch.tensor([len(tokens) for tokens in outputs], dtype=torch.int32)
    penalise_chain(logits, counts=counts, output_lens=output_lens, chain=chain, params=params)
    assert torch.equal(counts, counts_before)
    assert not torch.equal(logits, before)
    for row in range(4):
        for t in range(chain_len):
            seen = outputs[row] + chain[row, 1 : t + 1].tolist()
            expected = torch.tensor(_naive(before[row, t].tolist(), seen, _row(params, row)))
            torch.testing.assert_close(logits[row, t], expected, rtol=1e-6, atol=1e-6)


def test_neutral_rows_keep_their_logits_bit_for_bit() -> None:
    """Without it, one request's penalties could move the argmax of the others in its batch."""
    torch.manual_seed(1)
    params = _params(2, frequency=0.5, presence=0.5, repetition=1.3, min_new_tokens=9, stop=[[2], [2]])
    neutral = PenaltyParams(
        **{
            name: torch.stack([getattr(params, name)[0], getattr(_params(1, stop=[[VOCAB]]), name)[0]])
            for name in vars(params)
        }
    )
    logits = torch.randn(2, 3, VOCAB)
    logits[1, 1, 4] = float("-inf")
    before = logits.clone()
    penalise_chain(
        logits,
        counts=torch.ones(2, VOCAB, dtype=torch.int32),
        output_lens=torch.tensor([7, 7], dtype=torch.int32),
        chain=torch.tensor([[1, 2, 3], [1, 2, 3]]),
        params=neutral,
    )
    assert not torch.equal(logits[0], before[0])
    assert torch.equal(logits[1], before[1])


def test_min_new_tokens_ends_inside_the_chain() -> None:
    """Without it, a whole round could be forbidden to stop although its last positions may, or the reverse."""
    logits = torch.zeros(1, 4, VOCAB)
    penalise_chain(
        logits,
        counts=torch.zeros(1, VOCAB, dtype=torch.int32),
        output_lens=torch.tensor([3], dtype=torch.int32),
        chain=torch.tensor([[1, 1, 1, 1]]),
        params=_params(1, min_new_tokens=5, stop=[[VOCAB, 4, 4, VOCAB - 1]]),
    )
    assert torch.isinf(logits[0, :2][:, [4, VOCAB - 1]]).all()
    assert torch.isfinite(logits[0, 2:]).all()
    assert torch.isfinite(logits[0, :, :4]).all()


def test_padding_of_stop_ids_forbids_nothing() -> None:
    """Without it, clamped padding could forbid the last token of the vocabulary."""
    logits = torch.zeros(2, 1, VOCAB)
    penalise_chain(
        logits,
        counts=torch.zeros(2, VOCAB, dtype=torch.int32),
        output_lens=torch.zeros(2, dtype=torch.int32),
        chain=torch.zeros(2, 1, dtype=torch.int64),
        params=_params(2, min_new_tokens=5, stop=[[VOCAB, VOCAB], [2, VOCAB]]),
    )
    assert torch.isfinite(logits[0]).all()
    assert torch.isinf(logits[1, 0]).nonzero().flatten().tolist() == [2]


def test_masked_logits_stay_masked_and_finite_elsewhere() -> None:
    """Without it, -inf times a penalty or minus one could turn into NaN."""
    logits = torch.tensor([[[float("-inf"), 0.0, -2.0, 2.0, 0.0, 0.0, 0.0]]])
    params = _params(1, frequency=1.0, presence=1.0, repetition=2.0, min_new_tokens=9, stop=[[0]])
    penalise_chain(
        logits,
        counts=torch.tensor([[2, 0, 1, 1, 0, 0, 0]], dtype=torch.int32),
        output_lens=torch.tensor([4], dtype=torch.int32),
        chain=torch.zeros(1, 1, dtype=torch.int64),
        params=params,
    )
    assert logits[0, 0].tolist() == [float("-inf"), 0.0, -8.0, 0.0, 0.0, 0.0, 0.0]


def test_ledger_counts_only_valid_tokens_of_each_round() -> None:
    """Without it, zero padding after the accepted tokens would count as token 0."""
    ledger = PenaltyLedger()
    ledger.start("a", [1, 1, 6], VOCAB, "cpu")
    ledger.start("b", [], VOCAB, "cpu")
    tokens = torch.tensor([[2, 0, 0], [3, 3, 5]])
    ledger.append(["b", "a"], tokens, torch.tensor([1, 2], dtype=torch.int32))
    counts, output_lens = ledger.stack(["a", "b"])
    assert counts.dtype == output_lens.dtype == torch.int32
    assert counts.tolist() == [[0, 2, 0, 2, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert output_lens.tolist() == [5, 1]
    # nothing valid, and garbage where nothing is valid
    ledger.append(["a"], torch.tensor([[-5, 10**9]]), torch.tensor([0], dtype=torch.int32))
    assert torch.equal(ledger.stack(["a"])[0], counts[:1])


def test_ledger_stack_is_a_copy() -> None:
    """Without it, counts handed to a forward could change under it when the next round is appended."""
    ledger = PenaltyLedger()
    ledger.start("a", [1], VOCAB, "cpu")
    counts, _ = ledger.stack(["a"])
    ledger.append(["a"], torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32))
    assert counts[0, 1] == 1
    assert ledger.stack(["a"])[0][0, 1] == 2


def test_ledger_reuses_slots_without_old_counts() -> None:
    """Without it, a new request could inherit the penalties of a finished one, or the ledger grow for ever."""
    ledger = PenaltyLedger()
    for i in range(40):
        ledger.start(f"r{i}", [i % VOCAB] * 3, VOCAB, "cpu")
        assert f"r{i}" in ledger
        if i >= 6:  # six live requests force one growth
            ledger.drop(f"r{i - 6}")
            assert f"r{i - 6}" not in ledger
    rids = [f"r{i}" for i in range(34, 40)]
    counts, output_lens = ledger.stack(rids)
    assert len(ledger) == 6
    assert output_lens.tolist() == [3] * 6
    assert counts.tolist() == [[3 * (token == i % VOCAB) for token in range(VOCAB)] for i in range(34, 40)]
    assert ledger._counts is not None
    assert ledger._counts.shape[0] <= 16


def test_ledger_start_again_counts_afresh_and_drop_is_forgiving() -> None:
    """Without it, a request that returns from a retraction would be penalised twice for the same outputs."""
    ledger = PenaltyLedger()
    ledger.drop("never started")
    ledger.start("a", [1, 2], VOCAB, "cpu")
    ledger.start("a", [1, 2, 3], VOCAB, "cpu")
    counts, output_lens = ledger.stack(["a"])
    assert counts.tolist() == [[0, 1, 1, 1, 0, 0, 0]]
    assert output_lens.tolist() == [3]
    assert len(ledger) == 1


def test_ledger_refuses_another_vocabulary() -> None:
    """Without it, a draft vocabulary of another size would scatter counts into the wrong request's row."""
    ledger = PenaltyLedger()
    ledger.start("a", [1], VOCAB, "cpu")
    with pytest.raises(ValueError, match="vocab_size: expected 7"):
        ledger.start("b", [1], VOCAB + 1, "cpu")
