"""Server arguments for tests of the adapter: SGLang's own resolution runs, nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from tests.support.offload_machine import Machine

ArgsFactory = Callable[..., "SparseSpecServerArgs"]


@pytest.fixture(scope="session")
def _registered() -> None:
    from sglang_sparsespec import plugin

    plugin.register()


@pytest.fixture
def server_args(_registered: None, tiny_qwen3_path: Path) -> Iterator[ArgsFactory]:
    """ServerArgs of a small model on a CPU under SPARSESPEC; keywords win over these defaults.

    What they leave in the environment for the schedulers to come is taken back.
    """
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs

    def build(**kwargs: Any) -> SparseSpecServerArgs:
        defaults = {"model_path": str(tiny_qwen3_path), "device": "cpu", "speculative_algorithm": "SPARSESPEC"}
        return SparseSpecServerArgs(**{**defaults, **kwargs})

    with mock.patch.dict(os.environ):
        yield build


@pytest.fixture
def machine(server_args: ArgsFactory) -> Iterator[Callable[..., Machine]]:
    from sglang.srt import runtime_context

    from tests.support.offload_machine import Machine

    def build(
        page_size: int = 1, is_radix: bool = True, host_blocks: int = 40, queues: Any = None, **options: Any
    ) -> Machine:
        args = server_args(page_size=page_size, **{"sparsespec_host_memory_gb": 0.1, **options})
        runtime_context.publish(args, role="test")
        return Machine(args, is_radix=is_radix, host_blocks=host_blocks, queues=queues)

    yield build
    runtime_context.reset_context()
