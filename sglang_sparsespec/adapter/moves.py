"""What becomes of one request on its way to host memory and back: slots, page-table row, prefix, selection, accounts.

Its committed KV, [0, kv_committed_len), is written by no forward any more, so it is copied while the device computes.
Who moves and when: `adapter/offload.py`. Copies: `kv/offload.py`. In what order on the device: `kv/queues.py`.
Invariant: slots of the device are free only when no copy reads or writes them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_sparsespec.adapter.host_memory import AUTO, AUTO_POOLS
from sglang_sparsespec.config import OPTION_PREFIX
from sglang_sparsespec.errors import ConfigError, PinError
from sglang_sparsespec.kv.ledger import Entry, OffloadLedger, Place
from sglang_sparsespec.kv.offload import BLOCK_TOKENS, HostPool, Mover, block_keys, pinned_copy
from sglang_sparsespec.kv.policy import Seniority

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req

    from sglang_sparsespec.adapter.host_ranks import HostRanks
    from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.kv.queues import Queues
    from sglang_sparsespec.selection.store import SavedSelection

logger = logging.getLogger(__name__)

OPTION = f"{OPTION_PREFIX}host-memory-gb"


class RequestState(NamedTuple):
    """What offloading asks of the worker: everything it knows of a request besides KV."""

    save: Callable[[Req, Callable[[torch.Tensor], torch.Tensor]], SavedSelection]
    """Copies of the selection; called where the device has finished the round in flight."""
    load: Callable[[Req, SavedSelection], None]
    """Into the request's new row."""
    forget: Callable[[Req], None]
    """The request stops running."""


class Moves:
    """Moves single requests, and holds those that are away.

    Args:
        num_bytes: host memory of this rank; the smallest of all ranks counts, and with `auto` no more than AUTO_POOLS
            device pools are taken.
        model_runner: SGLang's, with its pools built.
        server_args: for priorities and the overlap scheduler.
        state: see RequestState.
        metrics: told of every move.
        queues: of the device.
        ranks: that move the same requests.

    Raises:
        ConfigError: if the memory does not hold one block, or cannot be pinned.
    """

    def __init__(
        self,
        *,
        num_bytes: int,
        model_runner: Any,
        server_args: SparseSpecServerArgs,
        state: RequestState,
        metrics: OffloadMetrics,
        queues: Queues,
        ranks: HostRanks,
    ) -> None:
        self._server_args = server_args
        self._ranks = ranks
        self._state = state
        self._metrics = metrics
        self._queues = queues
        self._req_to_token_pool = model_runner.req_to_token_pool
        self._allocator = model_runner.token_to_kv_pool_allocator
        pool, is_cuda = model_runner.token_to_kv_pool, model_runner.device == "cuda"
        widths = [buffer[0].numel() for buffer in (*pool.k_buffer, *pool.v_buffer)]
        if server_args.sparsespec_host_memory_gb == AUTO:
            num_bytes = min(num_bytes, AUTO_POOLS * self._allocator.size * sum(widths) * pool.store_dtype.itemsize)
        # once at start, on every rank; from then on equal pools are full at the same moment
        num_bytes = ranks.least("bytes of host memory", num_bytes)
        try:
            self.host = HostPool(widths, pool.store_dtype, num_bytes, block_tokens=BLOCK_TOKENS, is_pinned=is_cuda)
        except PinError as error:
            raise ConfigError(
                OPTION,
                server_args.sparsespec_host_memory_gb,
                f"memory that can be pinned; on this rank, one of {ranks.size}, it cannot: {error}",
                "Lower it, raise the limits on locked memory (`ulimit -l`) or of the container, or give 0 to have "
                "requests retracted.",
            ) from error
        if self.host.num_blocks == 0:
            raise ConfigError(
                OPTION,
                server_args.sparsespec_host_memory_gb,
                f"at least {ranks.size * BLOCK_TOKENS * self.host.bytes_per_token / 1e9:.3g} ({BLOCK_TOKENS} tokens, "
                f"on each of {ranks.size} ranks)",
                "Raise it, or give 0 to have requests retracted.",
            )
        logger.info(
            "SPARSESPEC: host memory for KV %.2f GB, %d tokens",
            self.host.num_bytes / 1e9,
            self.host.num_blocks * BLOCK_TOKENS,
        )
        # asked for at every copy: SGLang may replace its buffers
        self.mover = Mover(self.host, lambda: [*pool.k_buffer, *pool.v_buffer], queues, is_staged=is_cuda)
        if is_cuda:
            self.mover.warm_up()
        self.ledger: OffloadLedger[Req] = OffloadLedger(self.host)
        metrics.watch(self.host, self.ledger)

    def depart(self, req: Req) -> bool:
        """Start to copy a request's KV out; False where host memory is full on some rank, and nothing is done.

        Every rank gets here with the same request: who leaves follows from the page table, the pool and the lists.
        """
        num_tokens = req.kv_committed_len
        keys = self._shareable(req)
        shared = self.host.share(keys)
        start = len(shared) * self.host.block_tokens
        own = self.host.alloc(num_tokens - start)
        if not self._ranks.all_hold("room on the host", {req.rid: own is not None})[req.rid] or own is None:
            self.host.free(shared + (own or []))
            return False
        blocks = shared + own
        # a copy: the row is rewritten when it has a new owner
        slots = self._req_to_token_pool.req_to_token[req.req_pool_idx, start:num_tokens].to(torch.int64, copy=True)
        transfer = self.mover.copy_out(slots, blocks, start)
        self.host.publish(keys, blocks[: len(keys)])
        self._metrics.shared(start * self.host.bytes_per_token)
        # the round in flight refreshes the selection; the one it leaves behind fits the length we go on from. Among
        # the rounds, so that slots need not wait for it, and the row's next owner comes later by itself
        with self._queues.rounds.entered():
            selection = self._state.save(req, pinned_copy)
        self._state.forget(req)
        # SGLang drops results of requests that are marked so
        req.is_retracted = True
        self.ledger.add(
            Entry(
                request=req,
                seniority=self.seniority(req),
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

    def _shareable(self, req: Req) -> list[bytes]:
        """Keys of the full host blocks of the prefix that a request shares with the radix cache, hence with others."""
        prefix = (req.origin_input_ids + req.output_ids)[: min(req.cache_protected_len, req.kv_committed_len)]
        return block_keys(prefix, req.extra_key, self.host.block_tokens)

    def give_up_slots(self, tree_cache: Any, place: Place) -> bool:
        """Wait for the copy of the last that arrived at `place`, and free its slots; False if there is none.

        A request that was returning stays on the host, where its KV still is.
        """
        moving = self.ledger.entries(place)
        if moving:
            self.free_device(tree_cache, moving[-1])
        return bool(moving)

    def free_device(self, tree_cache: Any, entry: Entry[Req]) -> None:
        """Free the slots and the row of a request whose copy is done, or wait for it; it is on the host alone then."""
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

    def start_return(self, tree_cache: Any, entry: Entry[Req]) -> bool:
        """Give a request slots and a row, and start to copy its KV in; False where no slots are free."""
        req, num_tokens = entry.request, entry.num_tokens
        token_ids = (req.origin_input_ids + req.output_ids)[:num_tokens]
        match = tree_cache.match_prefix(MatchPrefixParams(key=RadixKey(token_ids, req.extra_key)))
        prefix = match.device_indices
        tree_cache.inc_lock_ref(match.last_device_node)
        missing = self.aligned(num_tokens - len(prefix))
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
        transfer = self.mover.copy_in(slots[: num_tokens - len(prefix)], entry.blocks, start=len(prefix))
        entry.place, entry.transfer, entry.device_tokens = Place.RETURNING, transfer, self._held_tokens(req)
        return True

    def drop(self, tree_cache: Any, entry: Entry[Req]) -> None:
        """Give up what a request holds, wherever it is."""
        if entry.place is not Place.ON_HOST:
            self.free_device(tree_cache, entry)
        self.ledger.remove(entry)

    def _held_tokens(self, req: Req) -> int:
        return self.aligned(req.kv.kv_allocated_len) - req.cache_protected_len

    def seniority(self, req: Req) -> Seniority:
        """Its rank among requests, on the device or away from it."""
        rank = 0
        if self._server_args.enable_priority_scheduling and req.priority is not None:
            rank = req.priority if self._server_args.schedule_low_priority_values_first else -req.priority
        return Seniority(rank, req.time_stats.scheduler_recv_time, req.rid)

    def aligned(self, num_tokens: int) -> int:
        """Rounded up to whole pages."""
        page_size = self._allocator.page_size
        return -(-num_tokens // page_size) * page_size
