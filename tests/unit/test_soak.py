"""The soak script's verdicts, on servers that answer wrongly."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.scripts import load_script


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("soak.py", monkeypatch)


def answering(tokens: Any, retractions: int = 0) -> Any:
    """A server that answers with these tokens."""

    def generate(payload: Any) -> Any:
        if isinstance(tokens, Exception):
            raise tokens
        return {"output_ids": tokens, "meta_info": {"num_retractions": retractions}}

    return SimpleNamespace(generate=generate)


def test_answers_are_compared_with_earlier_ones(soak: ModuleType) -> None:
    """Another request's KV shows as another answer to the same prompt."""
    traffic = soak.Traffic(answering([1, 2, 3]), seed=0)
    for tokens in ([1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 9]):
        traffic._server = answering(tokens)
        traffic.send(0, "answer", 5, len(tokens))
    assert traffic.failures == []
    assert traffic.counts["answer"] == 4
    assert traffic.counts["answers that differ"] == 1
    assert traffic.counts["tokens"] == 11


@pytest.mark.parametrize("tokens", [[1, 2], [], RuntimeError("gone")], ids=str)
def test_a_lost_answer_is_a_failure(soak: ModuleType, tokens: Any) -> None:
    """A soak that passes while requests vanish says nothing."""
    traffic = soak.Traffic(answering(tokens), seed=0)
    traffic.send(7, "answer", 5, 3)
    assert len(traffic.failures) == 1
    assert "answer 7" in traffic.failures[0]
    assert traffic.counts["answer"] == 0


def test_a_slow_server_gets_no_backlog(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of minutes that goes on for an hour, until all that was sent meanwhile has been answered."""
    release, waiting = threading.Event(), []

    def send(traffic: Any, number: int, *request: Any) -> None:
        waiting.append(number)
        release.wait(timeout=20)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args: Any, **kwargs: Any) -> None:
            # the time is over
            release.set()
            super().shutdown(*args, **kwargs)

    monkeypatch.setattr(soak, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(soak.Traffic, "send", send)
    monkeypatch.setattr(soak, "CLIENTS", 3)
    monkeypatch.setattr(soak, "resident_mb", lambda pid: 1.0)
    traffic, _ = soak.soak(SimpleNamespace(pid=0), minutes=0.5 / 60, rate=1000, seed=0)
    assert sorted(waiting) == [0, 1, 2]
    assert traffic.counts["sent"] == 3


def test_growth_compares_the_ends(soak: ModuleType) -> None:
    """One sample that jumps is noise; a leak moves the last third."""
    assert soak.growth([100.0, 100, 500, 100, 100, 100]) == pytest.approx(0)
    assert soak.growth([100.0, 100, 105, 110, 120, 120]) == pytest.approx(0.2)
