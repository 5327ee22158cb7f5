"""SGLang's own benchmarks against a server with SPARSESPEC: they must not notice, and must see its accept length."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support.server import Server, server_env

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# SGLang adds accept lengths up when it logs
LOG = "--decode-log-interval=2"
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    options = ("--speculative-algorithm=SPARSESPEC", "--sparsespec-min-budget=64", "--skip-server-warmup", LOG)
    with Server(tiny_model, *options, env=TINY_ENV) as server:
        yield server


def last_line(path: Path, module: str, *options: str) -> dict[str, Any]:
    """Run a benchmark of SGLang; what it wrote into its file of results."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, env=server_env(), capture_output=True, text=True, check=False, cwd=path.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    found: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    return found


def test_bench_serving(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    """Streams whose chunks hold several tokens, counted by a client that knows nothing of us."""
    out = tmp_path / "serving.jsonl"
    options = ("--backend", "sglang", "--base-url", server.url, "--model", str(tiny_model), "--output-file", str(out))
    load = ("--dataset-name", "random-ids", "--num-prompts", "8", "--max-concurrency", "4", "--warmup-requests", "1")
    lengths = (
        "--random-input-len",
        "96",
        "--random-output-len",
        "48",
        "--random-range-ratio",
        "1.0",
        "--tokenize-prompt",
    )
    found = last_line(out, "sglang.bench_serving", *options, *load, *lengths)
    assert found["completed"] == 8
    assert found["total_output_tokens"] == 8 * 48
    assert found["output_throughput"] > 0
    assert 1 <= found["accept_length"] <= 9
    assert 0 < found["median_itl_ms"] <= found["p99_itl_ms"]
    server.idle_check()


def test_bench_one_batch_server(server: Server, tmp_path: Path) -> None:
    """A whole batch in one request, with the accept length from /server_info."""
    out = tmp_path / "batch.jsonl"
    options = ("--model", "None", "--device", "cpu", "--base-url", server.url, "--result-filename", str(out))
    load = ("--dataset-name", "random-ids", "--batch-size", "4", "--input-len", "96", "--output-len", "48")
    # its warm-up has 1,024 tokens, more than this model's context holds
    found = last_line(out, "sglang.bench_one_batch_server", *options, *load, "--skip-warmup")
    assert (found["batch_size"], found["input_len"], found["output_len"]) == (4, 96, 48)
    assert found["output_throughput"] > 0
    assert 1 <= found["acc_length"] <= 9
    server.idle_check()
