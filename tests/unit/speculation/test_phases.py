"""The unified schedule as arithmetic: level forwards, whole chains, and what coming and going costs."""

from __future__ import annotations

import random

import pytest

from sglang_sparsespec.speculation.phases import Turn, assign, held_after, load_of, turns

CASES = [(n, k) for k in (1, 3, 8) for n in (1, 2, k, k + 1, k + 2, 3 * k + 2, 128)]


def round_of(held: list[int], k: int) -> tuple[list[Turn], list[int]]:
    phases = assign(held, k)
    return turns(held, phases, k), held_after(phases, k)


@pytest.mark.parametrize(("num_reqs", "k"), CASES)
def test_every_request_verifies_once_and_drafts_in_order(num_reqs: int, k: int) -> None:
    """A request left out or verified twice, or a draft made before the token that it follows."""
    rng = random.Random(num_reqs)
    held = [rng.randint(0, k) for _ in range(num_reqs)]
    for _ in range(4):
        forwards, after = round_of(held, k)
        assert len(forwards) == k + 1
        assert sorted(req for turn in forwards for req in turn.verify_reqs) == list(range(num_reqs))
        chain_lens = list(held)
        for turn in forwards:
            assert not set(turn.draft_reqs) & set(turn.verify_reqs)
            for req, offset in zip(turn.draft_reqs, turn.draft_offsets, strict=True):
                assert offset == chain_lens[req] < k
                chain_lens[req] += 1
            for req, num_drafts in zip(turn.verify_reqs, turn.num_drafts, strict=True):
                assert num_drafts == chain_lens[req] <= k
                chain_lens[req] = 0
        assert chain_lens == after
        held = after


@pytest.mark.parametrize(("num_reqs", "k"), CASES)
def test_forwards_are_level_and_within_the_load(num_reqs: int, k: int) -> None:
    """A forward wider than what was captured for its batch size, or a bound that a smaller batch passes."""
    rng = random.Random(k)
    for size in range(1, num_reqs + 1):
        forwards, _ = round_of([rng.randint(0, k) for _ in range(size)], k)
        verifies = [len(turn.verify_reqs) for turn in forwards]
        assert max(verifies) - min(verifies) <= 1
        assert max(verifies) <= load_of(num_reqs, k).verify_reqs
        assert max(len(turn.draft_reqs) for turn in forwards) <= load_of(num_reqs, k).draft_reqs
    # nothing is reserved that no forward needs
    forwards, _ = round_of([k - phase for phase in assign([0] * num_reqs, k)], k)
    assert max(len(turn.verify_reqs) for turn in forwards) == load_of(num_reqs, k).verify_reqs
    assert max(len(turn.draft_reqs) for turn in forwards) == load_of(num_reqs, k).draft_reqs


@pytest.mark.parametrize(("num_reqs", "k"), CASES)
def test_a_steady_batch_keeps_its_phases_and_verifies_whole_chains(num_reqs: int, k: int) -> None:
    """Requests that wander would verify short chains for ever, without any other sign."""
    phases = assign([0] * num_reqs, k)
    held = held_after(phases, k)
    for _ in range(3):
        assert assign(held, k) == phases
        forwards, held = round_of(held, k)
        assert {n for turn in forwards for n in turn.num_drafts} == {k}


def test_the_first_round_verifies_what_there_is() -> None:
    """128 requests that come together: a ninth waits for eight drafts, a ninth verifies its first token alone."""
    forwards, _ = round_of([0] * 128, 8)
    assert [turn.num_drafts[0] for turn in forwards] == list(range(9))
    assert [len(turn.verify_reqs) for turn in forwards] == [14] * 7 + [15] * 2


def test_coming_and_going_costs_few_drafts() -> None:
    """Levelling that moves requests far would cost more drafts than uneven forwards cost time."""
    rng, k = random.Random(5), 8
    held = held_after(assign([0] * 100, k), k)
    for _ in range(200):
        leaves = rng.random() < 0.5
        if leaves:
            held.pop(rng.randrange(len(held)))
        else:
            held.append(0)
        forwards, after = round_of(held, k)
        short = sum(k - n for turn in forwards for n in turn.num_drafts)
        # a request that has just come may drop out of the last group, by one phase
        assert short <= k
        held = after


def test_an_offset_in_the_chain_for_any_phase() -> None:
    """A request that is put off drafts no ninth token; one that is called early verifies what it has."""
    [late, early] = [turns([3], [phase], 4) for phase in (4, 0)]
    assert [turn.draft_offsets for turn in late] == [[3], [], [], [], []]
    assert late[4].num_drafts == [4]
    assert early[0].num_drafts == [3]
    assert [turn.draft_offsets for turn in early] == [[], [0], [1], [2], [3]]
