"""Running requests that wait in host memory while the pool is full, instead of being retracted and prefilled again.

A request that leaves loses the round that is in flight under the overlap scheduler, and nothing else: SGLang drops the
result of a request that is marked retracted, and the request goes on later from the last token that the host has seen.
Its committed KV, [0, kv_committed_len), is written by no forward any more, so it is copied while the device computes.

Shared radix prefixes: a leaving request copies all its committed KV and unlocks its prefix, which stays in the cache as
long as there is room. When it returns, it matches the cache again and shares what is still there; only the rest is
copied back. Pinning instead would let requests that wait fill the pool.

When SGLang calls: `patches/offload.py`. Who moves: `kv/policy.py`. Accounts: `kv/ledger.py`. Copies: `kv/offload.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_sparsespec.adapter.host_memory import AUTO, AUTO_POOLS
from sglang_sparsespec.adapter.rejoin import join_running
from sglang_sparsespec.adapter.round_clock import FULL_SHARE
from sglang_sparsespec.config import OPTION_PREFIX
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.kv.ledger import Entry, OffloadLedger, Place
from sglang_sparsespec.kv.offload import BLOCK_TOKENS, HostPool, Mover, to_host
from sglang_sparsespec.kv.policy import MovePolicy, Seniority, leaving_order, may_enter
from sglang_sparsespec.kv.queues import device_queues

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.kv.queues import Queues
    from sglang_sparsespec.selection.store import SavedSelection

logger = logging.getLogger(__name__)


class RequestState(NamedTuple):
    """What offloading asks of the worker: everything it knows of a request besides KV."""

    save: Callable[[Req, Callable[[torch.Tensor], torch.Tensor]], SavedSelection]
    """Copies of the selection; called where the device has finished the round in flight."""
    load: Callable[[Req, SavedSelection], None]
    """Into the request's new row."""
    forget: Callable[[Req], None]
    """The request stops running."""


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
    ) -> None:
        self._server_args = server_args
        pool = model_runner.token_to_kv_pool
        self._device = model_runner.device
        self._queues = device_queues(self._device, model_runner.forward_stream) if queues is None else queues
        self._req_to_token_pool = model_runner.req_to_token_pool
        self._allocator = model_runner.token_to_kv_pool_allocator
        buffers = [*pool.k_buffer, *pool.v_buffer]
        widths = [buffer[0].numel() for buffer in buffers]
        if server_args.sparsespec_host_memory_gb == AUTO:
            num_bytes = min(num_bytes, AUTO_POOLS * self._allocator.size * sum(widths) * pool.store_dtype.itemsize)
        self._host = HostPool(widths, pool.store_dtype, num_bytes, is_pinned=self._device == "cuda")
        if self._host.num_blocks == 0:
            raise ConfigError(
                f"{OPTION_PREFIX}host-memory-gb",
                server_args.sparsespec_host_memory_gb,
                f"at least {BLOCK_TOKENS * self._host.bytes_per_token / 1e9:.3g} for each rank ({BLOCK_TOKENS} tokens)",
                "Raise it, or leave it out to have requests retracted.",
            )
        logger.info(
            "SPARSESPEC: host memory for KV %.2f GB, %d tokens",
            self._host.num_bytes / 1e9,
            self._host.num_blocks * BLOCK_TOKENS,
        )
        self._mover = Mover(
            self._host,
            lambda: [*pool.k_buffer, *pool.v_buffer],
            self._queues,
            is_staged=self._device == "cuda",
        )
        if self._device == "cuda":
            self._mover.warm_up()
        self._policy = MovePolicy(tokens_per_round=tokens_per_round, pool_tokens=self._allocator.size)
        self._ledger: OffloadLedger[Req] = OffloadLedger(self._host)
        self._state = state
        self._metrics = metrics
        metrics.watch(self._host, self._ledger)

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
        return may_enter(self._seniority(req).rank, [entry.seniority for entry in self._ledger.entries()])

    # Out

    def relieve(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        """Make room for the next step of a running batch, in place of SGLang's retraction.

        What may not move or finds no room on the host is left to SGLang: retracted, and logged.
        """
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
        order = leaving_order([self._seniority(r) for r in batch.reqs], [_is_movable(r) for r in batch.reqs])
        retracted = []
        while not batch.check_decode_mem(selected_indices=keep):
            if self._give_up_slots(batch.tree_cache, Place.LEAVING):
                continue
            if len(keep) > 1 and order:
                index = order.pop(0)
                keep.remove(index)
                req = batch.reqs[index]
                # hooked: offloads, or retracts where the host is full
                batch.release_req(index, len(keep), scheduler.server_args)
                if not self.holds(req):
                    retracted.append(req)
            elif not self._give_up_slots(batch.tree_cache, Place.RETURNING):
                break
        self._start_early_departures(batch, keep, order)
        if len(keep) == len(batch.reqs):
            return
        batch.filter_batch(keep_indices=keep)
        batch.batch_is_full = False
        if retracted:
            self._requeue(scheduler, batch, retracted)

    def _requeue(self, scheduler: Scheduler, batch: ScheduleBatch, retracted: list[Req]) -> None:
        logger.warning(
            "SPARSESPEC: host memory is full (%d requests, %.1f of %.1f GB); retracting %d request(s), which will be "
            "prefilled again. Raise --sparsespec-host-memory-gb, or lower --max-running-requests.",
            len(self._ledger),
            self._host.used_bytes / 1e9,
            self._host.num_bytes / 1e9,
            len(retracted),
        )
        scheduler.metrics_reporter.num_retracted_reqs = len(retracted)
        scheduler.new_token_ratio_tracker.current = NewTokenRatioTracker.estimate_new_token_ratio_after_retract(
            batch.reqs
        )
        for req in retracted:
            scheduler._add_request_to_queue(req, is_retracted=True)

    def _start_early_departures(self, batch: ScheduleBatch, keep: list[int], order: list[int]) -> None:
        """Below the watermark, begin to copy before the pool is full: the slots are free when the copy is done."""
        while order and len(keep) > 1:
            room = self._room(batch.tree_cache) + self._ledger.device_tokens(Place.LEAVING)
            needed = batch.new_tokens_required_next_decode(keep)
            if not self._policy.should_leave(room=room, needed=needed, num_running=len(keep)):
                return
            index = order.pop(0)
            if not self._start_departure(batch.reqs[index]):
                return
            keep.remove(index)

    def take(self, batch: ScheduleBatch, req: Req) -> bool:
        """Offload a request and free its slots before returning; False where it cannot move, and nothing is done."""
        if not _is_movable(req):
            return False
        if not self._start_departure(req):
            self._metrics.refused()
            return False
        self._free_device(batch.tree_cache, self._ledger.entry(req.rid))
        return True

    def _start_departure(self, req: Req) -> bool:
        num_tokens = req.kv_committed_len
        blocks = self._host.alloc(num_tokens)
        if blocks is None:
            return False
        # a copy: the row is rewritten when it has a new owner
        slots = self._req_to_token_pool.req_to_token[req.req_pool_idx, :num_tokens].to(torch.int64, copy=True)
        transfer = self._mover.copy_out(slots, blocks)
        # the round in flight refreshes the selection; the one it leaves behind fits the length we go on from. Among
        # the rounds, so that slots need not wait for it, and the row's next owner comes later by itself
        with self._queues.rounds.entered():
            selection = self._state.save(req, to_host)
        self._state.forget(req)
        # SGLang drops results of requests that are marked so
        req.is_retracted = True
        self._ledger.add(
            Entry(
                request=req,
                seniority=self._seniority(req),
                num_tokens=num_tokens,
                blocks=blocks,
                place=Place.LEAVING,
                transfer=transfer,
                state=selection,
                device_tokens=self._held_tokens(req),
            )
        )
        self._metrics.left(lost_round=not self._server_args.disable_overlap_schedule)
        return True

    def _give_up_slots(self, tree_cache: Any, place: Place) -> bool:
        """Wait for the copy of the last that arrived at `place`, and free its slots; False if there is none.

        A request that was returning stays on the host, where its KV still is.
        """
        moving = self._ledger.entries(place)
        if moving:
            self._free_device(tree_cache, moving[-1])
        return bool(moving)

    def _free_device(self, tree_cache: Any, entry: Entry[Req]) -> None:
        transfer = entry.transfer
        assert transfer is not None, "nothing is under way"
        if not transfer.is_done():
            self._metrics.stalled()
            transfer.wait()
        self._metrics.copied(transfer, "out" if entry.place is Place.LEAVING else "in")
        req = entry.request
        release_kv_cache(req, tree_cache, is_insert=False)
        req.prefix_indices = torch.empty((0,), dtype=torch.int64)
        req.last_node = None
        req.cache_protected_len = 0
        entry.place, entry.transfer, entry.device_tokens = Place.ON_HOST, None, 0

    # Back

    def before_batch(
        self, scheduler: Scheduler, running: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> ScheduleBatch:
        """Collect copies that are done, start others, and let those that are back join the running batch."""
        for entry in self._ledger.entries(Place.LEAVING):
            if entry.transfer is None or entry.transfer.is_done():
                self._free_device(scheduler.tree_cache, entry)
        live = {id(req): req for req in running.reqs if not req.finished()}
        if last_batch is not None and last_batch.forward_mode.is_extend():
            live.update({id(req): req for req in last_batch.reqs if not req.finished()})
        # the chunks of a prompt follow each other without a decode between them; their room is spoken for
        if scheduler.chunked_req is None:
            self._start_returns(scheduler, list(live.values()))
        returned = [e for e in self._ledger.entries(Place.RETURNING) if e.transfer is not None and e.transfer.is_done()]
        if not returned:
            return running
        for entry in returned:
            assert entry.transfer is not None, "nothing is under way"
            self._metrics.copied(entry.transfer, "in")
            self._ledger.remove(entry)
            entry.request.is_retracted = False
        return join_running(scheduler, running, [entry.request for entry in returned], self._load_states(returned))

    def _load_states(self, entries: list[Entry[Req]]) -> Callable[[], None]:
        def load() -> None:
            for entry in entries:
                self._state.load(entry.request, entry.state)

        return load

    def _start_returns(self, scheduler: Scheduler, live: list[Req]) -> None:
        reserve = get_alloc_reserve_per_decode(self._server_args) + self._allocator.page_size
        for entry in self._ledger.entries(Place.ON_HOST):
            returning = self._ledger.entries(Place.RETURNING)
            num_running = len(live) + len(returning)
            if self._is_outranked(scheduler, entry) or scheduler.get_num_allocatable_reqs(num_running) <= 0:
                return
            next_step = sum(max(0, r.kv_committed_len + reserve - r.kv.kv_allocated_len) for r in live if r.kv)
            # nobody else to wait for: SGLang decides what to do if the next step does not fit
            own = entry.num_tokens + (reserve if num_running else 0)
            needed = self._aligned(own) + next_step + len(returning) * reserve
            room = self._room(scheduler.tree_cache)
            if not self._policy.may_return(room=room, needed=needed, num_running=num_running):
                return
            if not self._start_return(scheduler.tree_cache, entry):
                return

    def _is_outranked(self, scheduler: Scheduler, entry: Entry[Req]) -> bool:
        return any(self._seniority(req).rank < entry.seniority.rank for req in scheduler.waiting_queue)

    def _start_return(self, tree_cache: Any, entry: Entry[Req]) -> bool:
        req, num_tokens = entry.request, entry.num_tokens
        token_ids = (req.origin_input_ids + req.output_ids)[:num_tokens]
        match = tree_cache.match_prefix(MatchPrefixParams(key=RadixKey(token_ids, req.extra_key)))
        prefix = match.device_indices
        tree_cache.inc_lock_ref(match.last_device_node)
        missing = self._aligned(num_tokens - len(prefix))
        evict_from_tree_cache(tree_cache, missing)
        slots = self._allocator.alloc(missing)
        if slots is None:
            tree_cache.dec_lock_ref(match.last_device_node)
            return False
        self._req_to_token_pool.alloc([req])
        self._req_to_token_pool.write((req.req_pool_idx, slice(0, len(prefix))), prefix)
        self._req_to_token_pool.write((req.req_pool_idx, slice(len(prefix), len(prefix) + missing)), slots)
        req.prefix_indices = prefix
        req.last_node = match.last_device_node
        req.cache_protected_len = len(prefix)
        req.kv = ReqKvInfo(kv_allocated_len=len(prefix) + missing, swa_evicted_seqlen=0)
        transfer = self._mover.copy_in(slots[: num_tokens - len(prefix)], entry.blocks, start=len(prefix))
        entry.place, entry.transfer, entry.device_tokens = Place.RETURNING, transfer, self._held_tokens(req)
        return True

    # Ends

    def abort(self, scheduler: Scheduler, rid: str, abort_all: bool) -> None:
        """End every request here whose id starts with `rid`, as SGLang does with its waiting queue."""
        for entry in self._ledger.entries():
            if abort_all or entry.request.rid.startswith(rid):
                logger.info("SPARSESPEC: aborted request %s (%s)", entry.request.rid, entry.place.value)
                self._drop(scheduler, entry)
                scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=entry.request.rid), entry.request)

    def retract_all(self, scheduler: Scheduler) -> None:
        """Give every request back to SGLang's queue, to be prefilled again: its KV may belong to other weights."""
        for entry in self._ledger.entries():
            self._drop(scheduler, entry)
            entry.request.reset_for_retract()
            scheduler._add_request_to_queue(entry.request)

    def _drop(self, scheduler: Scheduler, entry: Entry[Req]) -> None:
        if entry.place is not Place.ON_HOST:
            self._free_device(scheduler.tree_cache, entry)
        self._ledger.remove(entry)

    # Numbers

    def _room(self, tree_cache: Any) -> int:
        return self._allocator.available_size() + tree_cache.evictable_size()

    def _held_tokens(self, req: Req) -> int:
        return self._aligned(req.kv.kv_allocated_len) - req.cache_protected_len

    def _seniority(self, req: Req) -> Seniority:
        rank = 0
        if self._server_args.enable_priority_scheduling and req.priority is not None:
            rank = req.priority if self._server_args.schedule_low_priority_values_first else -req.priority
        return Seniority(rank, req.time_stats.scheduler_recv_time, req.rid)

    def _aligned(self, num_tokens: int) -> int:
        page_size = self._allocator.page_size
        return -(-num_tokens // page_size) * page_size


def _is_movable(req: Req) -> bool:
    """Whether the host knows exactly what is committed and the request is to go on.

    After a prefill whose result has not arrived yet the first token is known to the device alone.
    """
    is_settled = req.kv is not None and req.kv_committed_len == req.seqlen - 1
    is_ending = req.finished() or req.to_finish is not None
    return is_settled and not is_ending and req.session is None and req.input_embeds is None
