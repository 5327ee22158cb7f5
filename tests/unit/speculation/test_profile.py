"""What a controller has learnt, saved and loaded; and every way in which a file is not that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.speculation import profile
from sglang_sparsespec.speculation.controller import Controller
from tests.support.round_simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHOICES = (0, 1, 2, 4, 8)
IDENTITY = {"architecture": "Qwen3ForCausalLM", "card": "H100", "num_steps": "8"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "rounds.json")


def learnt(**settings: Any) -> Controller:
    controller = Controller(CHOICES)
    Simulator(**settings).run(controller, 600)
    return controller


def test_a_warm_start_knows_what_the_last_server_knew(path: str) -> None:
    """The first decision, before any round: nothing would be saved by a profile that only looks loaded."""
    pool, limits = 20_000, [8] * 64
    taught = learnt(rates=lambda now: [0.2] * 8, pool_tokens=lambda now: pool)
    assert taught.status.num_steps == 0
    profile.save(path, IDENTITY, taught)
    controller = Controller(CHOICES)
    assert profile.load(path, IDENTITY, controller)
    assert controller.choose(pool, limits).num_steps == 0
    assert controller.times.of(64).round_ms(8, pool) == pytest.approx(taught.times.of(64).round_ms(8, pool), rel=0.05)
    assert controller.rates.survival() == pytest.approx(taught.rates.survival(), abs=0.05)
    # and it counts as little: a server that is another soon knows better
    server = Simulator(rates=lambda now: [0.95] * 8, pool_tokens=lambda now: 400_000)
    server.run(controller, 800)
    assert controller.status.num_steps == 8


def test_without_a_file_there_is_nothing_to_load(path: str) -> None:
    """The first server writes the file; it must start without one."""
    profile.check_path(path)
    assert not profile.load(path, IDENTITY, Controller(CHOICES))


def test_no_part_of_a_file_is_left(path: str, tmp_path: Path) -> None:
    """Saving runs while the server may be killed."""
    for _ in range(2):
        profile.save(path, IDENTITY, learnt())
    assert [file.name for file in tmp_path.iterdir()] == ["rounds.json"]
    assert profile.read(path)["identity"] == IDENTITY


@pytest.mark.parametrize("change", [{"card": "H200"}, {"architecture": "LlamaForCausalLM"}, {"extra": "1"}], ids=str)
def test_a_profile_of_another_server_is_refused(path: str, change: dict[str, str]) -> None:
    """Times of another card would choose k wrongly, and nothing would say why."""
    profile.save(path, {**IDENTITY, **change}, learnt())
    name, theirs = next(iter(change.items()))
    with pytest.raises(ConfigError) as caught:
        profile.load(path, IDENTITY, Controller(CHOICES))
    assert str(caught.value).startswith(f"--sparsespec-profile {path}: {name} is {theirs!r}; it must be ")
    assert repr(IDENTITY.get(name)) in str(caught.value)


def _first_sums(data: Any) -> Any:
    return next(iter(next(iter(data["batches"].values())).values()))


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "format": (lambda data: data.update(format=2), "its format is not 1"),
    "no identity": (lambda data: data.pop("identity"), "identity is not an object of strings"),
    "identity of numbers": (lambda data: data["identity"].update(card=3), "identity is not an object of strings"),
    "no batches": (lambda data: data.pop("batches"), "batches or acceptance is not an object"),
    "bucket by name": (lambda data: data["batches"].update(large={}), "batches.large is not an object under a number"),
    "a sum is missing": (lambda data: _first_sums(data).pop("time"), "does not have weight, pool"),
    "a sum is text": (lambda data: _first_sums(data).update(time="1"), "does not have weight, pool"),
    "a sum is not finite": (lambda data: _first_sums(data).update(time=float("inf")), "does not have weight, pool"),
    "weight 0": (lambda data: _first_sums(data).update(weight=0), "as positive numbers"),
    "acceptance by name": (lambda data: data["acceptance"].update(trials={}), "are not lists of as many numbers"),
    "lengths differ": (lambda data: data["acceptance"]["trials"].pop(), "are not lists of as many numbers"),
    "more than all": (lambda data: data["acceptance"]["correct"].__setitem__(0, 1e9), "exceeds acceptance.trials"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_profile_is_refused(path: str, tmp_path: Path, name: str) -> None:
    """A damaged file that loads halfway ends in an exception in the middle of serving."""
    profile.save(path, IDENTITY, learnt())
    data = json.loads((tmp_path / "rounds.json").read_text())
    mistake, problem = MISTAKES[name]
    mistake(data)
    (tmp_path / "rounds.json").write_text(json.dumps(data))
    for check in (profile.check_path, lambda p: profile.load(p, IDENTITY, Controller(CHOICES))):
        with pytest.raises(ConfigError) as caught:
            check(path)
        assert str(caught.value).startswith(
            f"--sparsespec-profile is {path!r}; it must be a profile that a server has "
        )
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_text_that_is_no_profile_is_refused(path: str, tmp_path: Path, text: str) -> None:
    """A truncated or foreign file."""
    (tmp_path / "rounds.json").write_text(text)
    with pytest.raises(ConfigError, match="must be a profile that a server has written"):
        profile.check_path(path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """It would be noticed a minute later, by a server that serves."""
    with pytest.raises(ConfigError, match=r"a file in a folder that can be written to\. Make the folder"):
        profile.check_path(str(tmp_path / "none" / "rounds.json"))


def test_describes_in_json_types() -> None:
    """/server_info is sent as JSON."""
    shown = json.loads(json.dumps(profile.describe(learnt())))
    assert shown["num_steps"] == 2
    assert shown["predicted_speedup"] > 1
    assert len(shown["survival"]) == 8
    assert set(shown["terms_by_batch"]["64"]) == {"fixed_ms", "step_ms", "kv_ms", "step_kv_ms", "drafted_ms"}
