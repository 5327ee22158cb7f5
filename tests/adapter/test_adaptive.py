"""Between SGLang's rounds and the controller: which outcome belongs to which round, and which times count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from tests.support.rank_threads import Meeting
from tests.support.schedule_simulator import COSTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def requests(*limits: int | None) -> list[Any]:
    """As much of Req as is read: requests that allow so many drafts."""
    return [
        SimpleNamespace(
            sampling_params=SimpleNamespace(
                custom_params=None if limit is None else {"sparsespec": {"max_draft_tokens": limit}}
            )
        )
        for limit in limits
    ]


@pytest.mark.parametrize(
    ("limits", "num_steps", "planned"),
    [
        ([None, None], 8, None),
        ([None, 3], 8, [8, 3]),
        ([2, 3], 3, [2, 3]),
        ([2, 2], 2, None),
        ([0, 0], 0, None),
        ([100, None], 8, None),
    ],
    ids=str,
)
def test_a_round_drafts_no_more_than_its_requests_may_use(
    limits: list[int | None], num_steps: int, planned: list[int] | None
) -> None:
    """Drafts that nobody may use cost their steps; one request's limit must not be another's."""
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    plan = RoundSteps(SparseSpecConfig()).next_round(requests(*limits), 1000)
    assert (plan.num_steps, plan.limits) == (num_steps, planned)
    tensor = plan.limits_on("cpu")
    assert (None if tensor is None else tensor.tolist()) == planned


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[int], float | None]]:
    """What the controller is told."""
    from sglang_sparsespec.speculation.controller import Controller

    calls: list[tuple[Any, list[int], float | None]] = []
    monkeypatch.setattr(Controller, "observe", lambda self, *args: calls.append(args))
    return calls


def test_times_are_those_between_results(observed: list[Any]) -> None:
    """Under the overlap scheduler a result arrives when the next round is launched; a prefill is no round's time."""
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    clock = Clock()
    steps = RoundSteps(SparseSpecConfig(adaptive=True), clock=clock)
    steps.interrupted()
    for pool in range(3):
        steps.next_round(requests(None, None), pool)
        if pool > 0:
            clock.now += 0.02
            steps.verified([1, 2])
    # a prefill is launched behind round 2, whose results arrive before it runs
    steps.interrupted()
    clock.now += 0.03
    steps.verified([3, 4])
    steps.next_round(requests(None, None), 3)
    clock.now += 5.0
    steps.verified([5, 6])
    steps.next_round(requests(None, None), 4)
    clock.now += 0.04
    steps.verified([7, 8])
    assert [done.pool_tokens for done, _, _ in observed] == [0, 1, 2, 3, 4]
    assert [num_correct for _, num_correct, _ in observed] == [[1, 2], [1, 2], [3, 4], [5, 6], [7, 8]]
    times = [None if ms is None else round(ms) for _, _, ms in observed]
    # the first follows a prefill, as does the fourth
    assert times == [None, 20, 30, None, 40]


def test_drafts_that_were_never_made_did_not_fail(observed: list[Any]) -> None:
    """With n-gram guesses a request may have six drafts of eight; all standing says nothing of the seventh."""
    import torch

    from sglang_sparsespec.adapter.adaptive import RoundSteps

    steps = RoundSteps(SparseSpecConfig(adaptive=True, ngram_assist=2), clock=Clock())
    counts = torch.tensor([6, 8, 8])
    steps.next_round(requests(None, None, 5), 1)
    steps.drafted(counts)
    # the next round's counts are in the same memory before the results of this one are seen
    counts.fill_(1)
    steps.next_round(requests(None, None, None), 2)
    steps.verified([6, 2, 5])
    steps.verified([8, 8, 8])
    assert [done.allowed for done, _, _ in observed] == [(6, 8, 5), (8, 8, 8)]
    # and nobody asks the device where k is fixed
    RoundSteps(SparseSpecConfig()).drafted(counts)


def test_results_that_are_not_ours_are_not_mixed_up(observed: list[Any]) -> None:
    """A result of another size belongs to another round: all pairs after it would be wrong."""
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    steps = RoundSteps(SparseSpecConfig(adaptive=True), clock=Clock())
    steps.next_round(requests(None), 1)
    steps.next_round(requests(None, None), 2)
    steps.verified([1, 1])
    assert observed == []
    steps.verified([1])
    steps.next_round(requests(None), 3)
    steps.verified([1])
    assert [done.pool_tokens for done, _, _ in observed] == [3]


def test_a_profile_is_written_now_and_then_and_read_at_start(tmp_path: Path) -> None:
    """Learnt and lost, or written every round."""
    from sglang_sparsespec.adapter.adaptive import SAVE_EVERY_S, RoundSteps

    path, clock = tmp_path / "rounds.json", Clock()
    config = SparseSpecConfig(adaptive=True, profile=str(path))
    steps = RoundSteps(config, {"card": "H100"}, clock)
    assert not steps.is_warm
    for _ in range(10):
        steps.next_round(requests(None), 100)
        clock.now += SAVE_EVERY_S / 12
        steps.verified([1])
    assert not path.exists()
    steps.next_round(requests(None), 100)
    clock.now += SAVE_EVERY_S / 3
    steps.verified([1])
    assert path.exists()
    assert RoundSteps(config, {"card": "H100"}, clock).is_warm
    with pytest.raises(ConfigError, match=r"rounds\.json: card is 'H100'; it must be 'H200'"):
        RoundSteps(config, {"card": "H200"}, clock)


def test_a_profile_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk must not end a server, nor fill its log."""
    from sglang_sparsespec.adapter.adaptive import SAVE_EVERY_S, RoundSteps

    folder, clock = tmp_path / "gone", Clock()
    folder.mkdir()
    steps = RoundSteps(SparseSpecConfig(adaptive=True, profile=str(folder / "rounds.json")), clock=clock)
    folder.rmdir()
    for _ in range(4):
        steps.next_round(requests(None), 100)
        clock.now += 2 * SAVE_EVERY_S
        steps.verified([1])
    assert caplog.text.count("cannot be written any more") == 1


@pytest.mark.parametrize("is_adaptive", [True, False], ids=["adaptive", "fixed"])
def test_ranks_with_clocks_of_their_own_make_the_same_rounds(tmp_path: Path, is_adaptive: bool) -> None:
    """Ranks that disagree on k hang in the next collective; and a fixed k is nothing to talk about."""
    import random

    from sglang_sparsespec.adapter.adaptive import SAVE_EVERY_S, RoundSteps, StepPlan

    path = tmp_path / "rounds.json"
    config = SparseSpecConfig(adaptive=is_adaptive, profile=str(path) if is_adaptive else None)

    def work(ranks: HostRanks) -> tuple[list[StepPlan], bool]:
        outcomes, clock = random.Random(1), Clock()
        times = random.Random(ranks.rank)
        steps = RoundSteps(config, {"card": "H100"}, clock, ranks)
        plans = []
        for pool in range(300):
            limits = [None, outcomes.choice([None, 0, 3])]
            plans.append(steps.next_round(requests(*limits), 1000 + pool))
            # drafting pays by one clock and not by the other
            clock.now += 0.01 * times.uniform(0.9, 1.1) * (1 + plans[-1].num_steps * (0.01 + ranks.rank))
            steps.verified([min(limit, outcomes.randint(0, 8)) for limit in (plans[-1].limits or [8, 8])])
        # whoever writes it, writes it now
        clock.now += 2 * SAVE_EVERY_S
        (tmp_path / f"knows-{ranks.rank}").write_text(str(steps.status is not None))
        steps.next_round(requests(None), 1)
        path.unlink(missing_ok=True)
        ranks.least("both are here", 0)
        if not ranks.leads:
            steps.verified([1])
        ranks.least("the other had its chance", 0)
        early = path.exists()
        ranks.least("and has looked", 0)
        if ranks.leads:
            steps.verified([1])
        return plans, early

    meeting = Meeting(2)
    (plans, early), (others, _) = meeting.run(work)
    assert plans == others
    assert not early, "rank 0 alone writes"
    assert path.exists() == is_adaptive
    assert meeting.calls.count("rank 0") == (301 if is_adaptive else 0)
    assert len({plan.num_steps for plan in plans}) >= (3 if is_adaptive else 1)
    assert [(tmp_path / f"knows-{rank}").read_text() for rank in range(2)] == [str(is_adaptive), "False"]


def test_every_rank_says_that_k_is_chosen() -> None:
    """A rank without a controller that calls itself fixed."""
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    for config, is_adaptive in ((SparseSpecConfig(adaptive=True), True), (SparseSpecConfig(), False)):
        shown = RoundSteps(config, ranks=HostRanks(None, rank=1, size=2)).describe()
        assert shown == {"adaptive": is_adaptive, "num_steps": 8, "schedule": "lockstep"}


def auto_steps(clock: Clock, **options: Any) -> Any:
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    config = SparseSpecConfig(schedule="auto", num_steps=4, **options)
    return RoundSteps(config, clock=clock, cost=COSTS["1.7b"])


def test_the_schedule_is_chosen_by_the_times_of_rounds_as_they_ran() -> None:
    """Times of lockstep rounds that count as unified ones because that was wanted, and of rounds of another k."""
    clock = Clock()
    steps = auto_steps(clock)
    ms = {"lockstep": 20, "unified": 15}
    ran = []
    for _ in range(200):
        plan = steps.next_round(requests(None, None), 1000)
        steps.runs(plan.schedule)
        ran.append(plan.schedule)
        clock.now += 1e-3 * ms[plan.schedule]
        steps.verified([4, 4])
    # by the model unified is slower, and it is looked at all the same
    assert ran[0] == "lockstep"
    assert set(ran[-20:]) == {"unified"}
    shown = steps.describe()
    assert (shown["schedule"], shown["auto"]["now"]) == ("auto", "unified")
    assert shown["auto"]["round_ms"] == {"lockstep": 20.0, "unified": 15.0}
    assert shown["auto"]["measured_ratio"] == pytest.approx(0.75, abs=0.01)
    assert shown["auto"]["predicted_ratio"] > 1
    # rounds that unified does not take, and a k that is not the server's
    for limits, runs_as in (([None, None], "lockstep"), ([2, 2], None)):
        steps = auto_steps(clock)
        wanted = []
        for _ in range(200):
            plan = steps.next_round(requests(*limits), 1000)
            wanted.append(plan.schedule)
            steps.runs(runs_as or plan.schedule)
            clock.now += 1e-3 * ms[plan.schedule]
            steps.verified([2, 2])
        assert steps.describe()["auto"]["now"] == "lockstep"
        assert "unified" not in steps.describe()["auto"]["round_ms"]
        assert ("unified" in wanted) == (limits == [None, None])


def test_tries_of_a_schedule_do_not_move_k(observed: list[Any]) -> None:
    """k of rounds by the slower schedule taken for k itself; drafts that were never made taken for rejected ones."""
    clock = Clock()
    steps = auto_steps(clock, adaptive=True)
    ms, told = {"lockstep": 20, "unified": 50}, []
    for number in range(100):
        # enough of KV that the cost model begins with all drafts
        plan = steps.next_round(requests(None, None), 400_000)
        # a request's first unified round has fewer drafts than were wanted
        verified = [4, 1] if plan.schedule == "unified" else None
        steps.runs(plan.schedule, verified)
        told.append((plan.schedule, verified))
        clock.now += 1e-3 * ms[plan.schedule]
        steps.verified([1, 1])
        done, _, round_ms = observed[number]
        assert done.allowed == ((4, 1) if verified else (4, 4))
        assert round_ms is None or round(round_ms) == 20
    assert any(schedule == "unified" for schedule, _ in told)
    assert sum(round_ms is not None for _, _, round_ms in observed) > 80
    shown = steps.describe()["auto"]["round_ms"]
    assert shown["unified"] == pytest.approx(50)


def test_ranks_run_rank_0s_schedule() -> None:
    """Ranks that run different forwards never meet again."""
    from sglang_sparsespec.adapter.adaptive import RoundSteps

    told = []

    class Told(HostRanks):
        def _broadcast(self, value: int) -> int:
            told.append(value)
            return 1

    steps = RoundSteps(SparseSpecConfig(schedule="auto"), ranks=Told(None, rank=1, size=2))
    assert steps.next_round(requests(None), 100).schedule == "unified"
    assert told == [0]
    # with another k there is nothing to choose, and every rank knows that
    assert steps.next_round(requests(2), 100).schedule == "lockstep"
    assert told == [0]
    fixed = RoundSteps(SparseSpecConfig(schedule="unified"), ranks=Told(None, rank=1, size=2))
    assert fixed.next_round(requests(None), 100).schedule == "unified"
    assert told == [0]


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_adaptive_on_several_ranks_is_served(
    server_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    """An option that its check still refuses."""
    # the resolution sets it where it is missing
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "all|all")
    assert server_args(sparsespec_adaptive=True, tp_size=tp_size).sparsespec_config.adaptive


def test_a_bad_profile_is_refused_before_anything_is_loaded(server_args: Callable[..., Any], tmp_path: Path) -> None:
    """The scheduler would find out after minutes of loading."""
    (tmp_path / "rounds.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--sparsespec-profile is "):
        server_args(sparsespec_adaptive=True, sparsespec_profile=str(tmp_path / "rounds.json"))


def test_the_identity_names_what_rounds_cost_by(server_args: Callable[..., Any]) -> None:
    """A profile of another model, dtype or policy would pass for this one's."""
    import torch

    from sglang_sparsespec.adapter.memory import identity

    args = server_args(sparsespec_adaptive=True)
    model, cpu = args.get_model_config(), torch.device("cpu")
    base = identity(model, args.sparsespec_config, "torch_native", cpu)
    assert base["card"] == "cpu"
    assert base["architecture"] == "Qwen3ForCausalLM"
    config = SparseSpecConfig(selection="window", num_steps=4, verify_attention="backend")
    other = identity(model, config, "triton", cpu)
    assert {name for name in base if base[name] != other[name]} == {"selection", "num_steps", "attention_backend"}
    # shapes are of the whole model; what differs is what a rank has of it
    two = identity(model, args.sparsespec_config, "torch_native", cpu, num_ranks=2)
    assert {name: value for name, value in two.items() if base[name] != value} == {"num_ranks": "2"}


def test_server_info_shows_what_was_decided() -> None:
    """k changes while a server runs; its options do not show it."""
    from sglang_sparsespec.patches.server_info import add_decisions

    from sglang_sparsespec.adapter.adaptive import RoundSteps

    steps = RoundSteps(SparseSpecConfig(adaptive=True))
    for worker, expected in (
        (SimpleNamespace(describe_rounds=steps.describe), {"version": 1, "sparsespec": steps.describe()}),
        (SimpleNamespace(), {"version": 1}),
    ):
        output = SimpleNamespace(internal_state={"version": 1})
        scheduler: Any = SimpleNamespace(model_worker=worker)
        shown: Any = add_decisions(lambda scheduler, request, output=output: output, scheduler, None)  # type: ignore[arg-type]
        assert shown.internal_state == expected
    assert steps.describe()["num_steps"] == 8
    assert RoundSteps(SparseSpecConfig(num_steps=3)).describe() == {
        "adaptive": False,
        "num_steps": 3,
        "schedule": "lockstep",
    }


def test_the_log_line_and_gauges_say_k_and_why(
    server_args: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who cannot see why drafting is off turns it off for good."""
    from sglang_sparsespec.adapter.metrics import RoundMetrics
    from sglang_sparsespec.speculation.controller import Status
    from sglang_sparsespec.speculation.schedule_choice import ScheduleStatus

    metrics = RoundMetrics(server_args(decode_log_interval=1), 8, is_reporting_rank=True, is_fused=True)
    gauges: dict[str, list[float]] = {}
    metrics._gauges = _Recorder(gauges)  # type: ignore[assignment]
    metrics._reason_gauge = _Reasons(reasons := {})
    metrics.watch(lambda: Status(2, "the fastest by the cost model", 1.5, None))
    with caplog.at_level("INFO"):
        metrics.plan([100], [10])
        metrics.verified([1])
    assert "k 2 (the fastest by the cost model), over plain decoding 1.50 expected, unknown measured" in caplog.text
    assert gauges["num_steps"] == [2]
    assert reasons == {("k", "the fastest by the cost model"): 1}
    metrics.watch(lambda: Status(0, "drafting does not pay", 0.9, None))
    metrics.verified([1])
    assert reasons == {("k", "the fastest by the cost model"): 0, ("k", "drafting does not pay"): 1}
    assert gauges["predicted_speedup"] == [1.5, 0.9]
    assert gauges["measured_speedup"] == [0.0, 0.0]
    metrics.watch(lambda: None)
    caplog.clear()
    with caplog.at_level("INFO"):
        metrics.verified([1])
    assert "over plain decoding" not in caplog.text
    assert "schedule" not in caplog.text
    assert "unified" not in gauges
    decided = ScheduleStatus("unified", "the faster by measured times", 1.1, 0.9, {"lockstep": 2.0, "unified": 1.8})
    metrics.watch(lambda: None, lambda: decided)
    with caplog.at_level("INFO"):
        metrics.verified([1])
    assert "schedule unified (the faster by measured times), a unified round's time over a lockstep" in caplog.text
    assert "1.10 by the cost model, 0.90 measured" in caplog.text
    assert gauges["unified"] == [1]
    assert (gauges["predicted_unified_ratio"], gauges["measured_unified_ratio"]) == ([1.1], [0.9])


class _Reasons:
    """Stands in for the gauge whose value is its label."""

    def __init__(self, values: dict[tuple[str, str], int]) -> None:
        self._values = values

    def labels(self, *, what: str, reason: str, **_: str) -> Any:
        return SimpleNamespace(set=lambda value: self._values.__setitem__((what, reason), value))


class _Recorder:
    """Stands in for the dictionary of gauges."""

    def __init__(self, values: dict[str, list[float]]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(set=lambda value: self._values.setdefault(name, []).append(value))
