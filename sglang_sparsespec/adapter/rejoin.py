"""Requests that come back from host memory join the running batch without a prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_sparsespec.adapter.spec_input import SparseSpecDraftInput
from sglang_sparsespec.adapter.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


def join_running(
    scheduler: Scheduler, running: ScheduleBatch, reqs: list[Req], load_states: Callable[[], None]
) -> ScheduleBatch:
    """The running batch with `reqs` in it, as if they had just been through a round.

    Args:
        running: changed in place, or replaced where it is empty.
        reqs: with their page-table rows, slots and KV in place; the last output is the next round's first token.
        load_states: puts what the worker knows of them into their rows.
    """
    batch = _batch_of(scheduler, reqs)
    stream = scheduler.forward_stream
    # an earlier owner of a row may still be running: write behind its round
    stream.wait_stream(scheduler.schedule_stream)
    with scheduler.forward_stream_ctx:
        load_states()
        bonus_tokens = to_device(
            torch.tensor([req.output_ids[-1] for req in reqs], dtype=torch.int64), scheduler.device
        )
        batch.spec_info = SparseSpecDraftInput(bonus_tokens=bonus_tokens)
        if scheduler.enable_overlap:
            scheduler.future_map.publish(batch.req_pool_indices, batch.seq_lens)
            scheduler.future_map.stash(batch.req_pool_indices, RelayPayload(bonus_tokens=bonus_tokens))
            batch.spec_info.future_indices = batch.req_pool_indices
    if scheduler.device == "cuda":
        # made on the scheduler's stream, and perhaps freed there when the batches merge
        for tensor in (batch.req_pool_indices, batch.seq_lens):
            tensor.record_stream(stream)
    if running.is_empty():
        return batch
    running.merge_batch(batch)
    return running


def _batch_of(scheduler: Scheduler, reqs: list[Req]) -> ScheduleBatch:
    batch = ScheduleBatch.init_new(
        reqs,
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    rows = torch.tensor([req.req_pool_idx for req in reqs], dtype=torch.int64)
    lens = torch.tensor([req.kv_committed_len for req in reqs], dtype=torch.int64)
    batch.req_pool_indices_cpu = rows
    batch.req_pool_indices = to_device(rows, scheduler.device)
    batch.seq_lens_cpu = lens
    batch.seq_lens = to_device(lens, scheduler.device)
    batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
    batch.seq_lens_sum = int(lens.sum())
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, scheduler.model_config.vocab_size)
    return batch
