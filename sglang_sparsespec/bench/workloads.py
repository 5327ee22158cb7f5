"""The loads of the two papers, for any local model and any file of prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A load that stops by itself: answers end at their own end-of-text token, and each makes place for the next."""

    source: str
    temperature: float
    top_p: float
    top_k: int
    batch: int
    prompt_tokens: int
    """Of the default prompts. A file's have their own length, up to FILE_PROMPT_TOKENS."""
    new_tokens: int
    """At most, and never past the context."""


FILE_PROMPT_TOKENS = 1024
"""A longer prompt of a file loses its beginning."""
WORKLOADS = {
    "paper": Workload(
        "SparseSpec, arXiv:2512.01278: reasoning problems of 124 to 148 tokens, answers up to 17K",
        temperature=0.65,
        top_p=1.0,
        top_k=-1,
        batch=128,
        prompt_tokens=160,
        new_tokens=17_000,
    ),
    "vegas": Workload(
        "Vegas, arXiv:2602.07223: AIME25 problems, contexts up to 40,960 tokens",
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        batch=128,
        prompt_tokens=512,
        new_tokens=40_448,
    ),
}
