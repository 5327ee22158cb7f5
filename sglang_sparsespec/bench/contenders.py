"""Who competes: plain SGLang on each backend, its own speculative algorithms, and our engine under each policy."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from sglang_sparsespec.bench.cells import ALLOW_LOSSY, Contender, Skip, is_lossy, lossy_names
from sglang_sparsespec.bench.server import PLAIN_CPU_SERVER
from sglang_sparsespec.config import SELECTIONS, SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import NOT_CALIBRATED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_sparsespec.bench.machine import Machine
    from sglang_sparsespec.bench.shapes import ModelShape

# the bonus and what the paper (arXiv:2512.01278) saw accepted: 6.16 of 8 drafts, about 1.6 of 4
SIMULATED_ACCEPT_LENGTHS = {"sparsespec": 7.16, "ngram": 2.6}
ORIGINS = {
    "window": "MagicDec's StreamingLLM drafts",
    "pillar": "SparseSpec",
    "quest": "Quest's page bounds",
    "first-last": "Vegas' capture rule",
    "random": "a lower bound",
}
# on a GPU; the others' rounds run from CUDA graphs with our verify. adapter/worker.py and support.py say why
EAGER = {"quest": "eager: no CUDA graphs", "first-last": "eager verify by SGLang's backend"}
NGRAM_GUESSES = 2
"""Of a draft forward, in TriForce's hierarchy."""
HOST_MEMORY_GB = 16
OURS = ("triforce", "adaptive", "retract", "host-memory", "attention", "attention-anchors", "ffn", "moe")
"""Names of contenders below, besides the policies."""
DEFAULT_SCHEDULE = SparseSpecConfig().schedule
# those that our own verify serves, with selections made before the drafts (adapter/support.py); `auto` tries it too
UNIFIED_POLICIES = ("pillar", "window", "random")
NO_GPU_ARGS = ("--device", "cpu")
ADAPTIVE = "--sparsespec-adaptive"


def plain(machine: Machine) -> tuple[list[Contender], list[Skip]]:
    """SGLang without speculation, once per backend."""
    found = []
    for backend in machine.backends:
        args: tuple[str, ...] = ("--attention-backend", backend)
        if not machine.has_gpu:
            args = NO_GPU_ARGS + tuple(
                part for option in PLAIN_CPU_SERVER.items() for part in option if part is not None
            )
        found.append(Contender(f"plain/{backend}", f"SGLang, {backend}", args))
    return found, [Skip(f"plain/{backend}", reason) for backend, reason in machine.missing.items()]


def ngram(machine: Machine, simulated: float) -> tuple[list[Contender], list[Skip]]:
    if not machine.has_gpu:
        reason = "SGLang's NGRAM worker reserves slots and plans attention with Triton kernels, which need a GPU"
        return [], [Skip("ngram", reason)]
    args = ("--speculative-algorithm", "NGRAM", "--attention-backend", machine.backends[0])
    return [Contender("ngram", "SGLang NGRAM", args, simulated)], []


def eagle3(machine: Machine, draft: str | None) -> tuple[list[Contender], list[Skip]]:
    """The paper's setting for it: three drafts in a chain, on the real model."""
    if draft is None:
        return [], [Skip("eagle3", "it needs a trained draft model: --eagle3-draft PATH")]
    if not machine.has_gpu:
        return [], [Skip("eagle3", "SGLang's EAGLE workers use Triton kernels, which need a GPU")]
    args: tuple[str, ...] = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", draft)
    args += ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
    return [Contender("eagle3", "SGLang EAGLE-3", (*args, "--attention-backend", machine.backends[0]))], []


def sparsespec(
    machine: Machine,
    policies: Iterable[str],
    simulated: float,
    extra: tuple[str, ...] = (),
    schedules: Iterable[str] = (DEFAULT_SCHEDULE,),
) -> list[Contender]:
    """Our engine: each policy under each schedule that serves it; `extra` are options for all of them."""
    found = []
    for policy in policies:
        for schedule in schedules:
            if schedule != DEFAULT_SCHEDULE and policy not in UNIFIED_POLICIES:
                continue
            args: tuple[str, ...] = ("--speculative-algorithm", "SPARSESPEC", "--sparsespec-selection", policy, *extra)
            name = policy
            if schedule != DEFAULT_SCHEDULE:
                args += ("--sparsespec-schedule", schedule)
                name += f"/{schedule}"
            args += _where(machine)
            origin = f" ({ORIGINS[policy]})" if policy in ORIGINS else ""
            label = f"policy {policy}{origin} in our engine, {schedule}"
            if machine.has_gpu and policy in EAGER:
                label += f", {EAGER[policy]}"
            found.append(_ours(name, label, args, simulated))
    return found


def triforce(machine: Machine, simulated: float, extra: tuple[str, ...] = ()) -> Contender:
    """N-gram guesses, checked by the sparse model, checked by the verify."""
    args = ("--speculative-algorithm", "SPARSESPEC", "--sparsespec-ngram-assist", str(NGRAM_GUESSES), *extra)
    return _ours("triforce", "TriForce's hierarchy in our engine, policy pillar", args + _where(machine), simulated)


def adaptive(machine: Machine, simulated: float, extra: tuple[str, ...] = ()) -> Contender:
    """k by the controller; a round may be plain decoding."""
    args = ("--speculative-algorithm", "SPARSESPEC", ADAPTIVE, *extra)
    label = "policy pillar in our engine, adaptive k"
    return _ours("adaptive", label, args + _where(machine), simulated, is_fixed=False)


def retract(machine: Machine, simulated: float, extra: tuple[str, ...] = ()) -> Contender:
    """SGLang retracts, and admits as boldly as with host memory."""
    without = ("--sparsespec-host-memory-gb", "0", "--schedule-conservativeness", "0.1")
    args = ("--speculative-algorithm", "SPARSESPEC", *without, *extra)
    return _ours("retract", "policy pillar in our engine, SGLang's retraction", args + _where(machine), simulated)


def host_memory(machine: Machine, simulated: float, extra: tuple[str, ...] = ()) -> Contender:
    """Requests that the pool has no room for wait with their KV in host memory."""
    args = ("--speculative-algorithm", "SPARSESPEC", "--sparsespec-host-memory-gb", str(HOST_MEMORY_GB), *extra)
    return _ours("host-memory", "policy pillar in our engine, host memory for KV", args + _where(machine), simulated)


def _where(machine: Machine) -> tuple[str, ...]:
    return ("--attention-backend", machine.backends[0]) if machine.has_gpu else NO_GPU_ARGS


def named(machine: Machine, text: str, simulated: float, extra: tuple[str, ...] = ()) -> Contender:
    """A contender of the user's: `NAME=OPTIONS`, options of SPARSESPEC, which count over `extra`.

    Raises:
        ConfigError: without a name.
    """
    name, equals, options = text.partition("=")
    if not equals or not name or "/" in name:
        raise ConfigError(
            "--contender", text, "NAME=OPTIONS", "For instance: --contender 'k4=--speculative-num-steps 4'"
        )
    args = ("--speculative-algorithm", "SPARSESPEC", *extra, *shlex.split(options), *_where(machine))
    return _ours(name, f"{options or 'defaults'} in our engine", args, simulated)


def lossy(
    machine: Machine, shape: ModelShape, anchors: str, simulated: float, extra: tuple[str, ...] = ()
) -> list[Contender]:
    """What sparse verification can leave out of a model of this shape, mode by mode; L0 of 1K, so that contexts of 10K
    are mostly left out.

    Args:
        anchors: an anchors file of this shape.
    """
    attention = ("attention", "--sparsespec-verify-kv-ratio", "0.25", "--sparsespec-verify-dense-below", "1024")
    modes: dict[str, tuple[str, ...]] = {
        "attention": attention,
        "attention-anchors": (*attention, "--sparsespec-verify-anchors", anchors),
    }
    if shape.experts:
        fewer = str(shape.experts_per_token * 3 // 4)
        modes["moe"] = ("moe", "--sparsespec-verify-experts", fewer)
    else:
        modes["ffn"] = ("ffn", "--sparsespec-verify-ffn-threshold", "0.05")
    found = []
    for name, options in modes.items():
        args = ("--speculative-algorithm", "SPARSESPEC", ALLOW_LOSSY, "--sparsespec-verify-sparsity", *options)
        args += (*extra, *_where(machine))
        label = f"sparse verification by {name.replace('-', ', ')} in our engine"
        if "anchors" in name:
            label += f" ({NOT_CALIBRATED})"
        found.append(_ours(name, label, args, simulated))
    return found


def _ours(name: str, label: str, args: tuple[str, ...], simulated: float, *, is_fixed: bool = True) -> Contender:
    """A contender of our engine; with a fixed k, unless k is what it is about or the user says."""
    if is_fixed and ADAPTIVE not in args:
        args = (args[0], args[1], "--no-sparsespec-adaptive", *args[2:])
    if is_lossy(args):
        name, label = lossy_names(name, label)
    return Contender(f"sparsespec/{name}", label, args, simulated)


def useful_policies() -> tuple[str, ...]:
    """Every policy but those that exist for tests and for analysis."""
    return tuple(policy for policy in SELECTIONS if policy not in ("random", "oracle"))
