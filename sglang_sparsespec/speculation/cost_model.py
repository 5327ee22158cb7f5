"""What a lockstep round costs, from a few measured times; which k is worth it.

A plain decode step costs W + A: reading the weights, and the KV cache of all running requests. Knows nothing of how
acceptance came about. Reference: SparseSpec (arXiv:2512.01278), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    """Times of one batch on one machine, in milliseconds. The defaults of the shares are guesses to be measured."""

    weights_ms: float
    """W: a decode step without attention."""
    attention_ms: float
    """A: the attention of a decode step over the whole KV cache in use."""
    verify_ms: float | None = None
    """V: a verify without attention, k + 1 rows a request. None: W, as long as reading weights fills the time."""
    gather_efficiency: float = 0.75
    """u: bandwidth of sparse attention as a share of dense attention's."""
    capture_share: float = 0.1
    """c: capture and selection as a share of A."""
    overhead_ms: float = 0.2
    """o: host and launch gap of a draft step."""

    def round_ms(self, num_steps: int, read_share: float) -> float:
        """k drafts that read `read_share` of the KV cache each, one verify with capture."""
        draft_ms = self.weights_ms + read_share * self.attention_ms / self.gather_efficiency + self.overhead_ms
        verify_ms = self.weights_ms if self.verify_ms is None else self.verify_ms
        return num_steps * draft_ms + verify_ms + self.attention_ms * (1.0 + self.capture_share)

    def speedup(self, num_steps: int, read_share: float, accept_length: float) -> float:
        """Tokens per time over plain decoding's; `accept_length` counts the bonus token."""
        return accept_length * (self.weights_ms + self.attention_ms) / self.round_ms(num_steps, read_share)

    def best_num_steps(self, survival: Sequence[float], read_share: float) -> tuple[int, float]:
        """The k with the largest speed-up, and that speed-up.

        Args:
            survival: probability that draft j and all before it are correct, j = 1 .. the largest k.
            read_share: share of the KV cache that a draft step reads.
        """
        accept_length = 1.0
        best = (1, 0.0)
        for num_steps, alive in enumerate(survival, start=1):
            accept_length += alive
            speedup = self.speedup(num_steps, read_share, accept_length)
            if speedup > best[1]:
                best = (num_steps, speedup)
        return best
