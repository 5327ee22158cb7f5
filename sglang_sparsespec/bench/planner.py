"""From jobs to turns in order, server starts and predicted minutes. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.cells import BYTES, RESERVE_TOKENS, turn_key
from sglang_sparsespec.bench.cost_model import Roofline, roofline_of, step_times
from sglang_sparsespec.bench.gate import LONGEST, NUM_PROMPTS
from sglang_sparsespec.bench.measure import WARMUP_NEW_TOKENS, WARMUP_PROMPT_TOKENS

if TYPE_CHECKING:
    from sglang_sparsespec.bench.cells import Contender, Job, Scene, Target
    from sglang_sparsespec.bench.machine import Machine

SERVER_BYTES = 6 << 30
"""A GPU rank beside weights and KV: its CUDA context, graphs and workspaces. Seen on an H100: 3 to 5 GiB."""
TOGETHER_SERVER_BYTES = 5 << 30
"""The same where all servers of a job are up: the most that was seen. One that takes more takes it from the tenth of
the card that stays free."""
TOGETHER_STARTS = 1.5
"""Time of all of them to start in parallel, over that of one alone. Seen on an H200: six in 79 s, one in 50 to 66."""
START_S = {True: 60.0, False: 40.0}
"""Of a server, with and without a GPU; seen with kernels compiled, and with two servers on two cores."""
SPARE_REQUESTS = 4
TINY_PARAMS = 10_000_000
SIMULATION = ("SGLANG_SIMULATE_ACC_LEN", "SGLANG_SIMULATE_ACC_METHOD")
# only for predictions: a card that nobody measured, and a CPU, where the gap of 25 ms a step rules
UNKNOWN_GPU = Roofline(1.5e12, 3e14)
CPU = Roofline(1e10, 2e10)
GAP_S = {True: 0.002, False: 0.025}
SHORT_GATE_TOKENS = 50
"""Mean of the gate's prompts that are sent alone."""
COMPILE_S = 3.0
"""Of a warm-up, beside its load."""


@dataclass(frozen=True)
class Turn:
    job: Job
    contender: Contender
    scene: Scene
    pair: str
    repeat: int
    key: str
    server_args: tuple[str, ...]
    """That all contenders of the job share."""

    def __str__(self) -> str:
        return f"{self.job.target.name}, {self.contender.name}, {self.scene}, repeat {self.repeat + 1}"


def common_args(job: Job, machine: Machine) -> tuple[str, ...]:
    """Server arguments that every contender of a job shares: pools, batch, streaming."""
    args = [
        *job.target.server_args,
        "--max-total-tokens",
        str(pool_tokens(job, machine)),
        "--max-running-requests",
        # at its limit SGLang counts a request in chunked prefill twice: the last of a batch would wait for the first
        str(max(scene.batch for scene in job.scenes) + SPARE_REQUESTS),
        # often enough for a median within a steady state
        "--decode-log-interval",
        "16",
        # else every chunk repeats the answer so far
        "--incremental-streaming-output",
        "--skip-server-warmup",
        "--random-seed",
        "1",
    ]
    if machine.tp_size > 1:
        args += ["--tp-size", str(machine.tp_size)]
    if machine.has_gpu:
        args.append("--disable-prefill-cuda-graph")
        if together(job, machine):
            # SGLang gives the KV pool what is free once the weights are loaded, less (1 - fraction) of what was free
            # before (`_profile_available_bytes`), if that is less than --max-total-tokens. Of servers that start at the
            # same time one may see an empty card before, and the pools of all others after. By SGLang's default, 0.88
            # or so, it would miss more than the tenth that `together` leaves free, and get a small pool. A larger
            # fraction takes nothing from anybody, since the pool's size is given.
            args += ["--mem-fraction-static", "0.95"]
            # else each idle scheduler polls and keeps a core busy
            args.append("--sleep-on-idle")
        elif not side_by_side(job, machine):
            args += ["--mem-fraction-static", "0.9"]
    return tuple(args)


def pool_tokens(job: Job, machine: Machine) -> int:
    """KV tokens of a server. Scenes of fixed lengths get all that they fill; one whose answers end by themselves gets
    what there is, at most."""
    fixed = max((scene.pool_tokens for scene in job.scenes if scene.ignore_eos), default=0)
    gate_tokens = NUM_PROMPTS * (LONGEST + job.gate_tokens + RESERVE_TOKENS)
    open_ended = max((scene.pool_tokens for scene in job.scenes if not scene.ignore_eos), default=0)
    return max(fixed, gate_tokens, min(open_ended, room_tokens(job.target, machine)))


def room_tokens(target: Target, machine: Machine) -> int:
    """KV tokens that fit beside the weights: on cards all of it, on a CPU a quarter of the memory for each of two."""
    room = 0.25 * machine.memory_bytes
    if machine.has_gpu:
        room = 0.85 * machine.memory_bytes - machine.tp_size * SERVER_BYTES
    return max(0, int((room - target.weights_bytes) / target.kv_bytes_per_token(machine.tp_size)))


def side_by_side(job: Job, machine: Machine) -> bool:
    """Whether two servers of this job fit here at a time; a CPU runs two, of a model that leaves room for it."""
    server = job.target.weights_bytes + pool_tokens(job, machine) * job.target.kv_bytes_per_token(machine.tp_size)
    server += machine.tp_size * SERVER_BYTES if machine.has_gpu else 0
    return 2 * server < 0.9 * machine.memory_bytes


def together(job: Job, machine: Machine) -> bool:
    """Whether the servers of all contenders, more than a pair, fit on the card at a time.

    One rank alone: with several SGLang refuses to start unless all cards have the same free memory
    (`_check_tp_memory_balance`), which others that start would upset. Host memory, 5 GB or so a server, does not count:
    what a virtual machine shows may grow, and the way in which a job runs is part of its keys.
    """
    if not machine.has_gpu or machine.tp_size > 1 or len(job.contenders) <= 2:
        return False
    server = job.target.weights_bytes + pool_tokens(job, machine) * job.target.kv_bytes_per_token()
    return len(job.contenders) * (server + TOGETHER_SERVER_BYTES) < 0.9 * machine.memory_bytes


def turns(job: Job, machine: Machine, context: dict[str, Any]) -> list[Turn]:
    """In the order in which they run.

    Together, all take turns on each scene, forth and back: ABCCBA. Side by side, each contender is paired with the
    baseline and they take turns. Otherwise all run one after another, and the whole row `repeats` times: ABAB.
    """
    baseline, *others = job.contenders
    args = common_args(job, machine)

    def turn(contender: Contender, scene: Scene, pair: str, repeat: int) -> Turn:
        whole = {**context, "server_args": args}
        key = turn_key(job.target, contender, scene, pair=pair, repeat=repeat, context=whole)
        return Turn(job, contender, scene, pair, repeat, key, args)

    if together(job, machine):
        return [
            turn(contender, scene, "", repeat)
            for repeat in range(job.repeats)
            for scene in job.scenes
            for contender in (job.contenders if repeat % 2 == 0 else reversed(job.contenders))
        ]
    if others and side_by_side(job, machine):
        return [
            turn(member, scene, other.name, repeat)
            for other in others
            for scene in job.scenes
            for repeat in range(job.repeats)
            for member in (baseline, other)
        ]
    return [
        turn(contender, scene, "", repeat)
        for repeat in range(job.repeats)
        for contender in job.contenders
        for scene in job.scenes
    ]


def needs_gate(job: Job, contender: Contender) -> bool:
    """Whether this job compares the contender's output (a job on random weights may leave that to the real model)."""
    return not contender.is_plain and job.gate_on == job.target.name


def is_simulated(target: Target, contender: Contender) -> bool:
    return not target.has_weights and not contender.is_plain


def environment(
    target: Target, contender: Contender, machine: Machine, *, simulate: bool = True
) -> dict[str, str | None]:
    """Variables of a server; None removes one."""
    # a simulation that the caller's shell left on would pass for real acceptance
    env: dict[str, str | None] = dict.fromkeys(SIMULATION)
    if simulate and is_simulated(target, contender):
        # the host's default rounds a normal deviate, whose mean is another one at the ends
        env |= dict(zip(SIMULATION, (str(contender.simulated_accept_length), "match-expected"), strict=True))
    if not machine.has_gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
        if target.shape.stored_params < TINY_PARAMS:
            # threads that wait for each other cost a tiny model more than they save
            env["OMP_NUM_THREADS"] = "1"
    return env


def describe(turn: Turn) -> dict[str, Any]:
    """A turn as the first part of its record."""
    target, contender = turn.job.target, turn.contender
    simulated = contender.simulated_accept_length if is_simulated(target, contender) else None
    return {
        "key": turn.key,
        "target": target.name,
        "dtype": target.dtype,
        "shape": vars(target.shape),
        "acceptance": "simulated" if simulated else "none" if contender.is_plain else "real",
        "simulated_accept_length": simulated,
        "contender": contender.name,
        "label": contender.label,
        "contender_args": list(contender.args),
        "server_args": list(turn.server_args),
        "is_baseline": contender is turn.job.contenders[0],
        "baseline": turn.job.contenders[0].name,
        "gate_on": turn.job.gate_on,
        "scene": vars(turn.scene),
        "pair": turn.pair,
        "repeat": turn.repeat,
    }


def num_starts(job: Job, machine: Machine) -> int:
    """Servers that an uninterrupted run starts."""
    rows = 1 if together(job, machine) or side_by_side(job, machine) else job.repeats
    return rows * len(job.contenders) + _gates_apart(job)


def _gates_apart(job: Job) -> int:
    """Gates that need a server of their own."""
    return sum(needs_gate(job, contender) and is_simulated(job.target, contender) for contender in job.contenders)


def predicted_turn_s(turn: Turn, machine: Machine) -> float:
    """A guess within a factor of two, for the dry run and for stopping in time; likewise all that follow."""
    scene = turn.scene
    waves = math.ceil(scene.requests / scene.batch) / min(1.0, scene.pool_share)
    return predicted_load_s(turn.job.target, machine, scene.batch, scene.prompt_tokens, scene.new_tokens, waves) + 2.0


def predicted_load_s(
    target: Target, machine: Machine, batch: int, prompt_tokens: int, new_tokens: int, waves: float = 1.0
) -> float:
    """Seconds for so many waves of a batch, decoded without speculation."""
    roofline = roofline_of(machine.name) or UNKNOWN_GPU
    roofline = roofline.times(machine.tp_size) if machine.has_gpu else CPU
    weights_ms, kv_ms = step_times(
        target.shape,
        roofline,
        rows=batch,
        pool_tokens=batch * (prompt_tokens + new_tokens / 2),
        bytes_per_value=BYTES[target.dtype],
    )
    prefill_s = batch * prompt_tokens * 2 * target.shape.active_layer_params / roofline.flops
    return waves * (prefill_s + new_tokens * ((weights_ms + kv_ms) / 1e3 + GAP_S[machine.has_gpu]))


def predicted_gate_s(job: Job, machine: Machine) -> float:
    """Of one server's answers: half of the prompts one by one, then the long half together."""
    half = NUM_PROMPTS // 2
    alone = half * predicted_load_s(job.target, machine, 1, SHORT_GATE_TOKENS, job.gate_tokens)
    return alone + predicted_load_s(job.target, machine, half, LONGEST // 2, job.gate_tokens)


def predicted_warm_up_s(turn: Turn, machine: Machine) -> float:
    prompt_tokens = min(turn.scene.prompt_tokens, WARMUP_PROMPT_TOKENS)
    return predicted_load_s(turn.job.target, machine, turn.scene.batch, prompt_tokens, WARMUP_NEW_TOKENS) + COMPILE_S


def warm_up_kind(turn: Turn) -> tuple[str, int, bool]:
    """Turns of one kind need one warm-up of a server."""
    return turn.contender.name, turn.scene.batch, turn.scene.temperature > 0


def predicted_visit_s(pending: list[Turn], machine: Machine) -> float:
    """Seconds for turns and their warm-ups on servers that are up."""
    kinds = {warm_up_kind(turn): turn for turn in pending}
    warm_ups = sum(predicted_warm_up_s(turn, machine) for turn in kinds.values())
    return warm_ups + sum(predicted_turn_s(turn, machine) for turn in pending)


def predicted_starts_s(job: Job, machine: Machine) -> float:
    starts: float = num_starts(job, machine)
    if together(job, machine):
        apart = _gates_apart(job)
        # the baseline then comes before the others, for what the gates compare with
        starts = TOGETHER_STARTS + apart + bool(apart)
    return starts * START_S[machine.has_gpu]


def predicted_s(jobs: tuple[Job, ...], machine: Machine, pending: list[Turn]) -> float:
    """Seconds for the pending turns, with the server starts and gates of the jobs that have any."""
    seconds = 0.0
    for job in jobs:
        own = [turn for turn in pending if turn.job is job]
        if not own:
            continue
        gates = sum(needs_gate(job, contender) for contender in job.contenders)
        seconds += predicted_starts_s(job, machine) + predicted_visit_s(own, machine)
        seconds += (gates + bool(gates)) * predicted_gate_s(job, machine)
    return seconds
