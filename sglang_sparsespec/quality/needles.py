"""A task with right and wrong answers, made from any text: recall a number that stood in the context.

Lines such as "The pass code of Oslo is 48213." stand at even distances in a text. The model has then to write such a
line again: the words are given, the digits are its own. A line is fed as output, by sparse verifies, and not as a part
of the prompt: that is the case of a long answer that comes back to its context. Right is a line of which every digit is
the model's argmax, which is what greedy decoding would write.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = (
    "Oslo",
    "Rome",
    "Paris",
    "Berlin",
    "London",
    "Madrid",
    "Vienna",
    "Dublin",
    "Athens",
    "Lisbon",
    "Cairo",
    "Tokyo",
)
NUM_DIGITS = 5


@dataclass(frozen=True)
class Haystack:
    """A context with lines in it, and the lines to be written again."""

    prompt: list[int]
    lines: list[list[int]]
    """Token ids."""
    answers: list[range]
    """By line: its tokens that are digits of the answer."""


def hide(tokenizer: Any, windows: Sequence[Sequence[int]], num_lines: int, seed: int) -> list[Haystack]:
    """A haystack from each window of token ids, with `num_lines` lines in it.

    Args:
        tokenizer: a transformers tokenizer.
        num_lines: at most len(NAMES).
    """
    rng = random.Random(seed)
    found = []
    for window in windows:
        names = rng.sample(NAMES, num_lines)
        lines, answers = [], []
        for name in names:
            digits = "".join(rng.choice("0123456789") for _ in range(NUM_DIGITS))
            # the same line with other digits tells which tokens are the answer
            other = "".join(str((int(digit) + 5) % 10) for digit in digits)
            line, changed = (encode(tokenizer, f"\nThe pass code of {name} is {text}.\n") for text in (digits, other))
            same = [a == b for a, b in zip(line, changed, strict=False)]
            answer_start = same.index(False)
            answer_end = len(line) - next(i for i in range(len(line)) if line[-1 - i] != changed[-1 - i])
            lines.append(line)
            answers.append(range(answer_start, answer_end))
        prompt: list[int] = []
        for i, line in enumerate(lines):
            prompt += window[i * len(window) // num_lines : (2 * i + 1) * len(window) // (2 * num_lines)]
            prompt += line
            prompt += window[(2 * i + 1) * len(window) // (2 * num_lines) : (i + 1) * len(window) // num_lines]
        found.append(Haystack(prompt, lines, answers))
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
