"""The controller on rounds that a real server ran, SmolLM2-135M on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_sparsespec.speculation.controller import Controller
from tests.support.recorded_rounds import Recording

DATA = Path(__file__).parents[2] / "data"
RECORDINGS = sorted(DATA.glob("rounds_*.json"))
# of the best fixed k
OVER_BEST = 0.97


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_settles_near_the_best_k_of_recorded_rounds(path: Path) -> None:
    """Times of a real machine scatter, and real drafts stand in runs: what made-up ones do not show.

    k was switched from outside while they were recorded.
    """
    recording = Recording(path)
    controller = Controller(recording.choices)
    recording.replay(controller, 400)
    settled = recording.replay(controller, 400)
    [(most, _)] = settled.most_common(1)
    best = recording.speed(recording.best())
    assert recording.speed(most) >= OVER_BEST * best
    assert recording.speed(controller.status.num_steps) >= OVER_BEST * best
    # looking around included; each k's rounds at what they took in the middle
    tokens = {k: 1 + sum(recording.survival()[:k]) for k in settled}
    spent = sum(count * tokens[k] / recording.speed(k) for k, count in settled.items())
    assert sum(count * tokens[k] for k, count in settled.items()) / spent >= OVER_BEST * best


def test_follows_drafts_that_turn_poor_and_good_again() -> None:
    """A server that drafts on for nothing, or that stays with plain decoding once drafts have been poor.

    Two recordings of the same load: the usual drafts, and drafts that see sixteen tokens.
    """
    good, poor = (Recording(DATA / f"rounds_2x1024{name}.json") for name in ("", "_poor_drafts"))
    assert (good.best(), poor.best()) == (good.choices[-1], 0)
    controller = Controller(good.choices)
    good.replay(controller, 400)
    for start in range(0, 40, 4):
        poor.replay(controller, 300, start)
        assert poor.speed(controller.status.num_steps) >= OVER_BEST * poor.speed(0)
        # nothing is drafted then but in tries, and these alone can say that drafts are good again
        good.replay(controller, 700, start)
        assert good.speed(controller.status.num_steps) >= OVER_BEST * good.speed(good.best())


def test_recorded_rounds_tell_k_apart() -> None:
    """Without it a controller that never moves could pass."""
    recordings = [Recording(path) for path in RECORDINGS]
    assert len({recording.best() for recording in recordings}) > 1
    for recording in recordings:
        speeds = [recording.speed(k) for k in recording.choices]
        assert min(speeds) < 0.9 * max(speeds)
        assert len(recording.rounds) >= 150
