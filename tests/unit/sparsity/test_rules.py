"""The rules of arXiv:2512.21911 by examples worked out by hand, at their limits and on ties."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.sparsity import attention, experts, ffn


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (0, 0),
        (1, 1),
        (1024, 64),  # not above L0: all
        (1025, 64),  # one token more: floor(.25) + 1024 tokens are 64 blocks of 65
        (4096, 112),  # floor(3072 / 4) + 1024 = 1792
    ],
)
def test_blocks_that_are_kept(length: int, kept: int) -> None:
    """Dense up to L0, and the formula beyond."""
    found = attention.num_kept_blocks(torch.tensor([length]), ratio=0.25, dense_below=1024, block_size=16)
    assert found.tolist() == [kept]


def test_ratios_are_the_decimals_that_were_given() -> None:
    """A double below the decimal loses a token wherever the product is whole: 0.29 x 100 is 28.999999999999996."""
    for hundredths in range(101):
        lengths = torch.arange(0, 2000)
        found = attention.num_kept_blocks(lengths, ratio=hundredths / 100, dense_below=0, block_size=1)
        kept = (lengths * hundredths // 100).clamp(min=2)
        assert torch.equal(found, torch.where(lengths > 0, torch.minimum(kept, lengths), lengths)), hundredths
    third = attention.num_kept_blocks(torch.tensor([3 * 10**6]), ratio=1 / 3, dense_below=0, block_size=1)
    assert third.tolist() == [10**6]


def test_a_ratio_of_one_keeps_everything() -> None:
    lengths = torch.arange(200)
    found = attention.num_kept_blocks(lengths, ratio=1.0, dense_below=0, block_size=16)
    assert torch.equal(found, -(-lengths // 16))


def test_first_and_last_block_survive_any_ratio() -> None:
    kept = attention.num_kept_blocks(torch.tensor([640]), ratio=0.0, dense_below=0, block_size=16)
    assert kept.tolist() == [2]
    scores = torch.arange(40.0).flip(0).repeat(3, 1)
    assert attention.choose_blocks(scores, 2).tolist() == [[0, 39]] * 3


def test_block_scores_are_means_over_tokens_and_heads_of_a_group() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(4, 8), torch.randn(11, 2, 8)
    keys[10:] = float("nan")  # beyond the length
    scores = attention.block_scores(query, keys, 10, 4)
    assert scores.shape == (2, 3)
    wanted = torch.stack([query[2:] @ keys[8 + i, 1] for i in range(2)]).mean()
    assert torch.allclose(scores[1, 2], wanted)


def test_no_blocks_of_an_empty_context() -> None:
    assert attention.block_scores(torch.ones(2, 4), torch.empty(0, 1, 4), 0, 4).shape == (1, 0)
    assert attention.choose_blocks(torch.empty(1, 0), 0).shape == (1, 0)


def test_channels_below_the_threshold_are_dropped() -> None:
    hidden = torch.tensor([[0.05, -0.05, 0.2, -0.2, 0.1]])
    assert ffn.drop_channels(hidden, 0.1).tolist() == torch.tensor([[0, 0, 0.2, -0.2, 0.1]]).tolist()
    assert ffn.dropped_share(hidden, 0.1) == pytest.approx(0.4)
    assert ffn.drop_channels(hidden, 0.0) is hidden


def test_experts_are_skipped_by_ratio() -> None:
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    # one below .1 / .9, so beta_1 = .2 skips it in the first row; two: .2 / .8 = .25, not below .25
    assert experts.skipped_experts(weights, (0.2, 0.25)).tolist() == [[False, True, False, False], [False] * 4]
    assert experts.skipped_experts(weights, (0.2, 0.26)).tolist()[0] == [False, True, False, True]
    assert not experts.skipped_experts(weights, ()).any()


def test_kept_weights_keep_their_sum() -> None:
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    kept = experts.without_skipped(weights, experts.smaller_top_k(weights, 2))
    assert torch.allclose(kept, torch.tensor([[0.625, 0.0, 0.375, 0.0]]))
    assert torch.equal(experts.without_skipped(weights, torch.zeros(1, 4, dtype=torch.bool)), weights)


def test_a_full_top_k_skips_nothing_and_ties_go_to_the_first() -> None:
    weights = torch.full((2, 3), 0.5)
    assert not experts.smaller_top_k(weights, 3).any()
    assert experts.smaller_top_k(weights, 1).tolist() == [[False, True, True]] * 2
