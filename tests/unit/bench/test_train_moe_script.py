"""scripts/bench/train_moe.py: what it trains on, and that it learns."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.model_tools.texts import SOURCES, builtin_texts
from tests.support.scripts import load_script

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_is_measured_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the text by heart, and so loses nothing with half of its experts."""
    code, prose = load_script("bench/train_moe.py", monkeypatch).training_texts()
    texts = [text.encode() for text in builtin_texts()]
    modules, parts = texts[::2], texts[1::2]
    assert len(modules) == len(SOURCES)
    # from the middle: many modules begin and end alike
    assert not any(text[len(text) // 2 :][:500] in code for text in modules)
    assert not any(text[:2000] in prose for text in parts[: len(parts) // 2])
    assert all(text[:2000] in prose for text in parts[len(parts) // 2 :])


def test_learns_to_write_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes under the numbers of other bytes would be learnt as well; the tokenizer must know them again."""
    import transformers

    script = load_script("bench/train_moe.py", monkeypatch)
    sizes = {"steps": 60, "batch": 4, "window": 64, "hidden": 64, "layers": 2, "experts": 4, "experts-per-token": 2}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["train_moe.py", "--out", str(tmp_path), *options])
    script.main()
    assert "step 60: loss" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("    def run(self, name):\n        return self.name\n")["input_ids"]])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < math.log(256) - 1.5
