"""The label of a lossy server: on every kind of response, whatever else is put around the app."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import HostContractError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from starlette.websockets import WebSocket

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

LOSSY = {"sparsespec_allow_lossy": True, "sparsespec_verify_sparsity": ["attention"]}
HEADER = "x-sparsespec-lossy"


@pytest.fixture
def app() -> Any:
    """Like SGLang's: routes, a stream, a mounted app, errors, and authorization that is added last."""
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import StreamingResponse
    from starlette.responses import PlainTextResponse
    from starlette.routing import WebSocketRoute

    app = FastAPI()
    app.mount("/metrics", PlainTextResponse("sglang:x 1"))

    @app.get("/plain")
    async def plain() -> dict[str, int]:
        return {"a": 1}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter([b"data: 1\n\n", b"data: [DONE]\n\n"]), media_type="text/event-stream")

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(400)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a bug")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.router.routes.append(WebSocketRoute("/socket", socket))
    return app


@pytest.fixture
def client(app: Any) -> Iterator[Callable[[str], Any]]:
    """Asks the app after the label and then an authorization have been put around it, as SGLang does."""
    from fastapi.testclient import TestClient
    from sglang.srt.utils.auth import add_api_key_middleware
    from sglang_sparsespec.patches.lossy import label_app

    label_app(app)
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    with TestClient(app, raise_server_exceptions=False) as test_client:
        yield lambda path, **options: test_client.get(path, **options)


@pytest.mark.parametrize(
    ("path", "status"), [("/plain", 200), ("/stream", 200), ("/refused", 400), ("/broken", 500), ("/nowhere", 404)]
)
def test_every_response_has_the_header(client: Any, path: str, status: int) -> None:
    """A response that is made by an inner or outer middleware, or by an error handler, would come without it."""
    response = client(path, headers={"Authorization": "Bearer secret"})
    assert response.status_code == status
    assert response.headers.get_list(HEADER) == ["1"]


def test_responses_of_later_middleware_and_mounts_have_it(client: Any) -> None:
    """SGLang adds its authorization after plugins had their say, so that one answers before any inner middleware."""
    response = client("/plain")
    assert response.status_code == 401
    assert response.headers.get_list(HEADER) == ["1"]
    response = client("/metrics", headers={"Authorization": "Bearer secret"})
    assert response.headers.get_list(HEADER) == ["1"]


def test_websockets_have_it(app: Any) -> None:
    """Another kind of start message."""
    from fastapi.testclient import TestClient
    from sglang_sparsespec.patches.lossy import label_app

    label_app(app)
    with TestClient(app).websocket_connect("/socket") as socket:
        assert (HEADER.encode(), b"1") in (socket.extra_headers or [])


def test_every_route_of_the_host_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that SGLang mounts beside its app, or answers before it. Without a model behind it each ends in some
    error, which is a response like any other."""
    from fastapi.routing import APIRoute
    from fastapi.testclient import TestClient
    from sglang.srt.entrypoints import http_server
    from sglang_sparsespec.patches.lossy import label_app

    app = http_server.app
    monkeypatch.setattr(http_server, "_global_state", None)
    monkeypatch.setattr(app, "middleware_stack", None)
    monkeypatch.setattr(app, "build_middleware_stack", app.build_middleware_stack)
    label_app(app)
    # not entered: the app's start-up belongs to a server
    test_client = TestClient(app, raise_server_exceptions=False)
    routes = [(method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in route.methods]
    assert {path for _, path in routes} >= {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"}
    lost = []
    for method, path in routes:
        response = test_client.request(method, path, json=None if method == "GET" else {})
        if response.headers.get_list(HEADER) != ["1"]:
            lost.append((method, path, response.status_code))
    assert lost == []


def test_an_unlabelled_app_has_no_header(app: Any) -> None:
    """A label on everything, lossless servers too, would mean nothing."""
    from fastapi.testclient import TestClient

    assert HEADER not in TestClient(app).get("/plain").headers


@pytest.mark.parametrize("is_lossy", [True, False])
def test_the_server_labels_its_app_by_its_options(
    server_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, app: Any, is_lossy: bool
) -> None:
    """The hook is in force and looks at the options of the server that starts."""
    from fastapi.testclient import TestClient
    from sglang.srt.entrypoints import http_server
    from sglang_sparsespec.patches import LEDGER, verify

    # a lossy server was resolved in this process: the patches are in force
    lossy_args = server_args(**LOSSY)
    verify(patch for patch in LEDGER if patch.scope == "lossy")
    args = lossy_args if is_lossy else server_args()
    monkeypatch.setattr(http_server, "app", app)

    class Started(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr(http_server, "set_global_state", stop)
    with contextlib.suppress(Started):
        http_server._setup_and_run_http_server(args, None, None, None, [{}], None)
    assert (HEADER in TestClient(app).get("/plain").headers) == is_lossy


def start_from_pickle(answers: multiprocessing.Queue[str], pickled: bytes) -> None:
    """What a program does in a process of its own: SGLang's entry point, with arguments resolved elsewhere."""
    import sglang
    from sglang.srt.entrypoints import engine

    class Started(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Started

    # the first thing that SGLang does after its arguments have been checked
    engine.PortArgs.init_new = stop
    try:
        sglang.Engine(server_args=pickle.loads(pickled))
    except Started:
        from sglang_sparsespec.patches import LEDGER, verify

        try:
            verify(patch for patch in LEDGER if patch.scope in ("lossy", "sparsespec"))
        except HostContractError as error:
            answers.put(str(error))
        else:
            answers.put("in force")


def test_arguments_of_another_process_bring_the_label(server_args: Callable[..., Any]) -> None:
    """Patches stay in the process that resolved the options; a server that is started elsewhere, as SGLang's
    launch_server_process does, would be lossy without a word, and refuse no request."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=start_from_pickle, args=(answers, pickle.dumps(server_args(**LOSSY))))
    process.start()
    try:
        assert answers.get(timeout=120) == "in force"
    finally:
        process.join()


def collect(manager: Any, outs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes out of the hook around a generator of `outs`."""
    from sglang_sparsespec.patches.lossy import label_meta_info

    async def original(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        for out in outs:
            yield out

    async def run() -> list[dict[str, Any]]:
        return [out async for out in label_meta_info(original, manager, SimpleNamespace(rid="1"))]

    return asyncio.run(run())


def manager_of(**options: Any) -> Any:
    return SimpleNamespace(server_args=SimpleNamespace(sparsespec_config=SparseSpecConfig(**options)))


def test_every_part_of_a_stream_says_so() -> None:
    """A client that reads the first part only, or the last one only."""
    outs = [{"text": str(i), "meta_info": {"id": "1"}} for i in range(3)]
    found = collect(manager_of(allow_lossy=True, verify_sparsity=("attention",)), outs)
    assert [out["text"] for out in found] == ["0", "1", "2"]
    for out in found:
        assert out["meta_info"]["sparsespec_lossy"] is True
        assert out["meta_info"]["sparsespec_verify_sparsity"] == ["attention"]


def test_lossless_responses_stay_as_they_are() -> None:
    """The hook stays in force in a process that serves losslessly afterwards."""
    for manager in (manager_of(), SimpleNamespace(server_args=SimpleNamespace(sparsespec_config=None))):
        assert collect(manager, [{"meta_info": {"id": "1"}}]) == [{"meta_info": {"id": "1"}}]


def test_a_stream_that_is_left_is_closed() -> None:
    """A client that goes away: the request's own generator must not stay open behind ours."""
    from sglang_sparsespec.patches.lossy import label_meta_info

    closed = []

    async def original(*_: Any) -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {"meta_info": {}}
        finally:
            closed.append(True)

    async def run() -> None:
        outs = label_meta_info(original, manager_of(), SimpleNamespace(rid="1"))
        await outs.__anext__()
        await outs.aclose()
        assert closed

    asyncio.run(run())
