"""The documentation says what the code says: options, defaults, refusals, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sglang_sparsespec.config import SparseSpecConfig

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


def _rows(page: str) -> list[list[str]]:
    lines = (DOCS / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `--")]


def test_configuration_lists_every_option_with_its_default() -> None:
    """A default that was measured anew and not written down sends people to the wrong setting."""
    from sglang_sparsespec.adapter.server_args import _option_fields, option_name

    rows = {row[0].strip("`"): row for row in _rows("configuration.md")}
    defaults = {option_name(field.name): field.default for field in _option_fields()}
    defaults["--speculative-num-steps"] = SparseSpecConfig().num_steps
    assert set(rows) == set(defaults)
    for option, default in defaults.items():
        assert rows[option][1] == str(default), option
    assert all(len(row) == 5 for row in rows.values())


def test_features_names_every_refusal() -> None:
    """A refusal that the table of verdicts lacks is a surprise at start."""
    from sglang_sparsespec.adapter.support import REFUSALS

    text = (DOCS / "features.md").read_text()
    assert [refusal.option for refusal in REFUSALS if f"{refusal.option}" not in text] == []


def test_tests_named_in_the_documentation_exist() -> None:
    """`works` with a test that is gone is a claim without evidence."""
    functions: dict[str, set[str]] = {}
    for page in DOCS.glob("*.md"):
        for path, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text()):
            file = REPOSITORY / path
            assert file.is_file(), f"{page.name} names {path}"
            if path not in functions:
                tree = ast.parse(file.read_text())
                functions[path] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert not name or name in functions[path], f"{page.name} names {path}::{name}"


def test_links_between_pages_lead_somewhere() -> None:
    """A page that was renamed; docs/results.md is written by measurements and may be absent in a fresh branch."""
    pages = [REPOSITORY / "README.md", *DOCS.glob("*.md"), *REPOSITORY.glob("*/README.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            path = (page.parent / target).resolve()
            assert path.exists() or path.name == "results.md", f"{page.relative_to(REPOSITORY)} links to {target}"
