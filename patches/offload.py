"""Where SGLang decides what to do when the KV pool is full: requests go to host memory instead of being retracted.

The hooks say when; `adapter/offload.py` does. They are applied in a scheduler process whose host memory is not 0.
Invariant: a request is in one place: a batch, SGLang's queues, or the offloader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
    from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
    from sglang.srt.managers.scheduler_components.load_inquirer import SchedulerLoadInquirer


class Offloader(Protocol):
    """What the hooks ask; see `adapter.offload.Offloader`."""

    def __len__(self) -> int: ...
    def holds(self, req: Req) -> bool: ...
    def device_tokens(self) -> int: ...
    def check_integrity(self) -> None: ...
    def may_enter(self, req: Req) -> bool: ...
    def relieve(self, scheduler: Scheduler, batch: ScheduleBatch) -> None: ...
    def take(self, batch: ScheduleBatch, req: Req) -> bool: ...
    def before_batch(
        self, scheduler: Scheduler, running: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> ScheduleBatch: ...
    def abort(self, scheduler: Scheduler, rid: str, abort_all: bool) -> None: ...
    def retract_all(self, scheduler: Scheduler) -> None: ...


_current: Offloader | None = None
_late: list[Req] | None = None
"""While new requests are held back: those that SGLang puts into its queue on the way (their grammar is ready)."""


def install(offloader: Offloader | None) -> None:
    """Set whom the hooks ask in this process; a process runs one scheduler."""
    global _current
    _current = offloader


def _ours() -> Offloader:
    assert _current is not None, "the worker installs the offloader before the scheduler runs"
    return _current


def offload_instead_of_release(
    original: Callable[..., None], batch: ScheduleBatch, idx: int, remaing_req_count: int, server_args: Any
) -> None:
    if not _ours().take(batch, batch.reqs[idx]):
        original(batch, idx, remaing_req_count, server_args)


def relieve_before_decode(
    original: Callable[..., ScheduleBatch], scheduler: Scheduler, batch: ScheduleBatch
) -> ScheduleBatch:
    size = batch.batch_size()
    batch.filter_batch()
    if not batch.is_empty():
        _ours().relieve(scheduler, batch)
    if batch.batch_size() < size:
        # what SGLang does at the end; it would no longer see that the batch has shrunk
        batch.batch_is_full = False
    return original(scheduler, batch)


def keep_out_of_the_queue(
    original: Callable[..., None], scheduler: Scheduler, req: Req, is_retracted: bool = False
) -> None:
    if _ours().holds(req):
        return
    original(scheduler, req, is_retracted=is_retracted)
    if _late is not None and scheduler.waiting_queue[-1:] == [req] and not _ours().may_enter(req):
        _late.append(scheduler.waiting_queue.pop())


def return_before_scheduling(
    original: Callable[..., NextBatchPlan],
    scheduler: Scheduler,
    running_batch: ScheduleBatch,
    last_batch: ScheduleBatch | None,
) -> NextBatchPlan:
    if len(_ours()) > 0:
        running_batch = _ours().before_batch(scheduler, running_batch, last_batch)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


def hold_back_new_requests(
    original: Callable[..., NextBatchPlan], scheduler: Scheduler, running_batch: ScheduleBatch
) -> NextBatchPlan:
    if len(_ours()) == 0:
        return original(scheduler, running_batch)
    global _late
    before = scheduler.waiting_queue
    held_back = {id(req) for req in before if not _ours().may_enter(req)}
    scheduler.waiting_queue = [req for req in before if id(req) not in held_back]
    _late = late = []
    try:
        plan = original(scheduler, running_batch)
    finally:
        _late = None
    # SGLang may have taken requests from the queue and put others into it
    left = {id(req) for req in scheduler.waiting_queue}
    known = {id(req) for req in before}
    added = [req for req in scheduler.waiting_queue if id(req) not in known]
    scheduler.waiting_queue = [req for req in before if id(req) in held_back or id(req) in left] + added + late
    return plan


def is_not_idle_while_requests_wait(
    original: Callable[..., bool], scheduler: Scheduler, for_health_check: bool = False
) -> bool:
    return original(scheduler, for_health_check) and len(_ours()) == 0


def abort_offloaded(original: Callable[..., None], scheduler: Scheduler, recv_req: AbortReq) -> None:
    _ours().abort(scheduler, recv_req.rid, recv_req.abort_all)
    original(scheduler, recv_req)


def retract_offloaded_on_pause(
    original: Callable[..., Any], scheduler: Scheduler, recv_req: PauseGenerationReqInput
) -> Any:
    result = original(scheduler, recv_req)
    if recv_req.mode == "retract":
        _ours().retract_all(scheduler)
    return result


def count_moving_tokens(
    original: Callable[..., tuple[int, int]], checker: SchedulerInvariantChecker
) -> tuple[int, int]:
    _ours().check_integrity()
    full, swa = original(checker)
    return full + _ours().device_tokens(), swa


def report_offloaded_as_waiting(original: Callable[..., Any], inquirer: SchedulerLoadInquirer) -> Any:
    loads = original(inquirer)
    loads.num_waiting_reqs += len(_ours())
    return loads


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_NO_POLICY = "Not reported yet: SGLang has no interface for what happens to a request when the pool is full."


def _patch(target: str, replacement: Callable[..., Any], why: str, how: str) -> Patch:
    return Patch(
        target=target,
        why=why,
        how=how,
        upstream=_NO_POLICY,
        remove_when="SGLang lets a plugin choose between retracting and offloading, and asks it whom to resume.",
        scope="offload",
        kind="around",
        replacement=replacement,
    )


PATCHES = (
    _patch(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.release_req",
        offload_instead_of_release,
        "A request that loses its memory, to a full pool or to one of higher priority, loses its KV with it.",
        "Copies the KV to host memory and keeps the request, where that is possible; releases it otherwise.",
    ),
    _patch(
        f"{_SCHEDULER}.update_running_batch",
        relieve_before_decode,
        "SGLang retracts when the next step does not fit, the shortest outputs first, and then admits less.",
        "Makes room first, the last arrivals first, so that SGLang finds nothing to retract.",
    ),
    _patch(
        f"{_SCHEDULER}._add_request_to_queue",
        keep_out_of_the_queue,
        "A request preempted by one of higher priority goes to the waiting queue and is prefilled again.",
        "Leaves out a request that waits in host memory.",
    ),
    _patch(
        f"{_SCHEDULER}.get_next_batch_to_run",
        return_before_scheduling,
        "A request with its KV can join decoding without a prefill; SGLang has no way in for it.",
        "Merges requests that are back from host memory into the running batch before anything is scheduled.",
    ),
    _patch(
        f"{_SCHEDULER}.get_new_batch_prefill",
        hold_back_new_requests,
        "New requests would take the room that requests in host memory wait for.",
        "Hides waiting requests from admission while others are in host memory, unless they outrank them.",
    ),
    _patch(
        f"{_SCHEDULER}.is_fully_idle",
        is_not_idle_while_requests_wait,
        "A flush of the cache or an idle check would take requests in host memory for none at all.",
        "Is idle only when no request is in host memory.",
    ),
    _patch(
        f"{_SCHEDULER}.abort_request",
        abort_offloaded,
        "An abort looks at SGLang's own queues and batches.",
        "Ends matching requests in host memory as well.",
    ),
    _patch(
        f"{_SCHEDULER}.pause_generation",
        retract_offloaded_on_pause,
        "A pause in mode `retract` promises that all KV is computed again, possibly with new weights.",
        "Gives requests in host memory back to the waiting queue, without their KV.",
    ),
    _patch(
        f"{_COMPONENTS}.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes",
        count_moving_tokens,
        "SGLang's memory check while busy counts the slots of its batches; those of a copy under way are in none.",
        "Adds them, and checks the accounts of host memory.",
    ),
    _patch(
        f"{_COMPONENTS}.load_inquirer.SchedulerLoadInquirer.get_loads",
        report_offloaded_as_waiting,
        "A load balancer would not see requests in host memory.",
        "Counts them as waiting.",
    ),
)
