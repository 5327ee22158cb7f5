"""Scripts of the repository as modules, for tests of what is in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/<path>`, with its folder importable as when it runs; until the test ends."""
    file = SCRIPTS / path
    name = f"script_{file.stem}"
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
