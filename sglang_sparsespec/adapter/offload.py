"""Running requests that wait in host memory while the pool is full, instead of being retracted and prefilled again.

A request that leaves loses the round that is in flight under the overlap scheduler, and nothing else: SGLang drops the
result of a request that is marked retracted, and the request goes on later from the last token that the host has seen.
Its committed KV, [0, kv_committed_len), is written by no forward any more, so it is copied while the device computes.

Shared radix prefixes: a leaving request unlocks its prefix, which stays in the cache as long as there is room, and
copies its committed KV, but for full blocks of the prefix that another has brought to the host. When it returns, it
matches the cache again and shares what is still there; only the rest is copied back. Pinning the prefix in the pool
instead would let requests that wait fill it.

Tensor parallelism: each rank moves its own heads of the same requests at the same time. What is asked for here follows
from state that is equal on all ranks, and from whether copies are done, which `_done` and `Moves.depart` agree on.

When SGLang calls: `patches/offload.py`. Who moves: `kv/policy.py`. How one request moves: `adapter/moves.py`.
"""

from __future__ import annotations

import logging
import time
import weakref
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.adapter.moves import Moves
from sglang_sparsespec.adapter.rejoin import join_running
from sglang_sparsespec.adapter.round_clock import FULL_SHARE
from sglang_sparsespec.kv.ledger import Entry, Place
from sglang_sparsespec.kv.policy import MovePolicy, Stay, leaving_order, may_enter, precedes
from sglang_sparsespec.kv.queues import device_queues

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_sparsespec.adapter.moves import RequestState
    from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.kv.queues import Queues

logger = logging.getLogger(__name__)


class Offloader:
    """Moves requests between the device pool and host memory.

    Args:
        num_bytes: host memory of this rank.
        tokens_per_round: tokens that a request commits in a round at most.
        model_runner: SGLang's, with its pools built.
        server_args: for priorities and the overlap scheduler.
        state: see RequestState.
        metrics: told of every move.
        queues: default: those of the model runner's device.
        ranks: schedulers that move the same requests; default: this one alone.
    """

    def __init__(
        self,
        *,
        num_bytes: int,
        tokens_per_round: int,
        model_runner: Any,
        server_args: SparseSpecServerArgs,
        state: RequestState,
        metrics: OffloadMetrics,
        queues: Queues | None = None,
        ranks: HostRanks | None = None,
    ) -> None:
        self._server_args = server_args
        self._ranks = ranks or HostRanks()
        self._allocator = model_runner.token_to_kv_pool_allocator
        self._moves = Moves(
            num_bytes=num_bytes,
            model_runner=model_runner,
            server_args=server_args,
            state=state,
            metrics=metrics,
            queues=device_queues(model_runner.device, model_runner.forward_stream) if queues is None else queues,
            ranks=self._ranks,
        )
        self._ledger = self._moves.ledger
        self._policy = MovePolicy(tokens_per_round=tokens_per_round, pool_tokens=self._allocator.size)
        self._state = state
        self._metrics = metrics
        self._round = 0
        """Decode steps so far; equal on all ranks, as clocks are not."""
        self._stays: weakref.WeakKeyDictionary[Req, Stay] = weakref.WeakKeyDictionary()
        """Of all requests that have ever left, as long as SGLang knows them."""

    # What the scheduler asks

    def __len__(self) -> int:
        """Requests that are neither running nor in SGLang's own queues."""
        return len(self._ledger)

    def holds(self, req: Req) -> bool:
        return req.rid in self._ledger

    def device_tokens(self) -> int:
        """Slots that no batch accounts for, because the copy of their owner is under way."""
        return self._ledger.device_tokens()

    def check_integrity(self) -> None:
        """Raise AccountError unless the accounts balance."""
        self._ledger.check_integrity()

    def may_enter(self, req: Req) -> bool:
        """Whether a waiting request may be admitted before those in host memory."""
        offloaded = [entry.seniority for entry in self._ledger.entries()]
        return may_enter(self._moves.seniority(req), offloaded, has_run=_has_run(req))

    # Out

    def relieve(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        """Make room for the next step of a running batch, in place of SGLang's retraction.

        What finds no room on the host is retracted, and logged; so is what may not move, once nothing else is left
        but the senior of the batch, which always stays.
        """
        self._round += 1
        self._relieve(scheduler, batch)
        last = scheduler.last_batch
        self._metrics.clock.tick(
            follows_round=last is not None and not last.forward_mode.is_extend(),
            is_full=self._room(batch.tree_cache) <= (1 - FULL_SHARE) * self._allocator.size,
            out=bool(self._ledger.entries(Place.LEAVING)),
            back=bool(self._ledger.entries(Place.RETURNING)),
        )

    def _relieve(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        keep = list(range(len(batch.reqs)))
        room = self._room(batch.tree_cache)
        needed = batch.new_tokens_required_next_decode()
        if needed <= room and not self._policy.should_leave(room=room, needed=needed, num_running=len(keep)):
            return
        order = leaving_order(
            [self._moves.seniority(req) for req in batch.reqs],
            [_is_movable(req) for req in batch.reqs],
            [self._is_settling(req) for req in batch.reqs],
        )
        retracted, num_fixed = [], 0
        while not batch.check_decode_mem(selected_indices=keep):
            if self._moves.give_up_slots(batch.tree_cache, Place.LEAVING):
                continue
            if order.movable:
                index = order.movable.pop(0)
            elif self._moves.give_up_slots(batch.tree_cache, Place.RETURNING):
                continue
            elif order.settling:
                index = order.settling.pop(0)
            elif order.fixed:
                index = order.fixed.pop(0)
                # one that ends anyway is no refusal
                num_fixed += not _is_ending(batch.reqs[index])
            else:
                break
            keep.remove(index)
            req = batch.reqs[index]
            # hooked: offloads, or retracts what cannot move and where the host is full
            batch.release_req(index, len(keep), scheduler.server_args)
            if not self.holds(req):
                retracted.append(req)
        self._start_early_departures(batch, keep, order.movable)
        if len(keep) == len(batch.reqs):
            return
        batch.filter_batch(keep_indices=keep)
        batch.batch_is_full = False
        if retracted:
            self._requeue(scheduler, batch, retracted, num_fixed)

    def _requeue(self, scheduler: Scheduler, batch: ScheduleBatch, retracted: list[Req], num_fixed: int) -> None:
        level = logging.WARNING if self._ranks.leads else logging.DEBUG
        if num_fixed:
            logger.log(
                level,
                "SPARSESPEC: the pool is full and nobody is left that could move but the oldest request, which stays; "
                "retracting %d request(s) whose first token is not known yet, or that cannot move. Raise "
                "--schedule-conservativeness, so that fewer are admitted.",
                num_fixed,
            )
        num_refused = sum(not _is_ending(req) for req in retracted) - num_fixed
        if num_refused > 0:
            logger.log(
                level,
                "SPARSESPEC: host memory is full (%d requests, %.1f of %.1f GB); retracting %d request(s), which will "
                "be prefilled again. Raise --sparsespec-host-memory-gb, or lower --max-running-requests.",
                len(self._ledger),
                self._moves.host.used_bytes / 1e9,
                self._moves.host.num_bytes / 1e9,
                num_refused,
            )
        reporter = scheduler.metrics_reporter
        reporter.num_retracted_reqs = len(retracted)
        if reporter.enable_metrics:
            reporter.metrics_collector.increment_retracted_reqs(
                num_retracted_reqs=len(retracted),
                num_retracted_input_tokens=sum(len(req.origin_input_ids) for req in retracted),
                num_retracted_output_tokens=sum(len(req.output_ids) for req in retracted),
            )
        scheduler.new_token_ratio_tracker.current = NewTokenRatioTracker.estimate_new_token_ratio_after_retract(
            batch.reqs
        )
        for req in retracted:
            scheduler._add_request_to_queue(req, is_retracted=True)
        self._put_retracted_first(scheduler)

    def _put_retracted_first(self, scheduler: Scheduler) -> None:
        """SGLang appends them to its queue, where they would wait for all who have come since."""
        queue = scheduler.waiting_queue
        retracted = sorted((req for req in queue if _has_run(req)), key=self._moves.seniority)
        scheduler.waiting_queue = retracted + [req for req in queue if not _has_run(req)]

    def _start_early_departures(self, batch: ScheduleBatch, keep: list[int], movable: list[int]) -> None:
        """Below the watermark, begin to copy before the pool is full: the slots are free when the copy is done."""
        while movable:
            room = self._room(batch.tree_cache) + self._ledger.device_tokens(Place.LEAVING)
            needed = batch.new_tokens_required_next_decode(keep)
            if not self._policy.should_leave(room=room, needed=needed, num_running=len(keep)):
                return
            index = movable.pop(0)
            if not self._depart(batch.reqs[index]):
                return
            keep.remove(index)

    def _depart(self, req: Req) -> bool:
        if not self._moves.depart(req):
            return False
        stay = self._stays.setdefault(req, Stay())
        stay.num_moves += 1
        self._metrics.moved(stay.num_moves, was_settling=stay.is_settling(self._round))
        return True

    def _is_settling(self, req: Req) -> bool:
        stay = self._stays.get(req)
        return stay is not None and stay.is_settling(self._round)

    def take(self, batch: ScheduleBatch, req: Req) -> bool:
        """Offload a request and free its slots before returning; False where it cannot move, and nothing is done.

        A refusal is counted, for SGLang retracts the request then; not where the request is about to end anyway.
        """
        if not _is_movable(req) or not self._depart(req):
            if not _is_ending(req):
                self._metrics.refused()
            return False
        self._moves.free_device(batch.tree_cache, self._ledger.entry(req.rid))
        return True

    # Back

    def before_batch(
        self, scheduler: Scheduler, running: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> ScheduleBatch:
        """Collect copies that are done, start others, and let those that are back join the running batch."""
        self._end_overdue(scheduler)
        for entry in self._done(Place.LEAVING):
            self._moves.free_device(scheduler.tree_cache, entry)
        live = {id(req): req for req in running.reqs if not req.finished()}
        if last_batch is not None and last_batch.forward_mode.is_extend():
            live.update({id(req): req for req in last_batch.reqs if not req.finished()})
        # the chunks of a prompt follow each other without a decode between them; their room is spoken for
        if scheduler.chunked_req is None:
            self._start_returns(scheduler, list(live.values()))
        returned = self._done(Place.RETURNING)
        if not returned:
            return running
        for entry in returned:
            assert entry.transfer is not None, "nothing is under way"
            self._metrics.copied(entry.transfer, "in")
            self._ledger.remove(entry)
            entry.request.is_retracted = False
            self._stays.setdefault(entry.request, Stay()).returned_in = self._round
        return join_running(scheduler, running, [entry.request for entry in returned], self._load_states(returned))

    def _done(self, place: Place) -> list[Entry[Req]]:
        """Those at `place` whose copies are done on every rank; the senior first.

        Every rank asks in the same iterations about the same entries: the hook calls while the ledger holds any, and
        the ledger changes by decisions that are equal on all ranks. Nobody is asked while nothing is under way.
        """
        entries = {entry.seniority.rid: entry for entry in self._ledger.entries(place)}
        if not entries:
            return []
        own = {rid: entry.transfer is None or entry.transfer.is_done() for rid, entry in entries.items()}
        agreed = self._ranks.all_hold(place.value, own)
        return [entry for rid, entry in entries.items() if agreed[rid]]

    def _load_states(self, entries: list[Entry[Req]]) -> Callable[[], None]:
        def load() -> None:
            for entry in entries:
                self._state.load(entry.request, entry.state)

        return load

    def _start_returns(self, scheduler: Scheduler, live: list[Req]) -> None:
        settling = sum(self._is_settling(req) for req in live)
        reserve = get_alloc_reserve_per_decode(self._server_args) + self._allocator.page_size
        for entry in self._ledger.entries(Place.ON_HOST):
            returning = self._ledger.entries(Place.RETURNING)
            num_running = len(live) + len(returning)
            if self._is_outranked(scheduler, entry) or scheduler.get_num_allocatable_reqs(num_running) <= 0:
                return
            next_step = sum(max(0, r.kv_committed_len + reserve - r.kv.kv_allocated_len) for r in live if r.kv)
            # nobody else to wait for: SGLang decides what to do if the next step does not fit
            own = entry.num_tokens + (reserve if num_running else 0)
            needed = self._moves.aligned(own) + next_step + len(returning) * reserve
            room = self._room(scheduler.tree_cache)
            num_settling = settling + len(returning)
            if not self._policy.may_return(
                room=room, needed=needed, num_running=num_running, num_settling=num_settling
            ):
                return
            if not self._moves.start_return(scheduler.tree_cache, entry):
                return

    def _is_outranked(self, scheduler: Scheduler, entry: Entry[Req]) -> bool:
        return any(
            precedes(self._moves.seniority(req), entry.seniority, has_run=_has_run(req))
            for req in scheduler.waiting_queue
        )

    # Ends

    def abort(self, scheduler: Scheduler, rid: str, abort_all: bool) -> None:
        """End every request here whose id starts with `rid`, as SGLang ends one that runs."""
        for entry in self._ledger.entries():
            if abort_all or entry.request.rid.startswith(rid):
                if self._ranks.leads:
                    logger.info("SPARSESPEC: aborted request %s (%s)", entry.request.rid, entry.place.value)
                self._end(scheduler, entry, FINISH_ABORT())

    def _end_overdue(self, scheduler: Scheduler) -> None:
        """SGLang's limit on the time that a request runs, which it looks for in its running batch: those here count."""
        timeout_s = envs.SGLANG_REQ_RUNNING_TIMEOUT.get()
        if timeout_s <= 0:
            return
        deadline = time.perf_counter() - timeout_s
        entries = self._ledger.entries()
        overdue = {e.seniority.rid: 0 < e.request.time_stats.forward_entry_time < deadline for e in entries}
        # each rank has a clock of its own; all come by here in the same iterations, as for `_done`
        agreed = self._ranks.all_hold("running for too long", overdue)
        for entry in entries:
            if agreed[entry.seniority.rid]:
                reason = FINISH_ABORT("Request running timeout reached.", HTTPStatus.SERVICE_UNAVAILABLE)
                self._end(scheduler, entry, reason)

    def _end(self, scheduler: Scheduler, entry: Entry[Req], reason: FINISH_ABORT) -> None:
        """As SGLang does when a running request ends: the client gets the output so far, the counts and the reason."""
        self._moves.drop(scheduler.tree_cache, entry)
        req = entry.request
        req.to_finish = reason
        req.update_finish_state()
        if req.multimodal_inputs is not None:
            req.multimodal_inputs.release_features()
        req.time_stats.set_completion_time()
        scheduler.output_streamer.stream_output([req], req.return_logprob)

    def retract_all(self, scheduler: Scheduler) -> None:
        """Give every request back to SGLang's queue, to be prefilled again: its KV may belong to other weights."""
        for entry in self._ledger.entries():
            self._moves.drop(scheduler.tree_cache, entry)
            entry.request.reset_for_retract()
            scheduler._add_request_to_queue(entry.request)
        self._put_retracted_first(scheduler)

    # Numbers

    def _room(self, tree_cache: Any) -> int:
        return self._allocator.available_size() + tree_cache.evictable_size()


def _is_movable(req: Req) -> bool:
    """Whether the host knows exactly what is committed and the request is to go on.

    After a prefill whose result has not arrived yet the first token is known to the device alone.
    """
    is_settled = req.kv is not None and req.kv_committed_len == req.seqlen - 1
    return is_settled and not _is_ending(req) and req.session is None and req.input_embeds is None


def _has_run(req: Req) -> bool:
    """Of a request in SGLang's queue: whether it was retracted."""
    return req.retraction_count > 0


def _is_ending(req: Req) -> bool:
    return req.finished() or req.to_finish is not None
