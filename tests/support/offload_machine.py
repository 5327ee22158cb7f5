"""As much of a scheduler as the offloader sees: SGLang's own pools, radix cache, requests and batches; no server."""

from __future__ import annotations

import itertools
from array import array
from types import SimpleNamespace
from typing import Any

import torch

from sglang_sparsespec.kv import offload as copies

POOL_TOKENS, NUM_ROWS, LAYERS = 512, 8, 2
K1 = 9


class Machine:
    """As much of a scheduler as the offloader sees, around real pools; `run` puts requests on it as rounds would."""

    def __init__(
        self, args: Any, *, is_radix: bool, host_blocks: int = 40, queues: Any = None, ranks: Any = None
    ) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode
        from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
        from sglang.srt.mem_cache import allocation_sizing
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.chunk_cache import ChunkCache
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixCache
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        from sglang_sparsespec.adapter.moves import RequestState
        from sglang_sparsespec.adapter.offload import Offloader
        from sglang_sparsespec.adapter.offload_metrics import OffloadMetrics

        self.args, page_size = args, args.page_size
        self.reserved_tokens: int = allocation_sizing.get_alloc_reserve_per_decode(args)
        self.rows = ReqToTokenPool(NUM_ROWS, 256, "cpu", False)
        self.kv = MHATokenToKVPool(POOL_TOKENS, page_size, torch.float32, 2, 4, LAYERS, "cpu", False)
        for buffer in self.buffers:
            buffer.normal_()
        self.allocator = (
            TokenToKVPoolAllocator(POOL_TOKENS, torch.float32, "cpu", self.kv, False)
            if page_size == 1
            else PagedTokenToKVPoolAllocator(POOL_TOKENS, page_size, torch.float32, "cpu", self.kv, False)
        )
        params = CacheInitParams(not is_radix, self.rows, self.allocator, page_size)
        self.tree = RadixCache(params) if is_radix else ChunkCache(params)
        stream = torch.cpu.Stream()
        algorithm = SpeculativeAlgorithm.from_string("SPARSESPEC")
        self.sent: list[Any] = []
        self.scheduler: Any = SimpleNamespace(
            server_args=args,
            device="cpu",
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            model_config=SimpleNamespace(vocab_size=259, is_encoder_decoder=False),
            enable_overlap=not args.disable_overlap_schedule,
            spec_algorithm=algorithm,
            future_map=algorithm.create_future_map("cpu", self.rows),
            forward_stream=stream,
            schedule_stream=stream,
            forward_stream_ctx=torch.cpu.stream(stream),
            chunked_req=None,
            waiting_queue=[],
            get_num_allocatable_reqs=lambda running: self.rows.available_size(),
            output_streamer=SchedulerOutputStreamer(
                send_to_detokenizer=SimpleNamespace(send_output=self.sent.append),
                tree_cache=self.tree,
                ps=SimpleNamespace(dp_rank=0, attn_tp_rank=0),
                server_args=args,
                is_generation=True,
                spec_algorithm=algorithm,
                disaggregation_mode=DisaggregationMode.NULL,
                enable_hicache_storage=lambda: False,
            ),
            last_batch=None,
            metrics_reporter=SimpleNamespace(
                num_retracted_reqs=0,
                enable_metrics=True,
                metrics_collector=SimpleNamespace(increment_retracted_reqs=self._count_retracted),
            ),
            new_token_ratio_tracker=SimpleNamespace(current=0.1),
            _add_request_to_queue=lambda req, is_retracted=False: self.scheduler.waiting_queue.append(req),
        )
        self.retracted = {"num_retracted_reqs": 0, "num_retracted_input_tokens": 0, "num_retracted_output_tokens": 0}
        self.saved: dict[int, Any] = {}
        self.forgotten: list[str] = []
        block_bytes = copies.BLOCK_TOKENS * 2 * LAYERS * 8 * 4
        self.metrics = OffloadMetrics(args, is_reporting_rank=True)
        self.offloader = Offloader(
            num_bytes=host_blocks * block_bytes,
            tokens_per_round=K1,
            model_runner=SimpleNamespace(
                device="cpu",
                forward_stream=stream,
                req_to_token_pool=self.rows,
                token_to_kv_pool=self.kv,
                token_to_kv_pool_allocator=self.allocator,
            ),
            server_args=args,
            state=RequestState(
                save=lambda req, copy: copy(torch.tensor([req.req_pool_idx])),  # type: ignore[arg-type,return-value]
                load=lambda req, state: self.saved.update({req.req_pool_idx: int(state)}),  # type: ignore[call-overload]
                forget=lambda req: self.forgotten.append(req.rid),
            ),
            metrics=self.metrics,
            queues=queues,
            ranks=ranks,
        )
        self._arrivals = itertools.count(1)
        self._requests: list[Any] = []
        self._occupied = 0

    @property
    def queued(self) -> list[Any]:
        return self.scheduler.waiting_queue  # type: ignore[no-any-return]

    def _count_retracted(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self.retracted[name] += number

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [*self.kv.k_buffer, *self.kv.v_buffer]

    def request(self, prompt: list[int], num_outputs: int, rid: str | None = None) -> Any:
        """After `num_outputs` outputs: its prompt is in the radix cache, slots for the next round are reserved."""
        from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
        from sglang.srt.sampling.sampling_params import SamplingParams

        arrival = next(self._arrivals)
        req = Req(rid or f"r{arrival}", "", array("q", prompt), SamplingParams(max_new_tokens=50))
        req.time_stats.scheduler_recv_time = float(arrival)
        req.init_next_round_input(self.tree)
        self.tree.inc_lock_ref(req.last_node)
        self.rows.alloc([req])
        committed = len(prompt) + num_outputs - 1
        page = self.args.page_size
        start = len(req.prefix_indices)
        allocated = -(-(committed + self.reserved_tokens) // page) * page
        slots = self.allocator.alloc(allocated - start)
        assert slots is not None
        self.rows.write((req.req_pool_idx, slice(0, start)), req.prefix_indices)
        self.rows.write((req.req_pool_idx, slice(start, allocated)), slots)
        req.kv = ReqKvInfo(kv_allocated_len=allocated, swa_evicted_seqlen=0)
        req.kv_committed_len = len(prompt)
        req.set_extend_range(start, len(prompt))
        self.tree.cache_unfinished_req(req)
        req.output_ids.extend(range(100, 100 + num_outputs))
        req.kv_committed_len = committed
        self._requests.append(req)
        return req

    def occupy(self, num_tokens: int) -> torch.Tensor:
        """Slots that belong to nobody here, until `vacate`."""
        slots = self.allocator.alloc(num_tokens)
        assert slots is not None
        self._occupied += num_tokens
        return slots

    def vacate(self, slots: torch.Tensor) -> None:
        self.allocator.free(slots)
        self._occupied -= len(slots)

    def reserve(self, batch: Any) -> None:
        """Slots for the next round, as SGLang allocates them once relief has made room."""
        for req in batch.reqs:
            start, end = req.kv.kv_allocated_len, req.kv_committed_len + self.reserved_tokens
            if end > start:
                slots = self.allocator.alloc(end - start)
                assert slots is not None, "relief has made room"
                self.rows.write((req.req_pool_idx, slice(start, end)), slots)
                req.kv.kv_allocated_len = end
        self.check()

    def run(self, *reqs: Any) -> Any:
        """A running batch."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        from sglang_sparsespec.adapter.rejoin import join_running

        return join_running(self.scheduler, ScheduleBatch(reqs=[]), list(reqs), lambda: None)

    def kv_of(self, req: Any) -> list[torch.Tensor]:
        slots = self.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
        return [buffer[slots].clone() for buffer in self.buffers]

    def leave(self, batch: Any, *reqs: Any) -> None:
        """Off the batch, as the hook of release_req does; the caller of that filters the batch."""
        for req in reqs:
            assert self.offloader.take(batch, req)
        batch.filter_batch(keep_indices=[i for i, r in enumerate(batch.reqs) if not self.offloader.holds(r)])

    def iterate(self, batch: Any) -> Any:
        self.check()
        batch = self.offloader.before_batch(self.scheduler, batch, None)
        self.check()
        return batch

    def check(self) -> None:
        """Every slot of the pool has one owner, and every host block: what SGLang checks in a server."""
        self.offloader.check_integrity()
        page = self.args.page_size
        held = sum(
            -(-req.kv.kv_allocated_len // page) * page - req.cache_protected_len
            for req in self._requests
            if req.kv is not None and not self.offloader.holds(req)
        )
        parts = {
            "free": self.allocator.available_size(),
            "cached": self.tree.evictable_size(),
            "cached and in use": self.tree.protected_size(),
            "held by requests": held,
            "under a copy": self.offloader.device_tokens(),
            "occupied": self._occupied,
        }
        assert sum(parts.values()) == POOL_TOKENS, parts

    def used_slots(self) -> int:
        return POOL_TOKENS - self.allocator.available_size() - self.tree.evictable_size()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
