"""Where requests are checked before they reach the scheduler, so that a refusal is an HTTP 400 and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_sparsespec.patches.ledger import Patch

from sglang_sparsespec.errors import RequestError

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


def refuse_what_is_not_exact(manager: TokenizerManager, obj: GenerateReqInput, input_ids: Any) -> None:
    """BEFORE hook: raise for sampling features whose result would not be the target's distribution.

    Raises:
        RequestError: SGLang turns this ValueError into HTTP 400; the server goes on.
    """
    if manager.server_args.speculative_algorithm != "SPARSESPEC":
        return
    if getattr(obj, "custom_logit_processor", None):
        raise RequestError(
            "custom_logit_processor",
            "set",
            "absent",
            "A processor sees one position at a time and cannot run inside a verify; "
            "serve this request without --speculative-algorithm.",
        )
    sampling = obj.sampling_params or {}
    if manager.server_args.skip_tokenizer_init and sampling.get("min_new_tokens"):
        raise RequestError(
            "min_new_tokens",
            sampling["min_new_tokens"],
            "0 on a server with --skip-tokenizer-init",
            "The tokenizer knows which tokens stop; leave it out, or serve with a tokenizer.",
        )
    if sampling.get("sampling_seed") is not None:
        raise RequestError(
            "sampling_seed",
            sampling["sampling_seed"],
            "absent",
            "SGLang honours seeds with --enable-deterministic-inference only, which SPARSESPEC does not serve.",
        )


PATCHES = (
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        why="SGLang's speculative verify skips custom logit processors without telling the client.",
        how="Raises a ValueError, which SGLang reports as HTTP 400, before the request is tokenised.",
        upstream="Not reported yet; SGLang has no per-algorithm request validation.",
        remove_when="CustomSpecAlgo gains a hook that validates requests.",
        scope="sparsespec",
        kind="before",
        replacement=refuse_what_is_not_exact,
    ),
)
