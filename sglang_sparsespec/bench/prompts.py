"""Prompts as token ids: real text from Python and this package, a JSONL file of the user's, or random ids.

No download. Real text matters for every measurement of acceptance; random ids do for random weights.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sglang_sparsespec.model_tools.texts import builtin_texts, own_sources, read_jsonl

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

OWN_PLACE = 2


def token_prompts(tokenizer: PreTrainedTokenizerBase, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """One prompt of each length, in tokens: code and prose in turn, each from a place of its own."""
    rng = random.Random(seed)
    texts = builtin_texts()
    # early, for a small batch has the first few alone
    texts.insert(OWN_PLACE, own_sources())
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
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


def file_prompts(tokenizer: PreTrainedTokenizerBase, path: Path, count: int) -> list[list[int]]:
    """`count` prompts of a JSONL file in order, from its beginning again when it is too short; chat models get their
    template."""
    prompts = read_jsonl(path)
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
