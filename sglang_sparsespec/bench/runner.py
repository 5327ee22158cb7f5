"""Runs the turns of a plan that its file of results lacks: starts and stops servers, gates, measures, records.

Invariants: at most two servers are up at a time, or all of a job that fits whole, and one of them works; a turn that is
on file is not run again; what fails is recorded with its reason and tried again at the next call.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sglang_sparsespec.bench import gate, trace
from sglang_sparsespec.bench.cells import digest, lossy_names
from sglang_sparsespec.bench.measure import PromptSource, measure, warm_up
from sglang_sparsespec.bench.planner import (
    START_S,
    TOGETHER_STARTS,
    common_args,
    describe,
    environment,
    is_simulated,
    needs_gate,
    predicted_gate_s,
    predicted_load_s,
    predicted_turn_s,
    predicted_visit_s,
    predicted_warm_up_s,
    side_by_side,
    together,
    turns,
    warm_up_kind,
)
from sglang_sparsespec.bench.records import append_record
from sglang_sparsespec.bench.server import Server, ServerError
from sglang_sparsespec.bench.window import NoSteadyStateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sglang_sparsespec.bench.cells import Contender, Job, Scene, Skip
    from sglang_sparsespec.bench.machine import Machine
    from sglang_sparsespec.bench.planner import Turn
    from sglang_sparsespec.bench.records import Record

START_TIMEOUT_S = 900
DONE = ("turn", "gate", "trace", "skip")
"""Kinds of records that are not made again; a failure is."""
REQUEST_TIMEOUT_S = 7200
GRACE_S = 60.0
"""What a step that runs over may take past the end of a call, before it is cut off and comes again at the next one."""
PROFILED_BATCH = 64
"""Requests of a scene that is traced, at least."""


class OutOfTimeError(Exception):
    """The next step would end after --max-minutes."""


class Runner:
    """One call of the benchmark.

    Args:
        records: what is on file already.
        context: what decides numbers besides the cells themselves: machine, versions, commit.
        profile: trace rounds of each SPARSESPEC server that is started, where there is a GPU.
        max_s: stop before a step that would probably end later than this, once there is something that the next call
            need not repeat. A step that takes far longer than predicted is cut off GRACE_S later.
    """

    def __init__(
        self,
        set_name: str,
        jobs: tuple[Job, ...],
        machine: Machine,
        out: Path,
        *,
        records: list[Record],
        provenance: dict[str, Any],
        context: dict[str, Any],
        profile: bool = False,
        max_s: float | None = None,
    ) -> None:
        self._set_name = set_name
        self._machine = machine
        self._out = out
        self._provenance = provenance
        self._context = context
        self._profiles = profile and machine.has_gpu
        self._max_s = max_s
        self._deadline = None if max_s is None else time.monotonic() + max_s
        self._has_begun = False
        self._finished = {record["key"] for record in records if record["record"] in DONE}
        self._jobs = jobs
        self._bar: Any = None
        self._lossy: dict[str, list[str]] = {}
        """By contender: what its server said that it leaves out."""
        self.is_out_of_time = False

    @property
    def pending(self) -> list[Turn]:
        """Turns that are not on file, in order."""
        return [
            turn
            for job in self._jobs
            for turn in turns(job, self._machine, self._context)
            if turn.key not in self._finished
        ]

    def run(self) -> bool:
        """Work until everything is on file (True), or until nothing more can be done in this call (False)."""
        with tqdm(total=len(self.pending), unit="turn", dynamic_ncols=True) as self._bar:
            try:
                for job in self._jobs:
                    if together(job, self._machine):
                        self._run_together(job)
                    elif side_by_side(job, self._machine) and len(job.contenders) > 1:
                        self._run_paired(job)
                    else:
                        self._run_alternating(job)
            except OutOfTimeError:
                self.is_out_of_time = True
        return not self.pending

    def note_skips(self, skips: Sequence[Skip]) -> None:
        """Put on file what this machine could not run: the page may be made on another one."""
        for skip in skips:
            key = digest("skip", self._set_name, skip, self._context)
            if key not in self._finished:
                self._record({"record": "skip", "key": key, "what": skip.what, "reason": skip.reason})

    # one job

    def _run_together(self, job: Job) -> None:
        """All servers are up, started at the same time, and take turns."""
        baseline, *others = job.contenders
        source = PromptSource(job.target)
        servers: dict[str, Server] = {}
        try:
            with contextlib.ExitStack() as up:
                apart = any(is_simulated(job.target, other) and self._gate_is_open(job, other) for other in others)
                if apart and self._lacks_reference(job):
                    # what these gates compare with; they have servers of their own, before the others start
                    work_s = 2 * predicted_gate_s(job, self._machine) + self._start_s
                    self._start(job, [baseline], servers, up, start_s=self._start_s, work_s=work_s)
                    self._keep_reference(job, servers[baseline.name], source)
                for other in others:
                    self._gate_apart(job, other, source)
                wanted = [other for other in others if self._wants_server(job, other, contender=other)]
                if not wanted and not self._wants_server(job, baseline, contender=baseline):
                    return
                absent = [member for member in (baseline, *wanted) if member.name not in servers]
                work_s = sum(self._gate_s(job, member) for member in (baseline, *wanted))
                work_s += predicted_visit_s(self._open_turns(job), self._machine)
                self._start(job, absent, servers, up, start_s=TOGETHER_STARTS * self._start_s, work_s=work_s)
                self._keep_reference(job, servers[baseline.name], source)
                for other in wanted:
                    if other.name in servers:
                        with self._dropping(job, other, servers):
                            self._gate(job, other, servers[other.name], source)
                warm: set[tuple[str, int, bool]] = set()
                for turn in self._open_turns(job):
                    if turn.contender.name in servers:
                        with self._dropping(job, turn.contender, servers):
                            self._take_one(turn, servers, source, warm)
                for other in wanted:
                    if other.name in servers:
                        self._profile(job, other, servers[other.name], source)
        except ServerError as error:
            self._stop_if_over(error)
            self._record_failures(job, error, pair=None)

    def _start(
        self,
        job: Job,
        members: list[Contender],
        servers: dict[str, Server],
        up: contextlib.ExitStack,
        *,
        start_s: float,
        work_s: float,
    ) -> None:
        """All at the same time, into `servers`; they stop with `up`."""
        self._spend_on_start(start_s, work_s)
        self._bar.set_postfix_str(f"starting {len(members)} servers on {job.target.name}")
        for member in members:
            servers[member.name] = server = self._new_server(job, member)
            up.push(server)
            server.launch()
        for member in members:
            with self._dropping(job, member, servers):
                servers[member.name].wait_until_healthy()
                self._lossy[member.name] = gate.loss_of(servers[member.name])

    def _run_paired(self, job: Job) -> None:
        """The baseline stays up; the others come one at a time and take turns with it."""
        baseline, *others = job.contenders
        source = PromptSource(job.target)
        if not any(self._wants_beside(job, other) for other in others):
            return
        try:
            first = next(other for other in others if self._wants_beside(job, other))
            # a baseline without anybody beside it is a start for nothing
            with self._server(job, baseline, work_s=self._paired_s(job, first)) as reference:
                self._keep_reference(job, reference, source)
                for other in others:
                    # without it nothing that follows can be compared
                    reference.check_alive("between contenders")
                    self._gate_apart(job, other, source)
                    if not self._wants_server(job, other, pair=other.name):
                        continue
                    work_s = self._paired_s(job, other) - self._start_s
                    with self._failing(job, other.name), self._server(job, other, work_s=work_s) as server:
                        self._gate(job, other, server, source)
                        servers = {baseline.name: reference, other.name: server}
                        self._take(job, servers, source, pair=other.name)
                        self._profile(job, other, server, source)
        except ServerError as error:
            self._stop_if_over(error)
            self._record_failures(job, error, pair=None)

    def _run_alternating(self, job: Job) -> None:
        """One server at a time, all of them in turn, as often as there are repeats."""
        source = PromptSource(job.target)
        for repeat in range(job.repeats):
            for contender in job.contenders:
                is_baseline = contender is job.contenders[0]
                self._gate_apart(job, contender, source)
                if not self._wants_server(job, contender, contender=contender, repeat=repeat):
                    continue
                left = self._open_turns(job, contender=contender, repeat=repeat)
                work_s = predicted_visit_s(left, self._machine) + self._gate_s(job, contender)
                with (
                    self._failing(job, None, contender=contender, repeat=repeat),
                    self._server(job, contender, work_s=work_s) as server,
                ):
                    if is_baseline:
                        self._keep_reference(job, server, source)
                    self._gate(job, contender, server, source)
                    self._take(job, {contender.name: server}, source, repeat=repeat)
                    self._profile(job, contender, server, source)

    def _open_turns(self, job: Job, **wanted: Any) -> list[Turn]:
        return [
            turn
            for turn in turns(job, self._machine, self._context)
            if turn.key not in self._finished and all(getattr(turn, name) == value for name, value in wanted.items())
        ]

    def _wants_server(self, job: Job, member: Contender, **wanted: Any) -> bool:
        """Whether something is left for which a contender has to be up: turns, gate, reference, trace."""
        gates_here = self._gate_is_open(job, member) and not is_simulated(job.target, member)
        answers = member is job.contenders[0] and self._lacks_reference(job)
        return gates_here or answers or bool(self._open_turns(job, **wanted) or self._open_traces(job, member))

    def _wants_beside(self, job: Job, other: Contender) -> bool:
        return self._wants_server(job, other, pair=other.name) or self._gate_is_open(job, other)

    @property
    def _start_s(self) -> float:
        return START_S[self._machine.has_gpu]

    def _gate_s(self, job: Job, contender: Contender) -> float:
        """Predicted, for what is left of it."""
        is_left = self._gate_is_open(job, contender) or (contender is job.contenders[0] and self._lacks_reference(job))
        return predicted_gate_s(job, self._machine) if is_left else 0.0

    def _paired_s(self, job: Job, other: Contender) -> float:
        """Predicted, for starting a contender beside the baseline and all that is left of the pair."""
        gates_s = self._gate_s(job, job.contenders[0]) + self._gate_s(job, other)
        left = self._open_turns(job, pair=other.name)
        return self._start_s + gates_s + predicted_visit_s(left, self._machine)

    def _take(self, job: Job, servers: dict[str, Server], source: PromptSource, **wanted: Any) -> None:
        """Every open turn that these servers can serve."""
        warm: set[tuple[str, int, bool]] = set()
        for turn in self._open_turns(job, **wanted):
            if turn.contender.name in servers:
                self._take_one(turn, servers, source, warm)

    def _take_one(
        self, turn: Turn, servers: dict[str, Server], source: PromptSource, warm: set[tuple[str, int, bool]]
    ) -> None:
        """One turn, after its warm-up if that is not among `warm` yet."""
        server = servers[turn.contender.name]
        scene, kind = turn.scene, warm_up_kind(turn)
        warm_up_s = 0.0 if kind in warm else predicted_warm_up_s(turn, self._machine)
        self._spend(warm_up_s + predicted_turn_s(turn, self._machine), *servers.values())
        self._bar.set_postfix_str(str(turn))
        if kind not in warm:
            warm_up(server, source, scene)
            warm.add(kind)
        try:
            # all that take turns get the same prompts; each repeat has its own
            result = measure(server, source, scene, seed=turn.repeat)
        except NoSteadyStateError as error:
            self._record_failure(turn, str(error))
            return
        self._record(
            {
                **describe(turn),
                "record": "turn",
                "result": result,
                "server": {"command": server.command[1:], "startup_s": round(server.startup_s, 1)},
            }
        )
        self._bar.update()

    def _profile(self, job: Job, contender: Contender, server: Server, source: PromptSource) -> None:
        """Trace the first scene of each large batch, greedy and sampled."""
        for key, scene in self._open_traces(job, contender).items():
            load_s = predicted_load_s(
                job.target, self._machine, scene.batch, scene.prompt_tokens + scene.new_tokens, trace.NEW_TOKENS
            )
            self._spend(load_s + trace.WRITE_S, server)
            self._bar.set_postfix_str(f"tracing {contender.name} on {job.target.name}, {scene}")
            try:
                path = trace.record(server, source, scene, self._out / "traces")
            except ServerError as error:
                self._stop_if_over(error)
                tqdm.write(f"failed: {error}")
                continue
            self._record(
                {
                    "record": "trace",
                    "key": key,
                    "target": job.target.name,
                    "contender": contender.name,
                    "contender_args": list(contender.args),
                    "scene": vars(scene),
                    "file": path.name,
                    **trace.summarise(path),
                }
            )

    def _open_traces(self, job: Job, contender: Contender) -> dict[str, Scene]:
        """By key."""
        if not self._profiles or contender.is_plain:
            return {}
        firsts = {(scene.batch, scene.temperature): scene for scene in reversed(job.scenes)}
        wanted = {
            digest("trace", job.target.identity, contender, scene, self._context): scene
            for scene in firsts.values()
            if scene.batch >= PROFILED_BATCH
        }
        return {key: scene for key, scene in wanted.items() if key not in self._finished}

    # servers and time

    @contextlib.contextmanager
    def _server(
        self, job: Job, contender: Contender, *, simulate: bool = True, work_s: float = 0.0
    ) -> Iterator[Server]:
        """A server for work that takes about `work_s`, which would be left half done if it did not fit any more."""
        self._spend_on_start(self._start_s, work_s)
        self._bar.set_postfix_str(f"starting {contender.name} on {job.target.name}")
        with self._new_server(job, contender, simulate=simulate) as server:
            self._lossy[contender.name] = gate.loss_of(server)
            yield server

    def _new_server(self, job: Job, contender: Contender, *, simulate: bool = True) -> Server:
        return Server(
            job.target.path,
            *common_args(job, self._machine),
            *contender.args,
            env=environment(job.target, contender, self._machine, simulate=simulate),
            timeout_s=self._at_most(START_TIMEOUT_S),
            request_timeout_s=self._at_most(REQUEST_TIMEOUT_S),
        )

    def _spend_on_start(self, start_s: float, work_s: float) -> None:
        """What no call can hold whole is begun all the same, at the beginning of one."""
        seconds = start_s + work_s
        if self._max_s is not None and self._has_begun and seconds > self._max_s - 2 * start_s:
            seconds = start_s
        self._spend(seconds)

    def _spend(self, seconds: float, *servers: Server) -> None:
        """Before a step of about so many seconds, on these servers."""
        if self._deadline is not None and self._has_begun and time.monotonic() + seconds > self._deadline:
            raise OutOfTimeError
        for server in servers:
            server.request_timeout_s = self._at_most(REQUEST_TIMEOUT_S)

    def _at_most(self, seconds: float) -> float:
        """A timeout that ends with the call."""
        if self._deadline is None:
            return seconds
        return min(seconds, max(0.0, self._deadline - time.monotonic()) + GRACE_S)

    def _stop_if_over(self, error: ServerError) -> None:
        """A step that the end of the call cut off is no failure."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise OutOfTimeError from error

    # the gate

    def _gate_key(self, job: Job, contender: Contender) -> str:
        return digest(
            "gate", job.gate_tokens, job.target.identity, contender, common_args(job, self._machine), self._context
        )

    def _reference_path(self, job: Job) -> Path:
        name = digest(
            job.gate_tokens, job.target.identity, job.contenders[0], common_args(job, self._machine), self._context
        )
        return self._out / "gate" / f"{name}.json"

    def _lacks_reference(self, job: Job) -> bool:
        wanted = any(self._gate_is_open(job, contender) for contender in job.contenders)
        return wanted and not self._reference_path(job).exists()

    def _keep_reference(self, job: Job, server: Server, source: PromptSource) -> None:
        if self._lacks_reference(job):
            self._spend(predicted_gate_s(job, self._machine), server)
            answers = gate.answers(server, gate.gate_prompts(source, job.target), job.gate_tokens)
            gate.save_reference(self._reference_path(job), answers)
            self._has_begun = True

    def _gate_apart(self, job: Job, contender: Contender, source: PromptSource) -> None:
        """Where acceptance is simulated, a server of the gate's own, without simulation."""
        if is_simulated(job.target, contender) and self._gate_is_open(job, contender):
            work_s = predicted_gate_s(job, self._machine)
            with (
                self._failing(job, None, contender=contender),
                self._server(job, contender, simulate=False, work_s=work_s) as server,
            ):
                self._compare(job, contender, server, source)

    def _gate(self, job: Job, contender: Contender, server: Server, source: PromptSource) -> None:
        if not is_simulated(job.target, contender) and self._gate_is_open(job, contender):
            self._compare(job, contender, server, source)

    def _gate_is_open(self, job: Job, contender: Contender) -> bool:
        return needs_gate(job, contender) and self._gate_key(job, contender) not in self._finished

    def _compare(self, job: Job, contender: Contender, server: Server, source: PromptSource) -> None:
        reference = gate.load_reference(self._reference_path(job))
        if reference is None:
            raise ServerError("the baseline did not answer, so there is nothing to compare with")
        self._spend(predicted_gate_s(job, self._machine), server)
        outputs = gate.answers(server, gate.gate_prompts(source, job.target), job.gate_tokens)
        verdict = gate.judge(reference, outputs, job.target.dtype)
        self._record(
            {
                "record": "gate",
                "key": self._gate_key(job, contender),
                "target": job.target.name,
                "has_weights": job.target.has_weights,
                "contender": contender.name,
                "contender_args": list(contender.args),
                **verdict,
            }
        )
        if not verdict["ok"]:
            tqdm.write(f"parity gate is RED for {contender.name} on {job.target.name}: {verdict['report']}")

    # records

    def _record(self, record: Record) -> None:
        lossy = self._lossy.get(record.get("contender", ""))
        if lossy:
            record = {**record, "lossy": lossy}
            record["contender"], record["label"] = lossy_names(record["contender"], record.get("label", ""))
        whole = {**record, "set": self._set_name, "context": digest(self._context), "provenance": self._provenance}
        append_record(self._out / "results.jsonl", whole)
        self._has_begun |= record["record"] != "skip"
        if record["record"] in DONE:
            self._finished.add(record["key"])

    def _record_failure(self, turn: Turn, reason: str) -> None:
        tqdm.write(f"failed: {turn}: {reason.splitlines()[0]}")
        self._record({**describe(turn), "record": "failure", "reason": reason})

    @contextlib.contextmanager
    def _failing(self, job: Job, pair: str | None, **wanted: Any) -> Iterator[None]:
        """A server that does not start, or dies, costs its own turns and no others."""
        try:
            yield
        except ServerError as error:
            self._stop_if_over(error)
            self._record_failures(job, error, pair=pair, **wanted)

    @contextlib.contextmanager
    def _dropping(self, job: Job, contender: Contender, servers: dict[str, Server]) -> Iterator[None]:
        """The same among servers that are all up; one that hangs would keep the card busy, so it goes down at once.

        The baseline's failure is everybody's.
        """
        try:
            yield
        except ServerError as error:
            self._stop_if_over(error)
            if contender is job.contenders[0]:
                raise
            self._record_failures(job, error, pair=None, contender=contender)
            server = servers.pop(contender.name)
            server.keep_log = True
            server.stop()

    def _record_failures(self, job: Job, error: ServerError, *, pair: str | None, **wanted: Any) -> None:
        if pair is not None:
            wanted["pair"] = pair
        for turn in self._open_turns(job, **wanted):
            self._record_failure(turn, str(error)[:4000])
