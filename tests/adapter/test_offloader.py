"""The offloader on SGLang's own pools, radix cache, requests and batches: what moves, and what is given back."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.errors import ConfigError, PinError
from sglang_sparsespec.kv import offload as copies
from sglang_sparsespec.kv.ledger import Place
from tests.support.offload_machine import K1, LAYERS, NUM_ROWS, POOL_TOKENS, Machine, prompt

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> set[copies.Transfer]:
    """Copies are under way until this set holds them, or until somebody waits for them."""
    # the copies themselves: the id of one that is gone would soon be another's
    done: set[copies.Transfer] = set()
    monkeypatch.setattr(copies.Transfer, "is_done", lambda self: self in done)
    monkeypatch.setattr(copies.Transfer, "wait", lambda self: done.add(self))
    return done


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("is_radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("is_evicted", [True, False], ids=["prefix gone", "prefix cached"])
def test_a_request_comes_back_as_it_left(
    machine: Callable[..., Machine], page_size: int, is_radix: bool, is_evicted: bool
) -> None:
    """KV of a wrong slot, a length off by one, state of a wrong row, or a prefix that is copied though it is cached."""
    host = machine(page_size, is_radix)
    req, other = host.request(prompt(70), 30), host.request(prompt(50, seed=1), 9)
    batch = host.run(req, other)
    row, kv, held = req.req_pool_idx, host.kv_of(req), host.used_slots()
    host.leave(batch, req)
    assert (req.req_pool_idx, req.kv, req.is_retracted) == (None, None, True)
    assert host.forgotten == [req.rid]
    assert host.used_slots() < held
    if is_evicted:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        host.tree.evict(EvictParams(num_tokens=POOL_TOKENS))
    # the old slots and row belong to others now
    stolen = host.occupy(host.allocator.available_size() - 256)
    for buffer in host.buffers:
        buffer[stolen] = float("nan")
    host.rows.free_slots.reverse()
    batch = host.iterate(batch)
    assert batch.reqs == [other, req]
    for got, expected in zip(host.kv_of(req), kv, strict=True):
        assert torch.equal(got, expected)
    assert (req.is_retracted, req.retraction_count) == (False, 0)
    assert (req.kv_committed_len, len(req.output_ids)) == (99, 30)
    assert host.saved == {req.req_pool_idx: row}
    shared = 70 // page_size * page_size if is_radix and not is_evicted else 0
    assert req.cache_protected_len == shared
    assert host.metrics.counts["copied_in_bytes"] == (99 - shared) * 2 * LAYERS * 8 * 4
    # what the next round starts from
    rows = torch.tensor([req.req_pool_idx])
    assert batch.req_pool_indices.tolist() == [other.req_pool_idx, req.req_pool_idx]
    assert int(host.scheduler.future_map.new_seq_lens_buf[rows]) == 99
    assert int(host.scheduler.future_map.output_tokens_buf[rows]) == req.output_ids[-1]
    assert batch.spec_info.future_indices.tolist() == batch.req_pool_indices.tolist()


def test_without_overlap_the_bonus_token_travels_in_the_batch(machine: Callable[..., Machine]) -> None:
    """There is no relay then: a batch whose inputs have another length than its requests."""
    host = machine(disable_overlap_schedule=True)
    req, other = host.request(prompt(20), 5), host.request(prompt(20, seed=1), 7)
    batch = host.run(req, other)
    host.leave(batch, req)
    batch = host.iterate(batch)
    assert batch.spec_info.future_indices is None
    assert batch.spec_info.bonus_tokens.tolist() == [other.output_ids[-1], req.output_ids[-1]]
    assert batch.seq_lens.tolist() == [26, 24]
    assert host.metrics.counts["offload_lost_rounds"] == 0


def move_to(host: Machine, place: Place) -> Any:
    """One request at `place`, beside a running one."""
    req = host.request(prompt(40), 10)
    batch = host.run(host.request(prompt(30, seed=1), 4), req)
    if place is Place.LEAVING:
        assert host.offloader._moves.depart(req)
        batch.filter_batch(keep_indices=[0])
    else:
        host.leave(batch, req)
    if place is Place.RETURNING:
        assert host.iterate(batch).reqs == batch.reqs
    assert [e.place for e in host.offloader._moves.ledger.entries()] == [place]
    host.offloader.check_integrity()
    return req


@pytest.mark.parametrize("is_radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("place", list(Place))
def test_abort_gives_everything_back(
    machine: Callable[..., Machine], slow_copies: set[copies.Transfer], place: Place, page_size: int, is_radix: bool
) -> None:
    """A slot, row, lock or host block of an aborted request that nobody frees, or that a copy still writes to."""
    host = machine(page_size, is_radix)
    req = move_to(host, place)
    host.offloader.abort(host.scheduler, "nobody", abort_all=False)
    assert host.offloader.holds(req)
    host.offloader.abort(host.scheduler, req.rid[:2], abort_all=False)
    assert [message.rids for message in host.sent] == [[req.rid]]
    assert (req.req_pool_idx, req.kv) == (None, None)
    assert len(host.offloader) == host.offloader.device_tokens() == host.offloader._moves.host.used_bytes == 0
    assert host.rows.available_size() == NUM_ROWS - 1
    # what the other request holds, in whole pages: 33 committed tokens, of them 30 of its prompt, and its reserve
    held = -(-(33 + 2 * K1) // page_size) * page_size
    assert host.allocator.available_size() + host.tree.evictable_size() == POOL_TOKENS - held


@pytest.mark.parametrize("place", list(Place))
def test_an_aborted_request_answers_as_if_it_had_been_running(
    machine: Callable[..., Machine], slow_copies: set[copies.Transfer], place: Place
) -> None:
    """A stream that ends without its last tokens, or an answer without prompt tokens and counts."""
    host = machine()
    req = move_to(host, place)
    req.stream, req.spec_verify_ct = True, 4
    # what the client has got already
    req.send_token_offset = 3
    host.offloader.abort(host.scheduler, "", abort_all=True)
    (message,) = host.sent
    assert req.finished()
    assert [reason["type"] for reason in message.finished_reasons] == ["abort"]
    assert message.finished_reasons[0]["message"] == "Aborted"
    assert [list(ids) for ids in message.output_ids] == [list(range(103, 110))]
    assert (message.prompt_tokens, message.completion_tokens, message.spec_verify_ct) == ([40], [10], [4])
    # the round in flight comes by with it once more
    host.scheduler.output_streamer.stream_output([req], False)
    assert len(host.sent) == 1


@pytest.mark.parametrize("place", list(Place))
def test_time_in_host_memory_counts_as_running(
    machine: Callable[..., Machine],
    slow_copies: set[copies.Transfer],
    monkeypatch: pytest.MonkeyPatch,
    place: Place,
) -> None:
    """A request that its operator limits to a minute, and that waits for hours where SGLang does not look."""
    monkeypatch.setenv("SGLANG_REQ_RUNNING_TIMEOUT", "60")
    host = machine()
    req = move_to(host, place)
    running = SimpleNamespace(reqs=[])
    now = time.perf_counter()
    req.time_stats.forward_entry_time = now - 30
    host.offloader.before_batch(host.scheduler, running, None)  # type: ignore[arg-type]
    assert host.sent == []
    assert host.offloader.holds(req)
    req.time_stats.forward_entry_time = now - 61
    host.offloader.before_batch(host.scheduler, running, None)  # type: ignore[arg-type]
    (message,) = host.sent
    assert message.finished_reasons[0]["message"] == "Request running timeout reached."
    assert message.finished_reasons[0]["status_code"] == 503
    assert len(host.offloader) == host.offloader._moves.host.used_bytes == 0
    assert host.rows.available_size() == NUM_ROWS - 1


@pytest.mark.parametrize("place", list(Place))
def test_a_pause_that_retracts_gives_requests_back_to_the_queue(
    machine: Callable[..., Machine], slow_copies: set[copies.Transfer], place: Place
) -> None:
    """KV of old weights under new ones, or a request that is in two places."""
    host = machine()
    req = move_to(host, place)
    host.offloader.retract_all(host.scheduler)
    assert host.queued == [req]
    assert (req.is_retracted, req.retraction_count, req.kv_committed_len, req.kv) == (True, 1, 0, None)
    assert len(host.offloader) == host.offloader._moves.host.used_bytes == 0
    assert host.rows.available_size() == NUM_ROWS - 1


def test_slots_are_free_only_when_their_copy_is_done(
    machine: Callable[..., Machine], slow_copies: set[copies.Transfer]
) -> None:
    """Slots handed out earlier are overwritten under the copy, and the request comes back with another's KV."""
    host = machine()
    req = move_to(host, Place.LEAVING)
    used = host.used_slots()
    held = host.offloader.device_tokens()
    assert held > 0
    running = SimpleNamespace(reqs=[])
    host.offloader.before_batch(host.scheduler, running, None)  # type: ignore[arg-type]
    assert host.used_slots() == used, "the copy is under way"
    slow_copies.update(e.transfer for e in host.offloader._moves.ledger.entries())
    host.scheduler.chunked_req = object()
    host.offloader.before_batch(host.scheduler, running, None)  # type: ignore[arg-type]
    # its prompt stays in the cache, unlocked
    assert host.used_slots() == used - held - 40
    assert host.metrics.counts["offload_stalls"] == 0
    assert req.kv is None


def test_nobody_returns_between_the_chunks_of_a_prompt(machine: Callable[..., Machine]) -> None:
    """The room was counted when the prompt was admitted; SGLang fails hard if it is gone."""
    host = machine()
    req, other = host.request(prompt(20), 5), host.request(prompt(20, seed=1), 7)
    batch = host.run(req, other)
    host.leave(batch, req)
    host.scheduler.chunked_req = object()
    assert host.iterate(batch).reqs == [other]
    host.scheduler.chunked_req = None
    assert host.iterate(batch).reqs == [other, req]


def fill(host: Machine, num_requests: int) -> Any:
    """A batch whose next step does not fit."""
    reqs = [host.request(prompt(30, seed=i), 10) for i in range(num_requests)]
    batch = host.run(*reqs)
    rest = host.allocator.available_size()
    if rest:
        host.occupy(rest)
    for req in reqs:
        # a round has been committed: the next one needs slots
        req.output_ids.extend(range(K1))
        req.kv_committed_len += K1
    return batch


def test_relief_takes_the_last_arrivals_and_stops_when_the_step_fits(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking the oldest would starve it; taking too many would empty the pool."""
    host = machine(is_radix=False)
    offload_on_release(monkeypatch, host)
    batch = fill(host, 6)
    oldest = batch.reqs[:4]
    assert not batch.check_decode_mem()
    host.offloader.relieve(host.scheduler, batch)
    host.check()
    assert batch.check_decode_mem()
    assert batch.reqs[: len(oldest)] == oldest
    assert 1 <= len(host.offloader) <= 2
    assert host.queued == []
    assert host.scheduler.new_token_ratio_tracker.current == 0.1, "nothing was retracted: admit as before"


def offload_on_release(monkeypatch: pytest.MonkeyPatch, host: Machine) -> None:
    """The hook of ScheduleBatch.release_req."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang_sparsespec.patches import install_offloader
    from sglang_sparsespec.patches.offload import offload_instead_of_release

    stock = ScheduleBatch.release_req
    install_offloader(host.offloader)
    monkeypatch.setattr(
        ScheduleBatch, "release_req", lambda batch, *args: offload_instead_of_release(stock, batch, *args)
    )


def test_a_full_host_retracts_and_says_so(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that is neither offloaded nor retracted is lost."""
    host = machine(is_radix=False)
    monkeypatch.setattr(copies.HostPool, "alloc", lambda pool, num_tokens: None)
    offload_on_release(monkeypatch, host)
    batch = fill(host, 6)
    running, newcomer = list(batch.reqs), SimpleNamespace(retraction_count=0)
    host.scheduler.waiting_queue = [newcomer]
    host.offloader.relieve(host.scheduler, batch)
    host.check()
    assert batch.check_decode_mem()
    assert host.queued.pop() is newcomer, "retracted requests come before those that have never run"
    assert host.queued == running[-len(host.queued) :]
    assert host.retracted == {
        "num_retracted_reqs": len(host.queued),
        "num_retracted_input_tokens": 30 * len(host.queued),
        "num_retracted_output_tokens": (10 + K1) * len(host.queued),
    }, "SGLang's counters"
    assert all(req.retraction_count == 1 and req.kv is None for req in host.queued)
    assert (
        host.metrics.counts["offload_refusals"]
        == len(host.queued)
        == host.scheduler.metrics_reporter.num_retracted_reqs
    )
    assert "host memory is full" in caplog.text
    assert host.scheduler.new_token_ratio_tracker.current != 0.1, "SGLang admits less after a retraction"


def test_the_senior_stays_though_nobody_else_can_move(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Newcomers whose prefill is in flight cannot move; if the oldest left for them, it could do so for ever."""
    host = machine(is_radix=False)
    offload_on_release(monkeypatch, host)
    batch = fill(host, 3)
    senior, *fresh = batch.reqs
    for req in fresh:
        req.output_ids, req.kv_committed_len = array("q"), 30
    host.offloader.relieve(host.scheduler, batch)
    host.check()
    assert batch.check_decode_mem()
    assert batch.reqs == [senior, *fresh[: len(batch.reqs) - 1]]
    assert len(host.offloader) == 0
    assert host.queued == fresh[len(batch.reqs) - 1 :]
    assert host.metrics.counts["offload_refusals"] == len(host.queued) > 0
    assert "the oldest request, which stays" in caplog.text
    assert "host memory is full" not in caplog.text


def test_the_senior_does_not_leave_early_either(machine: Callable[..., Machine]) -> None:
    """Below the watermark copies start before they must: of the oldest, if all others are too fresh."""
    host = machine(is_radix=False)
    senior, fresh = host.request(prompt(30), 10), host.request(prompt(30, seed=1), 1)
    batch = host.run(senior, fresh)
    fresh.output_ids, fresh.kv_committed_len = array("q"), 30
    host.occupy(host.allocator.available_size())
    needed = batch.new_tokens_required_next_decode()
    assert host.offloader._policy.should_leave(room=0, needed=needed, num_running=2)
    assert batch.check_decode_mem()
    host.offloader.relieve(host.scheduler, batch)
    host.check()
    assert batch.reqs == [senior, fresh]
    assert len(host.offloader) == 0


@pytest.mark.parametrize("place", [Place.LEAVING, Place.RETURNING])
def test_the_last_running_request_gets_what_copies_hold(
    machine: Callable[..., Machine], slow_copies: set[copies.Transfer], place: Place
) -> None:
    """SGLang ends the last request with an error when it does not fit; slots under a copy are no reason for that."""
    host = machine(is_radix=False)
    running, other = host.request(prompt(30), 10), host.request(prompt(40, seed=1), 10)
    batch = host.run(running, other)
    if place is Place.LEAVING:
        assert host.offloader._moves.depart(other)
        batch.filter_batch(keep_indices=[0])
    else:
        host.leave(batch, other)
        host.iterate(batch)
    assert [e.place for e in host.offloader._moves.ledger.entries()] == [place]
    host.occupy(host.allocator.available_size())
    running.output_ids.extend(range(K1))
    running.kv_committed_len += K1
    assert not batch.check_decode_mem()
    host.offloader.relieve(host.scheduler, batch)
    host.check()
    assert batch.reqs == [running]
    assert batch.check_decode_mem()
    assert [e.place for e in host.offloader._moves.ledger.entries()] == [Place.ON_HOST]
    host.offloader.check_integrity()


def test_memory_for_less_than_a_block_is_refused(machine: Callable[..., Machine]) -> None:
    """An option that is accepted and cannot hold a single request."""
    least = f"{copies.BLOCK_TOKENS * 2 * LAYERS * 8 * 4 / 1e9:.3g}"
    with pytest.raises(ConfigError, match=rf"^--sparsespec-host-memory-gb is 0.1; it must be at least {least} "):
        machine(host_blocks=0)


def test_memory_that_cannot_be_pinned_is_the_operators_to_mend(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback with a number of CUDA's, and not a word of the option that asked for the memory."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PinError(8_000_000_000, 2)

    monkeypatch.setattr("sglang_sparsespec.adapter.moves.HostPool", refuse)
    with pytest.raises(ConfigError, match=r"^--sparsespec-host-memory-gb is 0.1; .*8 GB.*cudaError 2.*Lower it"):
        machine()


def test_a_request_that_is_not_settled_stays(machine: Callable[..., Machine]) -> None:
    """Its prefill is in flight: the host does not know its first token, so nothing could be resumed."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    host = machine()
    fresh, ending = host.request(prompt(20), 1), host.request(prompt(20, seed=1), 3)
    batch = host.run(fresh, ending)
    fresh.output_ids = array("q")
    fresh.kv_committed_len = 20
    ending.to_finish = FINISH_ABORT()
    assert not host.offloader.take(batch, fresh)
    assert not host.offloader.take(batch, ending)
    assert (len(host.offloader), fresh.is_retracted, ending.is_retracted) == (0, False, False)


def test_the_senior_returns_first_and_leaves_room(machine: Callable[..., Machine]) -> None:
    """A junior that overtakes, or a return into a pool that is full again in the next round."""
    host = machine(is_radix=False)
    reqs = [host.request(prompt(30, seed=i), 10) for i in range(5)]
    batch = host.run(*reqs)
    host.leave(batch, *reqs[1:])
    assert host.iterate(batch).reqs == reqs
    host.leave(batch, *reqs[:0:-1])
    # room for one: 39 tokens of KV, the next steps, a tenth of the pool so that it can stay
    taken = host.occupy(host.allocator.available_size() - 39 - 2 * (2 * K1 + 1) - 51)
    batch = host.iterate(batch)
    assert batch.reqs == reqs[:2]
    host.vacate(taken)
    assert host.iterate(batch).reqs == reqs


def test_who_has_just_returned_stays_a_while(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies and a lost round for every other round of a request; counted where nobody else is left."""
    host = machine(is_radix=False)
    offload_on_release(monkeypatch, host)
    reqs = [host.request(prompt(30, seed=i), 10) for i in range(3)]
    batch = host.run(*reqs)
    host.leave(batch, reqs[2])
    batch = host.iterate(batch)
    assert batch.reqs == reqs
    host.reserve(batch)

    def step() -> list[Any]:
        for req in batch.reqs:
            req.output_ids.extend(range(K1))
            req.kv_committed_len += K1
        host.offloader.relieve(host.scheduler, batch)
        host.reserve(batch)
        return [entry.request for entry in host.offloader._moves.ledger.entries()]

    host.occupy(host.allocator.available_size())
    assert step() == [reqs[1]], "not the last, which has just come"
    assert (host.metrics.most_moves, host.metrics.counts["offload_short_stays"]) == (1, 0)
    host.occupy(host.allocator.available_size())
    assert step() == [reqs[1], reqs[2]], "the oldest stays in any case"
    assert (host.metrics.most_moves, host.metrics.counts["offload_short_stays"]) == (2, 1)


def test_a_retracted_senior_comes_before_juniors_in_host_memory(machine: Callable[..., Machine]) -> None:
    """It would wait until all of them had returned, and they would take the room that it waits for."""
    host = machine(is_radix=False)
    reqs = [host.request(prompt(20, seed=i), 5) for i in range(4)]
    batch = host.run(*reqs)
    host.leave(batch, reqs[1], reqs[3])
    batch.release_req(1, 1, host.args)
    batch.filter_batch(keep_indices=[0])
    host.scheduler._add_request_to_queue(reqs[2], is_retracted=True)
    assert not host.offloader.may_enter(reqs[2]), "its elder comes first"
    assert host.iterate(batch).reqs == reqs[:2]
    assert host.iterate(batch).reqs == reqs[:2], "the other one waits for it"
    assert host.offloader.may_enter(reqs[2])
    host.scheduler.waiting_queue = []
    assert host.iterate(batch).reqs == [*reqs[:2], reqs[3]]


def test_priorities_decide_before_arrival(machine: Callable[..., Machine]) -> None:
    """A request of low priority that returns before, and then is preempted by, one that waits with a higher one."""
    host = machine(enable_priority_scheduling=True)
    reqs = [host.request(prompt(20, seed=i), 5) for i in range(3)]
    for req, priority in zip(reqs, (0, 5, 1), strict=True):
        req.priority = priority
    batch = host.run(*reqs)
    host.leave(batch, reqs[0], reqs[2])
    assert [e.request for e in host.offloader._moves.ledger.entries()] == [reqs[2], reqs[0]]
    waiting = host.request(prompt(5, seed=9), 1)
    host.scheduler.waiting_queue = [waiting]
    waiting.priority = 1
    assert not host.offloader.may_enter(waiting)
    waiting.priority = 3
    assert host.offloader.may_enter(waiting)
    assert host.iterate(batch).reqs == [reqs[1]]
    host.scheduler.waiting_queue = []
    assert host.iterate(batch).reqs == [reqs[1], reqs[2], reqs[0]]
