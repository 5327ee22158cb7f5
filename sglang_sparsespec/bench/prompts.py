"""Prompts as token ids: real text that comes with Python, a JSONL file of the user's, or random ids.

No download. Real text matters for every measurement of acceptance; random ids do for random weights.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.model_tools.texts import builtin_texts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

PROMPT_FIELDS = ("prompt", "text", "question", "problem")


def token_prompts(tokenizer: PreTrainedTokenizerBase, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """One prompt of each length, in tokens: code and prose in turn, each from a place of its own."""
    rng = random.Random(seed)
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in builtin_texts()]
    prompts = []
    for i, length in enumerate(lengths):
        # a text shorter than the prompt goes on with the next one
        ids, following = list(encoded[i % len(encoded)]), i + 1
        while len(ids) < length:
            ids += encoded[following % len(encoded)]
            following += 1
        start = rng.randrange(max(1, len(ids) - length))
        prompts.append(ids[start : start + length])
    return prompts


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(vocab_size), k=length) for length in lengths]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file: strings, or objects with one of `PROMPT_FIELDS`, or with chat `messages`.

    Raises:
        ConfigError: for a file without prompts, and for a line that is none of these.
    """
    prompts = []
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
                value = next((value[field] for field in PROMPT_FIELDS if field in value), None)
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"line {number} of {path}",
                line[:80],
                f"a JSON string, or an object with one of {', '.join(PROMPT_FIELDS)}, or with messages",
                "Write one prompt per line.",
            )
        prompts.append(value)
    if not prompts:
        raise ConfigError("--prompts", str(path), "a JSONL file with at least one prompt", "The file has none.")
    return prompts


def file_prompts(tokenizer: PreTrainedTokenizerBase, path: Path, count: int) -> list[list[int]]:
    """`count` prompts of a JSONL file in order, from its beginning again when it is too short; chat models get their
    template."""
    prompts = read_prompts(path)
    encoded: list[list[int]] = []
    for text in prompts[:count]:
        if tokenizer.chat_template:
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
            )
        encoded.append(list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]))
    return [encoded[i % len(encoded)] for i in range(count)]
