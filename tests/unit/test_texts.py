"""Texts and the windows that are cut from them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.model_tools.texts import builtin_texts, own_sources, read_texts, token_windows

if TYPE_CHECKING:
    from pathlib import Path


class Letters:
    """A token for every letter."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_builtin_texts_are_long_code_and_prose() -> None:
    """A module that a Python lacks, or a manual in one huge part, would starve long prompts of one kind."""
    texts = builtin_texts()
    assert len(texts) == 16
    assert min(map(len, texts)) > 25_000
    assert all("import" in code and "def " in code for code in texts[::2])


def test_windows_take_turns_and_skip_short_texts() -> None:
    """Windows from one text only, or from past its end, would pass for a sample of all."""
    texts = ["a" * 50, "b" * 5, "c" * 40]
    windows = token_windows(Letters(), texts, [10, 10, 10, 45, 5], seed=3)
    assert [chr(window[0]) for window in windows] == ["a", "c", "a", "a", "b"]
    assert [len(window) for window in windows] == [10, 10, 10, 45, 5]
    assert token_windows(Letters(), ["xyz"], [3]) == [[120, 121, 122]]
    with pytest.raises(ValueError, match="longest text has 50 tokens; a window of 51"):
        token_windows(Letters(), texts, [51])


def test_windows_start_anywhere_and_repeat_by_seed() -> None:
    """Every window from the head of its text would be licences and imports."""
    text = "".join(chr(i) for i in range(33, 1000))
    starts = [window[0] for window in token_windows(Letters(), [text], [10] * 20, seed=1)]
    assert len(set(starts)) > 10
    assert starts == [window[0] for window in token_windows(Letters(), [text], [10] * 20, seed=1)]


def test_own_sources_are_a_long_text() -> None:
    """A wheel without them, or a folder that was renamed, would leave an empty prompt."""
    assert len(own_sources()) > 50_000
    assert "class PillarPolicy" in own_sources()


def test_reads_text_files_and_lines_of_json(tmp_path: Path) -> None:
    """A file of prompts read as one text gives prompts of braces and quotes; each form that data sets come in."""
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("plain")
    forms = ["a", {"id": 1, "prompt": "b"}, {"text": "c"}, {"problem": "d"}, {"question": "e"}, {"content": "f"}]
    forms += [{"messages": [{"role": "user", "content": "g"}]}, {"prompt": ["no", "string"], "text": "h"}]
    lines.write_text("\n\n".join(json.dumps(form) for form in forms) + "\n")
    assert read_texts([plain, lines]) == ["plain", *"abcdefgh"]
    for bad in ('{"id": 3}', "no json", '""', '{"prompt": ["no", "string"]}'):
        lines.write_text('"a"\n' + bad + "\n")
        with pytest.raises(ConfigError, match="line 2 of"):
            read_texts([lines])
    lines.write_text("\n")
    with pytest.raises(ConfigError, match="at least one text"):
        read_texts([lines])
