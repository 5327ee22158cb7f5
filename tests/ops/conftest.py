"""Where the ops run: ``cpu`` is the public function; ``triton`` is the kernels, compiled on a GPU, else interpreted.

The interpreter must be chosen before Triton is first imported, so its tests run in a process of their own
(test_interpreter.py starts it, with TRITON_INTERPRET=1) and are deselected here when there is no GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
# a GPU runs every implementation; without one the two processes share the work
if HAS_GPU:
    BACKENDS = ["cpu", "torch-cuda", "triton"]
elif INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda" if HAS_GPU and backend != "cpu" else "cpu")


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """On a shared machine threads wait for each other longer than these sizes take to compute."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, so that an element which a kernel forgets to write fails loudly."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only_backend(*names): the backends that have what the test is about")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    dropped = []
    for item in items:
        if not str(item.path).startswith(here):
            continue
        on_gpu = item.get_closest_marker("gpu") is not None
        uses_backend = "backend" in getattr(item, "fixturenames", ())
        wanted = item.get_closest_marker("only_backend")
        is_wanted = wanted is None or item.callspec.params["backend"] in wanted.args
        if (on_gpu and not HAS_GPU) or (INTERPRETED and not uses_backend) or not is_wanted:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
