"""The named sets of cells. Each function says what it measures and why; nothing here touches a server.

A set is built for a machine: what the machine or the call cannot give comes back as a Skip with its reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_sparsespec.bench import contenders as who
from sglang_sparsespec.bench.cells import Contender, Job, Scene, Skip, Target
from sglang_sparsespec.bench.workloads import FILE_PROMPT_TOKENS, WORKLOADS
from sglang_sparsespec.config import SCHEDULES
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.bench.machine import Machine

GREEDY, SAMPLED = 0.0, 0.6
FILL_TOKENS = {"qwen3-1.7b": 400_000, "qwen3-8b": 380_000, "qwen3-14b": 250_000, "qwen3-30b-a3b": 80_000}
"""Pool tokens at the end of a growing run, batch 128: what an 80 GB card holds beside the weights."""
LARGE_FILL_TOKENS = {"qwen3-30b-a3b": 500_000}
"""The same where there are LARGE_MEMORY bytes, of shapes whose weights leave little of 80 GB: 98 KB a token."""
LARGE_MEMORY = 120 << 30
LOSSY_SHAPES = ("qwen3-8b", "qwen3-30b-a3b")
MIN_PROMPT_TOKENS = 16
CPU_MIN_BUDGET = ("--sparsespec-min-budget", "64")
"""Of set cpu-table: its contexts are short, and the default floor would be a quarter of them."""
CPU_GATE_TOKENS = 16
"""Minutes matter there, and in float32 a wrong token shows at once."""
SMALL_POOL = Scene(128, 512, 2048, temperature=SAMPLED, num_requests=384, pool_share=0.4)
"""A pool that holds 40 % of what its requests need in the end, as in scripts/bench/offload.py."""
DEFAULT_SHAPES = {
    "core": ("qwen3-1.7b",),
    "gpu-table": ("qwen3-1.7b", "qwen3-8b"),
    "schedules": ("qwen3-1.7b", "qwen3-8b"),
    "lossy": ("qwen3-8b",),
    "full": ("qwen3-1.7b", "qwen3-8b", "qwen3-14b"),
}
"""Shapes of the sets that have any, unless the user names others; 30B-A3B has 61 GB of weights."""


@dataclass(frozen=True)
class Request:
    """What the user asked for besides the name of the set."""

    model: Target | None = None
    """The real model; None where there is none here that can be served."""
    no_model: str = "there is no real model here: ./scripts/quickstart.sh makes one, or --model PATH names one"
    """Why `model` is None, if it is."""
    shapes: tuple[Target, ...] = ()
    shapes_given: tuple[str, ...] = ()
    """Names of those that the user asked for."""
    anchors: dict[str, str] = field(default_factory=dict)
    """By shape: an anchors file, for set lossy."""
    tiny: Target | None = None
    eagle3_draft: str | None = None
    spec_args: tuple[str, ...] = ()
    """Options for every SPARSESPEC contender."""
    named: tuple[str, ...] = ()
    """Contenders of the user's, NAME=OPTIONS."""
    accept_lengths: dict[str, float] = field(default_factory=lambda: dict(who.SIMULATED_ACCEPT_LENGTHS))
    accept_lengths_given: tuple[str, ...] = ()
    """Whose simulated acceptance the user set."""
    repeats: int = 2
    prompts: str = ""
    batch: int | None = None
    new_tokens: int | None = None
    requests: int | None = None


@dataclass(frozen=True)
class Plan:
    jobs: tuple[Job, ...]
    skips: tuple[Skip, ...]


NO_GPU = "it needs a GPU"


def smoke(machine: Machine, request: Request) -> Plan:
    """Everything once, small: a random tiny model on a CPU. Shows that the harness works; its ratios mean nothing."""
    assert request.tiny is not None, "the caller makes the tiny model"
    members, skips = _rivals(machine, request, ("pillar", "window"), real=True)
    scenes = (
        Scene(2, 256, 64),
        Scene(8, 256, 64),
        Scene(2, 1024, 64),
        Scene(8, 1024, 256, num_slices=4),
        Scene(8, 1024, 64, temperature=0.65),
    )
    return Plan((Job(request.tiny, members, scenes, request.repeats, request.tiny.name),), tuple(skips))


def core(machine: Machine, request: Request) -> Plan:
    """One H100, at most 12 server starts: every rival on a real model, and ours against plain on the 1.7B shape.

    Twelve in one call. Each further call of --max-minutes starts the baseline of the real model once more. A card that
    holds all servers of the real model starts them at the same time, and again in each further call.
    """
    if not machine.has_gpu:
        return _needs_gpu("core")
    jobs, skips = [], []
    if request.model is None:
        skips.append(Skip("real model", request.no_model))
    else:
        members, missing = _rivals(machine, request, ("pillar", "window"), real=True)
        members += (_made(who.triforce, machine, request),)
        skips += missing
        scenes = (Scene(128, 2048, 256), Scene(128, 4096, 256), Scene(128, 4096, 256, temperature=SAMPLED))
        jobs.append(_job(request, request.model, members, scenes))
    shapes = [target for target in request.shapes if target.name == "qwen3-1.7b"]
    jobs += [_job(request, target, _pair(machine, request), (growing(target.name, machine),)) for target in shapes]
    if machine.backends[1:]:
        skips.append(Skip("shapes on " + ", ".join(machine.backends[1:]), "twelve server starts; set full has them"))
    return _fitting(machine, jobs, skips)


def gpu_table(machine: Machine, request: Request) -> Plan:
    """The headline table: 1.7B and 8B shapes, or those named, over pool fill and batch, and a real small model."""
    if not machine.has_gpu:
        return _needs_gpu("gpu-table")
    jobs, skips = [], []
    if request.model is None:
        skips.append(Skip("real model", request.no_model))
    else:
        # 768 tokens are about 100 rounds: fewer, and few of them are seen while all requests run
        lengths = (2048, 4096, 7168)
        scenes = tuple(Scene(128, n, 768, temperature=t) for n in lengths for t in (GREEDY, SAMPLED))
        jobs.append(_job(request, request.model, _pair(machine, request), scenes))
    for target in request.shapes:
        half = fill_tokens(target.name, machine) // 2
        scenes = (
            growing(target.name, machine, prompt_tokens=half // 128),
            *fills(target.name, machine, 128, parts=(1,), temperature=SAMPLED),
            *(scene for batch in (64, 32, 8) for scene in fills(target.name, machine, batch, parts=(1,))),
            Scene(128, half // 4 // 128, 256),
            *(scene for batch in (64, 32, 8) for scene in fills(target.name, machine, batch, parts=(4,))),
        )
        best = [c for c in who.plain(machine)[0] if c.name in ("plain/fa3",)]
        members = _pair(machine, request)
        jobs.append(_job(request, target, (members[0], *best, *members[1:]), scenes))
    if "triton" in machine.backends[1:]:
        skips.append(Skip("plain/triton", "not in this set; sets core and full have it"))
    return _fitting(machine, jobs, skips)


SCHEDULE_BATCHES = (16, 64, 128, 256)
SCHEDULE_TOKENS = 1024
"""Of an answer: about 140 rounds, of which `auto` may spend 16 on its first look at both."""


def schedules(machine: Machine, request: Request) -> Plan:
    """Plain, lockstep, unified and auto at batches 16 to 256: tokens per second, time between tokens."""
    if not machine.has_gpu:
        return _needs_gpu("schedules")
    length = request.accept_lengths["sparsespec"]
    ours = who.sparsespec(machine, ("pillar",), length, request.spec_args, SCHEDULES)
    members = (
        who.plain(machine)[0][0],
        *ours,
        *(who.named(machine, text, length, request.spec_args) for text in request.named),
    )
    jobs, skips = [], []
    if request.model is None:
        skips.append(Skip("real model", request.no_model))
    else:
        scenes = tuple(Scene(batch, 2048, SCHEDULE_TOKENS) for batch in SCHEDULE_BATCHES)
        jobs.append(_job(request, request.model, members, scenes))
    for target in request.shapes:
        scenes = tuple(
            scene
            for batch in SCHEDULE_BATCHES
            for scene in fills(target.name, machine, batch, SCHEDULE_TOKENS, longest=8192, parts=(1,))
        )
        jobs.append(_job(request, target, members, scenes))
    return _fitting(machine, jobs, skips)


def cpu_table(machine: Machine, request: Request) -> Plan:
    """What the papers compare, on a CPU with real acceptance: plain, MagicDec, TriForce, Quest, Vegas and ours."""
    if request.model is None:
        return Plan((), (Skip("real model", request.no_model),))
    members, skips = _rivals(machine, request, ("pillar", "window", "quest", "first-last"), real=True)
    members += (_made(who.triforce, machine, request),)
    job = dataclasses.replace(_job(request, request.model, members, (Scene(2, 512, 64),)), gate_tokens=CPU_GATE_TOKENS)
    return _fitting(machine, [job], skips)


def full(machine: Machine, request: Request) -> Plan:
    """The cross of everything, adaptive k, answers of several lengths and host memory for KV among it; hours."""
    if not machine.has_gpu:
        return _needs_gpu("full")
    jobs, skips = [], []
    members, missing = _rivals(machine, request, who.useful_policies(), real=True, schedules=SCHEDULES)
    if request.model is None:
        skips.append(Skip("real model", request.no_model))
    else:
        skips += missing
        members += (_made(who.triforce, machine, request), _made(who.adaptive, machine, request))
        contexts = tuple(
            Scene(batch, length, 256, temperature=temperature)
            for batch in (1, 8, 32, 128)
            for length in (1024, 4096, 7680)
            for temperature in (GREEDY, SAMPLED)
        )
        outputs = tuple(Scene(batch, 1024, length) for batch in (32, 128) for length in (1024, 4096))
        jobs.append(_job(request, request.model, members, contexts + outputs))
        jobs.append(_job(request, request.model, _offload_members(machine, request), (SMALL_POOL,)))
    members, missing = _rivals(machine, request, ("pillar",), real=False, schedules=SCHEDULES)
    skips += [skip for skip in missing if skip not in skips]
    for target in request.shapes:
        scenes = (
            growing(target.name, machine),
            *(scene for batch in (64, 32, 8) for scene in fills(target.name, machine, batch)),
        )
        jobs.append(_job(request, target, members, scenes))
    return _fitting(machine, jobs, skips)


def workload(name: str, machine: Machine, request: Request) -> Plan:
    """A paper's load on the user's model: every rival, answers as long as the model makes them."""
    preset = WORKLOADS[name]
    if request.model is None:
        return Plan((), (Skip("real model", request.no_model),))
    members, skips = _rivals(machine, request, ("pillar", "window"), real=True)
    batch = request.batch or preset.batch
    prompt_tokens = FILE_PROMPT_TOKENS if request.prompts else preset.prompt_tokens
    room = request.model.shape.context - prompt_tokens - 16
    scene = Scene(
        batch,
        prompt_tokens,
        min(request.new_tokens or preset.new_tokens, room),
        temperature=preset.temperature,
        top_p=preset.top_p,
        top_k=preset.top_k,
        num_requests=request.requests or 2 * batch,
        ignore_eos=False,
        prompts=request.prompts,
    )
    return _fitting(machine, [_job(request, request.model, members, (scene,))], skips)


CPU_SETS = ("smoke", "cpu-table")
"""Sets that leave a GPU out of account."""


def lossy(machine: Machine, request: Request) -> Plan:
    """What sparse verification gains where it could: long contexts, on shapes; its output is another matter."""
    if not machine.has_gpu:
        return _needs_gpu("lossy")
    if machine.tp_size > 1:
        return Plan((), (Skip("set lossy", "sparse verification is not served with --tp-size above 1"),))
    length = request.accept_lengths["sparsespec"]
    jobs = []
    for target in request.shapes:
        anchors = who.lossy(machine, target.shape, request.anchors[target.name], length, request.spec_args)
        # two fills of each batch: the cost model takes W and A from the line between them
        scenes = tuple(scene for batch in (32, 8) for scene in fills(target.name, machine, batch, parts=(1, 4)))
        # by itself, for what shapes leave out is not what a real model's weights would
        alone = dataclasses.replace(request, model=None)
        jobs.append(_job(alone, target, (*_pair(machine, request), *anchors), scenes))
    return _fitting(machine, jobs, [])


SETS: dict[str, Callable[[Machine, Request], Plan]] = {
    "smoke": smoke,
    "core": core,
    "cpu-table": cpu_table,
    "full": full,
    "gpu-table": gpu_table,
    "schedules": schedules,
    "lossy": lossy,
    "paper": lambda machine, request: workload("paper", machine, request),
    "vegas": lambda machine, request: workload("vegas", machine, request),
}


def fill_tokens(shape: str, machine: Machine) -> int:
    """Pool tokens at the end of a growing run on this machine."""
    is_large = machine.memory_bytes >= LARGE_MEMORY
    return LARGE_FILL_TOKENS.get(shape, FILL_TOKENS[shape]) if is_large else FILL_TOKENS[shape]


def growing(shape: str, machine: Machine, prompt_tokens: int = 512, batch: int = 128) -> Scene:
    """Every pool fill from the prompts to `fill_tokens` in one run: no request ends before."""
    length = fill_tokens(shape, machine) // batch
    # a small pool grows from a half
    prompt_tokens = min(prompt_tokens, length // 2)
    return Scene(batch, prompt_tokens, length - prompt_tokens, num_slices=8)


def fills(
    shape: str,
    machine: Machine,
    batch: int,
    new_tokens: int = 256,
    longest: int = 32_768,
    *,
    parts: tuple[int, ...] = (4, 2, 1),
    temperature: float = GREEDY,
) -> tuple[Scene, ...]:
    """`fill_tokens` over each of `parts`, as far as contexts of `longest` tokens fill the pool.

    Left out where the answers alone would fill more than that.
    """
    lengths = [min(longest, fill_tokens(shape, machine) // part // batch) - new_tokens for part in parts]
    return tuple(
        Scene(batch, length, new_tokens, temperature=temperature)
        for length in dict.fromkeys(lengths)
        if length >= MIN_PROMPT_TOKENS
    )


def _rivals(
    machine: Machine,
    request: Request,
    policies: tuple[str, ...],
    *,
    real: bool,
    schedules: tuple[str, ...] = (who.DEFAULT_SCHEDULE,),
) -> tuple[tuple[Contender, ...], list[Skip]]:
    found, skips = who.plain(machine)
    lengths = request.accept_lengths
    missing = [Skip("eagle3 on shapes", "no draft model fits random weights; it runs on the real model")]
    eagle3 = who.eagle3(machine, request.eagle3_draft) if real or not request.eagle3_draft else ([], missing)
    for members, missing in (who.ngram(machine, lengths["ngram"]), eagle3):
        found += members
        skips += missing
    found += who.sparsespec(machine, policies, lengths["sparsespec"], request.spec_args, schedules)
    found += [who.named(machine, text, lengths["sparsespec"], request.spec_args) for text in request.named]
    return tuple(found), skips


def _made(make: Callable[..., Contender], machine: Machine, request: Request) -> Contender:
    return make(machine, request.accept_lengths["sparsespec"], request.spec_args)


def _offload_members(machine: Machine, request: Request) -> tuple[Contender, ...]:
    """Plain, ours with SGLang's retraction, and ours with host memory."""
    return who.plain(machine)[0][0], *(_made(make, machine, request) for make in (who.retract, who.host_memory))


def _pair(machine: Machine, request: Request) -> tuple[Contender, ...]:
    """Plain on the backend that we run on, and ours."""
    length = request.accept_lengths["sparsespec"]
    ours = who.sparsespec(machine, ("pillar",), length, request.spec_args)
    return (
        who.plain(machine)[0][0],
        *ours,
        *(who.named(machine, text, length, request.spec_args) for text in request.named),
    )


def _job(request: Request, target: Target, members: tuple[Contender, ...], scenes: tuple[Scene, ...]) -> Job:
    """Random weights cannot tell right output from wrong: the real model is the gate where there is one."""
    gate_on = target.name if target.has_weights or request.model is None else request.model.name
    return Job(target, members, scenes, request.repeats, gate_on)


def _needs_gpu(name: str) -> Plan:
    return Plan((), (Skip(f"set {name}", f"{NO_GPU}; sets {' and '.join((*CPU_SETS, *WORKLOADS))} run on a CPU"),))


def _fitting(machine: Machine, jobs: list[Job], skips: list[Skip]) -> Plan:
    """Leave out, with the reason, what does not fit the memory or the context."""
    kept = []
    for job in jobs:
        scenes = []
        for scene in job.scenes:
            # answers that end by themselves share what pool there is; one of full length must fit
            tokens = scene.pool_tokens if scene.ignore_eos else scene.pool_tokens // scene.batch
            needed = job.target.weights_bytes + tokens * job.target.kv_bytes_per_token(machine.tp_size)
            if scene.prompt_tokens + scene.new_tokens > job.target.shape.context:
                skips.append(Skip(f"{job.target.name}: {scene}", f"its context is {job.target.shape.context} tokens"))
            elif needed > 0.95 * machine.memory_bytes:
                memory = f"{needed / 2**30:.0f} GiB of weights and KV, and {machine.name} has "
                memory += f"{machine.memory_bytes / 2**30:.0f}"
                skips.append(Skip(f"{job.target.name}: {scene}", f"it needs {memory}"))
            else:
                scenes.append(scene)
        if scenes:
            kept.append(dataclasses.replace(job, scenes=tuple(scenes)))
    return Plan(tuple(kept), tuple(skips))


def check(name: str, request: Request) -> None:
    """Refuse what would be ignored.

    Raises:
        ConfigError: for an option that the set has no use for, and for two contenders of one name.
    """
    workloads = " and ".join(WORKLOADS)
    if name not in WORKLOADS:
        for option, value in (
            ("--prompts", request.prompts),
            ("--batch", request.batch),
            ("--new-tokens", request.new_tokens),
            ("--requests", request.requests),
        ):
            if value:
                raise ConfigError(option, value, f"left out with set {name}", f"It belongs to the sets {workloads}.")
    _check_shapes(name, request)
    if request.eagle3_draft and name not in WITH_EAGLE3:
        sets = " and ".join(WITH_EAGLE3)
        allowed = f"left out with set {name}"
        raise ConfigError("--eagle3-draft", request.eagle3_draft, allowed, f"The sets {sets} have EAGLE-3.")
    names = [text.partition("=")[0] for text in request.named]
    taken = {*who.useful_policies(), *who.OURS, *(name for i, name in enumerate(names) if name in names[:i])}
    for name in names:
        if name in taken:
            raise ConfigError("--contender", name, "a name of its own", "Another contender has this name.")


WITH_EAGLE3 = ("core", "full", *WORKLOADS)
# one shape each, or what a set's promise of server starts allows
ONLY_SHAPES = {"core": ("qwen3-1.7b",), "lossy": LOSSY_SHAPES}
# set full alone has NGRAM on shapes
SIMULATED = {
    "core": ("sparsespec",),
    "gpu-table": ("sparsespec",),
    "schedules": ("sparsespec",),
    "lossy": ("sparsespec",),
    "full": tuple(who.SIMULATED_ACCEPT_LENGTHS),
}


def _check_shapes(name: str, request: Request) -> None:
    """Shapes, and acceptance simulated on them, belong to sets that have any."""
    with_shapes = " and ".join(DEFAULT_SHAPES)
    for option, values in (("--shapes", request.shapes_given), ("--accept-length", request.accept_lengths_given)):
        if values and name not in DEFAULT_SHAPES:
            text = " ".join(values)
            hint = f"It measures no random weights; the sets {with_shapes} do."
            raise ConfigError(option, text, f"left out with set {name}", hint)
    for shape in request.shapes_given:
        if shape not in ONLY_SHAPES.get(name, (shape,)):
            allowed = f"one of {', '.join(ONLY_SHAPES[name])} with set {name}"
            raise ConfigError("--shapes", shape, allowed, "Sets gpu-table and full measure any shape.")
    for contender in request.accept_lengths_given:
        if contender not in SIMULATED[name]:
            allowed = f"one of {', '.join(SIMULATED[name])} with set {name}"
            hint = "Only set full has NGRAM on random weights."
            raise ConfigError("--accept-length", contender, allowed, hint)
