"""Real text that needs no download, and prompts cut from it: Python sources and the prose of Python's own manual."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# long modules of the standard library, of different kinds of code
SOURCES = ("argparse", "asyncio.base_events", "difflib", "inspect", "subprocess", "tarfile", "typing", "unittest.mock")
OWN_SOURCES = ("selection", "speculation")
TEXT_FIELDS = ("prompt", "text", "question", "problem", "content")


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


def own_sources() -> str:
    """Code that no model was trained on, unlike Python's own: this package's rules of selection and of rounds."""
    package = Path(__file__).parents[1]
    files = [path for folder in OWN_SOURCES for path in sorted((package / folder).glob("*.py"))]
    return "\n\n".join(path.read_text() for path in files)


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Texts of files: those of `read_jsonl` from .jsonl files, else one text a file.

    Raises:
        ConfigError: as `read_jsonl`.
    """
    texts = []
    for path in paths:
        texts += read_jsonl(path) if path.suffix == ".jsonl" else [path.read_text()]
    return texts


def read_jsonl(path: Path) -> list[str]:
    """A text a line: a string, or an object with a string in one of `TEXT_FIELDS`, or with chat `messages`.

    Raises:
        ConfigError: for a file without texts, and for a line that is none of these.
    """
    texts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            if isinstance(value.get("messages"), list):
                value = "\n\n".join(str(message.get("content", "")) for message in value["messages"])
            else:
                value = next((value[field] for field in TEXT_FIELDS if isinstance(value.get(field), str)), None)
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"line {number} of {path}",
                line[:80],
                f"a JSON string, or an object with a string in one of {', '.join(TEXT_FIELDS)}, or with messages",
                "Write one text per line.",
            )
        texts.append(value)
    if not texts:
        raise ConfigError("a file of texts", str(path), "JSONL with at least one text", "The file has none.")
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
