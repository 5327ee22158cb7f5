"""Who leaves the device pool when it runs full, and who may come back: decisions over plain records.

Seniority rules both ways. Of the running requests the last that arrived leaves first; of those in host memory the first
that arrived returns first, and nobody new is admitted before it. So the oldest request never moves, nobody is overtaken
for ever, and the system makes progress whatever the load is. Under priority scheduling priority comes before arrival.

How often a request moves is bounded by a minimum stay: who has returned is settling for `MIN_STAY_ROUNDS` rounds, in
which others leave before it, and returns are spaced so that those who settle find room for that long. See
`MovePolicy.max_moves`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

STAY_ROUNDS = 8
"""Rounds for which there must be room when a request returns: a round lost in eight is cheap. At 128 requests and k = 8
it keeps 9,216 tokens free."""
MIN_STAY_ROUNDS = 16
"""Rounds after a return in which a request leaves only if nobody else can: a round lost and two copies, spread over
sixteen rounds or more."""
MAX_SETTLING_SHARE = 0.1
"""Of the pool, that settling requests may ask to be kept free: many return at once only when many others have ended."""
MAX_SLACK_SHARE = 0.03
"""Never keep more of the pool free than this. With room for one who returns, some 2 % more, it runs at 95 %."""
WATERMARK_SHARE = 0.25
"""A request starts to leave when less than this share of the slack is left, so that its copy runs beside compute."""


class Seniority(NamedTuple):
    """A smaller one leaves the pool later and returns earlier."""

    rank: int
    """0 where priorities are off; otherwise smaller for requests that the host prefers."""
    arrival: float
    """Any clock that all requests share and that no two of them read alike; each rank has its own, and as ranks make
    requests one after another in the same order, the order is the same on every rank."""
    rid: str
    """Breaks ties, the same way on every rank."""


@dataclass(frozen=True)
class MovePolicy:
    """When to move.

    Args:
        tokens_per_round: tokens that a request may commit in one round at most (k + 1).
        pool_tokens: size of the device pool.
    """

    tokens_per_round: int
    pool_tokens: int

    def slack(self, num_running: int) -> int:
        """Tokens that must be left over, beyond the next step, after a request has returned to `num_running` others."""
        wanted = STAY_ROUNDS * self.tokens_per_round * (num_running + 1)
        return min(wanted, int(MAX_SLACK_SHARE * self.pool_tokens))

    def settling_room(self, num_settling: int) -> int:
        """Tokens in which `num_settling` requests and the oldest can grow for a whole minimum stay."""
        wanted = MIN_STAY_ROUNDS * self.tokens_per_round * (num_settling + 1)
        return min(wanted, int(MAX_SETTLING_SHARE * self.pool_tokens))

    def watermark(self, num_running: int) -> int:
        """Tokens beyond the next step below which a request starts to leave."""
        return int(WATERMARK_SHARE * self.slack(num_running))

    def may_return(self, *, room: int, needed: int, num_running: int, num_settling: int = 0) -> bool:
        """Whether the senior request in host memory may return now.

        Args:
            room: tokens free or evictable on the device.
            needed: its KV and everybody's next step, tokens.
            num_running: live requests on the device, those that are just coming included. With 0 nothing but this
                request could ever make room, so it returns as soon as it fits.
            num_settling: those of them that have returned in the last MIN_STAY_ROUNDS rounds or are just coming.
        """
        if num_running == 0:
            return needed <= room
        return needed + max(self.slack(num_running), self.settling_room(num_settling + 1)) <= room

    def should_leave(self, *, room: int, needed: int, num_running: int) -> bool:
        """Whether one more running request should start to leave before the pool is full.

        Args:
            room: tokens free, evictable, or about to be freed by requests that are leaving.
            needed: everybody's next step, tokens.
        """
        return num_running > 1 and room < needed + self.watermark(num_running)

    def max_moves(self, new_tokens: int) -> int:
        """Bound on how often a request of `new_tokens` outputs leaves the device.

        A stay lasts MIN_STAY_ROUNDS rounds, each of which commits one token or more; under the overlap scheduler the
        last of them is lost. It holds where `settling_room` is not capped, and where a batch has others that can leave:
        not for what the host preempts for a request of higher priority, and not while everybody else's prefill is in
        flight.
        """
        return 1 + -(-new_tokens // (MIN_STAY_ROUNDS - 1))


class LeavingOrder(NamedTuple):
    """Indices of all running requests but the senior, the first to leave first."""

    movable: list[int]
    """They take their KV along."""
    settling: list[int]
    """They could, and have only just returned: once no other of the above is left."""
    fixed: list[int]
    """They would lose it: only once nobody else is left."""


def leaving_order(
    seniorities: Sequence[Seniority], is_movable: Sequence[bool], is_settling: Sequence[bool]
) -> LeavingOrder:
    """In which order requests make room; the last that arrived first, and the senior never.

    Args:
        seniorities: of the running requests, at least one.
        is_movable: whether each could leave with its KV.
        is_settling: whether each has returned less than MIN_STAY_ROUNDS rounds ago.
    """
    juniors = sorted(range(len(seniorities)), key=lambda index: seniorities[index], reverse=True)[:-1]
    return LeavingOrder(
        movable=[i for i in juniors if is_movable[i] and not is_settling[i]],
        settling=[i for i in juniors if is_movable[i] and is_settling[i]],
        fixed=[i for i in juniors if not is_movable[i]],
    )


class Stay:
    """How often a request has left the device, and in which round it came back last."""

    def __init__(self) -> None:
        self.num_moves = 0
        self.returned_in: int | None = None

    def is_settling(self, now: int) -> bool:
        """Whether the minimum stay is not over in round `now`."""
        return self.returned_in is not None and now - self.returned_in < MIN_STAY_ROUNDS


def precedes(queued: Seniority, offloaded: Seniority, *, has_run: bool) -> bool:
    """Whether a request in the host's queue gets room before one in host memory.

    A new one only if it outranks it; one that has run, and was retracted, also if it arrived before it.
    """
    return queued < offloaded if has_run else queued.rank < offloaded.rank


def may_enter(queued: Seniority, offloaded: Sequence[Seniority], *, has_run: bool) -> bool:
    """Whether a request in the host's queue may be admitted while others wait in host memory."""
    return all(precedes(queued, other, has_run=has_run) for other in offloaded)
