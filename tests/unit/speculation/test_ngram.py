"""Lookup of n-grams against a search written as a loop, and the rule by which guesses stand."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_sparsespec.speculation.ngram import MAX_MATCH, MIN_MATCH, matched, propose


def search(tokens: list[int], num_tokens: int) -> list[int]:
    """The longest match of the last tokens, up to MAX_MATCH; of equal ones the most recent."""
    best, found = MIN_MATCH - 1, None
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(MAX_MATCH, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= max(best, MIN_MATCH):
            best, found = length, end
    if found is None:
        return [-1] * num_tokens
    following = tokens[found + 1 : found + 1 + num_tokens]
    return following + [-1] * (num_tokens - len(following))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_finds_what_a_loop_finds(num_tokens: int) -> None:
    """An off-by-one in the shift, a match with itself, or tokens from past the end of a request."""
    rng = random.Random(num_tokens)
    lens = [1, 2, 3, 4, 5, 20, 57, 63, 64]
    texts = [[rng.randrange(3) for _ in range(length)] for length in lens for _ in range(8)]
    # what lies past a request's tokens would be a match for all of them
    history = torch.randint(0, 3, (len(texts), 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    lasts = torch.tensor([len(text) - 1 for text in texts])
    found = propose(history, lasts, num_tokens)
    assert found.tolist() == [search(text, num_tokens) for text in texts]
    assert (found >= 0).any()
    assert (found == -1).any()


def test_a_longer_match_wins_over_a_more_recent_one() -> None:
    """Recency alone would follow the wrong one of two sentences."""
    text = torch.tensor([[1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]])
    assert propose(text, torch.tensor([10]), 2).tolist() == [[9, 7]]
    assert propose(text[:, 1:], torch.tensor([9]), 2).tolist() == [[8, 1]]


def test_one_equal_token_is_no_match() -> None:
    """Guesses that hardly ever come true cost a row of every draft forward."""
    assert propose(torch.tensor([[4, 5, 6, 4]]), torch.tensor([3]), 1).tolist() == [[-1]]


def test_guesses_stand_up_to_the_first_that_did_not_come_true() -> None:
    """A guess behind a wrong one was made from another text."""
    guesses = torch.tensor([[5, 6], [5, 6], [5, 6], [-1, -1]])
    tokens = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [1, 2, 3]])
    assert matched(guesses, tokens).tolist() == [3, 2, 1, 1]
