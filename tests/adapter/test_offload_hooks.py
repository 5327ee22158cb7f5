"""The hooks around SGLang's scheduler, against an offloader that only answers: what passes through, what does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


class Answers:
    """Holds the requests named in `held`."""

    def __init__(self, *held: str, entering: tuple[str, ...] = (), takes: bool = True) -> None:
        self.held, self.entering, self.takes = set(held), entering, takes
        self.calls: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self.held)

    def holds(self, req: Any) -> bool:
        return req.rid in self.held

    def may_enter(self, req: Any) -> bool:
        return req.rid in self.entering

    def take(self, batch: Any, req: Any) -> bool:
        self.calls.append(("take", req.rid))
        return self.takes

    def relieve(self, scheduler: Any, batch: Any) -> None:
        self.calls.append(("relieve", len(batch.reqs)))
        batch.reqs = batch.reqs[: len(batch.reqs) - len(self.held)]

    def before_batch(self, scheduler: Any, running: Any, last_batch: Any) -> Any:
        self.calls.append(("before_batch", running, last_batch))
        return "merged"

    def abort(self, scheduler: Any, rid: str, abort_all: bool) -> None:
        self.calls.append(("abort", rid, abort_all))

    def retract_all(self, scheduler: Any) -> None:
        self.calls.append(("retract_all",))

    def device_tokens(self) -> int:
        return 7

    def check_integrity(self) -> None:
        self.calls.append(("check_integrity",))


@pytest.fixture
def hooks() -> Iterator[Any]:
    from sglang_sparsespec.patches import offload

    yield offload
    offload.install(None)


def req(rid: str, *, finished: bool = False) -> Any:
    return SimpleNamespace(rid=rid, finished=lambda: finished)


class Batch(SimpleNamespace):
    def __init__(self, *reqs: Any) -> None:
        super().__init__(reqs=list(reqs), batch_is_full=True)

    def batch_size(self) -> int:
        return len(self.reqs)

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self) -> None:
        self.reqs = [req for req in self.reqs if not req.finished()]


@pytest.mark.parametrize("takes", [True, False])
def test_release_is_sglangs_own_where_nothing_moves(hooks: Any, takes: bool) -> None:
    """Released twice, or never."""
    hooks.install(Answers(takes=takes))
    released: list[Any] = []
    hooks.offload_instead_of_release(lambda *args: released.append(args), Batch(req("a"), req("b")), 1, 5, "args")
    assert [args[1:] for args in released] == ([] if takes else [(1, 5, "args")])


def test_a_batch_that_shrinks_may_take_new_requests(hooks: Any) -> None:
    """SGLang reads off the size whether a request has ended; after ours it would not see it, and admit nobody."""
    for held, reqs, is_full in (
        ((), [req("a"), req("b")], True),
        ((), [req("a"), req("b", finished=True)], False),
        (("x",), [req("a"), req("b")], False),
    ):
        answers = Answers(*held)
        hooks.install(answers)
        batch = Batch(*reqs)
        assert hooks.relieve_before_decode(lambda scheduler, batch: batch, None, batch) is batch
        assert batch.batch_is_full is is_full
    answers = Answers()
    hooks.install(answers)
    hooks.relieve_before_decode(lambda scheduler, batch: batch, None, Batch(req("a", finished=True)))
    assert answers.calls == [], "nothing runs"


def test_a_preempted_request_that_is_held_stays_out_of_the_queue(hooks: Any) -> None:
    """It would run twice."""
    queued: list[Any] = []

    def original(scheduler: Any, req: Any, is_retracted: bool) -> None:
        queued.append((req.rid, is_retracted))

    hooks.install(Answers("held"))
    for rid, is_retracted in (("held", False), ("new", False), ("retracted", True)):
        hooks.keep_out_of_the_queue(original, None, req(rid), is_retracted=is_retracted)
    assert queued == [("new", False), ("retracted", True)]


def test_returns_come_before_scheduling(hooks: Any) -> None:
    """A request that returns after admission finds its room taken."""
    answers = Answers("held")
    hooks.install(answers)
    plans = []

    def original(scheduler: Any, running_batch: Any, last_batch: Any) -> str:
        plans.append((running_batch, last_batch))
        return "plan"

    assert hooks.return_before_scheduling(original, "s", running_batch="r", last_batch="l") == "plan"
    assert answers.calls == [("before_batch", "r", "l")]
    hooks.install(Answers())
    hooks.return_before_scheduling(original, "s", running_batch="r", last_batch="l")
    assert plans == [("merged", "l"), ("r", "l")]


@pytest.mark.parametrize("entering", [(), ("b",), ("a", "c"), ("b", "ready")], ids=str)
def test_new_requests_wait_while_others_are_held(hooks: Any, entering: tuple[str, ...]) -> None:
    """A queue that loses, doubles or reorders requests; or one that lets the room go that others wait for."""
    waiting = [req(rid) for rid in "abcd"]
    scheduler = SimpleNamespace(waiting_queue=waiting)
    seen: list[list[str]] = []

    def enqueue(scheduler: Any, req: Any, is_retracted: bool) -> None:
        scheduler.waiting_queue.append(req)

    def original(scheduler: Any, running: Any) -> str:
        # a request whose grammar is ready joins the queue; then the first of it is admitted
        hooks.keep_out_of_the_queue(enqueue, scheduler, req("ready"))
        seen.append([r.rid for r in scheduler.waiting_queue])
        scheduler.waiting_queue = scheduler.waiting_queue[1:]
        return "plan"

    hooks.install(Answers("held", entering=entering))
    assert hooks.hold_back_new_requests(original, scheduler, "r") == "plan"
    assert seen == [list(entering)]
    admitted = entering[:1]
    assert [r.rid for r in scheduler.waiting_queue] == [rid for rid in [*"abcd", "ready"] if rid not in admitted]
    hooks.install(Answers())
    scheduler.waiting_queue = list(waiting)
    hooks.hold_back_new_requests(original, scheduler, "r")
    assert seen[-1] == [*"abcd", "ready"]


@pytest.mark.parametrize(("held", "stock", "expected"), [((), True, True), (("x",), True, False), ((), False, False)])
def test_a_server_that_holds_requests_is_not_idle(
    hooks: Any, held: tuple[str, ...], stock: bool, expected: bool
) -> None:
    """/flush_cache would pull the page table from under them."""
    hooks.install(Answers(*held))
    assert hooks.is_not_idle_while_requests_wait(lambda scheduler, health: stock, None) is expected
    assert (
        hooks.is_not_idle_while_requests_wait(lambda scheduler, health: stock, None, for_health_check=True) is expected
    )


def test_aborts_reach_both_places(hooks: Any) -> None:
    """A prefix of an id, or all: SGLang's own queues are asked as well."""
    answers, stock = Answers("held"), []
    hooks.install(answers)
    message = SimpleNamespace(rid="he", abort_all=False)
    hooks.abort_offloaded(lambda scheduler, m: stock.append(m), None, message)
    assert answers.calls == [("abort", "he", False)]
    assert stock == [message]


@pytest.mark.parametrize(("mode", "calls"), [("retract", [("retract_all",)]), ("in_place", [])])
def test_only_a_pause_that_retracts_gives_kv_up(hooks: Any, mode: str, calls: list[Any]) -> None:
    """An in-place pause promises that requests go on where they were."""
    answers = Answers("held")
    hooks.install(answers)
    hooks.retract_offloaded_on_pause(lambda scheduler, message: None, None, SimpleNamespace(mode=mode))
    assert answers.calls == calls


def test_checks_and_loads_count_what_is_held(hooks: Any) -> None:
    """SGLang's busy check would call the slots of a copy under way a leak; a load balancer would see an idle server."""
    answers = Answers("a", "b")
    hooks.install(answers)
    assert hooks.count_moving_tokens(lambda checker: (100, 3), None) == (107, 3)
    assert answers.calls == [("check_integrity",)]
    loads = SimpleNamespace(num_waiting_reqs=4)
    assert hooks.report_offloaded_as_waiting(lambda inquirer: loads, None).num_waiting_reqs == 6


def test_every_hook_is_in_the_ledger(hooks: Any) -> None:
    """A hook that nobody applies is dead; one that is applied without the option is a change of behaviour at 0."""
    defined = {
        value
        for name, value in vars(hooks).items()
        if callable(value) and getattr(value, "__module__", "") == hooks.__name__
    }
    applied = {patch.replacement for patch in hooks.PATCHES}
    assert {f.__name__ for f in defined - applied} == {"Offloader", "install", "_ours", "_patch"}
    assert {patch.scope for patch in hooks.PATCHES} == {"offload"}
