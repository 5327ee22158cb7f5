"""scripts/bench/schedules.py: its loads, its order, and what it makes of turns."""

from __future__ import annotations

import dataclasses
import json
import time
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
    numbers = dict.fromkeys(script.TURN + script.CLOCK, 2.0) | {"tokens_per_s": speed, "rounds": ran}
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
    traced = {"lockstep": {"idle_share": 0.015}}
    ours[1]["host"] = {"iteration_ms": 14.0, "own_ms": 0.8, "launching_ms": 0.25, "launches": 2.0}
    records = [
        {**scene, "what": "scene", "who": "plain", "turns": turns(script, plain=[50.0])},
        {**scene, "what": "scene", "who": "sparsespec", "turns": ours},
        {**scene, "what": "traces", "who": "sparsespec", "traces": traced},
        {**scene, "what": "scene", "batch": 64, "who": "sparsespec", "turns": ours},
    ]
    failed = [{**scene, "what": "scene", "who": "plain", "batch": 64, "reason": "never 64 requests\nand more"}]
    shown = script.table(book_of(records, failed))
    assert "| 16 x 2,048 | lockstep | 100 | 2.00 |" in shown
    assert (
        "16 x 2,048: auto 0.900 (0.900 to 0.900, mean 0.900) of lockstep, the better; rounds alone 1.000: MISSED"
        in shown
    )
    assert "16 x 2,048, lockstep, traced: GPU idle 1.5 %" in shown
    assert "16 x 2,048, lockstep: of an iteration's 14.00 ms the host works 0.80 and launches 2 graphs in 0.25" in shown
    # without plain there is no ratio to it
    assert "| 64 x 2,048 | lockstep | 100 |  |" in shown
    assert "failure: plain, 64 x 2,048: never 64 requests" in shown


def test_the_host_s_time_is_what_is_left_of_an_iteration(script: ModuleType) -> None:
    """Neither waits nor launches; without a GPU nothing is timed."""
    assert script.host_of([]) is None
    iterations = [(14.0, 12.0, 1.5, 2), (15.0, 12.0, 1.0, 2), (90.0, 12.0, 0.5, 9)]
    assert script.host_of(iterations) == {"iteration_ms": 15.0, "own_ms": 2.0, "launching_ms": 1.0, "launches": 2.0}
    assert script.host_notes(turns(script, lockstep=[1.0], auto=[1.0])) == {}


def book_of(results: list[dict[str, Any]], failures: list[dict[str, Any]]) -> SimpleNamespace:
    found = {"result": results, "failure": failures}
    return SimpleNamespace(of=lambda kind, what: [record for record in found[kind] if record["what"] == what])


def test_plain_that_outruns_the_client_counts_by_the_schedulers_clock(script: ModuleType) -> None:
    """A small model on a fast card makes more chunks than a client reads; the ratio would flatter drafts."""
    scene = {"what": "scene", "batch": 256, "prompt_tokens": 2048, "new_tokens": 384}
    slow = [turn(script, "plain", i, 100.0, scheduler_tokens_per_s=200.0) for i in range(2)]
    ours = turns(script, auto=[300.0], lockstep=[300.0], unified=[80.0])
    shown = script.table(
        book_of([{**scene, "who": "plain", "turns": slow}, {**scene, "who": "sparsespec", "turns": ours}], [])
    )
    assert "| 256 x 2,048 | plain | 200* | 1.00 |" in shown
    assert "| 256 x 2,048 | lockstep | 300 | 1.50 |" in shown


def test_rounds_say_what_luck_with_drafts_hides(script: ModuleType) -> None:
    ours = turns(script, auto=[90.0, 99.0], lockstep=[100.0, 100.0], unified=[80.0, 80.0])
    for one in ours:
        one["clock_ms"] = {"auto": 50.5, "lockstep": 50.0, "unified": 60.0}[one["schedule"]]
    assert script.over_better_by_clock(ours) == pytest.approx(50.0 / 50.5)
    ours[0]["clock_ms"] = None
    assert script.over_better_by_clock(ours) is None


def planned(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """A bench of the 8B shape that has measured nothing."""
    monkeypatch.setattr(script, "detect", lambda: CARD)
    args = script.arguments(["--shape", "qwen3-8b", *options])
    shape = shape_from_config(SHAPES["qwen3-8b"])
    target = Target("qwen3-8b", "", "bfloat16", shape, has_weights=False)
    book = SimpleNamespace(has=lambda thing: False)
    return script.Bench(args, book, script.Allowance(args.max_minutes, time.monotonic()), target)


def test_traces_come_behind_all_turns(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a profiler leaves behind must slow no turn; and the last scene's prompts are cached then."""
    bench = planned(script, monkeypatch, "--batches", "16", "64", "128", "--profile", "16", "128")
    assert [(scene.batch, what) for scene, what in bench.to_do("sparsespec")] == [
        *((batch, "scene") for batch in (16, 64, 128)),
        *((batch, "traces") for batch in (128, 16)),
    ]
    assert all(what == "scene" for _, what in bench.to_do("plain"))
    # without a list, all of them
    assert script.arguments(["--tiny", "--profile", "--batches", "4", "8"]).profile == [4, 8]
    assert script.arguments(["--tiny"]).profile == []


def test_no_server_starts_for_a_scene_that_there_is_no_time_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes a minute of a card."""
    bench = planned(script, monkeypatch, "--max-minutes", "1.1")
    monkeypatch.setattr(script, "Server", lambda *args, **options: pytest.fail("it was started"))
    assert not bench.run("sparsespec", tmp_path)


def test_what_a_server_takes_is_learnt_from_its_own_scenes(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is twice as fast as plain: by plain's pace a call would end with a scene's time unused."""
    bench = planned(script, monkeypatch)
    scene = bench.scenes[2]
    first = bench.predicted_s("sparsespec", scene, "scene")
    bench._pace["sparsespec"] = 0.5
    assert bench.predicted_s("sparsespec", scene, "scene") == pytest.approx(first / 2)
    # of plain there are fewer turns, and its first load is short
    assert bench.predicted_s("plain", scene, "scene") < first / 2


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
    asking = SimpleNamespace(_choice=object(), max_steps=8, _in_flight=[])
    assert [ask(asking, chosen) for chosen in rounds] == ["auto's"] * 2
    asking._in_flight = [SimpleNamespace(round=rounds[0]), SimpleNamespace(round=rounds[1])]
    cost = ServerCost(weights_ms=1.0, row_ms=0.1, kv_ms=0.001, budget_ratio=0.05, min_budget=64)
    choice = ScheduleChoice(cost, 8)
    control.now = {"schedule": "unified", "label": "turn 1"}
    # a round of fewer drafts has one schedule only
    assert [ask(asking, chosen) for chosen in rounds] == ["unified", "auto's"]
    # the round before was planned by auto: its results come when the next schedule is set already
    choice.observe("lockstep", 4, 1000, 10.0)
    choice.observe("unified", 4, 1000, None)
    assert learned == [("lockstep", 4, 1000, 10.0)]
    lines = server.schedules_file(path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [[4, 10.0, "lockstep", ""], [4, None, "unified", "turn 1"]]
