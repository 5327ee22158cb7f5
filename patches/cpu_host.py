"""What SGLang 0.5.17 lacks on a machine without an accelerator (`--device cpu` without its own CPU engine).

With SGLANG_USE_CPU_ENGINE unset SGLang takes such a machine for an unknown accelerator and reaches for vLLM's or
Triton's kernels. Each replacement here is plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang_sparsespec.patches.ledger import Patch


class _TorchKernel:
    """Stands where SGLang launches a Triton kernel as `kernel[grid](*args)`."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.function


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    bs_upper: int,
) -> None:
    """Write new slots into each request's row: row[start:end) takes its share of `out_cache_loc`, in batch order.

    Args:
        req_pool_indices: [num_reqs], int64.
        req_to_token: [num_rows, pool_len], int32, in place.
        start_offset: [num_reqs], int32, tokens.
        end_offset: [num_reqs], int32, tokens.
        out_cache_loc: [sum(end - start)], int64, slots.
        pool_len: row length; unused here, part of the kernel's signature.
        bs_upper: unused here, likewise.
    """
    counts = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), counts)
    req_to_token[rows, _positions(start_offset, counts)] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """Slots for positions [prefix, seq) of each request: the rest of its last page first, then whole new pages.

    Args:
        prefix_lens: [num_reqs], integer, tokens that have slots.
        seq_lens: [num_reqs], integer, tokens that shall have slots.
        last_loc: [num_reqs], integer, slot of the last prefix token.
        free_pages: [num_free], int64, page numbers; taken from the front.
        out_indices: [sum(seq - prefix)], int64, filled in place.
        bs_upper: unused here, part of the kernel's signature.
        page_size: tokens per page.
    """
    prefix_lens, seq_lens = prefix_lens.long(), seq_lens.long()
    counts = seq_lens - prefix_lens
    first_new_page = -(-prefix_lens // page_size)
    new_pages = -(-seq_lens // page_size) - first_new_page
    page_offset = torch.cumsum(new_pages, 0) - new_pages - first_new_page

    request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    position = _positions(prefix_lens, counts)
    page = position // page_size
    in_last_page = page < first_new_page[request]
    # too few pages left: the allocator notices afterwards and gives up; only the gather must stay in range
    taken = (page + page_offset[request]).clamp(0, max(free_pages.numel() - 1, 0))
    fresh = free_pages[taken] * page_size + position % page_size if free_pages.numel() else torch.zeros_like(position)
    out_indices.copy_(torch.where(in_last_page, last_loc.long()[request] + 1 + position - prefix_lens[request], fresh))


def alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """`alloc_extend` for one new token per request; `seq_lens` includes it."""
    alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size)


def allocate_token_bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """A grammar bitmask that allows everything, [batch_size, ceil(vocab_size / 32)] int32, in pageable memory."""
    from xgrammar import allocate_token_bitmask as allocate

    return allocate(batch_size, vocab_size)


def apply_vocab_mask(grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Forbid what the bitmask does not allow, in place."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


def skip_kv_copy_kernel(pool: Any) -> None:
    """A KV pool without the tiled copy kernel; `move_kv_cache` has a native path."""
    pool._kv_copy_config = None


def without_gpu_communicators(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A process group whose collectives are torch.distributed's."""
    return original(*args, **{**kwargs, "use_pynccl": False, "use_custom_allreduce": False})


def keep_heads_that_ranks_can_copy(original: Any, model_config: Any, load_config: Any, tp_size: int) -> Any:
    """The model's own heads, where every rank can have whole ones."""
    num_heads, num_kv_heads = model_config.num_attention_heads, model_config.get_total_num_kv_heads()
    if num_heads % tp_size == 0 and num_kv_heads < tp_size and tp_size % num_kv_heads == 0:
        return model_config
    return original(model_config, load_config, tp_size)


def _positions(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Ragged aranges [start, start + count), one after another."""
    total = int(counts.sum())
    offsets = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return torch.arange(total) - offsets + torch.repeat_interleave(starts.long(), counts)


_NO_CPU_ENGINE = "SGLang's CPU support targets its own CPU engine, which is not on PyPI as a working build"

PATCHES = (
    Patch(
        target="sglang.srt.layers.rotary_embedding.base._is_cpu",
        why="RotaryEmbedding imports vLLM's kernel on any device that is neither CUDA nor SGLang's CPU engine.",
        how="Declares the device a CPU in this one module, which selects RotaryEmbedding.forward_native.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="`--device cpu --attention-backend torch_native` starts in stock SGLang without vLLM.",
        scope="cpu",
        kind="value",
        replacement=True,
    ),
    Patch(
        target="sglang.srt.mem_cache.allocation.assign_req_to_token_pool",
        why="Speculative slot allocation writes the page table with a Triton kernel.",
        how="Runs the same scatter in torch.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="assign_req_to_token_pool_func has a torch branch for device cpu.",
        scope="cpu",
        kind="value",
        replacement=_TorchKernel(assign_req_to_token_pool),
    ),
    Patch(
        target="sglang.srt.mem_cache.allocator.paged.alloc_extend_kernel",
        why="`--page-size` above 1 allocates with a Triton kernel.",
        how="Computes the same slots in torch.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="PagedTokenToKVPoolAllocator.alloc_extend has a torch branch for device cpu.",
        scope="cpu",
        kind="value",
        replacement=_TorchKernel(alloc_extend),
    ),
    Patch(
        target="sglang.srt.mem_cache.allocator.paged.alloc_decode_kernel",
        why="`--page-size` above 1 allocates with a Triton kernel.",
        how="Computes the same slots in torch.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="PagedTokenToKVPoolAllocator.alloc_decode has a torch branch for device cpu.",
        scope="cpu",
        kind="value",
        replacement=_TorchKernel(alloc_decode),
    ),
    Patch(
        target="sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask",
        why="Grammar bitmasks are allocated in pinned memory, which needs a GPU driver.",
        how="Lets xgrammar allocate them in ordinary memory.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="_allocate_token_bitmask asks is_pin_memory_available first.",
        scope="cpu",
        kind="replace",
        replacement=allocate_token_bitmask,
    ),
    Patch(
        target="sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
        why="Grammar masks are applied with a Triton kernel, and refused on a CPU.",
        how="Calls xgrammar's own CPU function.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="XGrammarGrammar.apply_vocab_mask has a branch for device cpu.",
        scope="cpu",
        kind="replace",
        replacement=apply_vocab_mask,
    ),
    Patch(
        target="sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        why="With any speculative algorithm the KV pool warms up a Triton copy kernel (tree drafts move KV).",
        how="Leaves the kernel out; a chain of drafts never moves KV.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="copy_all_layer_kv_cache_func has a torch branch for device cpu.",
        scope="cpu",
        kind="replace",
        replacement=skip_kv_copy_kernel,
    ),
    Patch(
        target="sglang.srt.distributed.parallel_state.init_model_parallel_group",
        why="Groups of several ranks (`--tp-size`) start an NCCL communicator, which asks for a CUDA device.",
        how="Leaves NCCL and the custom all-reduce out; collectives are torch.distributed's, over gloo.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="GroupCoordinator builds PyNcclCommunicator on CUDA devices only.",
        scope="cpu",
        kind="around",
        replacement=without_gpu_communicators,
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
        why="With fewer KV heads than ranks a CPU pads them, for the weight loader of SGLang's CPU engine; ours fails.",
        how="Leaves the heads as they are, so that ranks hold copies of them as they do on GPUs.",
        upstream=f"Not reported yet: {_NO_CPU_ENGINE}.",
        remove_when="`--device cpu --tp-size 2` loads a model with one KV head without SGLang's CPU engine.",
        scope="cpu",
        kind="around",
        replacement=keep_heads_that_ranks_can_copy,
    ),
)
