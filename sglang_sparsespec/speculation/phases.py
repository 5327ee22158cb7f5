"""The unified schedule: who drafts and who verifies in each forward of a round.

A round has k + 1 forwards, and every request verifies in one of them, its phase, and drafts in the others. So each
forward feeds one token of most requests and k + 1 tokens of a (k + 1)th part of them: (2k + 1) / (k + 1) tokens per
request, always, where drafting together and verifying together alternates between 1 and k + 1. What a request drafts
behind its phase it holds for its verify of the next round.

Paper: SparseSpec (arXiv:2512.01278), the unified batch. There a request is put into the least loaded bucket when it
comes, and waits an iteration after its verify; here phases are levelled anew before each round, and nobody waits.
Pure host code. Invariant: the verifies of a round differ by at most one from forward to forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Turn(NamedTuple):
    """One forward of a round. Requests are numbers in the round's batch."""

    draft_reqs: list[int]
    """Requests that draft."""
    draft_offsets: list[int]
    """Of each of them, where the token that is fed stands in its chain: 0 is the current token, i the i-th draft."""
    verify_reqs: list[int]
    """Requests that verify."""
    num_drafts: list[int]
    """Of each of them, the drafts that it has to verify, at most k: fewer in a round before which it held too few."""


class Load(NamedTuple):
    """Bounds over the forwards of a round."""

    draft_reqs: int
    verify_reqs: int
    width: int
    """Tokens that each of them verifies at most: k + 1."""

    @property
    def num_tokens(self) -> int:
        """That a forward feeds."""
        return self.draft_reqs + self.verify_reqs * self.width


def load_of(num_reqs: int, num_steps: int) -> Load:
    """The most that any forward of a round of `num_reqs` requests has; no smaller round has more."""
    num_forwards = num_steps + 1
    return Load(num_reqs - num_reqs // num_forwards, -(-num_reqs // num_forwards), width=num_steps + 1)


def assign(held: Sequence[int], num_steps: int) -> list[int]:
    """The phase of each request, 0 to k: the number of the forward in which it verifies.

    A request that holds h drafts has all k of them from phase k - h on; earlier it verifies fewer, later it pauses. So
    requests are ordered by that phase and cut into level groups. Where nobody comes or goes, everybody keeps the phase
    of the last round; otherwise at most one request per group moves up and drafts one less, once.

    Args:
        held: [num_reqs], drafts that each request has from the last round, 0 to k.
        num_steps: k.
    """
    order = sorted(range(len(held)), key=lambda req: num_steps - held[req])
    num_forwards = num_steps + 1
    base, extra = divmod(len(held), num_forwards)
    phases = [0] * len(held)
    start = 0
    for phase in range(num_forwards):
        # the larger groups come last: who has just come, with no drafts, finds room there
        end = start + base + (phase >= num_forwards - extra)
        for req in order[start:end]:
            phases[req] = phase
        start = end
    return phases


def held_after(phases: Sequence[int], num_steps: int) -> list[int]:
    """Drafts that each request holds after the round: one from each forward behind its phase."""
    return [num_steps - phase for phase in phases]


def turns(held: Sequence[int], phases: Sequence[int], num_steps: int) -> list[Turn]:
    """The k + 1 forwards of a round, by lists: the definition. `adapter.unified_state` lays out the same with arrays.

    Args:
        held: [num_reqs], drafts that each request has from the last round, 0 to k.
        phases: [num_reqs], as `assign` gives them, or any from 0 to k.
        num_steps: k.
    """
    forwards = []
    for number in range(num_steps + 1):
        turn = Turn([], [], [], [])
        for req, (has, phase) in enumerate(zip(held, phases, strict=True)):
            if number == phase:
                turn.verify_reqs.append(req)
                turn.num_drafts.append(min(has + phase, num_steps))
                continue
            # behind its verify a request starts afresh from the bonus token
            offset = has + number if number < phase else number - phase - 1
            if offset < num_steps:
                turn.draft_reqs.append(req)
                turn.draft_offsets.append(offset)
        forwards.append(turn)
    return forwards
