"""A server without a radix cache whose requests are retracted all the time, with parsers, metrics and large batches.

SGLang retracts a running request when the pool is full: its KV goes, and it is prefilled again with its outputs.
SGLANG_TEST_RETRACT makes it do so every few steps.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest
import requests

from tests.e2e.conftest import TINY_ENV
from tests.support.schedules import SCHEDULES, skip_if_long
from tests.support.server import Server
from tests.support.workload import assert_greedy_parity, concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.workload import ParityRecord

pytestmark = pytest.mark.slow


IN_BOTH_SCHEDULES = {"test_retracted_requests_go_on_as_if_nothing_had_happened"}


@pytest.fixture(scope="module", params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _short(request: pytest.FixtureRequest, schedule: str) -> None:
    skip_if_long(request, schedule, IN_BOTH_SCHEDULES)


@pytest.fixture(scope="module")
def server(schedule: str, tiny_model: Path) -> Iterator[Server]:
    options = "--disable-radix-cache --reasoning-parser deepseek-r1 --skip-server-warmup"
    load = "--max-running-requests 128 --max-total-tokens 50000 --enable-metrics --decode-log-interval 2"
    spec = ["--speculative-algorithm=SPARSESPEC", "--sparsespec-min-budget=32", *SCHEDULES[schedule]]
    env = {**TINY_ENV, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    # `sglang serve`, which other tests start as `python -m sglang.launch_server`
    command = [sys.executable, "-c", "import sys; from sglang.cli.main import main; sys.exit(main())", "serve"]
    with Server(tiny_model, *options.split(), *load.split(), *spec, env=env, command=command) as server:
        yield server


def test_retracted_requests_go_on_as_if_nothing_had_happened(server: Server, parity_record: ParityRecord) -> None:
    """A selection, a bonus token or a length that survives a retraction belongs to KV that is gone."""
    exchanges = parity_record.base
    responses = concurrently(server, [exchange.payload for exchange in exchanges])
    assert_greedy_parity(exchanges, responses)
    assert sum(response["meta_info"]["num_retractions"] for response in responses) > 0
    server.idle_check()


def test_batch_of_128(server: Server, parity_record: ParityRecord) -> None:
    """Buffers sized for fewer rows, or a row that reads its neighbour's selection, show at the largest batch only."""
    exchanges = (parity_record.base * 7)[:128]
    responses = concurrently(server, [exchange.payload for exchange in exchanges])
    assert_greedy_parity(exchanges, responses)
    server.idle_check()


def test_metrics_and_log_line_report_rounds(server: Server, schedule: str) -> None:
    """Gauges that are never set, or a log line that is never due, look like a server without drafts."""
    sampling = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    server.generate({"input_ids": [5, 6, 7] * 40, "sampling_params": sampling})
    metrics = requests.get(server.url + "/metrics", timeout=60).text
    values = dict(re.findall(r"^sglang:sparsespec_(\w+)\{.*?\} (\S+)$", metrics, flags=re.MULTILINE))
    assert 1 <= float(values["accept_length"]) <= 9
    assert 0 < float(values["budget_share"]) < 1
    # our own verify, which the unified schedule needs, has no refresh of its own
    assert ("selection_refresh_ms" in values and float(values["selection_refresh_ms"]) > 0) == (schedule == "lockstep")
    assert "SPARSESPEC: accept length" in server.log_text()


def test_reasoning_is_separated(server: Server) -> None:
    """This parser takes all text for reasoning until the model ends it, which a random one does not."""
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    whole = server.chat("Think!", separate_reasoning=False, **options)["choices"][0]["message"]["content"]
    message = server.chat("Think!", **options)["choices"][0]["message"]
    assert message["reasoning_content"].strip() == whole.strip()
    assert not message["content"]
