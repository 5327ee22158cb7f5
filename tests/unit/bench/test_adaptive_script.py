"""scripts/bench/adaptive.py: what it makes of rounds that were written down, what it keeps, and its verdicts."""

from __future__ import annotations

import json
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests

from sglang_sparsespec.bench.server import ServerError
from tests.support.scripts import load_script

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def rounds_of(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/study_rounds.py", monkeypatch)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/study_cells.py", monkeypatch)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/study_book.py", monkeypatch)


def rounds(script: ModuleType, *lines: tuple[int, float | None, list[int]], pool: int = 1000) -> list:
    """k, milliseconds and drafts that stood of each."""
    return [
        script.RoundLine(float(i), len(stood), k, pool, round_ms, stood, "turn 0")
        for i, (k, round_ms, stood) in enumerate(lines)
    ]


def test_tokens_by_the_rates_that_were_set(rounds_of: ModuleType) -> None:
    """The last rate serves for the rest, and the bonus token counts."""
    assert rounds_of.expected_tokens([0.5], 0) == 1
    assert rounds_of.expected_tokens([0.5], 3) == 1 + 0.5 + 0.25 + 0.125
    assert rounds_of.expected_tokens([1.0, 0.5], 3) == 1 + 1 + 0.5 + 0.25


def test_speed_counts_what_was_expected_and_leaves_out_what_has_no_time(rounds_of: ModuleType) -> None:
    """Luck of a few rounds would be read as speed; a round behind a prefill has no time of its own."""
    found = rounds(rounds_of, (1, 10.0, [1] * 4), (1, None, [1] * 4), (1, 30.0, [0] * 4))
    assert rounds_of.speed(found, [0.5]) == (2 * 4 * 1.5 / 0.04, 1000)
    with pytest.raises(rounds_of.ServerError, match="could be timed"):
        rounds_of.speed(rounds(rounds_of, (1, None, [1])), [0.5])


def test_real_acceptance_is_pooled_over_every_k(rounds_of: ModuleType) -> None:
    """A lucky turn is not a fast k: turns of the same k differ in their times alone."""
    lucky = rounds(rounds_of, (2, 10.0, [2, 2]), (2, 10.0, [2, 2]))
    unlucky = rounds(rounds_of, (2, 10.0, [0, 1]), (2, 10.0, [0, 1]))
    short = rounds(rounds_of, (1, 10.0, [1, 0]))
    rates = rounds_of.pooled_rates([*lucky, *unlucky, *short], 4)
    # draft 1: 10 trials, 7 stood; draft 2: the 6 of k = 2 whose first stood, 4 stood; beyond k nothing was tried
    assert rates == [0.7, pytest.approx(4 / 6), 0.0, 0.0]
    assert rounds_of.speed(lucky, rates) == rounds_of.speed(unlucky, rates)


def test_plain_is_compared_at_the_same_pool(rounds_of: ModuleType) -> None:
    """A controller measured later, with more tokens in the pool, is no slower for that, nor on a card that slowed."""
    plain = rounds_of.Plain(((1000, 10.0), (3000, 14.0)), ((1000, 12.0), (3000, 16.0)))
    assert plain.step_ms(2000) == pytest.approx(13.0)
    assert plain.drift == pytest.approx((12 / 10 + 16 / 14) / 2 - 1)
    # plain decoding by the same server: exactly 1
    assert rounds_of.over_plain(rounds(rounds_of, (0, 13.0, [0] * 4), pool=2000), [0.7], plain) == pytest.approx(1.0)
    # beyond what was measured nothing is made up
    assert plain.step_ms(9999) == pytest.approx(15.0)


def test_noise_of_a_plain_point_is_not_a_difference_between_k(rounds_of: ModuleType) -> None:
    """Two turns of the same speed at two pools, beside a plain server one of whose six points was held up."""
    noisy = rounds_of.Plain(((1000, 2.0), (2000, 2.6), (3000, 2.1)), ((1000, 2.0), (2000, 2.05), (3000, 2.1)))
    ratios = [
        rounds_of.over_plain(rounds(rounds_of, (0, 2.0 + 1e-4 * (pool - 1000) / 2, [0] * 4), pool=pool), [0.7], noisy)
        for pool in (1000, 2000, 3000)
    ]
    assert max(ratios) < 1.02 * min(ratios)
    # a step that became shorter with more KV is noise, too
    falling = rounds_of.Plain(((1000, 2.2),), ((3000, 2.0),))
    assert falling.step_ms(1000) == falling.step_ms(3000) == pytest.approx(2.1)
    assert rounds_of.Plain(((1000, 2.0),), ((1000, 2.2),)).step_ms(1000) == pytest.approx(2.1)


def test_a_hiccup_is_not_the_time_of_a_plain_step(rounds_of: ModuleType) -> None:
    """One long step among 24 would flatter everybody who is compared with it."""
    lines = rounds(rounds_of, *[(0, 50.0 if i == 3 else 10.0, [0, 0]) for i in range(24)])
    assert rounds_of.plain_point(lines) == (1000, 10.0)
    with pytest.raises(rounds_of.ServerError, match="7 plain decode steps"):
        rounds_of.plain_point(lines[:7])


def test_when_it_has_settled(rounds_of: ModuleType) -> None:
    """An early look that happens to be right is not the end of it."""
    assert rounds_of.rounds_to_settle([1.0, 1.0, 1.0, 1.01]) == 0
    assert rounds_of.rounds_to_settle([0.6, 1.0, 0.8, 1.0, 1.01, 0.99]) == 3
    assert rounds_of.rounds_to_settle([1.0, 1.0, 1.0, 0.7]) is None


def test_verdict_is_over_the_best_fixed_k_turn_by_turn(rounds_of: ModuleType) -> None:
    """Medians of ratios of neighbours, not a ratio of medians: the pool grows from turn to turn."""
    found = rounds_of.verdict([1.0, 2.0, 3.0], {0: [0.9, 0.9, 0.9], 8: [1.0, 2.0, 3.0]})
    assert (found["best_k"], found["over_best"], found["over_plain"], found["met"]) == (8, 1.0, 2.0, True)
    assert not rounds_of.verdict([0.97] * 3, {0: [0.97] * 3})["met"]
    assert not rounds_of.verdict([1.2] * 3, {0: [1.0] * 3, 4: [1.25] * 3})["met"]


def test_rounds_are_read_once_and_whole(rounds_of: ModuleType, tmp_path: Path) -> None:
    """The server is writing while the study reads: half a line is not a round yet."""
    path = tmp_path / "rounds"
    file = rounds_of.RoundsFile(path)
    assert file.new() == []
    first, second = [json.dumps([float(i), 2, 1, 50, 4.5, [1, 0], "turn 0"]) for i in range(2)]
    path.write_text(first + "\n" + second[:9])
    [line] = file.new()
    assert (line.tokens, line.round_ms, line.num_correct) == (3, 4.5, [1, 0])
    path.write_text(first + "\n" + second + "\n")
    assert [line.time for line in file.new()] == [1.0]
    assert file.new() == []


CHOICES = (0, 1, 2, 4, 8)


@pytest.mark.parametrize(
    ("batch", "context", "rate"), [(128, 256, 0.9), (128, 1024, 0.7), (8, 16384, 0.9), (1, 256, 0.5)]
)
def test_the_pool_holds_what_all_requests_may_write(cells: ModuleType, batch: int, context: int, rate: float) -> None:
    """A pool that runs full retracts requests in the middle of a turn."""
    growth, repeats = cells.room(batch, context, [rate], CHOICES, 240_000, 40_960)
    assert batch * (context + growth) <= 240_000
    settle, repeat = cells.growths(batch, CHOICES, [rate])
    assert growth >= 1.15 * settle
    assert growth >= 1.15 * repeats * repeat
    # and no more: five times as many requests of that context would not be refused for what nobody writes
    assert growth < 2 * max(settle, repeats * repeat) + 100
    # a cell of short prompts stays one
    assert repeats == 1 or repeats * repeat <= max(settle, context)


def test_a_cell_that_does_not_fit_is_no_cell(cells: ModuleType) -> None:
    """By the pool, and by the model's own context."""
    with pytest.raises(cells.DoesNotFitError, match="128 requests of 2048"):
        cells.room(128, 2048, [0.9], CHOICES, 240_000, 40_960)
    with pytest.raises(cells.DoesNotFitError):
        cells.room(1, 16384, [0.9], CHOICES, 240_000, 16_500)


class FakeStudy:
    """Rounds at once, of a server whose k = 4 is best; requests end at `most_rounds` of one set."""

    def __init__(self, script: ModuleType, most_rounds: int) -> None:
        self._script, self._most, self._left = script, most_rounds, 0
        self.starts = 0

    def set(self, k: int | None, rates: Any) -> None:
        assert k == 0

    def running(self, prompts: Any, new_tokens: int) -> Any:
        import contextlib

        self._left = self._most
        self.starts += 1
        return contextlib.nullcontext()

    def turn(self, k: int | None, rates: Any, count: int, **limits: Any) -> list:
        self._left -= count
        if self._left < 0:
            raise self._script.RequestsEndedError("out of tokens")
        steps = 4 if k is None else k
        ms = {0: 10.0, 1: 12.0, 2: 14.0, 4: 18.0, 8: 40.0}[steps]
        return rounds(self._script, *[(steps, ms, [min(steps, 2)] * 2)] * count)


def load_of(cells: ModuleType, *, repeats: int, rates: Any = (0.8,)) -> Any:
    return cells.Load([[1] * 300] * 2, 100, 200, rates, repeats)


def test_turns_are_spread_over_as_many_sets_of_requests_as_fit(cells: ModuleType) -> None:
    """And a repeat that did not end is not half counted."""
    turn, own = cells.turn_rounds(2)
    one_repeat = own + len(CHOICES) * turn
    study = FakeStudy(cells, 2 * one_repeat + 1)
    found = cells.take_turns(study, load_of(cells, repeats=2), CHOICES)
    assert study.starts == 3
    assert {what: len(repeats) for what, repeats in found.items()} == dict.fromkeys((cells.OWN, *CHOICES), 5)
    # luckier requests than were planned for: what was whole counts, and new requests take up the rest
    study = FakeStudy(cells, 2 * one_repeat + 1)
    assert len(cells.take_turns(study, load_of(cells, repeats=5), CHOICES)[cells.OWN]) == 5
    with pytest.raises(cells.RequestsEndedError, match="before 3"):
        cells.take_turns(FakeStudy(cells, one_repeat - 1), load_of(cells, repeats=5), CHOICES)


def test_a_cell_says_what_plain_took_before_and_after(cells: ModuleType) -> None:
    """A drift of the machine during the turns must show."""
    turns = cells.take_turns(FakeStudy(cells, 10_000), load_of(cells, repeats=5), CHOICES)
    settling = FakeStudy(cells, 10_000)
    settling._left = 1000
    plain = cells.Plain(((900, 10.0), (1100, 10.0)), ((900, 10.5), (1100, 10.5)))
    found = cells.judge(plain, settling.turn(None, None, 96), turns, [0.8])
    assert (found["best_k"], found["own_k"], found["over_best"], found["plain_drift"]) == (4, 4, 1.0, 0.05)
    assert found["over_plain"] == pytest.approx(cells.expected_tokens([0.8], 4) / 18 * 10.25, abs=1e-4)
    assert found["settled_after_rounds"] == 0
    assert found["own_rounds_ms"] == {"4": [5 * cells.turn_rounds(2)[1], 18.0, 18.0]}
    assert found["fixed_rounds_ms"]["8"] == [5 * cells.turn_rounds(2)[0], 40.0, 40.0]
    # with real acceptance by the rates of all turns: drafts 1 and 2 always stood here, 3 never
    real = cells.judge(plain, settling.turn(None, None, 96), turns, None)
    assert real["rates"][:3] == [1.0, 1.0, 0.0]


# What is kept


def test_what_is_on_file_is_not_measured_again(books: ModuleType, tmp_path: Path) -> None:
    """By the same commit and options; what failed is tried again."""
    path, context, cell = tmp_path / "cells.jsonl", {"commit": "a"}, {"what": "cell", "batch": 2}
    book = books.Book(path, context, {"acceptance": "SIMULATED"})
    assert not book.has(cell)
    book.note("failure", cell, {"reason": "gone"})
    assert not books.Book(path, context, {}).has(cell)
    book.note("result", cell, {"over_plain": 1.0})
    book.note("skip", {**cell, "batch": 4}, {"reason": "too large"})
    again = books.Book(path, context, {})
    assert again.has(cell)
    assert again.has({**cell, "batch": 4})
    assert not again.has({**cell, "batch": 8})
    assert [r["over_plain"] for r in again.of("result", "cell")] == [1.0]
    assert again.of("failure", "cell") == []
    assert all(json.loads(line)["acceptance"] == "SIMULATED" for line in path.read_text().splitlines())
    assert not books.Book(path, {"commit": "b"}, {}).has(cell)


def test_stops_before_what_would_not_end_in_time(books: ModuleType) -> None:
    """A call that is killed in a cell has paid for it and has nothing."""
    now = time.monotonic()
    assert books.Allowance(None, now).allows(1e9)
    assert books.Allowance(1.0, now).allows(50)
    assert not books.Allowance(1.0, now - 30).allows(40)


def run(
    cells: ModuleType, monkeypatch: pytest.MonkeyPatch, book: Any, allowance: Any, measured: Any, dies: bool = False
) -> bool:
    """Two cells of one request, with `measured` in the place of both servers."""
    monkeypatch.setattr(cells, "study_cell", measured)

    def require_alive() -> None:
        if dies:
            raise ServerError("the server died")

    watched = SimpleNamespace(require_alive=require_alive, forget_prompts=lambda: None, choices=lambda: CHOICES)
    args = SimpleNamespace(batches=[1], contexts=[64], rates=[0.5, 0.9], model=None, pool=12_000, plain_tokens=8)
    target = SimpleNamespace(shape=SimpleNamespace(context=8192))
    source = SimpleNamespace(prompts=lambda scene, seed: [[1] * scene.prompt_tokens])
    return cells.run_cells(args, book, allowance, watched, watched, target, source)


RESULT = {"over_plain": 1.0, "over_best": 1.0, "best_k": 0, "own_k": 0, "seconds": 20.0, "met": True}


def test_cells_go_on_after_a_failure_and_after_a_stop(
    cells: ModuleType, books: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One bad cell must not cost the others; time that is up must not cost those that are done."""
    path = tmp_path / "cells.jsonl"
    asked: list[float] = []

    def flaky(study: Any, plain: Any, load: Any, choices: Any, steps: int) -> dict[str, Any]:
        asked.append(load.rates[0])
        if asked == [0.5]:
            raise ServerError("no round of a turn could be timed")
        return RESULT

    book = books.Book(path, {}, {})
    assert run(cells, monkeypatch, book, books.Allowance(None, 0), flaky)
    assert asked == [0.5, 0.9]
    assert [r["reason"] for r in book.of("failure", "cell")] == ["no round of a turn could be timed"]
    # the one that failed again, the other not; but not in ten seconds, for one like it took 20
    book = books.Book(path, {}, {})
    assert not run(cells, monkeypatch, book, books.Allowance(10 / 60, time.monotonic()), flaky)
    assert run(cells, monkeypatch, book, books.Allowance(None, 0), flaky)
    assert asked == [0.5, 0.9, 0.5]
    assert len(book.of("result", "cell")) == 2


def test_a_dead_server_ends_the_call(
    cells: ModuleType, books: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every further cell would wait for its timeout; what the failed one died of is on file."""
    asked: list[float] = []

    def gone(study: Any, plain: Any, load: Any, choices: Any, steps: int) -> dict[str, Any]:
        asked.append(load.rates[0])
        raise requests.ConnectionError("refused")

    path = tmp_path / "cells.jsonl"
    with pytest.raises(ServerError, match="died"):
        run(cells, monkeypatch, books.Book(path, {}, {}), books.Allowance(None, 0), gone, dies=True)
    assert asked == [0.5]
    assert [r["reason"] for r in books.Book(path, {}, {}).of("failure", "cell")] == ["refused"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = load_script("bench/adaptive.py", monkeypatch)
    facts = {name: "same" for name in ("machine", "driver", "python", "versions", "commit", "sources")}
    monkeypatch.setattr("study_target.provenance", lambda: facts)
    return script


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> tuple[int, int]:
    """(exit code, how often servers were started) of a call that finds nothing to measure, or has to."""
    started: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["adaptive.py", *options, "--tiny", "--json", str(path)])
    monkeypatch.setattr(script, "measure", lambda args, book, time_left: started.append(args) or script.TIME_IS_UP)
    return script.main(), len(started)


def test_a_second_call_needs_no_server(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints the table of all that is on file, with cells of other calls; a miss is still one."""
    path, options = tmp_path / "cells.jsonl", ("cells", "--batches", "2", "--contexts", "64", "--rates", "0.5")
    assert call(script, monkeypatch, path, *options) == (script.TIME_IS_UP, 1)
    book = script.book_of(script.arguments())
    whole = {
        **{name: [1.0, 1.0] for name in ("over_plain_range", "over_best_range")},
        **{"best_over_plain": 1.0, "settled_after_rounds": 16, "plain_ms": 4.0, "plain_drift": 0.01},
    }
    cell = {"what": "cell", "batch": 2, "context": 64, "rate": 0.5}
    book.note("result", cell, RESULT | whole)
    book.note("result", {**cell, "batch": 4}, RESULT | whole)
    assert call(script, monkeypatch, path, *options) == (script.MET, 0)
    assert "| 2 x 64 |" in (shown := capsys.readouterr().out)
    assert "| 4 x 64 |" in shown
    assert call(script, monkeypatch, path, *options, "--spec-arg=--sparsespec-sharing=head")[1] == 1
    book.note("result", cell, RESULT | whole | {"met": False})
    assert call(script, monkeypatch, path, *options) == (script.MISSED, 0)


def test_a_second_call_of_load_needs_no_server(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the last contender is there; its plot shows how many requests ran as well."""
    path, plot = tmp_path / "load.jsonl", tmp_path / "load.png"
    options = ("load", "--batches", "4", "--plot", str(plot))
    assert call(script, monkeypatch, path, *options)[1] == 1
    args = script.arguments()
    book = script.book_of(args)
    for who, tokens_per_s in (("plain", 100.0), ("controller", 120.0), ("k=8", 90.0), ("k=0", 99.0)):
        assert call(script, monkeypatch, path, *options)[1] == 1
        found = {"tokens_per_s": tokens_per_s, "wall_s": 31.0, "requests": 9, "tokens": 3100, "most_running": 4}
        found |= {"latency_p50_s": 1.0, "latency_p99_s": 2.0, "prefills": 9, "prefill_ms_p50": 7.5, "prefill_s": 0.1}
        found |= {"tokens_over_time": [1.0, 3.0, 1.0], "running_over_time": [1.0, 4.0, 1.0]}
        book.note("result", script.load_of(args, who), found)
    assert call(script, monkeypatch, path, *options) == (script.MET, 0)
    assert "controller: 1.2 of plain" in capsys.readouterr().out
    assert plot.stat().st_size > 0


# Servers


def test_plain_steps_are_timed_by_the_schedulers_own_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From results to results; what a prefill delayed has no time, and results are those that SGLang made."""
    server = load_script("bench/study_server.py", monkeypatch)
    clock = iter([10.0, 10.004, 11.0, 11.005])
    monkeypatch.setattr(server.time, "perf_counter", lambda: next(clock))
    waited: list[str] = []

    class Scheduler:
        def process_batch_result(self, batch: Any, result: Any) -> str:
            waited.append("processed")
            return "as before"

    server.watch_decodes(Scheduler, tmp_path / "rounds")
    reqs = [SimpleNamespace(origin_input_ids=[1] * 10, output_ids=[1] * 5)] * 2

    def batch(is_decode: bool) -> Any:
        return SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: is_decode), reqs=reqs)

    done = SimpleNamespace(copy_done=SimpleNamespace(synchronize=lambda: waited.append("waited")))
    for is_decode in (True, True, False, True, True):
        assert Scheduler().process_batch_result(batch(is_decode), done) == "as before"
    assert waited == ["waited", "processed"] * 2 + ["processed"] + ["waited", "processed"] * 2
    found = [json.loads(line) for line in (tmp_path / "rounds").read_text().splitlines()]
    assert [line[4] for line in found] == [None, 4.0, None, 5.0]
    assert found[0][1:4] == [2, 0, 30]
    assert found[0][5:] == [[0, 0], "plain", 1]


def test_a_prefill_is_timed_from_the_results_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That is what it holds decoding requests up for, whichever server it is."""
    server = load_script("bench/study_server.py", monkeypatch)
    clock = iter([10.0, 10.004, 10.024, 10.03])
    monkeypatch.setattr(server.time, "perf_counter", lambda: next(clock))

    class Scheduler:
        def process_batch_result(self, batch: Any, result: Any) -> str:
            return "as before"

    server.watch_prefills(Scheduler, tmp_path / "prefills")
    for is_extend in (True, False, True, False):
        mode = SimpleNamespace(is_extend=lambda is_extend=is_extend: is_extend)
        batch = SimpleNamespace(forward_mode=mode, reqs=[0, 0], extend_num_tokens=30)
        # without overlap nothing is copied
        assert Scheduler().process_batch_result(batch, SimpleNamespace(copy_done=None)) == "as before"
    found = [json.loads(line) for line in (tmp_path / "prefills").read_text().splitlines()]
    assert found == [[10.0, 2, 30, None], [10.024, 2, 30, 20.0]]


def test_the_host_s_time_is_what_it_neither_waits_nor_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two decodes; an iteration with a prefill is left out, and SGLang's results stay what they are."""
    server = load_script("bench/study_server.py", monkeypatch)
    now = [10.0]
    monkeypatch.setattr(server.time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> Any:
        def call(self: Any) -> None:
            now[0] += seconds

        return call

    events, graphs = type("Event", (), {"synchronize": takes(0.008)}), type("Graph", (), {"replay": takes(0.0005)})

    class Scheduler:
        def process_batch_result(self, batch: Any, result: Any) -> str:
            now[0] += 0.001
            return "as before"

    server.watch_host(Scheduler, tmp_path / "hosts", lambda: "turn 1", events, graphs)
    scheduler = Scheduler()
    for is_decode in (True, True, False, True, True):
        graphs().replay()
        graphs().replay()
        mode = SimpleNamespace(is_decode=lambda is_decode=is_decode: is_decode)
        batch = SimpleNamespace(forward_mode=mode, reqs=[0, 0, 0])
        assert scheduler.process_batch_result(batch, SimpleNamespace(copy_done=events())) == "as before"
    lines = [json.loads(line) for line in (tmp_path / "hosts").read_text().splitlines()]
    # of 10 ms one is the host's own
    assert lines == [[3, 10.0, 8.0, 1.0, 2, "turn 1"]] * 2


def test_servers_run_the_batches_of_the_cells(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit at the batch, its last request waits for the first; without a graph of its size, it is padded."""
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    args = SimpleNamespace(what=["cells"], batches=[1, 8, 128], pool=240_000, shape="qwen3-1.7b", server_arg=[])
    given = script.server_args(args)
    assert int(given[given.index("--max-running-requests") + 1]) > 128
    assert given[given.index("--cuda-graph-bs-decode") + 1 :][:3] == ["1", "8", "128"]
    assert script.graph_sizes(["load"], [1, 128]) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert script.graph_sizes(["cells", "load"], [1, 20]) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert int(script.ADMISSION["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"]) * 128 + 128 * 256 < 240_000


# Load that rises and falls


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/study_load.py", monkeypatch)


def test_load_rises_to_its_peak_and_falls(load: ModuleType) -> None:
    """The same for everybody at the same time, prompts from short to long."""
    heights = [load.target_running(i / 100, 16) for i in range(101)]
    assert (heights[0], max(heights), heights[50], heights[99], heights[100]) == (1, 16, 16, 1, 0)
    texts = [list(range(9000))] * 4
    assert load.request_at(0.3, 7, texts, load.SIZES) == load.request_at(0.3, 7, texts, load.SIZES)
    early, late = ([len(load.request_at(share, i, texts, load.SIZES)[0]) for i in range(200)] for share in (0.0, 1.0))
    assert max(early) <= load.SIZES.longest // 8 < max(late) <= load.SIZES.longest
    assert sum(late) > 2 * sum(early)


def test_the_client_keeps_the_target_in_flight(load: ModuleType) -> None:
    """Arrivals that a slow server queues, or a fast one drains, never reach the peak that was asked for."""
    import asyncio

    from aiohttp import web

    async def main(slowness: float, inside: list[int]) -> list:
        now = 0

        async def generate(request: web.Request) -> web.Response:
            nonlocal now
            now += 1
            inside.append(now)
            tokens = (await request.json())["sampling_params"]["max_new_tokens"]
            await asyncio.sleep(0.02 * slowness)
            now -= 1
            return web.json_response({"meta_info": {"completion_tokens": tokens}})

        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await load._drive(f"http://127.0.0.1:{port}", [[1] * 500], load.TINY_SIZES, 12, slowness)
        finally:
            await runner.cleanup()

    # a busy machine may sleep through the moment of the peak, a twentieth of the time
    for slowness in (1.0, 4.0, 16.0):
        inside: list[int] = []
        answers = asyncio.run(main(slowness, inside))
        assert max(inside) <= 12
        assert len(answers) == len(inside)
        assert all(16 <= answer.tokens <= 48 for answer in answers)
        if max(inside) == 12 and len(inside) > 60:
            return
    pytest.fail(f"at most {max(inside)} of {len(inside)} in flight")


def test_what_ran_stands_in_its_second(load: ModuleType, rounds_of: ModuleType) -> None:
    """Tokens and running requests, by the server's own rounds."""
    lines = [
        rounds_of.RoundLine(at, len(stood), 2, 100, 5.0, stood, "turn 0")
        for at, stood in ((10.1, [1]), (11.5, [2, 0]), (11.9, [0, 0, 0, 0]), (13.2, [1]), (99.0, [1]))
    ]
    assert load.over_time(lines, 10.0, 13.5) == ([2, 8, 0, 2], [1.0, 3.0, 0.0, 1.0], [2.0, 2.0, 0.0, 2.0])


def test_load_goes_on_with_the_contender_that_is_missing(
    load: ModuleType, books: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seven loads do not fit into one call: those that a verdict needs come first, and none twice."""
    ran: list[tuple[str, Any]] = []

    def one_load(watched: Any, texts: Any, sizes: Any, peak: int, seconds: float) -> dict[str, Any]:
        ran.append((watched.name, watched.now))
        if len(ran) == 2:
            raise ServerError("a request failed")
        return {"tokens_per_s": 100.0, "wall_s": seconds + 1}

    monkeypatch.setattr(load, "one_load", one_load)
    warm: list[tuple[str, Any]] = []
    monkeypatch.setattr(load, "warm_up", lambda watched, *args: warm.append((watched.name, watched.now)))
    plain = SimpleNamespace(name="plain", now=None)
    study = SimpleNamespace(name="study", now=None, choices=lambda: (0, 4), require_alive=lambda: None)

    def set_steps(k: int | None, rates: Any, *, fresh: bool = False) -> None:
        assert rates == [0.7]
        study.now = (k, fresh)

    study.set = set_steps
    args = SimpleNamespace(tiny=True, model=None, batches=[4], rates=[0.5, 0.7, 0.9], seconds=30.0)
    target = SimpleNamespace(shape=SimpleNamespace(context=512))
    source = SimpleNamespace(prompts=lambda scene, seed: [[1] * scene.prompt_tokens])

    def go(seconds: float | None) -> bool:
        book = books.Book(tmp_path / "load.jsonl", {}, {})
        left = books.Allowance(None if seconds is None else seconds / 60, time.monotonic())
        return load.run_loads(args, book, left, plain, study, target, source)

    assert not go(20.0)
    assert ran == []
    assert go(None)
    assert ran == [("plain", None), ("study", (None, True)), ("study", (4, False)), ("study", (0, False))]
    assert go(None)
    assert ran[4:] == [("study", (None, True))]
    assert go(1.0)
    # in each call, each server, and each k of ours
    assert warm == [("plain", None), ("study", (0, False)), ("study", (4, False))] * 4


def test_load_has_a_verdict(load: ModuleType) -> None:
    """Against plain and against the best fixed k, in tokens per second."""

    def results(**speeds: float) -> list[dict[str, Any]]:
        return [{"who": who.replace("_", "="), "tokens_per_s": value} for who, value in speeds.items()]

    assert load.load_verdict(results(plain=100, controller=120)) is None
    found = load.load_verdict(results(plain=100, controller=120, k_0=100, k_4=122))
    assert found == {"over_plain": 1.2, "best": "k=4", "over_best": round(120 / 122, 4), "met": True}
    assert not load.load_verdict(results(plain=100, controller=97, k_0=97))["met"]
    assert not load.load_verdict(results(plain=100, controller=120, k_4=130))["met"]
