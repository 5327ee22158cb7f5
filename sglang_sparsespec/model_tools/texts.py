"""Real text that needs no download, and prompts cut from it: Python sources and the prose of Python's own manual."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# long modules of the standard library, of different kinds of code
SOURCES = ("argparse", "asyncio.base_events", "difflib", "inspect", "subprocess", "tarfile", "typing", "unittest.mock")
TEXT_KEYS = ("text", "prompt", "content")


def builtin_texts() -> list[str]:
    """Sixteen long texts, code and prose in turn: eight modules, and the manual's topics in as many parts."""
    modules = []
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"Python without {name}"
        assert spec.origin is not None, f"{name} has no source"
        modules.append(Path(spec.origin).read_text())
    prose = sorted(topics.topics.values(), key=len, reverse=True)
    parts = ["\n\n".join(prose[i :: len(SOURCES)]) for i in range(len(SOURCES))]
    return [text for pair in zip(modules, parts, strict=True) for text in pair]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Texts of files: a JSON object with `text`, `prompt` or `content` a line in .jsonl files, else one text a file.

    Raises:
        ValueError: for a line of a .jsonl file that has no text.
    """
    texts = []
    for path in paths:
        if path.suffix != ".jsonl":
            texts.append(path.read_text())
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip():
                record = json.loads(line)
                text = next((record[key] for key in TEXT_KEYS if isinstance(record.get(key), str)), None)
                if text is None:
                    raise ValueError(f"{path}:{number}: expected a string under one of {', '.join(TEXT_KEYS)}.")
                texts.append(text)
    return texts


def token_windows(tokenizer: Any, texts: Sequence[str], lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One window of tokens for each length, the texts in turn, each window from a random place of its text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: too short ones are passed over.
        lengths: tokens.
        seed: of the places.

    Raises:
        ValueError: if no text is long enough.
    """
    rng = random.Random(seed)
    # longer than the model's context on purpose: windows are cut from them
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    windows: list[list[int]] = []
    turn = 0
    for length in lengths:
        fitting = [i for i in range(turn, turn + len(encoded)) if len(encoded[i % len(encoded)]) >= length]
        if not fitting:
            longest = max((len(ids) for ids in encoded), default=0)
            raise ValueError(f"The longest text has {longest} tokens; a window of {length} was asked for.")
        ids = encoded[fitting[0] % len(encoded)]
        turn = fitting[0] + 1
        start = rng.randrange(len(ids) - length + 1)
        windows.append(list(ids[start : start + length]))
    return windows
