"""scripts/bench/schedules.py: its loads, its order, and what it makes of turns."""

from __future__ import annotations

import dataclasses
import json
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.bench.cells import Target
from sglang_sparsespec.bench.machine import Machine
from sglang_sparsespec.bench.shapes import SHAPES, shape_from_config
from tests.support.scripts import load_script

if TYPE_CHECKING:
    from pathlib import Path

CARD = Machine(name="card", has_gpu=True, memory_bytes=80 << 30, backends=("flashinfer",))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/schedules.py", monkeypatch)


def turn(script: ModuleType, schedule: str, repeat: int, speed: float, **changes: Any) -> dict[str, Any]:
    ran = {name: 20 if name == schedule else 0 for name in ("lockstep", "unified")}
    numbers = dict.fromkeys(script.TURN, 2.0) | {"tokens_per_s": speed, "rounds": ran}
    return {"schedule": schedule, "repeat": repeat, **numbers, **changes}


def turns(script: ModuleType, **speeds: list[float]) -> list[dict[str, Any]]:
    return [turn(script, name, i, speed) for name, given in speeds.items() for i, speed in enumerate(given)]


def test_loads_fill_the_card(script: ModuleType) -> None:
    """As far as contexts of 8K do; a real model's context is no longer than it is."""
    args = script.arguments(["--shape", "qwen3-8b", "--batches", "16", "256", "--new-tokens", "384"])
    shape = shape_from_config(SHAPES["qwen3-8b"])
    small, large = script.scenes_of(args, Target("qwen3-8b", "", "bfloat16", shape, has_weights=False), CARD)
    assert small.prompt_tokens + 384 == script.LONGEST
    assert large.batch * (large.prompt_tokens + 384) == pytest.approx(script.FILL_TOKENS["qwen3-8b"], rel=0.01)
    args = script.arguments(["--model", "here", "--batches", "16", "--new-tokens", "1000"])
    [scene] = script.scenes_of(args, Target("here", "", "bfloat16", dataclasses.replace(shape, context=2000)), CARD)
    assert scene.prompt_tokens + scene.new_tokens < 2000


def test_a_shape_whose_fill_is_unknown_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Not with a traceback after the start of a server."""
    unknown = sorted(set(SHAPES) - set(script.FILL_TOKENS))
    for name in unknown:
        with pytest.raises(SystemExit):
            script.arguments(["--shape", name])
        assert name in capsys.readouterr().err


def test_turns_go_both_ways(script: ModuleType) -> None:
    """A card that warms up must not favour whoever comes last."""
    assert script.order_of(0) == ["auto", "lockstep", "unified"]
    assert script.order_of(1) == ["unified", "lockstep", "auto"]


def test_auto_is_held_to_the_better_schedule_turn_by_turn(script: ModuleType) -> None:
    found = turns(script, auto=[98.0, 96.0, 50.0], lockstep=[90.0, 90.0, 90.0], unified=[100.0, 100.0, 100.0])
    assert script.over_better(found) == ("unified", [0.5, 0.96, 0.98])
    assert not script.is_met(found)
    assert script.is_met(turns(script, auto=[97.0], lockstep=[100.0], unified=[90.0]))


def test_rounds_by_another_schedule_are_no_measure_of_it(script: ModuleType) -> None:
    """A unified schedule that takes no round would be as fast as lockstep."""
    found = turns(script, auto=[100.0], lockstep=[100.0], unified=[100.0])
    assert script.is_forced(found)
    found[2]["rounds"] = {"lockstep": 1, "unified": 19}
    assert not script.is_forced(found)
    assert not script.is_met(found)
    # auto runs by whichever it likes
    found = turns(script, auto=[100.0], lockstep=[100.0], unified=[100.0])
    found[0]["rounds"] = {"lockstep": 5, "unified": 15}
    assert script.is_met(found)


def test_the_table_says_what_was_missed(script: ModuleType) -> None:
    scene = {"batch": 16, "prompt_tokens": 2048, "new_tokens": 384}
    ours = turns(script, auto=[90.0], lockstep=[100.0], unified=[80.0])
    traced = {"lockstep": {"host": {"iteration_ms": 0.8, "forward_ms": 0.1}, "idle_share": 0.015}}
    records = [
        {**scene, "who": "plain", "turns": turns(script, plain=[50.0]), "traces": {}},
        {**scene, "who": "sparsespec", "turns": ours, "traces": traced},
        {**scene, "batch": 64, "who": "sparsespec", "turns": ours, "traces": {}},
    ]
    failed = [{**scene, "who": "plain", "batch": 64, "reason": "never 64 requests\nand more"}]
    shown = script.table(SimpleNamespace(of=lambda kind, what: records if kind == "result" else failed))
    assert "| 16 x 2,048 | lockstep | 100 | 2.00 |" in shown
    assert "16 x 2,048: auto 0.900 (0.900 to 0.900) of lockstep, the better: MISSED" in shown
    assert "host's own time 0.8 ms a round, 0.1 a forward; GPU idle 1.5 %" in shown
    # without plain there is no ratio to it
    assert "| 64 x 2,048 | lockstep | 100 |  |" in shown
    assert "failure: plain, 64 x 2,048: never 64 requests" in shown


def test_what_was_not_measured_has_no_median(script: ModuleType) -> None:
    """Plain SGLang has no accept length."""
    found = script.medians([turn(script, "plain", i, 50.0 + i, accept_length=None) for i in range(3)])
    assert found["plain"]["tokens_per_s"] == 51.0
    assert "accept_length" not in found["plain"]


def test_a_schedule_that_is_set_rules_and_teaches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times of rounds that `auto` did not choose would be lessons that no server gets."""
    from sglang_sparsespec.speculation.cost_model import ServerCost
    from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice

    server = load_script("bench/study_server.py", monkeypatch)
    path = tmp_path / "control"
    path.write_text("{}")
    control = server.Control(path)
    control.read()
    learned: list[Any] = []
    monkeypatch.setattr(ScheduleChoice, "observe", lambda self, *outcome: learned.append(outcome))
    steps = SimpleNamespace(RoundSteps=type("RoundSteps", (), {"_agreed_schedule": lambda self, chosen: "auto's"}))
    server.install_schedules(control, steps)
    ask = steps.RoundSteps._agreed_schedule
    rounds = [SimpleNamespace(num_steps=8), SimpleNamespace(num_steps=3)]
    asking = SimpleNamespace(_choice=object(), max_steps=8)
    assert [ask(asking, chosen) for chosen in rounds] == ["auto's"] * 2
    cost = ServerCost(weights_ms=1.0, row_ms=0.1, kv_ms=0.001, budget_ratio=0.05, min_budget=64)
    choice = ScheduleChoice(cost, 8)
    choice.observe("lockstep", 4, 1000, 10.0)
    control.now = {"schedule": "unified"}
    # a round of fewer drafts has one schedule only
    assert [ask(asking, chosen) for chosen in rounds] == ["unified", "auto's"]
    choice.observe("unified", 4, 1000, None)
    assert learned == [("lockstep", 4, 1000, 10.0)]
    lines = server.schedules_file(path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [[4, 10.0, "lockstep"], [4, None, "unified"]]
