"""Lists of positions against the rule of one request, on lengths around every edge."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.sparsity import attention
from sglang_sparsespec.sparsity.block_lists import BlockRule, list_positions

WIDTH = 3
# padding, one token, around a block of 16, around L0 of 64, odd sizes
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 80, 81, 200, 333]
RULES = [
    BlockRule(0.25, 64, 16),
    BlockRule(0.0, 0, 16),
    BlockRule(0.5, 0, 16),
    BlockRule(1.0, 0, 16),
    BlockRule(0.3, 33, 24),
    BlockRule(0.1, 4096, 16),
]


def listed(rule: BlockRule, lengths: list[int], max_len: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores with NaN past the lengths, and the lists of them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(lengths), 2, -(-max_len // rule.block_size), generator=generator)
    for r, length in enumerate(lengths):
        scores[r, :, -(-length // rule.block_size) :] = torch.nan
    lists = list_positions(
        scores, torch.tensor(lengths), rule, width=WIDTH, max_len=max_len, max_position=max_len + WIDTH
    )
    return scores, lists.positions, lists.num_read


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("max_len", [333, 400])
def test_lists_are_the_rule_of_one_request(rule: BlockRule, max_len: int) -> None:
    """A block cut in two, a lost last token, or the verify's own tokens out of order would pass without it."""
    scores, positions, num_read = listed(rule, LENGTHS, max_len)
    assert positions.dtype == torch.int32
    assert positions.shape[-1] == rule.list_len(max_len, WIDTH)
    assert positions.min() >= 0
    assert positions.max() <= max_len + WIDTH
    for r, length in enumerate(LENGTHS):
        num_blocks = -(-length // rule.block_size)
        kept = int(attention.num_kept_blocks(torch.tensor([length]), **rule._asdict()))
        chosen = attention.choose_blocks(scores[r, :, :num_blocks], kept)
        for h in range(2):
            wanted = [
                p
                for block in chosen[h].tolist()
                for p in range(block * rule.block_size, min((block + 1) * rule.block_size, length))
            ]
            assert int(num_read[r]) == len(wanted)
            found = positions[r, h, : len(wanted) + WIDTH].tolist()
            assert found == [*wanted, *range(length, length + WIDTH)], (length, h)


def test_a_ratio_of_one_or_a_high_bound_reads_everything() -> None:
    """The dense limit: what is not dense there is an error and not sparsity."""
    for rule in (BlockRule(1.0, 0, 16), BlockRule(0.0, 333, 16)):
        _, positions, num_read = listed(rule, LENGTHS, 333)
        assert num_read.tolist() == LENGTHS
        assert positions[-1, 1, : 333 + WIDTH].tolist() == list(range(333 + WIDTH))


def test_a_low_ratio_reads_less() -> None:
    """A mode that is on and reads everything would cost its scoring and gain nothing."""
    rule = BlockRule(0.1, 64, 16)
    _, positions, num_read = listed(rule, [1600], 1600)
    # floor(1536 / 10) + 64 = 217 tokens: 14 blocks of 100
    assert num_read.tolist() == [14 * 16]
    assert positions.shape[-1] == 14 * 16 + WIDTH


def test_the_width_of_a_list_covers_every_length() -> None:
    """A list that is too short would drop a block in silence: the bound must hold below L0 too."""
    for rule in RULES:
        for max_len in (0, 1, 40, 64, 70, 333):
            kept = attention.num_kept_blocks(torch.arange(max_len + 1), **rule._asdict())
            assert rule.num_blocks(max_len) >= int(kept.max())


def test_nothing_to_list() -> None:
    """An empty batch, and a batch of new requests without a context."""
    rule = RULES[0]
    _, positions, _ = listed(rule, [], 100)
    assert positions.shape[:2] == (0, 2)
    _, positions, num_read = listed(rule, [0, 0], 0)
    assert num_read.tolist() == [0, 0]
    assert positions[..., :WIDTH].tolist() == [[[0, 1, 2]] * 2] * 2
