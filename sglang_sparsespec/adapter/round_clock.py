"""What copies of KV cost the rounds beside them: iterations of a full pool, timed apart by what was copied meanwhile.

Host time from one decision of the scheduler to the next, where nothing but a round lies between. Under load that is the
time of a round on the device. Only a pool that is nearly full counts, so that all rounds read about as much KV.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

FULL_SHARE = 0.9
"""Of the pool in use, from which on rounds are compared."""
KINDS = {
    "full_pool": "Rounds of a nearly full pool without a copy of KV beside them",
    "one_copy": "Rounds of a nearly full pool beside copies of KV in one direction",
    "both_copies": "Rounds of a nearly full pool beside copies of KV in both directions",
}
ROUND_COUNTERS = {
    name: text
    for kind, what in KINDS.items()
    for name, text in ((f"{kind}_rounds", f"{what}."), (f"{kind}_round_seconds", f"{what}: their time."))
}


class RoundClock:
    """Adds to counters named in ROUND_COUNTERS."""

    def __init__(self, counts: MutableMapping[str, float]) -> None:
        self._counts = counts
        self._started_s: float | None = None
        self._kind = ""

    def tick(self, *, follows_round: bool, is_full: bool, out: bool, back: bool) -> None:
        """The scheduler decides on the next round.

        Args:
            follows_round: the iteration before this one was a round, and not a prefill or a pause.
            is_full: at least FULL_SHARE of the pool is in use.
            out, back: copies to and from host memory are under way.
        """
        now = time.perf_counter()
        if self._started_s is not None and follows_round:
            self._counts[f"{self._kind}_rounds"] += 1
            self._counts[f"{self._kind}_round_seconds"] += now - self._started_s
        self._started_s = now if is_full else None
        self._kind = ("full_pool", "one_copy", "both_copies")[out + back]
