"""How many drafts the next round makes: what the controller wants or the server is set to, as its requests allow.

Times are the host's, from the arrival of one round's results to the next one's. The host gets results by waiting for
the device, so in a steady state that is what a round takes, whether the device or the host is the slower; CUDA events
would leave out the gaps between rounds, which short rounds pay more often. Nothing waits for the device for this.

Tensor parallelism: ranks must make rounds of the same k, and each has its own clock. Rank 0 has the controller, and the
others are told k, once a round. Were they told times instead, all controllers would have to come to the same k by
floating-point arithmetic, and a hang would be the price of a last bit; as it is there is nothing that could differ.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.adapter.transfer import ToHost, to_device, to_host
from sglang_sparsespec.config import SCHEDULES
from sglang_sparsespec.request_options import draft_limit
from sglang_sparsespec.speculation import profile
from sglang_sparsespec.speculation.controller import Controller, Round, Status
from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice, ScheduleStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.managers.schedule_batch import Req

    from sglang_sparsespec.config import SparseSpecConfig
    from sglang_sparsespec.speculation.cost_model import ServerCost

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
# results of rounds that nobody will see: SGLang drops none that we know of
_MAX_IN_FLIGHT = 8
# of a plain round's work, what may be done for requests that have ended; arbitrary
_MAX_WASTE = 0.03


class StepPlan(NamedTuple):
    """k of a round, and whose drafts stop earlier."""

    num_steps: int
    """k; 0 is a plain decode."""
    limits: list[int] | None
    """Drafts of each request that may stand, at most k; None: all k of all requests."""
    schedule: str = "lockstep"
    """That is wanted; a round that the unified one does not take runs in lockstep."""
    plain_steps: int = 0
    """Above 0: the round decodes so many tokens without drafting, verifying or refreshing selections."""

    def limits_on(self, device: str) -> torch.Tensor | None:
        """[num_reqs], int64; the copy does not wait for the device."""
        if self.limits is None:
            return None
        return to_device(torch.tensor(self.limits, dtype=torch.int64), device)


class _InFlight(NamedTuple):
    """A round whose results have not arrived."""

    round: Round
    is_steady: bool
    """Whether nothing else ran before it, and it is of a kind whose time is of interest."""
    schedule: str
    decoded: tuple[Req, ...] = ()
    """Requests of a plain round."""
    is_schedule_try: bool = False
    """Whether its schedule is not the one that is kept: its time says nothing of its k."""
    drafted: ToHost | None = None
    """Drafts that each request really had, where they were fewer than wanted."""


class RoundSteps:
    """Chooses k and the schedule, round by round. A round takes any k from 0, plain decoding, to `max_steps`.

    Args:
        config: of the server.
        identity: of the server, for its profile.
        clock: seconds.
        ranks: schedulers that make the same rounds; default: this one alone. Rank 0 alone learns, and reads and writes
            the profile.
        cost: what rounds take by the cost model: for `--sparsespec-schedule auto`, which needs it, and for the first k.

    Raises:
        ConfigError: the profile is of another server, or none.
    """

    def __init__(
        self,
        config: SparseSpecConfig,
        identity: profile.Identity | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: HostRanks | None = None,
        cost: ServerCost | None = None,
    ) -> None:
        self.max_steps = config.num_steps
        self._ranks = ranks or HostRanks()
        self._is_adaptive = bool(config.adaptive)
        # decode steps of a plain round at most; 0: rounds without drafts are verifies, which refresh selections
        self._plain_steps = config.most_plain_steps
        self._is_stale = False
        self.controller = None
        if config.adaptive and self._ranks.leads:
            guess = None if cost is None else cost.round_ms
            self.controller = Controller(config.step_choices, max(1, self._plain_steps), guess)
        self._profile, self._identity = config.profile, identity or {}
        self.is_warm = False
        if self.controller is not None and self._profile is not None:
            self.is_warm = profile.load(self._profile, self._identity, self.controller)
        self._clock = clock
        self._schedule = config.schedule
        self._choice: ScheduleChoice | None = None
        if self._schedule == "auto" and self._ranks.leads:
            assert cost is not None, "auto starts from the cost model"
            self._choice = ScheduleChoice(cost, self.max_steps)
        self._in_flight: deque[_InFlight] = deque()
        self._is_steady = False
        self._arrived: float | None = None
        self._saved = clock()

    def next_round(self, reqs: Sequence[Req], pool_tokens: int, *, allows_plain: bool = False) -> StepPlan:
        """The plan of the round that is about to start, for `reqs` with `pool_tokens` of KV as the host knows.

        Every rank calls this once for every round, before its first forward.

        Args:
            reqs: of the round.
            pool_tokens: their KV.
            allows_plain: whether a round without drafts may do without a verify.
        """
        chosen = self._agreed(pool_tokens, [self.limit_of(req) for req in reqs])
        plain_steps, is_refresh = 0, False
        if chosen.num_steps == 0 and allows_plain and self._plain_steps > 0:
            plain_steps = worthwhile_steps([left_of(req) for req in reqs], self._plain_steps)
            chosen = chosen._replace(plain_steps=plain_steps)
        elif chosen.num_steps > 0 and self._is_stale:
            # drafts would not see all that came since the selection was made: first a verify makes a new one
            is_refresh = True
            if self.controller is not None:
                self.controller.deferred(chosen)
            chosen = Round(0, pool_tokens, (0,) * len(reqs))
        self._is_stale = plain_steps > 0
        schedule = self._agreed_schedule(chosen)
        is_try = self._choice is not None and chosen.num_steps == self.max_steps and self._choice.is_try(schedule)
        decoded = tuple(reqs) if plain_steps > 0 else ()
        self._in_flight.append(_InFlight(chosen, self._is_steady and not is_refresh, schedule, decoded, is_try))
        self._is_steady = True
        if len(self._in_flight) > _MAX_IN_FLIGHT:
            self._in_flight.popleft()
        is_limited = min(chosen.allowed) < chosen.num_steps
        return StepPlan(chosen.num_steps, list(chosen.allowed) if is_limited else None, schedule, plain_steps)

    @property
    def is_stale(self) -> bool:
        """Whether selections are older than the last round, which was plain."""
        return self._is_stale

    def brought_back(self, *, is_stale: bool) -> None:
        """A request runs on with the selection that it left with."""
        self._is_stale |= is_stale and self._plain_steps > 0

    def runs(self, schedule: str, verified: Sequence[int] | None = None) -> None:
        """The round that was planned last runs by this schedule.

        Args:
            schedule: lockstep or unified.
            verified: drafts that each request has to verify, where some have fewer than were wanted: the first round
                of a request in the unified schedule. None: as planned.
        """
        planned = self._in_flight[-1]
        done = planned.round
        if verified is not None:
            # a draft that was not made was not rejected
            allowed = tuple(map(min, done.allowed, verified))
            done = done._replace(allowed=allowed)
        is_try = planned.is_schedule_try and schedule == planned.schedule
        self._in_flight[-1] = planned._replace(round=done, schedule=schedule, is_schedule_try=is_try)

    def drafted(self, counts: torch.Tensor) -> None:
        """The round that was planned last has fewer drafts than k for some requests.

        Args:
            counts: [num_reqs], int64, drafts of each request.
        """
        if self.controller is not None:
            self._in_flight[-1] = self._in_flight[-1]._replace(drafted=to_host(counts))

    def _agreed_schedule(self, chosen: Round) -> str:
        """Rank 0's choice, as with k; every rank gets here once a round, and knows k."""
        if self._schedule != "auto":
            return self._schedule
        if chosen.num_steps != self.max_steps:
            # the unified schedule has rounds of K drafts alone
            return SCHEDULES[0]
        wanted = SCHEDULES[0]
        if self._choice is not None:
            wanted = self._choice.choose(len(chosen.allowed), chosen.pool_tokens)
        return SCHEDULES[self._ranks.of_rank_0(SCHEDULES.index(wanted))]

    def _agreed(self, pool_tokens: int, limits: Sequence[int]) -> Round:
        """The same on every rank: requests and limits are, and k is rank 0's."""
        if self._is_adaptive and not self._ranks.leads:
            return round_of(self._ranks.of_rank_0(0), pool_tokens, limits)
        chosen = self.wanted(pool_tokens, limits)
        if self._is_adaptive:
            self._ranks.of_rank_0(chosen.num_steps)
        return chosen

    def limit_of(self, req: Req) -> int:
        """Drafts of a request that may stand."""
        # validated before it came here (patches/requests.py)
        limit = draft_limit(req.sampling_params.custom_params)
        return self.max_steps if limit is None else min(limit, self.max_steps)

    def wanted(self, pool_tokens: int, limits: Sequence[int]) -> Round:
        """The round to make, for requests with these limits."""
        if self.controller is not None:
            return self.controller.choose(pool_tokens, limits)
        return round_of(self.max_steps, pool_tokens, limits)

    def interrupted(self) -> None:
        """Something else runs before the next round: what passes until its results arrive is not its time."""
        self._is_steady = False

    def verified(self, num_correct: Sequence[int]) -> None:
        """Results of the oldest round in flight have arrived on the host."""
        arrived, before = self._clock(), self._arrived
        self._arrived = arrived
        if not self._in_flight:
            return
        done, is_steady, schedule, decoded, is_schedule_try, drafted = self._in_flight.popleft()
        if len(done.allowed) != len(num_correct):
            # not ours: forget what is in flight rather than mix rounds up
            self._in_flight.clear()
            return
        for req in decoded:
            # to SGLang's counters a token of a plain decode is a verify without a draft; the round it counts itself
            if not (req.is_retracted or req.finished()):
                req.spec_verify_ct += done.plain_steps - 1
        round_ms = 1e3 * (arrived - before) if is_steady and before is not None else None
        if self._choice is not None and done.num_steps == self.max_steps:
            # a round of another k is no measure of either
            self._choice.observe(schedule, len(num_correct), done.pool_tokens, round_ms)
        if self.controller is None:
            return
        if drafted is not None:
            # a draft that was never made did not fail
            done = done._replace(allowed=tuple(map(min, done.allowed, drafted.read())))
        self.controller.observe(done, num_correct, None if is_schedule_try else round_ms)
        if self._profile is not None and arrived - self._saved > SAVE_EVERY_S:
            self._saved = arrived
            self._save(self._profile, self.controller)

    def _save(self, path: str, controller: Controller) -> None:
        try:
            profile.save(path, self._identity, controller)
        except OSError as error:
            # a full disk is no reason to stop serving
            self._profile = None
            logger.warning("SPARSESPEC: --sparsespec-profile %s cannot be written any more: %s", path, error)

    @property
    def status(self) -> Status | None:
        """Of the controller; None where k is fixed or another rank's."""
        return None if self.controller is None else self.controller.status

    @property
    def schedule_status(self) -> ScheduleStatus | None:
        """Of the choice between schedules; None where it is fixed or another rank's."""
        return None if self._choice is None else self._choice.status

    def describe(self) -> dict[str, Any]:
        """For /server_info."""
        schedule: dict[str, Any] = {"schedule": self._schedule}
        status = self.schedule_status
        if status is not None:
            schedule["auto"] = {
                "now": status.schedule,
                "reason": status.reason,
                "predicted_ratio": _rounded(status.predicted),
                "measured_ratio": _rounded(status.measured),
                "round_ms": {name: round(ms, 3) for name, ms in status.round_ms.items()},
            }
        if self.controller is None:
            return {"adaptive": self._is_adaptive, "num_steps": self.max_steps, **schedule}
        return {"adaptive": True, **profile.describe(self.controller), **schedule}


def left_of(req: Req) -> int:
    """Tokens that a request may still say, as the host knows."""
    return max(1, req.sampling_params.max_new_tokens - len(req.output_ids))


def worthwhile_steps(left: Sequence[int], most: int) -> int:
    """Decode steps of a plain round: as many as possible with little done for requests that end on the way.

    Args:
        left: tokens of each request at most.
        most: steps.
    """
    if min(left) >= most:
        return most
    for steps in range(most, 1, -1):
        if sum(max(0, steps - tokens) for tokens in left) <= _MAX_WASTE * steps * len(left):
            return steps
    return 1


def round_of(num_steps: int, pool_tokens: int, limits: Sequence[int]) -> Round:
    """A round of `num_steps` drafts, or as many as the requests allow."""
    num_steps = min(num_steps, max(limits))
    return Round(num_steps, pool_tokens, tuple(min(limit, num_steps) for limit in limits))


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)
