"""What SPARSESPEC decides, in /server_info."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
    from sglang.srt.managers.scheduler import Scheduler


def add_decisions(
    get_internal_state: Callable[[Scheduler, GetInternalStateReq], GetInternalStateReqOutput],
    scheduler: Scheduler,
    request: GetInternalStateReq,
) -> GetInternalStateReqOutput:
    """AROUND hook: the worker's own description beside SGLang's state, as `sparsespec`."""
    output = get_internal_state(scheduler, request)
    describe: Callable[[], dict[str, Any]] | None = getattr(scheduler.model_worker, "describe_rounds", None)
    if describe is not None:
        output.internal_state["sparsespec"] = describe()
    return output


PATCHES = (
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        why="/server_info shows options and counters that SGLang knows of; k changes while a server runs.",
        how="Adds the worker's description under internal_states[].sparsespec; the rest goes through unchanged.",
        upstream="Not reported yet; SGLang's own adaptive algorithm shows its k in the log only.",
        remove_when="A speculative worker can add to Scheduler.get_internal_state.",
        scope="sparsespec",
        kind="around",
        replacement=add_decisions,
    ),
)
