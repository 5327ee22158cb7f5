"""Scripts of the repository: as modules, for tests of what is in them, and as programs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_helper(path: str) -> ModuleType:
    """`scripts/<path>`, which imports nothing that lies beside it."""
    module, run = _found(path)
    run(module)
    return module


def load_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/<path>`, with its folder importable as when it runs; until the test ends."""
    module, run = _found(path)
    monkeypatch.setattr(sys, "path", [str((SCRIPTS / path).parent), *sys.path])
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(module)
    return module


def run_script(path: str, *options: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """`python scripts/<path> <options>`, as a user runs it; whatever its exit code."""
    command = [sys.executable, f"scripts/{path}", *options]
    return subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True, timeout=timeout_s, check=False)


def _found(path: str) -> tuple[ModuleType, Callable[[ModuleType], None]]:
    """A module that has not run yet, and what runs it."""
    file = SCRIPTS / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    return importlib.util.module_from_spec(spec), spec.loader.exec_module
