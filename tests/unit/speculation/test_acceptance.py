from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.speculation.acceptance import Acceptance, accept_chain, accept_greedy, accept_simulated

ALMOST_ONE = 1 - 2**-24


def _check_layout(result: Acceptance, draft_tokens: torch.Tensor) -> None:
    """The promises of `Acceptance`, whatever was accepted."""
    num_reqs, num_steps = draft_tokens.shape
    assert result.accept_tokens.shape == (num_reqs, num_steps + 1)
    assert result.accept_tokens.dtype == torch.int64
    assert result.accept_lens.dtype == torch.int32
    assert result.bonus_tokens.dtype == torch.int64
    for row in range(num_reqs):
        num_correct = int(result.accept_lens[row]) - 1
        assert 0 <= num_correct <= num_steps
        tokens = result.accept_tokens[row].tolist()
        assert tokens[:num_correct] == draft_tokens[row, :num_correct].tolist()
        assert tokens[num_correct] == result.bonus_tokens[row]
        assert not any(tokens[num_correct + 1 :])


def _one_hot(tokens: list[list[int]], vocab_size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab_size).float()


@pytest.mark.parametrize(
    ("draft", "target", "accept_len", "bonus"),
    [
        pytest.param([5, 6, 7], [5, 6, 7, 8], 4, 8, id="all correct"),
        pytest.param([5, 6, 7], [5, 6, 1, 8], 3, 1, id="last wrong"),
        pytest.param([5, 6, 7], [5, 1, 7, 8], 2, 1, id="correct again after a mismatch"),
        pytest.param([5, 6, 7], [1, 6, 7, 8], 1, 1, id="first wrong"),
        pytest.param([5], [5, 8], 2, 8, id="one step, correct"),
        pytest.param([5], [0, 8], 1, 0, id="one step, wrong, token 0"),
    ],
)
@pytest.mark.parametrize("rule", ["greedy", "chain, sampled drafts", "chain, chosen drafts"])
def test_greedy_targets_accept_up_to_the_first_mismatch(
    draft: list[int], target: list[int], accept_len: int, bonus: int, rule: str
) -> None:
    """Without it, a draft after a mismatch could be accepted, or temperature 0 depend on coins."""
    drafts = torch.tensor([draft, draft])
    if rule == "greedy":
        result = accept_greedy(drafts, torch.tensor([target, target]))
    else:
        coins = torch.tensor([[0.0], [ALMOST_ONE]]).expand(2, len(draft))
        # any q that can produce the drafts
        draft_probs = torch.full((2, len(draft), 9), 1 / 9) if rule == "chain, sampled drafts" else None
        final_coins = torch.tensor([ALMOST_ONE, 0.0])
        result = accept_chain(drafts, _one_hot([target, target], 9), coins, final_coins, draft_probs)
    _check_layout(result, drafts)
    assert result.accept_lens.tolist() == [accept_len] * 2
    assert result.bonus_tokens.tolist() == [bonus] * 2


def test_accept_greedy_takes_int32_tokens() -> None:
    """Without it, the host's int32 ids could reach a gather that wants int64."""
    drafts = torch.tensor([[5, 6]], dtype=torch.int32)
    result = accept_greedy(drafts, torch.tensor([[5, 7, 8]], dtype=torch.int32))
    _check_layout(result, drafts)
    assert result.accept_tokens.tolist() == [[5, 7, 0]]


@pytest.mark.parametrize("vocab_size", [2, 3, 600])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
@pytest.mark.parametrize("are_sampled", [True, False])
def test_accept_chain_stays_inside_the_target_on_sparse_distributions(
    vocab_size: int, num_steps: int, are_sampled: bool
) -> None:
    """Without it, zeros in p or q could let an impossible token out, at edge coins above all."""
    torch.manual_seed(0)
    rows = 64
    target = torch.rand(rows, num_steps + 1, vocab_size) * (torch.rand(rows, num_steps + 1, vocab_size) < 0.4)
    target[..., 0] += 1e-3 * (target.sum(dim=-1) == 0)
    target /= target.sum(dim=-1, keepdim=True)
    draft_probs = torch.rand(rows, num_steps, vocab_size) * (torch.rand(rows, num_steps, vocab_size) < 0.4)
    draft_probs[..., 1] += 1e-3 * (draft_probs.sum(dim=-1) == 0)
    draft_probs /= draft_probs.sum(dim=-1, keepdim=True)
    drafts = torch.randint(0, vocab_size, (rows, num_steps))  # many are impossible under q: must not crash either
    for coin in (0.0, 0.3, ALMOST_ONE):
        result = accept_chain(
            drafts,
            target,
            torch.full((rows, num_steps), coin),
            torch.full((rows,), coin),
            draft_probs if are_sampled else None,
        )
        _check_layout(result, drafts)
        for row in range(rows):
            for i in range(int(result.accept_lens[row])):
                assert target[row, i, result.accept_tokens[row, i]] > 0


def test_accept_chain_accepts_everything_when_the_draft_is_the_target() -> None:
    """Without it, p == q could be rejected by rounding at the largest coin, and the residual be empty."""
    torch.manual_seed(1)
    target = torch.softmax(torch.randn(500, 5, 50), dim=-1)
    drafts = torch.multinomial(target[:, :4].reshape(-1, 50), 1).view(500, 4)
    coins = torch.full((500, 4), ALMOST_ONE)
    result = accept_chain(drafts, target, coins, torch.rand(500), target[:, :4].clone())
    assert (result.accept_lens == 5).all()


@pytest.mark.parametrize("are_sampled", [True, False])
def test_accept_chain_samples_the_target_when_the_residual_is_empty(are_sampled: bool) -> None:
    """Without it, a rejection that only rounding could cause would sample an all-zero row: token 0, or NaN."""
    # a row that sums to 1 - 2**-24, as rounding leaves it: the largest coin rejects its only token
    target = torch.zeros(1, 2, 4)
    target[..., 2] = ALMOST_ONE
    draft_probs = torch.zeros(1, 1, 4)
    draft_probs[..., 2] = 1.0
    result = accept_chain(
        torch.tensor([[2]]),
        target,
        torch.tensor([[ALMOST_ONE]]),
        torch.tensor([0.5]),
        draft_probs if are_sampled else None,
    )
    assert result.accept_tokens.tolist() == [[2, 0]]
    assert result.accept_lens.tolist() == [1]


def test_accept_chain_leaves_its_inputs_alone() -> None:
    """Without it, building the residual in place would corrupt the probabilities that logprobs are read from."""
    torch.manual_seed(2)
    target, draft_probs = torch.softmax(torch.randn(8, 4, 6), -1), torch.softmax(torch.randn(8, 3, 6), -1)
    before = target.clone(), draft_probs.clone()
    drafts = torch.randint(0, 6, (8, 3))
    for q in (draft_probs, None):
        accept_chain(drafts, target, torch.rand(8, 3), torch.rand(8), q)
    assert torch.equal(target, before[0])
    assert torch.equal(draft_probs, before[1])


def test_accept_chain_treats_rows_apart() -> None:
    """Without it, a row's stop position or residual could be taken from its neighbour."""
    torch.manual_seed(3)
    target, draft_probs = torch.softmax(torch.randn(40, 4, 6) * 3, -1), torch.softmax(torch.randn(40, 3, 6), -1)
    drafts, coins, final_coins = torch.randint(0, 6, (40, 3)), torch.rand(40, 3), torch.rand(40)
    for q in (draft_probs, None):
        together = accept_chain(drafts, target, coins, final_coins, q)
        assert len(set(together.accept_lens.tolist())) > 2
        for row in range(40):
            one = slice(row, row + 1)
            alone = accept_chain(drafts[one], target[one], coins[one], final_coins[one], None if q is None else q[one])
            assert torch.equal(alone.accept_tokens, together.accept_tokens[one])


@pytest.mark.parametrize("rule", ["greedy", "chain, sampled drafts", "chain, chosen drafts", "simulated"])
def test_limits_cut_what_would_stand(rule: str) -> None:
    """A limit that counts the bonus token, or one that lets a draft behind it decide the bonus."""
    drafts = torch.tensor([[5, 6, 7]] * 6)
    # the fourth row is rejected before its limit
    target = torch.tensor([[5, 6, 7, 8]] * 3 + [[5, 1, 7, 8]] + [[5, 6, 7, 8]] * 2)
    limits = torch.tensor([0, 1, 2, 2, 3, 99])
    if rule == "greedy":
        result = accept_greedy(drafts, target, limits)
    elif rule == "simulated":
        result = accept_simulated(drafts, torch.tensor([5, 6, 7, 1, 8, 8]), torch.tensor([3, 3, 3, 1, 3, 3]), limits)
    else:
        draft_probs = torch.full((6, 3, 9), 1 / 9) if rule == "chain, sampled drafts" else None
        one_hot = _one_hot(target.tolist(), 9)
        result = accept_chain(drafts, one_hot, torch.rand(6, 3), torch.rand(6), draft_probs, limits)
    _check_layout(result, drafts)
    assert result.accept_lens.tolist() == [1, 2, 3, 2, 4, 4]
    assert result.bonus_tokens.tolist() == [5, 6, 7, 1, 8, 8]


def test_accept_simulated_takes_the_number_it_is_given() -> None:
    """Without it, a benchmark at a set accept length could run at another, or index past the chain."""
    drafts = torch.tensor([[1, 2, 3]] * 5)
    bonus = torch.tensor([4, 6, 7, 7, 4])
    result = accept_simulated(drafts, bonus, torch.tensor([0, 2, 3, 99, -1], dtype=torch.int32))
    _check_layout(result, drafts)
    assert result.accept_lens.tolist() == [1, 3, 4, 4, 1]
    assert result.bonus_tokens.tolist() == [4, 6, 7, 7, 4]
