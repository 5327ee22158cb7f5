"""KV slot bookkeeping that SGLang sizes for its built-in algorithms only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.server_args import ServerArgs


def widen_page_table_rows(original: Callable[[ServerArgs], int], server_args: ServerArgs) -> int:
    """Tokens of a page-table row beyond the context length: never fewer than a decode step may reserve."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    headroom = original(server_args)
    if server_args.speculative_algorithm != "SPARSESPEC":
        return headroom
    return max(headroom, get_alloc_reserve_per_decode(server_args) + server_args.page_size)


def reserve_held_drafts(original: Callable[[ServerArgs | None], int], server_args: ServerArgs | None = None) -> int:
    """KV slots past the committed length that a request has before a decode step."""
    from sglang.srt.runtime_context import get_server_args

    reserve = original(server_args)
    config = getattr(server_args or get_server_args(), "sparsespec_config", None)
    # [n, n + k]      the round in flight, of which the host does not know yet how much it commits
    # [.., .. + k]    what the next one verifies
    # [.., .. + k)    and what it drafts behind that
    if config is None or not config.has_unified:
        return reserve
    return reserve + config.num_draft_tokens


PATCHES = (
    Patch(
        target="sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode",
        why="A unified round drafts behind its verify, so it writes up to k tokens further than it verifies; SGLang "
        "reserves for what a round verifies, twice.",
        how="Adds k + 1 tokens to the reserve, with --sparsespec-schedule unified or auto only.",
        upstream="None: SGLang's own algorithms never write past what they verify.",
        remove_when="SGLang asks the algorithm how many tokens a decode step may write.",
        scope="sparsespec",
        kind="around",
        replacement=reserve_held_drafts,
    ),
    Patch(
        target="sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
        why="At page size 1 a row has room for 4 + num_draft_tokens tokens past the context, but a decode step "
        "reserves 2 x num_draft_tokens: near the context limit the write lands in the next request's row.",
        how="Returns at least the reserve of a decode step.",
        upstream="Not reported yet; invisible with the 3 to 4 drafts that EAGLE uses.",
        remove_when="get_req_to_token_extra_context_len covers get_alloc_reserve_per_decode at every page size.",
        scope="sparsespec",
        kind="around",
        replacement=widen_page_table_rows,
    ),
)
