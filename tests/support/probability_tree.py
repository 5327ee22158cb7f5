"""How likely each output is: exact joint probabilities of the first tokens of an answer, as cells of a G-test.

The tree follows the outputs that many draws can be expected to give. The cells are a partition: an output of `depth`
tokens, or the shortest prefix of it that is too rare to follow, pooled with its siblings.
The filters are written here once more, from their definitions, so that the package's are not their own judge.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.teacher import Teacher

OTHER = -1
"""Stands for the pooled siblings in a cell."""
# the usual rule for the chi-square approximation
MIN_EXPECTED = 5.0

Cell = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0

    def probs(self, logits: torch.Tensor) -> list[float]:
        """One row of logits to probabilities: kept are ranks below top_k, mass above up to top_p, min_p of the best."""
        probs = torch.softmax(logits.double() / self.temperature, dim=-1)
        ranked, order = probs.sort(descending=True, stable=True)
        mass_above = ranked.cumsum(0) - ranked
        kept = (mass_above <= self.top_p) & (ranked >= ranked[0] * self.min_p)
        if self.top_k > 0:
            kept[self.top_k :] = False
        result = torch.zeros_like(probs)
        result[order[kept]] = ranked[kept]
        return (result / result.sum()).tolist()

    @property
    def params(self) -> dict[str, float]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


def expected_cells(
    teacher: Teacher, prompt: Sequence[int], sampling: Sampling, *, depth: int, num_draws: int
) -> dict[Cell, float]:
    """Cells and their expected counts; counts sum to `num_draws`."""
    cells: dict[Cell, float] = {}
    level: dict[Cell, float] = {(): float(num_draws)}
    for length in range(1, depth + 1):
        logits = teacher.next_logits(prompt, list(level))
        deeper: dict[Cell, float] = {}
        for (prefix, count), row in zip(level.items(), logits, strict=True):
            pooled = 0.0
            for token, prob in enumerate(sampling.probs(row)):
                expected = count * prob
                if expected < MIN_EXPECTED:
                    pooled += expected
                elif length < depth and expected >= 8 * MIN_EXPECTED:
                    deeper[(*prefix, token)] = expected
                else:
                    cells[(*prefix, token)] = expected
            if pooled > 0:
                cells[(*prefix, OTHER)] = pooled
        level = deeper
        if not level:
            break
    return cells


def cell_of(output: Sequence[int], cells: dict[Cell, float]) -> Cell | None:
    """The cell that an output falls into; None if it is impossible."""
    for length in range(1, len(output) + 1):
        prefix = tuple(output[:length])
        for cell in (prefix, (*prefix[:-1], OTHER)):
            if cell in cells and not _is_followed(prefix, cell, cells):
                return cell
    return None


def _is_followed(prefix: Cell, cell: Cell, cells: dict[Cell, float]) -> bool:
    """Whether the tree goes on below `prefix`, so that the pooled cell beside it is not meant."""
    if cell == prefix:
        return False
    depth = len(prefix)
    return any(len(other) > depth and other[:depth] == prefix for other in cells)


@dataclass(frozen=True)
class Fit:
    statistic: float
    num_cells: int
    p_value: float
    num_impossible: int

    def __str__(self) -> str:
        return (
            f"G = {self.statistic:.1f} over {self.num_cells} cells, p = {self.p_value:.3g}, "
            f"{self.num_impossible} impossible"
        )


def g_test(outputs: Sequence[Sequence[int]], cells: dict[Cell, float]) -> Fit:
    """Likelihood-ratio test of drawn outputs against expected counts; an impossible output makes p = 0."""
    from scipy.special import rel_entr
    from scipy.stats import chi2

    assert abs(sum(cells.values()) - len(outputs)) < 1e-6 * len(outputs), "expected counts of another number of draws"
    counts = Counter(cell_of(output, cells) for output in outputs)
    num_impossible = counts.pop(None, 0)
    # cells too small for the approximation are tested as one
    small = [cell for cell, expected in cells.items() if expected < MIN_EXPECTED]
    pairs = [(counts[cell], expected) for cell, expected in cells.items() if expected >= MIN_EXPECTED]
    if small:
        pairs.append((sum(counts[cell] for cell in small), sum(cells[cell] for cell in small)))
    statistic = 2 * sum(float(rel_entr(count, expected)) for count, expected in pairs)
    p_value = 0.0 if num_impossible else float(chi2.sf(statistic, len(pairs) - 1))
    return Fit(statistic, len(pairs), p_value, num_impossible)
