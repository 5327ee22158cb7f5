"""The launcher's own additions to a command line, and what a machine without a GPU is said to lack."""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests

from sglang_sparsespec.bench import machine, server
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


ASKED = {
    "flush_cache": server.Server.flush_cache,
    "loads": server.Server.loads,
    "generate": lambda live: live.generate({}),
    "stream": lambda live: list(live.stream("/generate", {})),
    "accept_length": server.Server.accept_length,
}


class Small(server.Server):
    defaults = {"--max-total-tokens": "100", "--skip-server-warmup": None}  # noqa: RUF012
    cpu_defaults = {"--dtype": "float32"}  # noqa: RUF012


@pytest.mark.parametrize("form", [("--speculative-algorithm", "SPARSESPEC"), ("--speculative-algorithm=SPARSESPEC",)])
def test_plain_servers_alone_get_what_plain_sglang_needs(
    form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPARSESPEC chooses its backend and its schedule itself, however the option is spelled."""
    monkeypatch.setattr(server, "has_gpu", lambda: False)
    assert "--disable-overlap-schedule" in server.Server.with_defaults(())
    args = server.Server.with_defaults(form)
    assert not {"--disable-overlap-schedule", "--attention-backend"} & set(args)
    assert ("--device", "cpu") in itertools.pairwise(args)


def test_given_options_win_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse takes the last one: a default behind the caller's value would silently replace it."""
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    assert Small.with_defaults(()) == ["--max-total-tokens", "100", "--skip-server-warmup"]
    assert Small.with_defaults(("--max-total-tokens=5",)) == ["--max-total-tokens=5", "--skip-server-warmup"]
    monkeypatch.setattr(server, "has_gpu", lambda: False)
    assert Small.with_defaults(("--dtype", "bfloat16")).count("--dtype") == 1


def test_a_cpu_names_every_backend_that_it_lacks() -> None:
    """A backend without a reason would be missing from the list of skips."""
    found = machine.detect("cpu")
    assert found.backends == ("torch_native",)
    assert set(found.missing) == {*machine.GPU_BACKENDS, *machine.CPU_BACKENDS} - set(found.backends)
    assert not found.has_gpu


def test_every_rank_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would fail in a scheduler, after minutes; and memory is counted over all cards."""
    import torch

    card = SimpleNamespace(name="NVIDIA H200", total_memory=1 << 37, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = machine.detect(tp_size=2)
    assert (found.tp_size, found.memory_bytes) == (2, 2 << 37)
    with pytest.raises(ConfigError, match="--tp-size is 4; it must be at most 2, the cards here"):
        machine.detect(tp_size=4)


def test_fa3_needs_a_hopper_card() -> None:
    """On another card SGLang would end the server with an assertion, minutes into a run."""
    assert "compute capability 9; this one has 8.0" in machine._missing_gpu_backends((8, 0)).get("fa3", "")


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("is_listening", [False, True], ids=["dead", "hung"])
def test_a_server_that_does_not_answer_is_a_server_error(ask: Callable[[Any], Any], is_listening: bool) -> None:
    """The runner catches that and goes on with the next contender; anything else ends the call without a page."""
    live = server.Server("/nowhere", request_timeout_s=0.2)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        live.url = f"http://127.0.0.1:{port.getsockname()[1]}"
        if is_listening:
            port.listen()
        with pytest.raises(server.ServerError, match="no answer from /") as raised:
            ask(live)
    assert isinstance(raised.value.__cause__, requests.RequestException)


HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_servers_start_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for one after another comes late to the last, which is up and must not be called too slow."""
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    first, late = (server.Server("/none", command=[sys.executable, "-c", HEALTHY], timeout_s=60) for _ in range(2))
    broken = server.Server("/none", command=[sys.executable, "-c", "raise SystemExit(3)"], timeout_s=60)
    assert len({first.port, late.port, broken.port}) == 3
    with contextlib.ExitStack() as up:
        for each in (first, late, broken):
            up.push(each)
            each.launch()
        first.wait_until_healthy()
        late.wait_until_healthy()
        late.timeout_s = 0
        late.wait_until_healthy()
        with pytest.raises(server.ServerError, match="died while starting, exit code 3"):
            broken.wait_until_healthy()
        broken.log_path.unlink()
        assert {first, late} <= server.Server.live
        assert broken not in server.Server.live
    assert not {first, late} & server.Server.live
