"""A server without a radix cache whose requests are retracted all the time, with the parsers that people deploy.

SGLang retracts a running request when the pool is full: its KV goes, and it is prefilled again with its outputs.
SGLANG_TEST_RETRACT makes it do so every few steps.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support.server import Server
from tests.support.workload import assert_greedy_parity, concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.workload import ParityRecord

pytestmark = pytest.mark.slow

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["days"],
        },
    },
}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    options = "--disable-radix-cache --tool-call-parser qwen25 --reasoning-parser deepseek-r1 --skip-server-warmup"
    spec = "--speculative-algorithm SPARSESPEC --sparsespec-min-budget 32"
    env = {**TINY_ENV, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    with Server(tiny_model, *options.split(), *spec.split(), env=env) as server:
        yield server


def test_retracted_requests_go_on_as_if_nothing_had_happened(server: Server, parity_record: ParityRecord) -> None:
    """A selection, a bonus token or a length that survives a retraction belongs to KV that is gone."""
    exchanges = parity_record.base
    responses = concurrently(server, [exchange.payload for exchange in exchanges])
    assert_greedy_parity(exchanges, responses)
    assert sum(response["meta_info"]["num_retractions"] for response in responses) > 0
    server.idle_check()


def test_tool_call_is_parsed(server: Server) -> None:
    """A grammar makes the random model write a call; the parser reads the text that comes out of accepted drafts."""
    call_text = r'<tool_call>\n\{"name": "weather", "arguments": \{"days": [1-7]\}\}\n</tool_call>'
    response = server.chat("What is the weather?", tools=[WEATHER], regex=call_text, max_tokens=120)
    choice = response["choices"][0]
    assert choice["message"]["tool_calls"], choice
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert 1 <= json.loads(call["function"]["arguments"])["days"] <= 7


def test_reasoning_is_separated(server: Server) -> None:
    """This parser takes all text for reasoning until the model ends it, which a random one does not."""
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    whole = server.chat("Think!", separate_reasoning=False, **options)["choices"][0]["message"]["content"]
    message = server.chat("Think!", **options)["choices"][0]["message"]
    assert message["reasoning_content"].strip() == whole.strip()
    assert not message["content"]
