"""The order of servers, gates and turns, and what a run leaves behind when it is cut off or something fails.

Servers, answers and measurements are replaced; everything between them is the real thing.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.bench import gate, planner, runner, sets, trace
from sglang_sparsespec.bench.cells import Contender, Job, Scene, Target
from sglang_sparsespec.bench.planner import num_starts
from sglang_sparsespec.bench.records import read_records
from sglang_sparsespec.bench.runner import Runner
from sglang_sparsespec.bench.server import ServerError
from sglang_sparsespec.bench.window import NoSteadyStateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sglang_sparsespec.bench.machine import Machine

CONTEXT = {"machine": "x", "commit": "abc"}


class FakeServer:
    """Counts who is up, and with which environment."""

    events: list[tuple[str, str, str | None]]
    running: set[FakeServer]
    broken = ""
    """Servers with this argument do not start."""
    dead = ""
    """Servers of this name die in their first turn."""
    lossy: dict[str, list[str]]
    """By name: what servers say of themselves."""

    start_s = 0.0
    """Of the clock, each start."""

    def __init__(
        self, model: str, *args: str, env: dict[str, str | None], timeout_s: float, request_timeout_s: float
    ) -> None:
        self.name = "ours" if "SPARSESPEC" in args else "plain"
        if "--served-model-name" in args:
            self.name = args[args.index("--served-model-name") + 1]
        self.keep_log = False
        self.env = env
        self.command = ["python", *args]
        self.startup_s = 1.0
        self.timeout_s, self.request_timeout_s = timeout_s, request_timeout_s
        self._args = args

    def __enter__(self) -> FakeServer:
        self.launch()
        self.wait_until_healthy()
        return self

    def launch(self) -> None:
        FakeServer.running.add(self)
        self._ready_at = World.now + FakeServer.start_s

    def wait_until_healthy(self) -> None:
        if FakeServer.broken in self._args:
            FakeServer.running.discard(self)
            raise ServerError("the server died while starting")
        FakeServer.events.append(("start", self.name, self.env["SGLANG_SIMULATE_ACC_LEN"]))
        World.now = max(World.now, self._ready_at)

    def check_alive(self, when: str) -> None:
        if FakeServer.dead == self.name:
            raise ServerError(f"the server died {when}")

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/server_info"
        if self.name == "plain":
            return {"internal_states": [{}]}
        modes = FakeServer.lossy.get(self.name, [])
        lossy = {"verify_sparsity": modes, "verify_kv_ratio": 0.1} if modes else {}
        return {"internal_states": [{"sparsespec": {"steps": {}, "lossy": lossy}}]}

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self in FakeServer.running:
            FakeServer.running.remove(self)
            FakeServer.events.append(("stop", self.name, self.env["SGLANG_SIMULATE_ACC_LEN"]))


class World:
    """What the runner sees instead of servers, and its clock."""

    now = 0.0
    """Seconds; they pass in a test that gives its steps a price."""
    prices: dict[str, Callable[..., float]]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[tuple[str, int, int]] = []
        self.gated: list[str] = []
        self.answer = {"plain": [1, 2], "ours": [1, 2]}
        self.error: Exception | None = None
        self.failing: set[str] = set()
        """Servers of these names die in a turn."""
        FakeServer.events, FakeServer.running = [], set()
        FakeServer.broken = FakeServer.dead = ""
        FakeServer.start_s = World.now = 0.0
        self.prices = {}
        self.limits: list[float] = []
        monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: World.now))
        FakeServer.lossy = {}
        monkeypatch.setattr(runner, "Server", FakeServer)
        monkeypatch.setattr(runner, "warm_up", lambda server, source, scene: self._pay("warm_up", scene))
        monkeypatch.setattr(runner, "measure", self.measure)
        monkeypatch.setattr(gate, "gate_prompts", lambda *args: [[1]])
        monkeypatch.setattr(gate, "answers", self.answers)

    def measure(self, server: FakeServer, source: Any, scene: Scene, seed: int) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        if server.name in self.failing:
            raise ServerError("the server died during /generate")
        self._pay("measure", scene)
        self.limits.append(World.now + server.request_timeout_s)
        self.measured.append((server.name, scene.batch, seed))
        return {"tokens_per_s": 1.0}

    def answers(self, server: FakeServer, prompts: Any, new_tokens: int) -> list[Any]:
        self.gated.append(server.name)
        self._pay("gate")
        tokens = self.answer.get(server.name, [1, 2])
        top = [[[-0.1, token, None], [-9.0, 99, None]] for token in tokens]
        return [{"output_ids": tokens, "meta_info": {"output_top_logprobs": top}}]

    def _pay(self, step: str, *args: Any) -> None:
        World.now += self.prices[step](*args) if step in self.prices else 0.0

    @property
    def starts(self) -> list[tuple[str, str | None]]:
        return [(name, simulated) for event, name, simulated in FakeServer.events if event == "start"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def make(job: Job, machine: Machine, out: Path, **options: Any) -> Runner:
    records = read_records(out / "results.jsonl")
    return Runner("core", (job,), machine, out, records=records, provenance={}, context=CONTEXT, **options)


def kinds(out: Path) -> list[str]:
    return [record["record"] for record in read_records(out / "results.jsonl")]


def test_a_pair_is_gated_and_then_takes_turns(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Both up, output compared before the first number, the same prompts for both in each repeat."""
    assert make(job, h100, tmp_path).run()
    assert world.starts == [("plain", None), ("ours", None)]
    assert world.gated == ["plain", "ours"]
    assert world.measured == [(name, batch, i) for batch in (2, 4) for i in (0, 1) for name in ("plain", "ours")]
    assert kinds(tmp_path) == ["gate"] + ["turn"] * 8


def test_a_server_that_says_lossy_is_labelled(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Options from a file, or spelt as nobody thought of, pass the plan by; and the gate is green, for its prompts are
    short."""
    FakeServer.lossy = {"ours": ["attention"]}
    assert make(job, h100, tmp_path).run()
    records = read_records(tmp_path / "results.jsonl")
    ours = [record for record in records if record["record"] == "gate" or not record["is_baseline"]]
    assert len(ours) == 5
    for record in ours:
        assert record["lossy"] == ["attention"]
        assert record["contender"] == job.contenders[1].name + "-LOSSY"
        assert record["label"].startswith("**LOSSY**: ")
    assert all("LOSSY" not in record["contender"] for record in records if record.get("is_baseline"))
    assert make(job, h100, tmp_path).pending == []


def test_a_finished_run_starts_nothing(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """A server start for nothing costs a minute of a lent card."""
    make(job, h100, tmp_path).run()
    FakeServer.events.clear()
    again = make(job, h100, tmp_path)
    assert again.pending == []
    assert again.run()
    assert world.starts == []


def test_a_run_that_was_cut_off_does_the_rest(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Turns on file stay; the gate is not repeated."""
    make(job, h100, tmp_path).run()
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:4]))
    world.measured.clear()
    world.gated.clear()
    assert make(job, h100, tmp_path).run()
    assert len(world.measured) == 5
    assert world.gated == []


def test_another_configuration_is_measured_anew(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Its gate and its turns: none of the old ones are of it."""
    make(job, h100, tmp_path).run()
    plain, ours = job.contenders
    other = dataclasses.replace(ours, args=(*ours.args, "--sparsespec-sink", "0"))
    world.measured.clear()
    assert make(dataclasses.replace(job, contenders=(plain, other)), h100, tmp_path).run()
    assert len([name for name, *_ in world.measured if name == "ours"]) == 4
    assert world.gated == ["plain", "ours", "ours"]


def test_time_that_is_up_stops_before_the_next_step(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Something that lasts is always done first, or no call would ever get anywhere; then servers go down."""
    world.prices["gate"] = lambda: 1.0
    first = make(job, h100, tmp_path, max_s=0.5)
    assert not first.run()
    assert first.is_out_of_time
    assert world.starts == [("plain", None)]
    assert FakeServer.events[-1][:2] == ("stop", "plain")
    # the reference is there; next comes the gate, and then a turn
    for measured in (0, 1, 2):
        assert not make(job, h100, tmp_path, max_s=-1).run()
        assert len(world.measured) == measured


@pytest.fixture
def core(real_target: Target, shape_target: Target, h100: Machine) -> tuple[Job, ...]:
    request = sets.Request(model=real_target, shapes=(shape_target,), eagle3_draft="/draft")
    return sets.core(h100, request).jobs


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3], ids=str)
def test_core_in_calls_of_eight_minutes(
    world: World, core: tuple[Job, ...], h100: Machine, tmp_path: Path, factor: float
) -> None:
    """A lent card is given for nine minutes at a time: calls end in time, and start again only what they must.

    Twelve starts in one call; each further one has the real model's baseline once more.
    """
    FakeServer.start_s = factor * planner.START_S[True]

    def load_s(scene: Scene, new_tokens: int) -> float:
        [job] = [job for job in core if scene in job.scenes]
        return factor * planner.predicted_load_s(job.target, h100, scene.batch, scene.prompt_tokens, new_tokens)

    world.prices = {
        "gate": lambda: factor * planner.predicted_gate_s(core[0], h100),
        "warm_up": lambda scene: factor * planner.COMPILE_S + load_s(scene, 24),
        "measure": lambda scene: 2.0 + load_s(scene, scene.new_tokens),
    }

    def call(out: Path, max_s: float | None) -> Runner:
        records = read_records(out / "results.jsonl")
        one = Runner("core", core, h100, out, records=records, provenance={}, context=CONTEXT, max_s=max_s)
        one.run()
        return one

    assert not call(tmp_path / "whole", None).pending
    assert len(world.starts) == 12
    FakeServer.events.clear()
    calls, is_done = 0, False
    while not is_done:
        calls, began = calls + 1, World.now
        is_done = not call(tmp_path / "parts", 480).pending
        assert World.now - began < 540
    assert 3 <= calls <= 6
    assert len(world.starts) <= 12 + calls - 1
    assert "failure" not in kinds(tmp_path / "parts")


def test_steps_are_cut_off_with_the_call(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """A server that hangs in start or stream would hold a lent card for hours; and its turn did not fail."""
    world.prices["measure"] = lambda _: 100.0
    make(job, h100, tmp_path, max_s=480).run()
    assert world.limits
    assert max(world.limits) <= 480 + runner.GRACE_S + 100
    World.now, world.error = 0.0, ServerError("no answer from /generate")

    def hang(server: FakeServer, *_: Any, **__: Any) -> dict[str, Any]:
        World.now += server.request_timeout_s
        raise ServerError("no answer from /generate")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure", hang)
        hung = make(job, h100, tmp_path / "hung", max_s=480)
        assert not hung.run()
    assert hung.is_out_of_time
    assert World.now == 480 + runner.GRACE_S
    assert "failure" not in kinds(tmp_path / "hung")


def test_a_baseline_that_dies_starts_no_others(
    world: World, job: Job, small_card: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would start, be gated and fail beside it; a minute of a lent card for each."""
    plain, ours = job.contenders
    others = [dataclasses.replace(ours, name=f"sparsespec/{i}", args=(*ours.args, str(i))) for i in range(3)]

    def measure(server: FakeServer, *_: Any, **__: Any) -> dict[str, Any]:
        FakeServer.dead = "plain"
        raise ServerError("the server died during /flush_cache")

    monkeypatch.setattr(runner, "measure", measure)
    whole = dataclasses.replace(job, contenders=(plain, *others))
    assert not make(whole, small_card, tmp_path).run()
    assert [name for name, _ in world.starts] == ["plain", "ours"]
    failed = {record["pair"] for record in read_records(tmp_path / "results.jsonl") if record["record"] == "failure"}
    assert failed == {other.name for other in others}


@pytest.fixture
def trio(job: Job, ours: Contender) -> Job:
    """All of it fits on a card: servers plain, a and b."""
    others = [
        dataclasses.replace(ours, name=f"sparsespec/{name}", args=(*ours.args, "--served-model-name", name))
        for name in ("a", "b")
    ]
    return dataclasses.replace(job, contenders=(job.contenders[0], *others))


def results(out: Path, kind: str) -> set[tuple[str, int, int]]:
    """Of records of a kind: contender, batch, repeat."""
    records = read_records(out / "results.jsonl")
    return {(r["contender"], r["scene"]["batch"], r["repeat"]) for r in records if r["record"] == kind}


def test_all_servers_of_a_job_start_at_once_and_take_turns(
    world: World, trio: Job, h100: Machine, tmp_path: Path
) -> None:
    """One start's time for all; the baseline is measured once for everybody; there and back, against drift."""
    FakeServer.start_s = 60
    assert make(trio, h100, tmp_path).run()
    assert world.starts == [("plain", None), ("a", None), ("b", None)]
    assert [event for event, *_ in FakeServer.events] == ["start"] * 3 + ["stop"] * 3
    assert World.now == 60
    assert world.gated == ["plain", "a", "b"]
    there = [(name, batch, 0) for batch in (2, 4) for name in ("plain", "a", "b")]
    back = [(name, batch, 1) for batch in (2, 4) for name in ("b", "a", "plain")]
    assert world.measured == there + back
    assert len(world.starts) == num_starts(trio, h100)
    FakeServer.events.clear()
    assert make(trio, h100, tmp_path).run()
    assert world.starts == []


def test_of_servers_that_start_together_one_fails_alone(world: World, trio: Job, h100: Machine, tmp_path: Path) -> None:
    """The next call starts it again, beside the baseline, whose turns are on file."""
    FakeServer.broken = "a"
    assert not make(trio, h100, tmp_path).run()
    scenes = {(batch, repeat) for batch in (2, 4) for repeat in (0, 1)}
    assert results(tmp_path, "failure") == {("sparsespec/a", *scene) for scene in scenes}
    assert {name for name, *_ in world.measured} == {"plain", "b"}
    FakeServer.broken = ""
    FakeServer.events.clear()
    world.measured.clear()
    assert make(trio, h100, tmp_path).run()
    assert world.starts == [("plain", None), ("a", None)]
    assert {name for name, *_ in world.measured} == {"a"}
    assert kinds(tmp_path).count("turn") == 12
    assert "failure" not in kinds(tmp_path)


def test_of_servers_that_are_all_up_one_dies_alone(world: World, trio: Job, h100: Machine, tmp_path: Path) -> None:
    """It goes down at once, for one that hangs would keep the card busy."""
    world.failing = {"a"}
    assert not make(trio, h100, tmp_path).run()
    assert [name for event, name, _ in FakeServer.events if event == "stop"] == ["a", "b", "plain"]
    assert {name for name, *_ in results(tmp_path, "failure")} == {"sparsespec/a"}
    assert len(results(tmp_path, "failure")) == 4
    assert len(world.measured) == 8


@pytest.mark.parametrize("dies", ["starting", "measured"])
def test_a_baseline_that_dies_takes_all_turns_with_it(
    world: World, trio: Job, h100: Machine, tmp_path: Path, dies: str
) -> None:
    """Nothing that follows could be compared; and no server stays behind."""
    if dies == "starting":
        FakeServer.broken = "flashinfer"
    world.failing = {"plain"}
    assert not make(trio, h100, tmp_path).run()
    assert world.measured == []
    assert len(results(tmp_path, "failure")) == 12
    assert not FakeServer.running


def test_servers_that_are_all_up_go_on_after_time_was_up(
    world: World, trio: Job, h100: Machine, tmp_path: Path
) -> None:
    """Each call does what is missing, in order, with those that have something left."""
    world.prices["measure"] = lambda _: 100.0
    first = make(trio, h100, tmp_path, max_s=350)
    assert not first.run()
    assert first.is_out_of_time
    assert not FakeServer.running
    done = list(world.measured)
    assert 3 <= len(done) <= 4
    world.prices.clear()
    assert make(trio, h100, tmp_path).run()
    assert len(set(world.measured)) == len(world.measured) == 12
    assert world.gated == ["plain", "a", "b"]
    # of b, the last turn is missing
    path = tmp_path / "results.jsonl"
    kept = [
        line
        for line, record in zip(path.read_text().splitlines(keepends=True), read_records(path), strict=True)
        if (record["contender"], record.get("repeat"), record.get("scene", {}).get("batch")) != ("sparsespec/b", 1, 4)
    ]
    path.write_text("".join(kept))
    FakeServer.events.clear()
    world.measured.clear()
    assert make(trio, h100, tmp_path).run()
    assert world.measured == [("b", 4, 1)]
    assert world.starts == [("plain", None), ("b", None)]


def test_gates_apart_come_before_all_servers_are_up(
    world: World, trio: Job, shape_target: Target, h200: Machine, tmp_path: Path
) -> None:
    """With simulation off they have servers of their own, and nobody but the baseline beside them."""
    alone = dataclasses.replace(trio, target=shape_target, gate_on=shape_target.name)
    assert make(alone, h200, tmp_path).run()
    assert world.starts == [("plain", None), ("a", None), ("b", None), ("a", "7.16"), ("b", "7.16")]
    assert world.gated == ["plain", "a", "b"]
    assert len(world.measured) == 12
    assert len(world.starts) == num_starts(alone, h200)


def test_core_on_a_large_card_is_one_start_and_its_turns(
    world: World, real_target: Target, h100: Machine, h200: Machine, tmp_path: Path
) -> None:
    """Seven servers of the real model: on the larger card they are up together, and calls in a row end in time."""
    [job] = sets.core(h200, sets.Request(model=real_target)).jobs
    assert len(job.contenders) == 7

    def predicted_s(machine: Machine) -> float:
        return planner.predicted_s((job,), machine, planner.turns(job, machine, CONTEXT))

    assert predicted_s(h200) < 0.5 * predicted_s(h100)
    FakeServer.start_s = planner.TOGETHER_STARTS * planner.START_S[True]
    world.prices = {
        "gate": lambda: planner.predicted_gate_s(job, h200),
        "warm_up": lambda scene: planner.COMPILE_S,
        "measure": lambda scene: planner.predicted_load_s(
            job.target, h200, scene.batch, scene.prompt_tokens, scene.new_tokens
        ),
    }
    calls, is_done = 0, False
    while not is_done:
        calls, began = calls + 1, World.now
        is_done = make(job, h200, tmp_path, max_s=180).run()
        assert World.now - began < 180
    assert 2 <= calls <= 3
    assert len(world.measured) == kinds(tmp_path).count("turn") == 7 * 3 * 2


@pytest.fixture
def shapes(shape_target: Target, plain: Contender, ours: Contender) -> Job:
    return Job(shape_target, (plain, ours), (Scene(128, 512, 2600),), 2, "small")


def test_servers_that_do_not_fit_alternate(world: World, shapes: Job, h100: Machine, tmp_path: Path) -> None:
    """ABAB, simulated acceptance for ours alone, and the real model's gate is not this job's business."""
    assert make(shapes, h100, tmp_path).run()
    assert world.starts == [("plain", None), ("ours", "7.16")] * 2
    assert world.gated == []
    ups = [1 if event == "start" else -1 for event, *_ in FakeServer.events]
    assert max(sum(ups[: i + 1]) for i in range(len(ups))) == 1
    assert len(world.starts) == num_starts(shapes, h100)


def test_random_weights_are_gated_with_simulation_off(
    world: World, shapes: Job, h100: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated acceptance takes wrong drafts for right: output compared under it means nothing."""
    monkeypatch.setenv("SGLANG_SIMULATE_ACC_LEN", "3")
    alone = dataclasses.replace(shapes, gate_on=shapes.target.name)
    assert make(alone, h100, tmp_path).run()
    assert world.starts == [("plain", None), ("ours", None), ("ours", "7.16"), ("plain", None), ("ours", "7.16")]
    assert world.gated == ["plain", "ours"]
    assert len(world.starts) == num_starts(alone, h100)
    [record] = [record for record in read_records(tmp_path / "results.jsonl") if record["record"] == "gate"]
    assert record["has_weights"] is False


def test_a_gate_that_is_left_starts_no_server_for_turns(
    world: World, shapes: Job, h100: Machine, tmp_path: Path
) -> None:
    """The file lacks the gate alone: one server without simulation, and the reference is still there."""
    alone = dataclasses.replace(shapes, gate_on=shapes.target.name)
    make(alone, h100, tmp_path).run()
    path = tmp_path / "results.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if '"record": "gate"' not in line]
    path.write_text("".join(kept))
    FakeServer.events.clear()
    assert make(alone, h100, tmp_path).run()
    assert world.starts == [("ours", None)]
    assert kinds(tmp_path).count("gate") == 1


def test_a_red_gate_is_on_file(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """The table refuses a speed-up by this record."""
    world.answer["ours"] = [1, 3]
    make(job, h100, tmp_path).run()
    [record] = [record for record in read_records(tmp_path / "results.jsonl") if record["record"] == "gate"]
    assert not record["ok"]
    assert "3 instead of 2" in record["report"]


def test_a_server_that_does_not_start_costs_its_own_turns(
    world: World, job: Job, small_card: Machine, tmp_path: Path
) -> None:
    """The others are measured; the failed ones are on file with the reason and come again at the next call."""
    plain, ours = job.contenders
    other = Contender("sparsespec/x", "x", (*ours.args, "--broken"))
    FakeServer.broken = "--broken"
    whole = dataclasses.replace(job, contenders=(plain, other, ours))
    assert not make(whole, small_card, tmp_path).run()
    records = read_records(tmp_path / "results.jsonl")
    assert {r["contender"] for r in records if r["record"] == "turn"} == {plain.name, ours.name}
    failures = [r for r in records if r["record"] == "failure"]
    assert {r["pair"] for r in failures} == {other.name}
    assert "died while starting" in failures[0]["reason"]
    FakeServer.broken = ""
    assert make(whole, small_card, tmp_path).run()
    assert "failure" not in kinds(tmp_path)


def test_a_batch_that_was_never_full_is_a_failure(world: World, job: Job, h100: Machine, tmp_path: Path) -> None:
    """Its rate would be that of a smaller batch."""
    world.error = NoSteadyStateError("never 2 requests decoded at the same time")
    assert not make(job, h100, tmp_path).run()
    assert kinds(tmp_path).count("failure") == 8


def test_rounds_are_traced_once(
    world: World, job: Job, h100: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trace a batch of 64 or more, of ours alone, and none again in a run that goes on."""
    traced = []

    def record(server: FakeServer, source: Any, scene: Scene, folder: Path) -> Path:
        traced.append((server.name, scene))
        return folder / "x.trace.json.gz"

    monkeypatch.setattr(trace, "record", record)
    monkeypatch.setattr(trace, "summarise", lambda path: {"idle_share": 0.01})
    scenes = (Scene(2, 64, 8), Scene(64, 64, 8), Scene(64, 128, 8))
    for _ in range(2):
        make(dataclasses.replace(job, scenes=scenes), h100, tmp_path, profile=True).run()
    assert traced == [("ours", scenes[1])]
    assert kinds(tmp_path).count("trace") == 1
    # one for which the time was up is not lost
    path = tmp_path / "results.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if '"record": "trace"' not in line]
    path.write_text("".join(kept))
    FakeServer.events.clear()
    make(dataclasses.replace(job, scenes=scenes), h100, tmp_path, profile=True).run()
    assert (len(traced), world.starts) == (2, [("plain", None), ("ours", None)])


@pytest.mark.parametrize(
    ("outputs", "ok"), [([[5, 6, 7]], True), ([[5, 8, 7]], False), ([[9, 6, 7]], False)], ids=["same", "wrong", "tie"]
)
def test_gate_rule(outputs: list[list[int]], ok: bool) -> None:
    """A wrong token is red, and so is a run of ties: with one equal token in twenty a tolerance excuses everything."""
    top = [[[-1.0, token, None], [-1.2, 9, None]] for token in (5, 6, 7)]
    reference = [{"output_ids": [5, 6, 7], "meta_info": {"output_top_logprobs": top}}]
    verdict = gate.judge(reference, [{"output_ids": ids} for ids in outputs], "bfloat16")
    assert verdict["ok"] is ok
