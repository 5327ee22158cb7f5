"""The label of a lossy server, in the process that answers clients: SGLang's HTTP server and tokenizer manager.

Invariant: nothing leaves a server that may change the output without saying so.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping

    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

HEADER = "x-sparsespec-lossy"
# the messages with which a response begins: HTTP, a websocket that is accepted, and one that is not
_STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")


class LossyHeader:
    """ASGI middleware: `x-sparsespec-lossy: 1` on every response, streams and errors included."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def labelled(message: Message) -> None:
            if message["type"] in _STARTS:
                label = (HEADER.encode(), b"1")
                message = {**message, "headers": [*message.get("headers", ()), label]}
            await send(message)

        await self._app(scope, receive, labelled)


def lossy_modes(server_args: ServerArgs) -> list[str]:
    """What the verifies of a server leave out; empty: nothing."""
    config = getattr(server_args, "sparsespec_config", None)
    return [] if config is None else list(config.verify_sparsity)


def label_app(app: Any) -> None:
    """Put the header around everything that a Starlette app is, whatever is added to it later."""
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: LossyHeader(build())
    # a stack that was built before would go on without it
    app.middleware_stack = None


def label_responses(server_args: ServerArgs, *_: Any, **__: Any) -> None:
    """BEFORE hook: label the HTTP server that is about to run."""
    from sglang.srt.entrypoints import http_server

    if lossy_modes(server_args):
        label_app(http_server.app)


async def label_meta_info(
    wait_one_response: Callable[..., AsyncGenerator[dict[str, Any], None]],
    manager: TokenizerManager,
    obj: GenerateReqInput | EmbeddingReqInput,
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[dict[str, Any], None]:
    """AROUND hook: say so in the meta_info of every response and of every part of a stream."""
    modes = lossy_modes(manager.server_args)
    # closed with the outer one, as it would be without us
    async with aclosing(wait_one_response(manager, obj, *args, **kwargs)) as outs:
        async for out in outs:
            if modes and "meta_info" in out:
                out["meta_info"]["sparsespec_lossy"] = True
                out["meta_info"]["sparsespec_verify_sparsity"] = modes
            yield out


PATCHES = (
    Patch(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        why="A server that may change the output says so on every HTTP response, and SGLang offers plugins no place "
        "for middleware.",
        how="Puts an ASGI middleware around the app, outside of all others, that adds a header; nothing else changes.",
        upstream="Not reported yet; no algorithm of SGLang has such a label.",
        remove_when="SGLang takes ASGI middleware from plugins and puts it outside of its own.",
        scope="lossy",
        kind="before",
        replacement=label_responses,
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        why="The meta_info of /generate and Engine.generate says so as well, and is made here.",
        how="Adds sparsespec_lossy and sparsespec_verify_sparsity to each; the rest goes through unchanged.",
        upstream="Not reported yet; no algorithm of SGLang has such a label.",
        remove_when="A speculative algorithm can add to the meta_info of a response.",
        scope="lossy",
        kind="around",
        replacement=label_meta_info,
    ),
)
