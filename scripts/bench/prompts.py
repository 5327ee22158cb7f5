"""Prompts of real text that need no download: Python sources and the English prose of Python's own manual."""

from __future__ import annotations

import argparse as code_a
import asyncio.base_events as code_b
import difflib as code_c
import inspect as code_d
import random
import subprocess as code_e
import tarfile as code_f
import typing as code_g
import unittest.mock as code_h
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = (code_a, code_b, code_c, code_d, code_e, code_f, code_g, code_h)


def texts() -> list[str]:
    """Sixteen long texts: eight modules, and the manual's topics in eight parts of whole topics."""
    modules = [Path(str(module.__file__)).read_text() for module in SOURCES]
    prose = sorted(topics.topics.values(), key=len, reverse=True)
    parts = ["\n\n".join(prose[i::8]) for i in range(8)]
    return [text for pair in zip(modules, parts, strict=True) for text in pair]


def token_prompts(tokenizer: PreTrainedTokenizerBase, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """One prompt of each length, in tokens: code and prose in turn, each from a place of its own."""
    rng = random.Random(seed)
    encoded = [tokenizer(text)["input_ids"] for text in texts()]
    prompts = []
    for i, length in enumerate(lengths):
        ids = encoded[i % len(encoded)]
        start = rng.randrange(max(1, len(ids) - length))
        prompts.append(list(ids[start : start + length]))
    return prompts
