"""Rounds one by one: which drafts stood, how sure the draft was of each, and what stopping on that would have changed.

Three signals, all in (0, 1], of the distribution that a draft is drawn from (greedy: of the softmax at temperature 1).
The emulation is within a round: a request that stops keeps the draft that it is unsure of, for that step has run, and
makes none behind it. Invariant: whether a request stops behind draft j follows from what was drafted up to j alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SIGNALS: Final = ("top1", "product", "entropy")
"""`top1`: the largest probability. `product`: of those of all drafts so far. `entropy`: exp(-entropy in nats)."""


@dataclass(frozen=True)
class Trace:
    """Rounds of one setting on some texts."""

    texts: torch.Tensor
    """[num_rounds], int64: the text of each round."""
    survival: torch.Tensor
    """[num_rounds, num_steps], float32: probability that draft j and all before it stand; in own text 0 or 1."""
    top1: torch.Tensor
    """[num_rounds, num_steps], float32: largest probability of the draft's distribution."""
    entropy: torch.Tensor
    """[num_rounds, num_steps], float32, nats."""

    def confidence(self, signal: str) -> torch.Tensor:
        """[num_rounds, num_steps], float32, one of SIGNALS."""
        return {"top1": self.top1, "product": self.top1.cumprod(dim=1), "entropy": (-self.entropy).exp()}[signal]

    def drafts_made(self, signal: str, threshold: float, num_steps: int | None = None) -> torch.Tensor:
        """[num_rounds], int64: drafts up to the first whose confidence is below `threshold`, that one counted.

        Args:
            num_steps: the most that a request makes; None: all that were recorded.
        """
        sure = (self.confidence(signal) >= threshold)[:, : num_steps or self.survival.shape[1]]
        return (1 + sure[:, :-1].long().cumprod(dim=1).sum(dim=1)).clamp(max=sure.shape[1])

    def accept_lens(self, made: torch.Tensor) -> torch.Tensor:
        """[num_rounds], float32: tokens that each round is expected to yield with `made` drafts, the bonus counted."""
        return 1.0 + (self.survival * self._is_made(made)).sum(dim=1)

    def by_text(self, values: torch.Tensor) -> torch.Tensor:
        """[num_texts]: mean of `values` ([num_rounds]) over each text's rounds."""
        return torch.stack([values[self.texts == text].double().mean() for text in self.texts.unique()])

    def of_texts(self, texts: Iterable[int]) -> Trace:
        """The rounds of some texts."""
        kept = torch.isin(self.texts, torch.tensor(list(texts)))
        return Trace(self.texts[kept], self.survival[kept], self.top1[kept], self.entropy[kept])

    def _is_made(self, made: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.survival.shape[1]) < made[:, None]

    def stopped(self, signal: str, threshold: float) -> Stopped:
        """What stopping below `threshold` would have changed."""
        made = self.drafts_made(signal, threshold)
        left_out = ~self._is_made(made)
        stood, fell = self.survival, 1.0 - self.survival
        return Stopped(
            signal,
            threshold,
            float(self.by_text(made).mean()),
            float(self.by_text(self.accept_lens(made)).mean()),
            _share(fell * left_out, fell),
            _share(stood * left_out, stood),
        )

    def record(self) -> dict[str, Any]:
        """As JSON takes it; rounded, which moves no confidence across a threshold by more than 5e-5."""
        return {
            "texts": self.texts.tolist(),
            **{name: _rounded(getattr(self, name)) for name in ("survival", "top1", "entropy")},
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Trace:
        rows = (torch.tensor(record[name], dtype=torch.float32) for name in ("survival", "top1", "entropy"))
        return cls(torch.tensor(record["texts"]), *rows)


class Stopped(NamedTuple):
    """A rule of stopping on a trace."""

    signal: str
    threshold: float
    drafts_made: float
    """Mean over texts of the drafts of a round."""
    accept_length: float
    """Mean over texts, the bonus token counted."""
    saved: float
    """Share of the drafts that fell, or stood behind one that did, which are not made."""
    lost: float
    """Share of the drafts that stood which are not made."""


class Recorder:
    """Takes rounds in as they run."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._rows: list[tuple[torch.Tensor, ...]] = []

    def add(self, texts: torch.Tensor, draft_logits: torch.Tensor, survival: torch.Tensor) -> None:
        """Note a round.

        Args:
            texts: [num_reqs], int64.
            draft_logits: [num_reqs, num_steps, vocab_size], float32.
            survival: [num_reqs, num_steps], as in `Trace`.
        """
        top1, entropy = certainty(draft_logits, self.temperature)
        self._rows.append(tuple(rows.cpu() for rows in (texts, survival.float(), top1, entropy)))

    def trace(self) -> Trace:
        return Trace(*(torch.cat(rows) for rows in zip(*self._rows, strict=True)))


def certainty(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest probability, entropy in nats) of each row, of the softmax at `temperature`, or at 1 where it is 0.

    Args:
        logits: [..., vocab_size], float32.

    Returns:
        Twice [...], float32.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    probs = logprobs.exp()
    # a token that is ruled out adds nothing, and -inf times 0 is not a number
    return probs.amax(dim=-1), -torch.where(probs > 0, probs * logprobs, 0.0).sum(dim=-1)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0


def _rounded(values: torch.Tensor) -> list[list[float]]:
    rows: Sequence[Sequence[float]] = values.tolist()
    return [[round(value, 4) for value in row] for row in rows]
