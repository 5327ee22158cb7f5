"""What is measured: a contender on a target in a scene is a cell; a cell measured once is a turn.

Invariant: the key of a turn covers everything that could change its number, so that a file of results can be taken up
again after an interruption, and a changed option, model, card, version or commit is another cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_sparsespec.bench.shapes import BYTES, ModelShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ALLOW_LOSSY = "--sparsespec-allow-lossy"

RESERVE_TOKENS = 64
"""KV tokens per request beyond prompt and completion: drafts of two rounds and a page that is not full."""


@dataclass(frozen=True)
class Target:
    """A model to serve."""

    name: str
    path: str
    dtype: str
    shape: ModelShape
    has_weights: bool = True
    """False: random weights of SGLang's own (`--load-format dummy`), acceptance simulated, prompts of random ids."""

    @property
    def identity(self) -> Target:
        """What keys are made of: the folder of a shape holds nothing but the shape, and may lie anywhere."""
        return self if self.has_weights else dataclasses.replace(self, path="")

    @property
    def server_args(self) -> tuple[str, ...]:
        dummy = () if self.has_weights else ("--load-format", "dummy", "--skip-tokenizer-init")
        return ("--dtype", self.dtype, *dummy)

    @property
    def weights_bytes(self) -> int:
        return self.shape.stored_params * BYTES[self.dtype]

    def kv_bytes_per_token(self, ranks: int = 1) -> int:
        """On all ranks together; with fewer KV heads than ranks each rank holds a whole head."""
        copies = max(1, ranks // self.shape.kv_heads)
        return copies * self.shape.kv_values_per_token * BYTES[self.dtype]


def is_lossy(args: Iterable[str]) -> bool:
    """Whether a server with these arguments may answer otherwise than its model would."""
    return any(_names_lossy(arg.partition("=")[0]) for arg in args)


def _names_lossy(option: str) -> bool:
    # argparse takes a prefix for the option; a shorter one than this may be another's, and is refused by the server
    return ALLOW_LOSSY.startswith(option) and len(option) > len("--sparsespec-a")


def is_lossy_record(record: Mapping[str, Any]) -> bool:
    """The same of a record about a contender: by its arguments, or by what its server said of itself."""
    return bool(record.get("lossy")) or is_lossy(record["contender_args"])


def lossy_names(name: str, label: str) -> tuple[str, str]:
    """Name and label of a contender whose output may differ: it says so in every table and plot."""
    return (name, label) if name.endswith("-LOSSY") else (f"{name}-LOSSY", f"**LOSSY**: {label}")


@dataclass(frozen=True)
class Contender:
    """A way to serve a target."""

    name: str
    label: str
    """For people: says whose method it is and in whose engine."""
    args: tuple[str, ...] = ()
    simulated_accept_length: float | None = None
    """Bonus counted; in force on targets without weights."""

    @property
    def is_plain(self) -> bool:
        return not any(arg.startswith("--speculative-algorithm") for arg in self.args)

    def option(self, name: str) -> str | None:
        """Value of a server argument, given as two words or with `=`."""
        for i, arg in enumerate(self.args):
            if arg.startswith(name + "="):
                return arg.split("=", 1)[1]
            if arg == name and i + 1 < len(self.args):
                return self.args[i + 1]
        return None

    def words(self, name: str) -> tuple[str, ...]:
        """All values of a server argument that takes several; empty without it."""
        if name not in self.args:
            value = self.option(name)
            return () if value is None else (value,)
        rest = self.args[self.args.index(name) + 1 :]
        return tuple(itertools.takewhile(lambda word: not word.startswith("--"), rest))


@dataclass(frozen=True)
class Scene:
    """A load: how many requests, how long, sampled how."""

    batch: int
    """Requests that decode at the same time."""
    prompt_tokens: int
    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    num_requests: int = 0
    """0: as many as the batch, all sent at once. More: each that ends makes place for the next."""
    ignore_eos: bool = True
    prompts: str = ""
    """A JSONL file; else Python's own texts, or random ids on a target without weights."""
    num_slices: int = 1
    """Parts of the steady state that are reported apart: speed over pool fill from one run."""
    pool_share: float = 1.0
    """The server's KV pool over what the batch needs in the end. Below 1 requests wait, start again, or move to host
    memory, and fewer than the batch decode at a time. A job of its own: a pool is sized for all scenes of a job."""

    @property
    def requests(self) -> int:
        return max(self.batch, self.num_requests)

    @property
    def pool_tokens(self) -> int:
        """KV tokens that a server must have for this scene."""
        return round(self.pool_share * self.batch * (self.prompt_tokens + self.new_tokens + RESERVE_TOKENS))

    @property
    def is_full(self) -> bool:
        """Whether the whole batch decodes at some time; otherwise the steady state is at what is reached."""
        return self.ignore_eos and self.pool_share >= 1

    @property
    def sampling(self) -> dict[str, Any]:
        params: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.new_tokens}
        if self.temperature > 0:
            params |= {"top_p": self.top_p, "top_k": self.top_k}
        return params | ({"ignore_eos": True} if self.ignore_eos else {})

    def __str__(self) -> str:
        sampling = "greedy" if self.temperature == 0 else f"T={self.temperature:g}"
        pool = "" if self.pool_share >= 1 else f", pool for {self.pool_share:.0%} of it"
        return f"batch {self.batch}, {self.prompt_tokens}+{self.new_tokens} tokens, {sampling}{pool}"


class Skip(NamedTuple):
    """Something that a set asks for and this machine, or this call, cannot give."""

    what: str
    reason: str


@dataclass(frozen=True)
class Job:
    """One target with its contenders, the baseline first, and its scenes."""

    target: Target
    contenders: tuple[Contender, ...]
    scenes: tuple[Scene, ...]
    repeats: int
    gate_on: str
    """Name of the target on which a contender's greedy output is compared with the baseline's."""
    gate_tokens: int = 48
    """Of each answer that is compared."""


def digest(*parts: Any) -> str:
    """Sixteen hex digits of whatever JSON can hold, dataclasses included."""
    text = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def turn_key(
    target: Target, contender: Contender, scene: Scene, *, pair: str, repeat: int, context: dict[str, Any]
) -> str:
    """Identity of one turn.

    Args:
        pair: the contender that took turns with it, or "" where servers ran one at a time.
        context: what else decides the number: machine, versions, commit, server arguments.
    """
    return digest(target.identity, contender, scene, pair, repeat, context)
