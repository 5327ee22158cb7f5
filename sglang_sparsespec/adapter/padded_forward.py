"""One kind of forward over static tensors: padded to a captured batch size, or as it is where none is large enough."""

from __future__ import annotations

import bisect
import logging
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

# before a capture: kernels are loaded and tuned, workspaces allocated
_WARM_UPS = 2


class PaddedForward:
    """A function of a batch size whose inputs stand at fixed addresses, replayed from a CUDA graph where one was taken.

    Logits of a replay stand where they are until the next replay of any forward that was captured.

    Args:
        name: for the log.
        body: batch size -> logits [batch size * width, vocab_size]; the same work for the same batch size.
        batch_sizes: to pad to, ascending; empty: nothing is padded or captured.
    """

    def __init__(self, name: str, body: Callable[[int], torch.Tensor], batch_sizes: Sequence[int]) -> None:
        self.name = name
        self._body = body
        self._batch_sizes = list(batch_sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.memory_gb = 0.0
        self.capture_s = 0.0

    def padded(self, num_reqs: int) -> int:
        """The batch size that `num_reqs` requests run at."""
        i = bisect.bisect_left(self._batch_sizes, num_reqs)
        return self._batch_sizes[i] if i < len(self._batch_sizes) else num_reqs

    def is_captured(self, batch_size: int) -> bool:
        """Whether a forward of this size is replayed."""
        return batch_size in self._graphs

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Take a graph of every batch size on `stream`, the largest first: the smaller ones fit into its memory."""
        if not self._batch_sizes:
            return
        from sglang.srt.compilation.weak_ref_tensor import weak_ref_tensor
        from sglang.srt.distributed.device_communicators.pynccl_allocator import set_graph_pool_id
        from sglang.srt.distributed.parallel_state import get_tp_group, graph_capture
        from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
        from sglang.srt.model_executor.runner_utils.pool import get_or_create_global_graph_memory_pool

        free_before, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        pool = get_or_create_global_graph_memory_pool(torch.cuda)
        set_graph_pool_id(pool)
        with model_capture_mode(), graph_capture(stream=stream):
            for batch_size in reversed(self._batch_sizes):
                for _ in range(_WARM_UPS):
                    torch.cuda.synchronize()
                    # as SGLang before its own captures: ranks wait for each other here and not inside a collective
                    get_tp_group().barrier()
                    self._body(batch_size)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    logits = self._body(batch_size)
                # the memory stays the pool's, and the next graph may write there: logits are read before it runs
                self._graphs[batch_size] = (graph, weak_ref_tensor(logits))
                del logits
        torch.cuda.synchronize()
        self.memory_gb = (free_before - torch.cuda.mem_get_info()[0]) / 2**30
        self.capture_s = time.perf_counter() - began
        logger.info(
            "SPARSESPEC: %s graphs at batch sizes %s, %.2f GB, %.1f s",
            self.name,
            self._batch_sizes,
            self.memory_gb,
            self.capture_s,
        )

    def __call__(self, batch_size: int) -> torch.Tensor:
        if batch_size in self._graphs:
            graph, logits = self._graphs[batch_size]
            graph.replay()
            return logits
        return self._body(batch_size)
