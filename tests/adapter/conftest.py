"""Server arguments for tests of the adapter: SGLang's own resolution runs, nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs

ArgsFactory = Callable[..., "SparseSpecServerArgs"]


@pytest.fixture(scope="session")
def _registered() -> None:
    from sglang_sparsespec import plugin

    plugin.register()


@pytest.fixture
def server_args(_registered: None, tiny_qwen3_path: Path) -> ArgsFactory:
    """ServerArgs of a small model on a CPU under SPARSESPEC; keywords win over these defaults."""
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs

    def build(**kwargs: Any) -> SparseSpecServerArgs:
        defaults = {"model_path": str(tiny_qwen3_path), "device": "cpu", "speculative_algorithm": "SPARSESPEC"}
        return SparseSpecServerArgs(**{**defaults, **kwargs})

    return build
