"""The size of the KV pool: what the algorithm takes beside it is taken first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    Reserve = Callable[[int, int, Callable[[int], int]], int]

_reserve: Reserve | None = None


def install(reserve: Reserve | None) -> None:
    """Ask `reserve` how much of the pool's bytes is left for KV; None: all of it.

    Its arguments are the bytes that SGLang would take for KV, those that it leaves free beside the pool, and a function
    from bytes to the tokens of a pool of that size.
    """
    global _reserve
    _reserve = reserve


def leave_room(
    original: Callable[[KVCacheConfigurator, int], int], configurator: KVCacheConfigurator, pre_model_load_memory: int
) -> int:
    """AROUND hook: bytes for KV. What the user gives as --max-total-tokens is applied afterwards, by SGLang's min()."""
    available = original(configurator, pre_model_load_memory)
    if _reserve is None or configurator.is_draft_worker:
        return available
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator
    from sglang.srt.runtime_context import get_schedule

    pools, page_size = create_memory_pool_configurator(configurator), get_schedule().page_size

    def tokens_in(num_bytes: int) -> int:
        try:
            return int(pools.calculate_pool_sizes(num_bytes, page_size).max_total_num_tokens)
        except RuntimeError:
            # less than a page; SGLang says so itself once it has the number
            return 0

    # pre_model_load_memory is in GiB, as SGLang's own slack is
    slack = int(pre_model_load_memory * (1 - get_schedule().mem_fraction_static) * (1 << 30))
    return _reserve(available, slack, tokens_in)


PATCHES = (
    Patch(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        why="SGLang sizes the KV pool before a speculative worker has allocated anything, and counts the memory of its "
        "own algorithms only, so that a full card runs out of it at capture or in the first large round.",
        how="Subtracts what the worker has planned to take, on a CUDA device.",
        upstream="Not reported yet: CustomSpecAlgo has no way to announce memory.",
        remove_when="A speculative worker can tell SGLang its bytes, fixed and per token, before the pool is sized.",
        scope="sparsespec",
        kind="around",
        replacement=leave_room,
    ),
)
