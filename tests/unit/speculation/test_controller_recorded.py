"""The controller on rounds that a real server ran, SmolLM2-135M on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_sparsespec.speculation.controller import Controller
from tests.support.recorded_rounds import Recording

RECORDINGS = sorted((Path(__file__).parents[2] / "data").glob("rounds_*.json"))
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


def test_recorded_rounds_tell_k_apart() -> None:
    """Without it a controller that never moves could pass."""
    recordings = [Recording(path) for path in RECORDINGS]
    assert recordings
    for recording in recordings:
        speeds = [recording.speed(k) for k in recording.choices]
        assert min(speeds) < 0.9 * max(speeds)
        assert len(recording.rounds) >= 150
