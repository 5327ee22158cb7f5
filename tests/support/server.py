"""The package's server, with what keeps it small and exact enough for tests."""

from __future__ import annotations

from typing import ClassVar

from sglang_sparsespec.bench import server as package
from sglang_sparsespec.bench.server import ServerError, free_port, has_gpu, is_running, server_env

__all__ = ["Server", "ServerError", "free_port", "has_gpu", "is_running", "server_env"]


class Server(package.Server):
    defaults: ClassVar[dict[str, str | None]] = {
        # enough for the tests, and quick to allocate
        "--max-total-tokens": "20000",
        "--max-running-requests": "16",
        "--random-seed": "1",
        # the accept length in /server_info moves only when SGLang logs
        "--decode-log-interval": "1",
    }
    # by itself SGLang takes a float32 checkpoint down to bf16, where ties between two logits are common
    cpu_defaults: ClassVar[dict[str, str | None]] = {"--dtype": "float32"}
