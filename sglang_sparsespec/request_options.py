"""What one request may ask of speculation: the member `sparsespec` of `custom_params`.

`{"sparsespec": {"enabled": false}}` drafts nothing for the request, `{"sparsespec": {"max_draft_tokens": n}}` lets at
most n of its drafts stand in a round. Both change speed alone. Knows nothing of SGLang.
"""

from __future__ import annotations

from typing import Any, Final

from sglang_sparsespec.errors import RequestError

KEY: Final = "sparsespec"
_ALLOWED: Final = 'an object with "enabled" (true or false) or "max_draft_tokens" (an integer of at least 0), or both'
_ADVICE: Final = 'For a request without drafts send {"sparsespec": {"enabled": false}}.'


def draft_limit(custom_params: Any) -> int | None:
    """Drafts of the request that may stand in a round; None: as many as the server makes.

    Args:
        custom_params: of the request's sampling parameters; anything, members of other names are not looked at.

    Raises:
        RequestError: for a value that says nothing, or something else.
    """
    if custom_params is None:
        return None
    if not isinstance(custom_params, dict):
        raise RequestError("custom_params", custom_params, "an object", "Leave it out, or send a JSON object.")
    if KEY not in custom_params:
        return None
    options = custom_params[KEY]
    thing = f"custom_params.{KEY}"
    if not isinstance(options, dict) or not options or not set(options) <= {"enabled", "max_draft_tokens"}:
        raise RequestError(thing, options, _ALLOWED, _ADVICE)
    is_enabled, limit = options.get("enabled", True), options.get("max_draft_tokens")
    if not isinstance(is_enabled, bool):
        raise RequestError(f"{thing}.enabled", is_enabled, "true or false", _ADVICE)
    if "max_draft_tokens" in options and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise RequestError(
            f"{thing}.max_draft_tokens",
            limit,
            "an integer of at least 0",
            "0 drafts nothing; more than the server's --speculative-num-steps is the same as no limit.",
        )
    return limit if is_enabled else 0
