"""Models and recordings of the end-to-end tests. One server is up at a time: the reference answers first and stops."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support import feature_requests, pressure, workload
from tests.support.server import Server

if TYPE_CHECKING:
    from pathlib import Path

TINY_ENV = {"OMP_NUM_THREADS": "1"}
"""Threads that wait for each other cost a tiny model fifty times what they save."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Qwen3 (GQA 4) with a short context, and with end-of-text tokens that its greedy output really contains."""
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3-short", context=workload.CONTEXT)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(workload.EOS_IDS)}) + "\n")
    return path


class Recorded(NamedTuple):
    parity: workload.ParityRecord
    features: feature_requests.FeatureRecord
    pressure: list[workload.Exchange]


@pytest.fixture(scope="session")
def recorded(tiny_model: Path) -> Recorded:
    """Everything that the reference is asked, in one start."""
    with Server(
        tiny_model, "--skip-server-warmup", "--constrained-json-disable-any-whitespace", env=TINY_ENV
    ) as server:
        parity, features = workload.record(server, tiny_model), feature_requests.record(server)
        payloads = pressure.payloads()
        responses = pressure.send(server, payloads, concurrency=32)
        return Recorded(parity, features, list(map(workload.Exchange, payloads, responses)))


@pytest.fixture(scope="session")
def parity_record(recorded: Recorded) -> workload.ParityRecord:
    return recorded.parity


@pytest.fixture(scope="session")
def feature_record(recorded: Recorded) -> feature_requests.FeatureRecord:
    return recorded.features


@pytest.fixture(scope="session")
def pressure_record(recorded: Recorded) -> list[workload.Exchange]:
    return recorded.pressure
