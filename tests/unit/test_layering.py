"""The architecture is a test: who may import SGLang, and in which direction imports go.

Reads the source with `ast`; nothing is imported, so a lazy import and one under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "sglang_sparsespec"

# part of the package -> the parts it may import besides itself
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "config": {"errors"},
    "request_options": {"errors"},
    "ops": {"errors", "config"},
    "speculation": {"errors", "config", "ops"},
    "selection": {"errors", "config", "ops", "speculation"},
    "kv": {"errors", "config", "ops"},
    "sparsity": {"errors", "ops"},
    "patches": {"errors", "config", "request_options"},
    "acceptance": {"errors", "config", "ops", "speculation", "selection", "sparsity", "model_tools"},
    "quality": {"errors", "config", "ops", "sparsity", "acceptance", "model_tools"},
    "adapter": {"errors", "config", "request_options", "ops", "speculation", "selection", "sparsity", "kv", "patches"},
    "plugin": {"errors", "config", "ops", "speculation", "selection", "sparsity", "kv", "patches", "adapter"},
    "bench": {"errors", "config", "speculation", "sparsity", "model_tools"},
    "model_tools": {"errors"},
    "kernels": set(),
}
MAY_IMPORT_SGLANG = {"adapter", "patches"}
# SGLang imports the entry point while it is itself half imported
MAY_IMPORT_SGLANG_IN_FUNCTIONS = {"plugin"}


def sources(repository: Path) -> dict[str, Path]:
    """Module name -> file. `patches/` and `kernels/` lie beside the package and belong to it."""
    found = {}
    for folder, prefix in ((PACKAGE, PACKAGE), ("patches", f"{PACKAGE}.patches"), ("kernels", f"{PACKAGE}.kernels")):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            found[".".join((prefix, *parts))] = path
    return found


def imported_modules(tree: ast.AST, module: str) -> list[tuple[str, int, bool]]:
    """(imported name, line, whether at module level), relative imports resolved."""
    package = module.split(".")[:-1]
    inside_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if callee in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names = [node.args[0].value]
        found += [(name, getattr(node, "lineno", 0), id(node) not in inside_functions) for name in names]
    return found


def part_of(module: str) -> str:
    """The part of the package that `module` belongs to; '__init__' for the package itself and for its attributes."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"


def violations(repository: Path) -> list[str]:
    found = []
    for module, path in sources(repository).items():
        part = part_of(module)
        parts = module.split(".")
        if part == "__init__" and parts[1] != "__init__":
            found.append(f"{path.relative_to(repository)}: {parts[1]} is not in the table of {Path(__file__).name}")
        for name, line, at_module_level in imported_modules(ast.parse(path.read_text(), str(path)), module):
            where = f"{path.relative_to(repository)}:{line}"
            root = name.split(".")[0]
            if root == "sglang":
                lazily = part in MAY_IMPORT_SGLANG_IN_FUNCTIONS and not at_module_level
                if part not in MAY_IMPORT_SGLANG and not lazily:
                    found.append(f"{where}: {part} imports {name}; only the adapter and patches know SGLang")
            elif root == PACKAGE:
                other = part_of(name)
                if other not in (part, "__init__") and other not in ALLOWED[part]:
                    found.append(f"{where}: {part} imports {name}; it may import {sorted(ALLOWED[part]) or 'nothing'}")
    return found


def test_layering_of_the_package() -> None:
    """SGLang inside `ops` or `speculation` would tie every line of the method to one release of the host."""
    assert len(sources(REPOSITORY)) > 10
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("sglang_sparsespec/ops/x.py", "import sglang", "ops imports sglang;"),
        ("sglang_sparsespec/ops/x.py", "def f():\n    from sglang.srt import utils", "ops imports sglang.srt.utils;"),
        (
            "sglang_sparsespec/selection/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sglang.srt import utils",
            "selection imports sglang.srt.utils;",
        ),
        (
            "sglang_sparsespec/speculation/x.py",
            "import importlib\nimportlib.import_module('sglang.srt')",
            "speculation imports sglang.srt;",
        ),
        ("sglang_sparsespec/plugin.py", "import sglang", "plugin imports sglang;"),
        ("sglang_sparsespec/plugin.py", "def register():\n    import sglang", None),
        ("sglang_sparsespec/model_tools/x.py", "def f():\n    import sglang", "model_tools imports sglang;"),
        ("sglang_sparsespec/bench/x.py", "import sglang", "bench imports sglang;"),
        (
            "sglang_sparsespec/bench/x.py",
            "from sglang_sparsespec.adapter import x",
            "bench imports sglang_sparsespec.ada",
        ),
        ("sglang_sparsespec/bench/x.py", "from sglang_sparsespec.config import SCHEDULES", None),
        ("sglang_sparsespec/adapter/x.py", "import sglang", None),
        ("patches/x.py", "import sglang", None),
        ("sglang_sparsespec/ops/a/x.py", "from ...adapter import y", "ops imports sglang_sparsespec.adapter.y;"),
        (
            "sglang_sparsespec/ops/x.py",
            "from sglang_sparsespec import adapter",
            "ops imports sglang_sparsespec.ada",
        ),
        ("sglang_sparsespec/selection/x.py", "import sglang_sparsespec.patches.y", "selection imports"),
        ("sglang_sparsespec/kv/x.py", "import sglang", "kv imports sglang;"),
        ("sglang_sparsespec/adapter/x.py", "from sglang_sparsespec.plugin import register", "adapter imports"),
        ("sglang_sparsespec/adapter/x.py", "from sglang_sparsespec.model_tools import tiny", "adapter imports"),
        ("sglang_sparsespec/adapter/x.py", "from sglang_sparsespec import __version__", None),
        ("sglang_sparsespec/selection/x.py", "from sglang_sparsespec.speculation.budget import f", None),
        ("sglang_sparsespec/ops/x.py", "from sglang_sparsespec.errors import ConfigError", None),
        ("sglang_sparsespec/newcomer.py", "", "newcomer is not in the table"),
    ],
)
def test_layering_finds_a_planted_offender(tmp_path: Path, file: str, code: str, complaint: str | None) -> None:
    """A walker that overlooks one form of import would let the layers erode unseen."""
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(tmp_path)
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]
