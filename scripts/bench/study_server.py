"""Servers for studies of the controller, which write down every round by the scheduler's own clock.

    SPARSESPEC_STUDY=CONTROL python scripts/bench/study_server.py --model-path PATH --speculative-algorithm SPARSESPEC \
        --sparsespec-adaptive ...
    SPARSESPEC_STUDY_PLAIN=CONTROL python scripts/bench/study_server.py --model-path PATH     # SGLang as it is

CONTROL is a JSON file, read again when it has changed:

    k       drafts of every round; null: the controller chooses
    rates   SIMULATED acceptance: how probable the draft at each position is to stand if all before it do, drawn for
            each request and position (the last number serves for all further positions); the output is then not the
            model's. null: acceptance as it is
    fresh   any number; when it changes, a new controller begins, which has seen nothing
    schedule  of rounds with as many drafts as the server is set to, on a server with --sparsespec-schedule auto; null:
            it chooses
    label   any text, for the record

Rounds with a k or a schedule from outside teach the server nothing. Every round whose results have arrived is a line in
CONTROL.rounds: [seconds, requests, k, tokens in the pool, milliseconds or null, drafts that stood by request, label,
tokens that each request decoded if k = 0]. Rounds that only make a new selection have no milliseconds. With schedule
auto each round of all drafts is a line in CONTROL.schedules as well: [requests, milliseconds or null, its schedule,
label]. Labels, and whether the server learns, are of the moment at which a round was planned: its results come later.

Every prefill is a line in CONTROL.prefills: [seconds, requests, tokens, milliseconds from the results before it to its
own], on a plain server too: what it holds everybody up for.

With SPARSESPEC_STUDY_HOSTS=PATH, on a GPU, every scheduler iteration behind a decode's results is a line of PATH:
[requests, milliseconds from results to results, of these the host waited for events, of these it launched graphs, how
many, label]. What is left is the host's own time, Python and all, without a profiler that slows it.

A plain server is not changed and reads no CONTROL. Its decode steps are lines of the same kind, with k = 0 and the
label "plain". Times mean the same on both: from the arrival of one batch's results on the host to the next one's, null
where anything else ran in between.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hooked_server import before_worker_runs

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = [sys.executable, str(Path(__file__).resolve())]
"""What starts such a server."""
CONTROL = "SPARSESPEC_STUDY"
PLAIN = "SPARSESPEC_STUDY_PLAIN"
HOSTS = "SPARSESPEC_STUDY_HOSTS"
PLAIN_LABEL = "plain"
SEED = 5


def rounds_file(control: Path) -> Path:
    """Where the rounds of a server with this control are written."""
    return control.with_name(control.name + ".rounds")


def schedules_file(control: Path) -> Path:
    """Where the schedules of its rounds are written."""
    return control.with_name(control.name + ".schedules")


def prefills_file(control: Path) -> Path:
    """Where the prefills of a server with this control are written, plain or not."""
    return control.with_name(control.name + ".prefills")


class Control:
    """The file, as it was when it last changed."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed = path, 0
        self.now: dict[str, Any] = {}
        self.rounds = rounds_file(path).open("a", buffering=1)
        self.schedules = schedules_file(path).open("a", buffering=1)
        self._generator: torch.Generator | None = None

    def read(self) -> None:
        changed = self._path.stat().st_mtime_ns
        if changed != self._changed:
            self._changed = changed
            self.now = json.loads(self._path.read_text())

    def num_correct(self, num_reqs: int, num_steps: int, device: torch.device) -> torch.Tensor | None:
        """[num_reqs], int64: drafts that stand; None: acceptance as it is."""
        rates = self.now.get("rates")
        if rates is None:
            return None
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(SEED)
        by_position = torch.tensor([rates[min(i, len(rates) - 1)] for i in range(num_steps)])
        if device.type == "cuda":
            by_position = by_position.pin_memory().to(device, non_blocking=True)
        coins = torch.rand((num_reqs, num_steps), generator=self._generator, device=device)
        return (coins < by_position).long().cumprod(dim=1).sum(dim=1)


def install(control: Control) -> None:
    """Replace what chooses k, what accepts, and what takes in outcomes, in this process."""
    from sglang_sparsespec.adapter import adaptive, sampling
    from sglang_sparsespec.speculation.acceptance import accept_simulated
    from sglang_sparsespec.speculation.controller import Controller

    choose, accept, learn = adaptive.RoundSteps.wanted, sampling.RoundSampler.accept, Controller.observe
    # of rounds in flight, whose outcomes arrive in order
    planned: deque[tuple[str, bool]] = deque()
    fresh: Any = None

    def wanted(self: Any, pool_tokens: int, limits: Any) -> Any:
        nonlocal fresh
        control.read()
        if control.now.get("fresh") != fresh:
            fresh = control.now.get("fresh")
            known = self.controller
            self.controller = Controller(known.choices, known.plain_steps, known.guess)
        steps = control.now.get("k")
        is_own = steps is None
        chosen = choose(self, pool_tokens, limits) if is_own else adaptive.round_of(steps, pool_tokens, limits)
        # some may have been given up
        while len(planned) > len(self._in_flight):
            planned.popleft()
        planned.append((control.now.get("label", ""), is_own))
        return chosen

    def observe(self: Any, done: Any, num_correct: Any, round_ms: float | None) -> None:
        label, is_own = planned.popleft()
        plain_steps = 1 if done.num_steps > 0 else done.plain_steps
        stood = list(num_correct)
        arrived = time.perf_counter()
        write_round(control.rounds, arrived, done.num_steps, done.pool_tokens, round_ms, stood, label, plain_steps)
        if is_own:
            learn(self, done, num_correct, round_ms)

    def accept_drawn(self: Any, logits: Any, drafts: Any, info: Any, rule: Any, limits: Any = None) -> Any:
        acceptance = accept(self, logits, drafts, info, rule, limits)
        num_correct = control.num_correct(*drafts.tokens.shape, logits.device)
        if num_correct is None:
            return acceptance
        return accept_simulated(drafts.tokens, acceptance.bonus_tokens, num_correct, limits)

    install_schedules(control, adaptive)
    if HOSTS in os.environ:
        install_host_watch(control, Path(os.environ[HOSTS]))
    adaptive.RoundSteps.wanted = wanted  # type: ignore[method-assign]
    Controller.observe = observe  # type: ignore[method-assign]
    sampling.RoundSampler.accept = accept_drawn  # type: ignore[method-assign]


def install_schedules(control: Control, adaptive: Any) -> None:
    """Replace what chooses the schedule, and what takes in times of both; `adaptive` is the module of RoundSteps."""
    from sglang_sparsespec.speculation.schedule_choice import ScheduleChoice

    choose, learn = adaptive.RoundSteps._agreed_schedule, ScheduleChoice.observe

    # of rounds in flight, whose times arrive in order
    planned: deque[tuple[str, bool]] = deque()

    def agreed(self: Any, chosen: Any) -> str:
        if self._choice is None or chosen.num_steps != self.max_steps:
            return choose(self, chosen)
        # some may have been given up
        while len(planned) > sum(one.round.num_steps == self.max_steps for one in self._in_flight):
            planned.popleft()
        wanted = control.now.get("schedule")
        planned.append((control.now.get("label", ""), wanted is None))
        return choose(self, chosen) if wanted is None else wanted

    def observe(self: Any, schedule: str, num_reqs: int, pool_tokens: int, round_ms: float | None) -> None:
        label, is_own = planned.popleft()
        control.schedules.write(json.dumps([num_reqs, round_ms, schedule, label]) + "\n")
        if is_own:
            learn(self, schedule, num_reqs, pool_tokens, round_ms)

    adaptive.RoundSteps._agreed_schedule = agreed
    ScheduleChoice.observe = observe  # type: ignore[method-assign]


def write_round(
    file: Any,
    arrived: float,
    num_steps: int,
    pool_tokens: int,
    round_ms: float | None,
    num_correct: list[int],
    label: str,
    plain_steps: int = 1,
) -> None:
    ms = round_ms and round(round_ms, 4)
    line = [arrived, len(num_correct), num_steps, pool_tokens, ms, num_correct, label, plain_steps]
    file.write(json.dumps(line, separators=(",", ":")) + "\n")


def arrival_of(result: Any) -> float:
    """When the results of a batch are on the host; SGLang waits for that next anyway."""
    if result.copy_done is not None:
        result.copy_done.synchronize()
    return time.perf_counter()


def before_results(scheduler: Any, see: Callable[[Any, Any], None]) -> None:
    """Call `see(batch, result)` before each batch's results are taken in by `scheduler`, SGLang's class; nothing else
    changes."""
    process = scheduler.process_batch_result

    def processed(self: Any, batch: Any, result: Any) -> Any:
        see(batch, result)
        return process(self, batch, result)

    scheduler.process_batch_result = processed


def watch_decodes(scheduler: Any, rounds: Path) -> None:
    """Write down when the results of each decode batch arrive at `scheduler`."""
    file = rounds.open("a", buffering=1)
    before: float | None = None

    def see(batch: Any, result: Any) -> None:
        nonlocal before
        if not batch.forward_mode.is_decode():
            before = None
            return
        arrived = arrival_of(result)
        round_ms = None if before is None else 1e3 * (arrived - before)
        before = arrived
        pool_tokens = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
        write_round(file, arrived, 0, pool_tokens, round_ms, [0] * len(batch.reqs), PLAIN_LABEL)

    before_results(scheduler, see)


def watch_prefills(scheduler: Any, prefills: Path) -> None:
    """Write down by how much each prefill's results are behind those before it at `scheduler`.

    Batches run one after the other, so that is what decoding requests wait for.
    """
    file = prefills.open("a", buffering=1)
    before: float | None = None

    def see(batch: Any, result: Any) -> None:
        nonlocal before
        arrived = arrival_of(result)
        if batch.forward_mode.is_extend():
            held_ms = None if before is None else round(1e3 * (arrived - before), 4)
            file.write(json.dumps([arrived, len(batch.reqs), batch.extend_num_tokens, held_ms]) + "\n")
        before = arrived

    before_results(scheduler, see)


def watch_host(scheduler: Any, hosts: Path, label: Callable[[], str], events: Any, graphs: Any) -> None:
    """Write down what the host does between two decodes' results at `scheduler`.

    Args:
        events: the class whose `synchronize` makes the host wait, torch.cuda.Event.
        graphs: the class whose `replay` launches, torch.cuda.CUDAGraph.
    """
    spent = {"synchronize": 0.0, "replay": 0.0}
    num_launches = 0
    file = hosts.open("a", buffering=1)
    before: float | None = None

    def timed(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def clocked(self: Any) -> Any:
            nonlocal num_launches
            began = time.perf_counter()
            try:
                return call(self)
            finally:
                spent[name] += time.perf_counter() - began
                num_launches += name == "replay"

        setattr(owner, name, clocked)

    timed(events, "synchronize")
    timed(graphs, "replay")

    def see(batch: Any, result: Any) -> None:
        nonlocal before, num_launches
        arrived = arrival_of(result)
        if batch.forward_mode.is_decode() and before is not None:
            times = [round(1e3 * t, 4) for t in (arrived - before, spent["synchronize"], spent["replay"])]
            file.write(json.dumps([len(batch.reqs), *times, num_launches, label()]) + "\n")
        before = arrived if batch.forward_mode.is_decode() else None
        spent.update(dict.fromkeys(spent, 0.0))
        num_launches = 0

    before_results(scheduler, see)


def install_host_watch(control: Control, hosts: Path) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    if torch.cuda.is_available():
        watch_host(Scheduler, hosts, lambda: control.now.get("label", ""), torch.cuda.Event, torch.cuda.CUDAGraph)


if __name__ in ("__main__", "__mp_main__") and CONTROL in os.environ:
    before_worker_runs(lambda: install(Control(Path(os.environ[CONTROL]))))

if __name__ == "__mp_main__" and (PLAIN in os.environ or CONTROL in os.environ):
    from sglang.srt.managers.scheduler import Scheduler

    if PLAIN in os.environ:
        watch_decodes(Scheduler, rounds_file(Path(os.environ[PLAIN])))
    watch_prefills(Scheduler, prefills_file(Path(os.environ.get(PLAIN) or os.environ[CONTROL])))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
