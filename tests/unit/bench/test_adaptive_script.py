"""scripts/bench/adaptive.py: what it makes of rounds that were written down, and the verdicts that it prints."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from tests.support.scripts import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/adaptive.py", monkeypatch)


def rounds(script: ModuleType, *lines: tuple[int, float | None, int], pool: int = 1000, num_reqs: int = 4) -> list:
    """k, milliseconds and tokens of each."""
    return [
        script.RoundLine(float(i), num_reqs, k, pool, round_ms, tokens, "turn 0")
        for i, (k, round_ms, tokens) in enumerate(lines)
    ]


def test_tokens_by_the_rates_that_were_set(script: ModuleType) -> None:
    """The last rate serves for the rest, and the bonus token counts."""
    assert script.expected_tokens([0.5], 0) == 1
    assert script.expected_tokens([0.5], 3) == 1 + 0.5 + 0.25 + 0.125
    assert script.expected_tokens([1.0, 0.5], 3) == 1 + 1 + 0.5 + 0.25


def test_speed_counts_what_was_expected_and_leaves_out_what_has_no_time(script: ModuleType) -> None:
    """Luck of a few rounds would be read as speed; a round behind a prefill has no time of its own."""
    found = rounds(script, (1, 10.0, 8), (1, None, 8), (1, 30.0, 4))
    assert script.speed(found, [0.5]) == (2 * 4 * 1.5 / 0.04, 1000)
    # where acceptance is real it is what came
    assert script.speed(found, None) == (12 / 0.04, 1000)
    with pytest.raises(script.ServerError, match="could be timed"):
        script.speed(rounds(script, (1, None, 8)), [0.5])


def test_plain_is_compared_at_the_same_pool(script: ModuleType) -> None:
    """A controller measured later, with more tokens in the pool, is no slower for that."""
    line = script.Line.through([(1000, 10.0), (2000, 12.0), (3000, 14.0)])
    assert line.step_ms(4000) == pytest.approx(16.0)
    # plain decoding by the same server: exactly 1
    assert script.over_plain(rounds(script, (0, 16.0, 4), pool=4000), [0.7], line) == pytest.approx(1.0)
    # a pool that did not grow, and one that cost less as it grew, say nothing of a slope
    assert script.Line.through([(1000, 10.0), (1001, 14.0), (1002, 12.0)]).step_ms(9999) == 12.0
    assert script.Line.through([(1000, 12.0), (3000, 10.0)]).step_ms(9999) == 11.0


def test_when_it_has_settled(script: ModuleType) -> None:
    """An early look that happens to be right is not the end of it."""
    assert script.rounds_to_settle([1.0, 1.0, 1.0, 1.01]) == 0
    assert script.rounds_to_settle([0.6, 1.0, 0.8, 1.0, 1.01, 0.99]) == 3
    assert script.rounds_to_settle([1.0, 1.0, 1.0, 0.7]) is None


def test_verdict_is_over_the_best_fixed_k_turn_by_turn(script: ModuleType) -> None:
    """Medians of ratios of neighbours, not a ratio of medians: the pool grows from turn to turn."""
    found = script.verdict([1.0, 2.0, 3.0], {0: [0.9, 0.9, 0.9], 8: [1.0, 2.0, 3.0]})
    assert (found["best_k"], found["over_best"], found["over_plain"], found["met"]) == (8, 1.0, 2.0, True)
    assert not script.verdict([0.97] * 3, {0: [0.97] * 3})["met"]
    assert not script.verdict([1.2] * 3, {0: [1.0] * 3, 4: [1.25] * 3})["met"]


def test_load_rises_and_falls_and_is_the_same_for_everybody(script: ModuleType) -> None:
    """Arrivals that differ from contender to contender compare nothing."""
    arrivals = script.rising_load(20.0, 16, 500)
    assert [a.after_s for a in arrivals] == [a.after_s for a in script.rising_load(20.0, 16, 500)]
    thirds = [sum(lo <= a.after_s < lo + 20 / 3 for a in arrivals) for lo in (0, 20 / 3, 40 / 3)]
    assert thirds[1] > 1.5 * max(thirds[0], thirds[2])
    assert max(len(a.ids) for a in arrivals) > 8 * min(len(a.ids) for a in arrivals)


def test_tokens_stand_in_the_second_in_which_they_came(script: ModuleType) -> None:
    """A chunk counts with what it added, at its own time."""
    traces = [SimpleNamespace(times=(10.1, 11.5, 13.2), counts=(1, 9, 10)), SimpleNamespace(times=(11.9,), counts=(5,))]
    assert script.tokens_over_time(traces, 10.0, 13.5) == [1, 13, 0, 1]
