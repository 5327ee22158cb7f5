"""Who moves when: order, hysteresis, progress, and the bound on moves, in a pool that is a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from sglang_sparsespec.kv.policy import MIN_STAY_ROUNDS, MovePolicy, Seniority, Stay, leaving_order, may_enter

K1 = 9


def test_the_last_that_arrived_leaves_first() -> None:
    """With any other order the oldest request may never end."""
    seniorities = [Seniority(0, arrival, f"r{arrival}") for arrival in (3.0, 1.0, 4.0, 2.0)]
    yes, no = [True] * 4, [False] * 4
    assert leaving_order(seniorities, yes, no) == ([2, 0, 3], [], [])
    assert leaving_order(seniorities, [True, True, False, True], no) == ([0, 3], [], [2])
    assert leaving_order(seniorities, no, no) == ([], [], [2, 0, 3])
    assert leaving_order(seniorities, [False, True, False, False], yes) == ([], [], [2, 0, 3]), "the senior could, too"
    assert leaving_order(seniorities, yes, [False, True, True, False]) == ([0, 3], [2], [])
    assert leaving_order(seniorities[:1], [True], [False]) == ([], [], [])


def test_priority_comes_before_arrival() -> None:
    """A request that the operator prefers must not leave because it came late."""
    preferred, other = Seniority(-5, 9.0, "late"), Seniority(0, 1.0, "early")
    assert leaving_order([preferred, other], [True, True], [False, False]).movable == [1]


@pytest.mark.parametrize("has_run", [False, True], ids=["new", "retracted"])
def test_who_is_admitted_while_others_are_in_host_memory(has_run: bool) -> None:
    """New requests that overtake restored ones; or a retracted elder that waits for its juniors."""
    preferred, other = Seniority(-5, 9.0, "late"), Seniority(0, 5.0, "early")
    assert may_enter(Seniority(-6, 20.0, "x"), [preferred, other], has_run=has_run)
    assert not may_enter(Seniority(-5, 20.0, "x"), [preferred, other], has_run=has_run)
    assert may_enter(Seniority(-5, 1.0, "x"), [preferred, other], has_run=has_run) is has_run
    assert not may_enter(Seniority(0, 7.0, "x"), [other], has_run=has_run)
    assert may_enter(Seniority(0, 4.0, "x"), [other], has_run=has_run) is has_run
    assert may_enter(Seniority(0, 9.0, "x"), [], has_run=has_run)


def test_who_returns_leaves_room_for_the_others() -> None:
    """Without hysteresis a request would return into a full pool and leave again in the next round."""
    policy = MovePolicy(tokens_per_round=K1, pool_tokens=1_000_000)
    slack = policy.slack(3)
    assert slack == 8 * K1 * 4
    assert policy.may_return(room=100 + slack, needed=100, num_running=3)
    assert not policy.may_return(room=100 + slack - 1, needed=100, num_running=3)
    # those who came just before need room for their own stay, and so does this one
    stay = MIN_STAY_ROUNDS * K1 * (3 + 1)
    assert policy.may_return(room=100 + stay, needed=100, num_running=3, num_settling=2)
    assert not policy.may_return(room=100 + stay - 1, needed=100, num_running=3, num_settling=2)
    # a request that starts to leave does so well before the room is gone that a return requires
    assert 0 < policy.watermark(3) < slack / 2
    assert not policy.should_leave(room=100 + slack, needed=100, num_running=4)
    assert policy.should_leave(room=100 + policy.watermark(4) - 1, needed=100, num_running=4)
    assert not policy.should_leave(room=100 + policy.watermark(4), needed=100, num_running=4)


def test_alone_a_request_returns_as_soon_as_it_fits() -> None:
    """Nobody else will ever make room: to wait for slack would be to wait for ever."""
    policy = MovePolicy(tokens_per_round=K1, pool_tokens=1000)
    assert policy.may_return(room=1000, needed=1000, num_running=0)
    assert not policy.may_return(room=999, needed=1000, num_running=0)
    assert not policy.should_leave(room=0, needed=1000, num_running=1)


def test_a_small_pool_is_hardly_emptier_than_a_large_one() -> None:
    """On a small pool eight rounds of everybody could be all of it."""
    policy = MovePolicy(tokens_per_round=K1, pool_tokens=1000)
    assert policy.slack(100) == 30


@dataclass
class Request:
    seniority: Seniority
    prompt: int
    new_tokens: int
    outputs: int = 0
    stay: Stay = field(default_factory=Stay)
    place: str = "waiting"

    @property
    def held(self) -> int:
        return self.prompt + self.outputs + 2 * K1


@dataclass
class Pool:
    """Rounds over a pool that counts tokens; SGLang's admission reduced to: what fits."""

    policy: MovePolicy
    requests: list[Request]
    rng: random.Random
    round: int = 0
    most_running: int = 0
    short_stays: int = 0
    is_slow: bool = False

    def at(self, place: str) -> list[Request]:
        return sorted((r for r in self.requests if r.place == place), key=lambda r: r.seniority)

    @property
    def room(self) -> int:
        return self.policy.pool_tokens - sum(r.held for r in self.at("running"))

    def step(self) -> None:
        for request in self.at("host"):
            running = self.at("running")
            if not self.policy.may_return(
                room=self.room,
                needed=request.held + K1 * len(running),
                num_running=len(running),
                num_settling=sum(r.stay.is_settling(self.round) for r in running),
            ):
                break
            request.place, request.stay.returned_in = "running", self.round
        if not self.at("host"):
            for request in self.at("waiting"):
                if request.held + 4 * K1 > self.room:
                    break
                request.place = "running"
        running = self.at("running")
        assert running, "nothing runs, and something waits"
        while len(running) > 1 and self.policy.should_leave(
            room=self.room, needed=K1 * len(running), num_running=len(running)
        ):
            settling = [r.stay.is_settling(self.round) for r in running]
            order = leaving_order([r.seniority for r in running], [True] * len(running), settling)
            leaving = running[[*order.movable, *order.settling][0]]
            assert leaving is not running[0], "the oldest never moves"
            self.short_stays += leaving.stay.is_settling(self.round)
            leaving.place = "host"
            leaving.stay.num_moves += 1
            running = self.at("running")
        self.most_running = max(self.most_running, len(running))
        self.round += 1
        for request in running:
            request.outputs += 1 if self.is_slow else self.rng.randint(1, K1)
            if request.outputs >= request.new_tokens:
                request.place = "done"


@pytest.mark.parametrize("is_slow", [False, True], ids=["drafts help", "a token a round"])
@pytest.mark.parametrize("pool_tokens", [600, 2000, 20_000, 200_000])
@pytest.mark.parametrize("seed", range(6))
def test_every_load_ends_and_nobody_moves_more_than_the_bound(seed: int, pool_tokens: int, is_slow: bool) -> None:
    """A livelock, a request that starves, or moves without end, at any mix of lengths.

    In the two small pools few requests run, and nobody else may be left to leave.
    """
    rng = random.Random(seed)
    policy = MovePolicy(tokens_per_round=K1, pool_tokens=pool_tokens)
    longest = min(pool_tokens // 2, 4000)
    requests = [
        Request(Seniority(0, float(i), str(i)), rng.randint(1, longest // 2), rng.randint(1, longest // 2))
        for i in range(60 if pool_tokens < 100_000 else 300)
    ]
    pool = Pool(policy, requests, rng, is_slow=is_slow)
    for _ in range(100_000):
        if all(request.place == "done" for request in requests):
            break
        pool.step()
    assert all(request.place == "done" for request in requests)
    assert any(request.stay.num_moves > 0 for request in requests)
    assert requests[0].stay.num_moves == 0
    if pool_tokens < 10_000:
        return
    assert pool.short_stays == 0
    for request in requests:
        assert request.stay.num_moves <= policy.max_moves(request.new_tokens)
    assert max(request.stay.num_moves for request in requests) < 20
    assert pool.most_running > 8
