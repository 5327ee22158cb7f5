"""Two schedulers whose devices are late at different things move the same requests in the same iterations."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sglang_sparsespec.errors import ConfigError, RankError
from sglang_sparsespec.kv import offload as copies
from sglang_sparsespec.kv.ledger import Place
from tests.support.fake_queues import FakeDevice
from tests.support.late_rounds import Rounds, end, exact, hand_out_last_freed_first
from tests.support.offload_machine import Machine, prompt
from tests.support.rank_threads import Meeting

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.adapter.host_ranks import HostRanks

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

NUM_RANKS = 2
HOST_BLOCKS = 40


class Iteration(NamedTuple):
    """What a rank has decided, as far as another could notice."""

    running: list[str]
    places: dict[str, Place]
    free_slots: int
    free_rows: int
    host_bytes: int
    retracted: list[str]


class Server:
    """As many machines as ranks; every rank has a thread, and SGLang's hooks find the offloader of theirs."""

    def __init__(self, args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang_sparsespec.patches import offload as hooks

        from sglang_sparsespec.adapter import moves

        monkeypatch.setattr(moves, "BLOCK_TOKENS", 16)
        self.args = args
        self.meeting = Meeting(NUM_RANKS)
        self._here = threading.local()
        monkeypatch.setattr(hooks, "_ours", lambda: self._here.offloader)
        stock = ScheduleBatch.release_req
        monkeypatch.setattr(
            ScheduleBatch, "release_req", lambda batch, *args: hooks.offload_instead_of_release(stock, batch, *args)
        )

    def rounds(self, ranks: HostRanks, seed: int, host_blocks: int = HOST_BLOCKS) -> Rounds:
        """Of one rank: tokens are the same on all, the device is not."""
        device = FakeDevice(100 * seed + ranks.rank, patience=(0, 6)[(seed + ranks.rank) % 2])
        queues = device.queues()
        host = Machine(self.args, is_radix=False, host_blocks=host_blocks, queues=queues, ranks=ranks)
        host.offloader._moves.mover._is_staged = True
        hand_out_last_freed_first(host.allocator)
        self._here.offloader = host.offloader
        return Rounds(host, device, queues.rounds, seed)


@pytest.fixture
def server(server_args: Callable[..., Any], machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> Server:
    from sglang.srt import runtime_context

    args = server_args(page_size=1, sparsespec_host_memory_gb=0.1)
    # `machine` resets it
    runtime_context.publish(args, role="test")
    return Server(args, monkeypatch)


def look(rounds: Rounds, batch: Any) -> Iteration:
    host = rounds.host
    ledger = host.offloader._moves.ledger
    return Iteration(
        running=[req.rid for req in batch.reqs],
        places={entry.request.rid: entry.place for entry in ledger.entries()},
        free_slots=host.allocator.available_size(),
        free_rows=host.rows.available_size(),
        host_bytes=host.offloader._moves.host.used_bytes,
        retracted=[req.rid for req in rounds.retracted],
    )


def serve(rounds: Rounds, num_requests: int = 6, num_outputs: int = 100) -> list[Iteration]:
    """More requests than the pool holds, until all have ended or been retracted; every request keeps its KV."""
    host = rounds.host
    batch = host.run(*(rounds.admit(20 + 10 * i, i) for i in range(num_requests)))
    seen = []
    for _ in range(400):
        # the slower device gets somewhere, too
        rounds.device.step()
        batch = rounds.iterate(batch)
        seen.append(look(rounds, batch))
        for req in list(batch.reqs):
            if len(req.output_ids) > num_outputs and any(row.req is req for row in rounds.in_flight):
                end(host, batch, req)
        if batch.is_empty() and not len(host.offloader):
            break
    rounds.process(rounds.in_flight)
    rounds.device.drain()
    assert batch.is_empty()
    assert len(host.offloader) == host.offloader._moves.host.used_bytes == host.used_slots() == 0
    host.offloader.check_integrity()
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_ranks_move_the_same_requests_at_the_same_time(server: Server, seed: int) -> None:
    """A rank that resumes a request a round before the others runs another batch than they do, and all hang."""
    seen = server.meeting.run(lambda ranks: serve(server.rounds(ranks, seed)))
    assert seen[0] == seen[1]
    places = {place for iteration in seen[0] for place in iteration.places.values()}
    assert Place.RETURNING in places
    assert server.meeting.disagreements > 0, "no copy was done on one rank alone: nothing was put to the test"
    assert set(server.meeting.calls) == {"smallest"}


def test_nobody_is_asked_while_nothing_moves(server: Server) -> None:
    """The price of an agreement in every iteration of a server whose pool is large enough."""
    server.meeting.run(lambda ranks: serve(server.rounds(ranks, seed=1), num_requests=2))
    assert server.meeting.calls == ["smallest"], "the size of host memory, at the start"


@pytest.mark.parametrize("failing", range(NUM_RANKS))
def test_no_memory_on_one_rank_retracts_on_all(
    server: Server, monkeypatch: pytest.MonkeyPatch, failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank retracts what the others have moved: it prefills what they resume."""
    alloc, attempts = copies.HostPool.alloc, itertools.count()
    failing_pool: list[copies.HostPool] = []

    def alloc_or_fail(pool: copies.HostPool, num_tokens: int) -> list[int] | None:
        return None if pool in failing_pool and next(attempts) % 3 != 2 else alloc(pool, num_tokens)

    monkeypatch.setattr(copies.HostPool, "alloc", alloc_or_fail)

    def work(ranks: HostRanks) -> tuple[list[Iteration], dict[str, float]]:
        rounds = server.rounds(ranks, seed=2)
        if ranks.rank == failing:
            failing_pool.append(rounds.host.offloader._moves.host)
        seen = serve(rounds)
        for req in rounds.retracted:
            assert (req.kv, req.is_retracted, req.retraction_count) == (None, True, 1)
        return seen, rounds.host.metrics.counts

    (seen, counts), (others, other_counts) = server.meeting.run(work)
    assert seen == others
    assert counts["offload_refusals"] == other_counts["offload_refusals"] == len(seen[-1].retracted) > 0
    assert counts["offloads"] == other_counts["offloads"] > 0
    waves = sum(before.retracted != after.retracted for before, after in itertools.pairwise(seen))
    waves += bool(seen[0].retracted)
    assert caplog.text.count("host memory is full") == waves, "one rank speaks"


def test_the_smallest_host_memory_is_everybodys(server: Server) -> None:
    """A pool that is full earlier than another one, for as long as the server runs."""

    def work(ranks: HostRanks) -> int:
        return int(server.rounds(ranks, 1, host_blocks=(3, 2)[ranks.rank]).host.offloader._moves.host.num_blocks)

    # memory is in blocks of the usual size, which the pool cuts into those of 16 tokens here
    assert server.meeting.run(work) == [2 * copies.BLOCK_TOKENS // 16] * 2


def test_memory_for_less_than_a_block_on_any_rank_is_refused_on_all(server: Server) -> None:
    """Ranks that start while one has ended wait for it; and the number is the server's, not a rank's."""
    messages = []

    def work(ranks: HostRanks) -> None:
        with pytest.raises(ConfigError) as caught:
            server.rounds(ranks, 1, host_blocks=1 - ranks.rank)
        messages.append(str(caught.value))

    server.meeting.run(work)
    least = 2 * 16 * 2 * 2 * 8 * 4 / 1e9
    wanted = f"--sparsespec-host-memory-gb is 0.1; it must be at least {least:.3g} (16 tokens, on each of 2 ranks). "
    assert [message.startswith(wanted) for message in messages] == [True, True], messages


def test_ranks_that_came_apart_say_so(server: Server) -> None:
    """The alternative is a hang without a word."""

    def work(ranks: HostRanks) -> None:
        host = server.rounds(ranks, 1).host
        reqs = [host.request(prompt(20, seed=i), 5) for i in range(2)]
        host.leave(host.run(*reqs), reqs[ranks.rank])

    with pytest.raises(RankError, match=r"^rank \d asks about 'room on the host r\d', another rank about something"):
        server.meeting.run(work)


def test_kv_of_every_rank_comes_back(server: Server) -> None:
    """A copy that this rank has not finished, taken for done because the others have."""

    def work(ranks: HostRanks) -> None:
        rounds = server.rounds(ranks, seed=4)
        host = rounds.host
        batch = host.run(*(rounds.admit(30 + 20 * i, i) for i in range(3)))
        host.leave(batch, batch.reqs[2])
        for _ in range(200):
            # the slower device gets somewhere, too
            rounds.device.step()
            batch = host.offloader.before_batch(host.scheduler, batch, None)
        assert len(batch.reqs) == 3
        for req in batch.reqs:
            slots = host.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].long()
            for buffer in host.buffers:
                assert buffer[slots].flatten(1)[:, 0].tolist() == exact(req, 0, req.kv_committed_len).tolist()

    server.meeting.run(work)
