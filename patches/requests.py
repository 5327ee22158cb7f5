"""Requests at their two ends: checked before they reach the scheduler (HTTP 400), and where their output stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_sparsespec.patches.ledger import Patch

from sglang_sparsespec.errors import RequestError
from sglang_sparsespec.request_options import draft_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


def refuse_what_is_not_exact(manager: TokenizerManager, obj: GenerateReqInput, input_ids: Any) -> None:
    """BEFORE hook: raise for sampling features whose result would not be the target's distribution, and for options
    of a request that make no sense.

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
    sampling = {**(manager.preferred_sampling_params or {}), **(obj.sampling_params or {})}
    draft_limit(sampling.get("custom_params"))
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


def judge_tokens_in_order(update_finish_state: Callable[[Req, int], None], req: Req, new_accepted_len: int = 1) -> None:
    """AROUND hook: where the rules could disagree, judge a round's tokens one by one, as plain decoding does.

    Token stops are found in order by the host itself, so most rounds are judged in one go.
    """
    num_outputs = len(req.output_ids)
    reaches_limit = num_outputs >= req.sampling_params.max_new_tokens
    has_strings = req.sampling_params.stop_strs or req.sampling_params.stop_regex_strs
    if new_accepted_len <= 1 or req.finished() or req.to_finish or not (reaches_limit or has_strings):
        update_finish_state(req, new_accepted_len)
        return
    grammar = req.grammar
    tokens = req.output_ids[num_outputs - new_accepted_len :]
    del req.output_ids[num_outputs - new_accepted_len :]
    try:
        for i, token in enumerate(tokens):
            req.output_ids.append(token)
            # the grammar has already seen the whole round
            req.grammar = grammar if i == new_accepted_len - 1 else None
            update_finish_state(req, 1)
            if req.finished():
                return
    finally:
        req.grammar = grammar
        req.output_ids.extend(tokens[len(req.output_ids) - num_outputs + new_accepted_len :])


PATCHES = (
    Patch(
        target="sglang.srt.managers.schedule_batch.Req.update_finish_state",
        why="In a round that reaches max_new_tokens SGLang looks at nothing else, so that an EOS or a stop string some "
        "tokens earlier goes unseen; and a stop string hides an EOS before it. Both put text after the end.",
        how="In those rounds the tokens are judged one by one; the other rounds go through unchanged.",
        upstream="Not reported yet; every speculative algorithm of SGLang is affected.",
        remove_when="Req.update_finish_state applies its rules in token order.",
        scope="sparsespec",
        kind="around",
        replacement=judge_tokens_in_order,
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        why="SGLang's speculative verify skips custom logit processors without telling the client, and nobody reads "
        "custom_params before the scheduler.",
        how="Raises a ValueError, which SGLang reports as HTTP 400, before the request is tokenised.",
        upstream="Not reported yet; SGLang has no per-algorithm request validation.",
        remove_when="CustomSpecAlgo gains a hook that validates requests.",
        scope="sparsespec",
        kind="before",
        replacement=refuse_what_is_not_exact,
    ),
)
