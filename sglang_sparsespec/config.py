"""The one configuration object: what a user may tune, with units and bounds.

Built once, in the process that parses the server's arguments (`adapter.server_args`), and passed down by value.
Knows nothing of SGLang. Invariant: an instance is valid, because construction validates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sglang_sparsespec.errors import ConfigError

OPTION_PREFIX: Final = "--sparsespec-"
SELECTIONS: Final = ("pillar", "first-last", "window", "quest", "oracle", "random")
GRANULARITIES: Final = ("token", "4", "8", "16")
SHARINGS: Final = ("head", "layer")
DRAFT_SAMPLINGS: Final = ("sampled", "greedy")
VERIFY_ATTENTIONS: Final = ("auto", "backend", "fused")
SCHEDULES: Final = ("lockstep", "unified", "auto")
# ways to compute less in a verify, and the fields that belong to each; a new one is a line here and its fields
SPARSITY_OPTIONS: Final = {
    "attention": ("verify_kv_ratio", "verify_dense_below", "verify_block_size", "verify_anchors"),
    "ffn": ("verify_ffn_threshold",),
    "moe": ("verify_experts", "verify_expert_thresholds"),
}
VERIFY_SPARSITIES: Final = tuple(SPARSITY_OPTIONS)

# docs/results.md, "Selection defaults": measured on SmolLM2-135M, real text.
DEFAULT_RECENT_WINDOW: Final = 32
DEFAULT_SINK: Final = 4
DEFAULT_SCORE_POOLING: Final = 8
DEFAULT_GRANULARITY: Final = "token"
DEFAULT_SHARING: Final = "layer"


@dataclass(frozen=True, kw_only=True)
class SparseSpecConfig:
    """How a server drafts for itself. Paper: SparseSpec (arXiv:2512.01278)."""

    num_steps: int = 8
    """k: drafts per round. Raising it spreads the verify over more tokens, and wastes more when drafts fail."""
    budget_ratio: float = 0.05
    """Share of a request's KV tokens that a draft step may read, per layer and KV head. 1 reads everything."""
    min_budget: int = 192
    """Floor of the budget, in tokens."""
    recent_window: int = DEFAULT_RECENT_WINDOW
    """Newest selectable tokens that are always selected; inside the budget."""
    sink: int = DEFAULT_SINK
    """First tokens of the context that are always selected; inside the budget."""
    selection: str = "pillar"
    """Policy that scores KV tokens: see `selection/`."""
    score_pooling: int = DEFAULT_SCORE_POOLING
    """Forward window in tokens over which attention scores spread to the tokens after them; 0 is the paper's rule."""
    granularity: str = DEFAULT_GRANULARITY
    """Unit of selection: single tokens, or aligned blocks of 4, 8 or 16 positions."""
    sharing: str = DEFAULT_SHARING
    """`head`: a set per KV head (the paper). `layer`: one set for the KV heads of a layer on a rank."""
    draft_sampling: str = "sampled"
    """`sampled`: drafts at the request's temperature, chain rejection with the stored draft distribution.
    `greedy`: the draft's argmax, target-only rule. Both leave the output distribution exact."""
    verify_attention: str = "auto"
    """`backend`: the user's attention backend verifies, and scores are captured beside it.
    `fused`: our kernel attends and scores in one pass (anchored scores), and rounds run from CUDA graphs.
    `auto`: fused on a GPU where the policy can, else backend; a server resolves it at start."""
    adaptive: bool | None = None
    """Choose the drafts of each round, 0 (plain decoding) to k, by load and acceptance; `num_steps` is then the most.
    None: where rounds are fast enough for it, which is decided at start (`adapts`)."""
    plain_steps: int = 4
    """Tokens that an adaptive server decodes between two visits of the host where it does not draft. 1: each token is
    handed out as it is made. Never more than k + 1; needs the fused verify."""
    profile: str | None = None
    """File with what an adaptive server has learnt: read at start if there is one, written while it serves."""
    schedule: str = "lockstep"
    """`lockstep`: all running requests draft together, then verify together. `unified`: each forward of a round holds
    drafts of most requests and verifies of some. `auto`: whichever is faster in trials while the server runs. Lockstep
    until both have been measured on a GPU."""
    ngram_assist: int = 0
    """Guesses per draft forward and request, from what the request has said before; 0: none. Draft forwards check them
    as the verify checks drafts, so that a round needs fewer. Off until it has been measured on a GPU."""
    draft_ffn_threshold: float = 0.0
    """tau: channels of the gated activation whose absolute value is below it count as 0 in drafts; 0: none. Saves no
    time: it is there to measure what drafts would be worth."""
    draft_experts: int = 0
    """Experts that a token visits in drafts, of a mixture of experts; 0: as many as the model's router gives."""
    verify_sparsity: tuple[str, ...] = ()
    """Of VERIFY_SPARSITIES: what a verify computes less of (arXiv:2512.21911). It changes the output."""
    allow_lossy: bool = False
    """The user's consent to an output that is not the model's."""
    verify_kv_ratio: float = 0.25
    """rho: share of the committed tokens beyond `verify_dense_below` that a sparse verify reads. Arbitrary."""
    verify_dense_below: int = 4096
    """L0, tokens: contexts up to it are verified whole. Of the paper's three the one that costs least quality."""
    verify_block_size: int = 16
    """B, tokens: a sparse verify reads whole aligned blocks of so many."""
    verify_anchors: str | None = None
    """File that names the layers which choose blocks; the others reuse their choice. None: every layer chooses."""
    verify_ffn_threshold: float = 0.0
    """tau: channels of the gated activation whose absolute value is below it count as 0 in a verify."""
    verify_experts: int = 0
    """Experts that a token visits in a verify, of a mixture of experts; 0: as many as the model's router gives."""
    verify_expert_thresholds: tuple[float, ...] = ()
    """beta_1 .. beta_m: a token does without its j lightest experts where their weight, relative to the others', is
    below beta_j. `quality calibrate` finds them."""
    dense_verify_every: int = 0
    """Every so many rounds of the server the verify is dense; 0: never."""
    host_memory_gb: float | None = None
    """Host memory for the KV of requests that wait while the pool is full, 10^9 bytes, for the whole server. 0: none;
    SGLang retracts them instead. None: by device, which is decided at start (`auto` on a GPU, 0 on a CPU)."""

    def __post_init__(self) -> None:
        _check_range("speculative-num-steps", self.num_steps, 1, 64, prefix="--")
        if not _is_number(self.budget_ratio) or not 0 < self.budget_ratio <= 1:
            raise ConfigError(
                f"{OPTION_PREFIX}budget-ratio",
                self.budget_ratio,
                "in (0, 1]",
                "It is the share of KV tokens that drafts read, not the share that they skip.",
            )
        _check_range("min-budget", self.min_budget, 1, None)
        _check_range("recent-window", self.recent_window, 0, None)
        _check_range("sink", self.sink, 0, None)
        _check_range("score-pooling", self.score_pooling, 0, 1024)
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("sharing", self.sharing, SHARINGS)
        _check_choice("draft-sampling", self.draft_sampling, DRAFT_SAMPLINGS)
        _check_choice("verify-attention", self.verify_attention, VERIFY_ATTENTIONS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        self._check_adaptive()
        _check_range("ngram-assist", self.ngram_assist, 0, self.num_steps)
        if self.ngram_assist > 0 and self.has_unified:
            raise ConfigError(
                f"{OPTION_PREFIX}ngram-assist",
                self.ngram_assist,
                f"0 with {OPTION_PREFIX}schedule {self.schedule}",
                "There every forward of a round has verifies of its own to make. Leave one of the two out.",
            )
        self._check_draft_layers()
        self._check_sparsity()
        is_amount = _is_number(self.host_memory_gb) and 0 <= (self.host_memory_gb or 0) < float("inf")
        if self.host_memory_gb is not None and not is_amount:
            raise ConfigError(
                f"{OPTION_PREFIX}host-memory-gb",
                self.host_memory_gb,
                "a number of at least 0",
                "It is the host memory for KV in 10^9 bytes, a total for the server; 0 turns offloading off.",
            )
        # A budget smaller than one block would select nothing; smaller than sink + recent is legal: sinks win.
        if self.min_budget < self.block_size and self.granularity != "token":
            raise ConfigError(
                f"{OPTION_PREFIX}min-budget",
                self.min_budget,
                f"at least one block of {OPTION_PREFIX}granularity ({self.block_size} tokens)",
                "Raise the budget or choose a finer granularity.",
            )

    def _check_adaptive(self) -> None:
        if self.adaptive is not None and not isinstance(self.adaptive, bool):
            advice = "Leave it out for what suits the device."
            raise ConfigError(f"{OPTION_PREFIX}adaptive", self.adaptive, "True, False or None", advice)
        if self.profile is not None and (not isinstance(self.profile, str) or not self.profile):
            raise ConfigError(f"{OPTION_PREFIX}profile", self.profile, "a path", "Leave it out for none.")
        if self.profile is not None and self.adaptive is False:
            raise ConfigError(
                f"{OPTION_PREFIX}profile",
                self.profile,
                f"left out without {OPTION_PREFIX}adaptive",
                f"A fixed k needs no profile: add {OPTION_PREFIX}adaptive, or drop the option.",
            )
        _check_range("plain-steps", self.plain_steps, 1, 16)
        if self.adaptive is False:
            self._refuse_fields(("plain_steps",), f"{OPTION_PREFIX}adaptive")
        if self.verify_attention == "backend":
            self._refuse_fields(("plain_steps",), f"{OPTION_PREFIX}verify-attention fused")
        if self.verify_sparsity and self.plain_steps != type(self).plain_steps:
            raise ConfigError(
                f"{OPTION_PREFIX}plain-steps",
                self.plain_steps,
                f"left out with {OPTION_PREFIX}verify-sparsity",
                "There every token comes out of a verify. Drop one of the two.",
            )

    def _check_draft_layers(self) -> None:
        _check_threshold("draft-ffn-threshold", self.draft_ffn_threshold, "Smaller channels are dropped in drafts.")
        _check_range("draft-experts", self.draft_experts, 0, None)
        for name, value in (("draft-ffn-threshold", self.draft_ffn_threshold), ("draft-experts", self.draft_experts)):
            if value > 0 and self.has_unified:
                raise ConfigError(
                    OPTION_PREFIX + name,
                    value,
                    f"0 with {OPTION_PREFIX}schedule {self.schedule}",
                    "There drafts and verifies share a forward, and a verify leaves nothing out. Drop one of the two.",
                )

    def _check_sparsity(self) -> None:
        modes = self.verify_sparsity
        if (
            not isinstance(modes, list | tuple)
            or len(set(modes)) < len(modes)
            or not set(modes) <= set(VERIFY_SPARSITIES)
        ):
            allowed = f"any of {', '.join(VERIFY_SPARSITIES)}, each once"
            raise ConfigError(f"{OPTION_PREFIX}verify-sparsity", modes, allowed, "See docs/lossy.md.")
        object.__setattr__(self, "verify_sparsity", tuple(modes))
        if not isinstance(self.allow_lossy, bool):
            raise ConfigError(
                f"{OPTION_PREFIX}allow-lossy", self.allow_lossy, "True or False", "Leave it out for False."
            )
        if modes and not self.allow_lossy:
            raise ConfigError(
                f"{OPTION_PREFIX}verify-sparsity",
                " ".join(modes),
                f"left out without {OPTION_PREFIX}allow-lossy",
                "With it the output is not the model's own any more. If that is what you want, and docs/lossy.md says "
                f"when not to, add {OPTION_PREFIX}allow-lossy; otherwise drop the option.",
            )
        if self.allow_lossy and not modes:
            raise ConfigError(
                f"{OPTION_PREFIX}allow-lossy",
                self.allow_lossy,
                f"left out without {OPTION_PREFIX}verify-sparsity",
                "Everything else is lossless. Drop it, or name what a verify may leave out.",
            )
        if not _is_number(self.verify_kv_ratio) or not 0 <= self.verify_kv_ratio <= 1:
            raise ConfigError(
                f"{OPTION_PREFIX}verify-kv-ratio",
                self.verify_kv_ratio,
                "in [0, 1]",
                "It is the share of KV tokens that a sparse verify reads, not the share that it skips.",
            )
        _check_range("verify-dense-below", self.verify_dense_below, 0, None)
        _check_range("verify-block-size", self.verify_block_size, 1, 1024)
        if self.verify_anchors is not None and (not isinstance(self.verify_anchors, str) or not self.verify_anchors):
            raise ConfigError(f"{OPTION_PREFIX}verify-anchors", self.verify_anchors, "a path", "Leave it out for none.")
        _check_range("dense-verify-every", self.dense_verify_every, 0, None)
        self._check_verify_layers()
        for mode, fields in SPARSITY_OPTIONS.items():
            if mode not in modes:
                self._refuse_fields(fields, f"{OPTION_PREFIX}verify-sparsity {mode}")
        if not modes:
            self._refuse_fields(("dense_verify_every",), f"{OPTION_PREFIX}verify-sparsity")
        elif self.has_unified:
            raise ConfigError(
                f"{OPTION_PREFIX}schedule",
                self.schedule,
                f"lockstep with {OPTION_PREFIX}verify-sparsity",
                "A forward with verifies of some requests alone has not been tested with it. Leave one of the two out.",
            )

    def _check_verify_layers(self) -> None:
        _check_threshold("verify-ffn-threshold", self.verify_ffn_threshold, "Smaller channels are dropped in verifies.")
        _check_range("verify-experts", self.verify_experts, 0, None)
        betas = self.verify_expert_thresholds
        if not isinstance(betas, list | tuple) or not all(map(_is_threshold, betas)):
            allowed = "numbers of at least 0"
            advice = "Lighter experts are left out in verifies. Leave it out for none."
            raise ConfigError(f"{OPTION_PREFIX}verify-expert-thresholds", betas, allowed, advice)
        object.__setattr__(self, "verify_expert_thresholds", tuple(betas))
        if "ffn" in self.verify_sparsity and self.verify_ffn_threshold == 0:
            raise ConfigError(
                f"{OPTION_PREFIX}verify-ffn-threshold",
                self.verify_ffn_threshold,
                f"above 0 with {OPTION_PREFIX}verify-sparsity ffn",
                "It has the scale of the model's activations, so there is no default: see docs/lossy_quality.md.",
            )
        if "moe" in self.verify_sparsity and (self.verify_experts > 0) == bool(betas):
            raise ConfigError(
                f"{OPTION_PREFIX}verify-experts",
                self.verify_experts,
                f"above 0, or {OPTION_PREFIX}verify-expert-thresholds given, with {OPTION_PREFIX}verify-sparsity moe",
                "Say which experts a verify leaves out, by one of the two rules.",
            )

    def _refuse_fields(self, names: tuple[str, ...], option: str) -> None:
        """Raise for the first of some fields that is not as by default: they mean nothing without `option`."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                thing = OPTION_PREFIX + name.replace("_", "-")
                raise ConfigError(thing, value, f"left out without {option}", "Add that, or drop the option.")

    @property
    def block_size(self) -> int:
        """Positions per selected unit."""
        return 1 if self.granularity == "token" else int(self.granularity)

    @property
    def has_unified(self) -> bool:
        """Whether rounds may run by the unified schedule."""
        return self.schedule != "lockstep"

    @property
    def host_memory_bytes(self) -> int:
        """Host memory for KV, of the whole server; 0 as long as nothing is decided."""
        return int((self.host_memory_gb or 0) * 1e9)

    def is_sparse_round(self, round_ct: int) -> bool:
        """Whether the verify of the server's `round_ct`-th round, from 1 on, may leave something out."""
        if not self.verify_sparsity:
            return False
        return self.dense_verify_every == 0 or round_ct % self.dense_verify_every != 0

    @property
    def dense_up_to(self) -> int:
        """Committed tokens up to which a sparse verify would leave nothing out, and the dense one runs; -1: none."""
        return self.verify_dense_below if self.verify_sparsity == ("attention",) else -1

    @property
    def has_dense_verify(self) -> bool:
        """Whether some verifies are the model's own: beside sparse ones, or all of them."""
        return not self.verify_sparsity or self.dense_verify_every > 0 or self.dense_up_to > 0

    def describe_loss(self) -> dict[str, object]:
        """What makes the output of a server another one than the model's, for people; empty if nothing does."""
        if not self.verify_sparsity:
            return {}
        fields = [name for mode in self.verify_sparsity for name in SPARSITY_OPTIONS[mode]]
        options = {name: getattr(self, name) for name in (*fields, "dense_verify_every")}
        return {"verify_sparsity": list(self.verify_sparsity), **options}

    @property
    def num_draft_tokens(self) -> int:
        """Width of a verify: the current token and k drafts (SGLang's meaning of the name)."""
        return self.num_steps + 1

    def adapts(self, device: str) -> bool:
        """Whether k is chosen round by round on this device: as the user says, or, unsaid, where a profile is given and
        on a GPU whose rounds run from graphs and leave nothing out (measured: docs/results.md, "Adaptive k")."""
        if self.adaptive is not None:
            return self.adaptive
        return self.profile is not None or (device != "cpu" and self.decodes_plainly)

    @property
    def decodes_plainly(self) -> bool:
        """Whether a round may do without a verify: the fused one's forward serves, unless it leaves something out."""
        return self.verify_attention == "fused" and not self.verify_sparsity

    @property
    def step_choices(self) -> tuple[int, ...]:
        """Numbers of drafts that rounds are prepared for, ascending: graphs of a verify are captured for each."""
        if not self.adaptive:
            return (self.num_steps,)
        powers = (1 << i for i in range(self.num_steps.bit_length()))
        return tuple(sorted({0, self.num_steps, *powers}))

    @property
    def most_plain_steps(self) -> int:
        """Decode steps of a round that neither drafts nor verifies; 0: there are none, and every round verifies."""
        return min(self.plain_steps, self.num_draft_tokens) if self.adaptive and self.decodes_plainly else 0

    @property
    def draft_tail(self) -> int:
        """Most positions from where a selection ends to the last draft: what the selection's block left out, the verify
        that made it, and the drafts and current token of the next round."""
        return 2 * self.num_draft_tokens + self.block_size


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _check_range(name: str, value: int, low: int, high: int | None, *, prefix: str = OPTION_PREFIX) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ConfigError(prefix + name, value, allowed, "Leave it out to get the measured default.")


def _is_threshold(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < float("inf")


def _check_threshold(name: str, value: float, meaning: str) -> None:
    if not _is_threshold(value):
        raise ConfigError(OPTION_PREFIX + name, value, "a number of at least 0", f"{meaning} 0 keeps them all.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(OPTION_PREFIX + name, value, f"one of {', '.join(choices)}", "See docs/configuration.md.")
