"""One thread: these models are too small to share out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest
import torch

from sglang_sparsespec.model_tools.tiny import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_moe_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind; four experts of a token."""
    folder = tmp_path_factory.mktemp("moe")
    kinds: tuple[Literal["qwen3-moe", "mixtral"], ...] = ("qwen3-moe", "mixtral")
    return {
        kind: write_tiny_model(folder / kind, arch=kind, experts_per_token=4, layers=2, hidden=64) for kind in kinds
    }
