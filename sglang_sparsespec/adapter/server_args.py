"""SPARSESPEC's options as fields of SGLang's ServerArgs, and the verdict on every other option.

The host builds its command line, `Engine(...)` keywords and `/server_info` from the dataclass fields of ServerArgs;
a subclass with more fields therefore gives all three, and pickles to the schedulers like the original.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import sglang.srt.server_args as host
import torch
from sglang.srt.arg_groups.arg_utils import NS, Arg
from sglang.srt.server_args import ServerArgs

from sglang_sparsespec import config as cfg
from sglang_sparsespec.adapter.host_memory import (
    default_host_memory_gb,
    host_memory,
    parse_host_memory_gb,
    resolve_host_memory_gb,
)
from sglang_sparsespec.adapter.support import CUDA_ATTENTION_BACKENDS, can_fuse, check_requested, check_supported
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError

ALGORITHM = "SPARSESPEC"
DEFAULT_NUM_STEPS = 8
DEFAULT_MAX_RUNNING_REQUESTS = 128
# of SGLang's --schedule-conservativeness, where a wrong guess costs a copy and not a prefill; not measured yet
OFFLOAD_CONSERVATIVENESS = 0.1
_STOCK_CONSERVATIVENESS: float = ServerArgs.schedule_conservativeness
_DEFAULTS = SparseSpecConfig()


def _help(text: str, default: object) -> str:
    return f"SPARSESPEC: {text} Default: {default}."


@dataclass
class SparseSpecServerArgs(ServerArgs):
    """ServerArgs with SPARSESPEC's options."""

    # SGLang's own, so that its default can be told from the same number given by the user
    schedule_conservativeness: Annotated[
        float | None,
        Arg(
            help="How conservative the schedule policy is. Use a larger value if you see requests being retracted "
            f"frequently. Default: {_STOCK_CONSERVATIVENESS}; {OFFLOAD_CONSERVATIVENESS} where SPARSESPEC has host "
            "memory for KV."
        ),
        NS("schedule"),
    ] = None
    sparsespec_budget_ratio: Annotated[
        float, _help("share of a request's KV tokens that a draft step reads, in (0, 1].", _DEFAULTS.budget_ratio)
    ] = _DEFAULTS.budget_ratio
    sparsespec_min_budget: Annotated[
        int, _help("floor of the budget, tokens, 1 to the context length.", _DEFAULTS.min_budget)
    ] = _DEFAULTS.min_budget
    sparsespec_recent_window: Annotated[
        int, _help("newest tokens that are always selected, inside the budget.", _DEFAULTS.recent_window)
    ] = _DEFAULTS.recent_window
    sparsespec_sink: Annotated[
        int, _help("first tokens that are always selected, inside the budget.", _DEFAULTS.sink)
    ] = _DEFAULTS.sink
    sparsespec_selection: Annotated[
        str,
        Arg(
            help=_help(
                "policy that scores KV tokens. pillar: PillarAttn; first-last: its scores from two verify queries; "
                "window: sink and newest tokens; quest: pages, anew for every draft step; oracle: exact for every "
                "draft step, for analysis only, slower than no speculation; random: bad drafts, for tests only.",
                _DEFAULTS.selection,
            ),
            choices=list(cfg.SELECTIONS),
        ),
    ] = _DEFAULTS.selection
    sparsespec_score_pooling: Annotated[
        int,
        _help("forward window over which scores spread, tokens; 0 is the paper's rule.", _DEFAULTS.score_pooling),
    ] = _DEFAULTS.score_pooling
    sparsespec_granularity: Annotated[
        str,
        Arg(
            help=_help("unit of selection: single tokens or blocks of 4, 8, 16 positions.", _DEFAULTS.granularity),
            choices=list(cfg.GRANULARITIES),
        ),
    ] = _DEFAULTS.granularity
    sparsespec_sharing: Annotated[
        str,
        Arg(help=_help("one set per KV head (the paper) or per layer.", _DEFAULTS.sharing), choices=list(cfg.SHARINGS)),
    ] = _DEFAULTS.sharing
    sparsespec_draft_sampling: Annotated[
        str,
        Arg(
            help=_help(
                "sampled: drafts at the request's temperature, chain rejection; greedy: argmax drafts, "
                "target-only rule; both exact.",
                _DEFAULTS.draft_sampling,
            ),
            choices=list(cfg.DRAFT_SAMPLINGS),
        ),
    ] = _DEFAULTS.draft_sampling
    sparsespec_verify_attention: Annotated[
        str,
        Arg(
            help=_help(
                "backend: the server's attention backend verifies and rounds run eagerly; fused: our own kernel "
                "verifies and scores in one pass, from CUDA graphs; auto: fused on a GPU where the policy can.",
                _DEFAULTS.verify_attention,
            ),
            choices=list(cfg.VERIFY_ATTENTIONS),
        ),
    ] = _DEFAULTS.verify_attention
    sparsespec_adaptive: Annotated[
        bool | None,
        Arg(
            help=_help(
                "choose the drafts of each round by load and acceptance, 0 (plain decoding) included; "
                "--speculative-num-steps is then the most. Left out, it is on on a GPU where the verify is fused and "
                "leaves nothing out, and off elsewhere.",
                _DEFAULTS.adaptive,
            ),
            action=argparse.BooleanOptionalAction,
        ),
    ] = _DEFAULTS.adaptive
    sparsespec_plain_steps: Annotated[
        int,
        _help(
            "tokens that an adaptive server decodes between two visits of the host while it does not draft, 1 to 16, "
            "and never more than --speculative-num-steps + 1.",
            _DEFAULTS.plain_steps,
        ),
    ] = _DEFAULTS.plain_steps
    sparsespec_profile: Annotated[
        str | None,
        _help(
            "file with what an adaptive server has learnt, read at start if there is one and written while it serves.",
            _DEFAULTS.profile,
        ),
    ] = _DEFAULTS.profile
    sparsespec_schedule: Annotated[
        str,
        Arg(
            help=_help(
                "lockstep: all requests draft together, then verify together; unified: in every forward some verify "
                "while the others draft; auto: whichever is faster in trials while the server runs.",
                _DEFAULTS.schedule,
            ),
            choices=list(cfg.SCHEDULES),
        ),
    ] = _DEFAULTS.schedule
    sparsespec_ngram_assist: Annotated[
        int,
        _help(
            "guesses per draft forward and request, from what the request has said before, 0 to "
            "--speculative-num-steps; used where they come true often enough.",
            _DEFAULTS.ngram_assist,
        ),
    ] = _DEFAULTS.ngram_assist
    sparsespec_draft_ffn_threshold: Annotated[
        float,
        _help(
            "channels of the gated activation below this absolute value count as 0 in drafts, at least 0; saves no "
            "time, for measuring acceptance.",
            _DEFAULTS.draft_ffn_threshold,
        ),
    ] = _DEFAULTS.draft_ffn_threshold
    sparsespec_draft_experts: Annotated[
        int,
        _help(
            "experts that a token visits in drafts of a mixture of experts, 1 to the model's own number; 0: that "
            "number.",
            _DEFAULTS.draft_experts,
        ),
    ] = _DEFAULTS.draft_experts
    sparsespec_verify_sparsity: Annotated[
        list[str] | tuple[str, ...],
        Arg(
            help=_help(
                "LOSSY, needs --sparsespec-allow-lossy: what a verify computes less of. attention: each KV head reads "
                "the blocks of its context that score best; ffn: small channels count as 0; moe: tokens do without "
                "their lightest experts (arXiv:2512.21911). docs/lossy.md says when not to use it.",
                _DEFAULTS.verify_sparsity,
            ),
            choices=list(cfg.VERIFY_SPARSITIES),
            nargs="+",
        ),
    ] = _DEFAULTS.verify_sparsity
    sparsespec_allow_lossy: Annotated[
        bool, _help("consent to an output that is not the model's own.", _DEFAULTS.allow_lossy)
    ] = _DEFAULTS.allow_lossy
    sparsespec_verify_kv_ratio: Annotated[
        float,
        _help(
            "share of the committed tokens beyond --sparsespec-verify-dense-below that a sparse verify reads, [0, 1].",
            _DEFAULTS.verify_kv_ratio,
        ),
    ] = _DEFAULTS.verify_kv_ratio
    sparsespec_verify_dense_below: Annotated[
        int, _help("contexts of up to so many tokens are verified whole.", _DEFAULTS.verify_dense_below)
    ] = _DEFAULTS.verify_dense_below
    sparsespec_verify_block_size: Annotated[
        int, _help("tokens of a KV block that a sparse verify reads or skips.", _DEFAULTS.verify_block_size)
    ] = _DEFAULTS.verify_block_size
    sparsespec_verify_anchors: Annotated[
        str | None,
        _help(
            "file that names the layers which choose blocks, for the others to reuse; without one every layer chooses.",
            _DEFAULTS.verify_anchors,
        ),
    ] = _DEFAULTS.verify_anchors
    sparsespec_verify_ffn_threshold: Annotated[
        float,
        _help(
            "with ffn: channels of the gated activation below this absolute value count as 0 in verifies.",
            _DEFAULTS.verify_ffn_threshold,
        ),
    ] = _DEFAULTS.verify_ffn_threshold
    sparsespec_verify_experts: Annotated[
        int,
        _help(
            "with moe: experts that a token visits in verifies, 1 to the model's own number.", _DEFAULTS.verify_experts
        ),
    ] = _DEFAULTS.verify_experts
    sparsespec_verify_expert_thresholds: Annotated[
        list[float] | tuple[float, ...],
        Arg(
            help=_help(
                "with moe: relative weights below which a token's one, two, ... lightest experts are left out.",
                _DEFAULTS.verify_expert_thresholds,
            ),
            type_parser=float,
            nargs="+",
        ),
    ] = _DEFAULTS.verify_expert_thresholds
    sparsespec_dense_verify_every: Annotated[
        int, _help("every so many rounds the verify is dense all the same; 0: never.", _DEFAULTS.dense_verify_every)
    ] = _DEFAULTS.dense_verify_every
    sparsespec_host_memory_gb: Annotated[
        float | str | None,
        Arg(
            help=_help(
                "host memory for the KV of requests that wait while the pool is full, 10^9 bytes, a total for the "
                "server, or auto: half of what is free, two pools at most; 0 leaves SGLang to retract them. Left out, "
                "it is auto on a GPU and 0 on a CPU.",
                _DEFAULTS.host_memory_gb,
            ),
            type_parser=parse_host_memory_gb,
        ),
    ] = _DEFAULTS.host_memory_gb
    sparsespec_config: Annotated[
        SparseSpecConfig | None, Arg(help="The validated options; set by resolution.", no_cli=True)
    ] = None
    sparsespec_batch_sizes: Annotated[
        tuple[int, ...], Arg(help="Batch sizes that rounds are padded to; set by resolution.", no_cli=True)
    ] = ()

    def __post_init__(self) -> None:
        self._is_conservativeness_given = self.schedule_conservativeness is not None
        if not self._is_conservativeness_given:
            self.schedule_conservativeness = _STOCK_CONSERVATIVENESS
        if (self.speculative_algorithm or "").upper() == ALGORITHM:
            check_requested(self)
            self._choose_backend()
        super().__post_init__()
        if self.sparsespec_config is None:
            self._refuse_stray_options()

    def check_server_args(self) -> None:
        """SGLang calls this in the process that answers clients, just before it starts schedulers.

        Resolution may have been in another process: arguments travel, patches do not.
        """
        if self.sparsespec_config is not None:
            # imported here: registration stands above the options
            from sglang_sparsespec.adapter.registration import prepare_parent

            prepare_parent(self.sparsespec_config)
        super().check_server_args()

    def _handle_cpu_backends(self) -> None:
        from sglang.srt.utils import is_cpu

        if self.device == "cpu" and not is_cpu():
            # SGLang's default, intel_amx, needs its own CPU engine
            if self.attention_backend is None:  # type: ignore[has-type]
                self.attention_backend = "torch_native"
            # an idle scheduler would otherwise poll, and take one of the cores that the next request needs
            self.sleep_on_idle = True
            # the schedulers inherit it: by OpenMP's default a thread that waits spins, and keeps the core from the
            # thread it waits for whenever something else runs too
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            if self.tp_size > 1:
                # SGLang asks for a NUMA node per rank unless cores are named; without its CPU engine it binds nothing
                os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(["all"] * self.tp_size))
        super()._handle_cpu_backends()

    def _choose_backend(self) -> None:
        """SGLang's own default depends on the card (fa3 on Hopper) and may be one that is not tested."""
        chosen = (self.attention_backend, self.prefill_attention_backend, self.decode_attention_backend)
        if self.device in (None, "cuda") and torch.cuda.is_available() and chosen == (None, None, None):
            self.attention_backend = CUDA_ATTENTION_BACKENDS[0]

    def _refuse_stray_options(self) -> None:
        for field in _option_fields():
            value = getattr(self, field.name)
            if value != field.default:
                raise ConfigError(
                    option_name(field.name),
                    value,
                    f"left out without --speculative-algorithm {ALGORITHM}",
                    f"Add --speculative-algorithm {ALGORITHM}, or drop the option.",
                )


def _option_fields() -> list[dataclasses.Field[Any]]:
    return [
        field
        for field in dataclasses.fields(SparseSpecServerArgs)
        if field.name.startswith("sparsespec_") and field.name not in ("sparsespec_config", "sparsespec_batch_sizes")
    ]


def option_name(field_name: str) -> str:
    """Command-line spelling of a ServerArgs field."""
    return "--" + field_name.replace("_", "-")


def resolve(server_args: ServerArgs) -> None:
    """Validate every option once, in the parent process, and leave the resolved values on `server_args`.

    Called by SGLang while ServerArgs resolves itself, after devices, backends and page size are known.

    Raises:
        ConfigError: for an option, or a combination, that cannot be served.
    """
    if not isinstance(server_args, SparseSpecServerArgs):
        raise ConfigError(
            "ServerArgs",
            type(server_args).__name__,
            "the class that sglang-sparsespec installs",
            "Call sglang.srt.plugins.load_plugins() before building ServerArgs.",
        )
    num_steps = DEFAULT_NUM_STEPS if server_args.speculative_num_steps is None else server_args.speculative_num_steps
    options = {field.name.removeprefix("sparsespec_"): getattr(server_args, field.name) for field in _option_fields()}
    if options["host_memory_gb"] is None:
        default = default_host_memory_gb(str(server_args.device), is_verify_sparse=bool(options["verify_sparsity"]))
        options["host_memory_gb"] = server_args.sparsespec_host_memory_gb = default
    options["host_memory_gb"] = resolve_host_memory_gb(options["host_memory_gb"], host_memory())
    config = SparseSpecConfig(num_steps=num_steps, **options)
    config = choose_verify_attention(config, str(server_args.device))
    config = dataclasses.replace(config, adaptive=config.adapts(str(server_args.device)))
    server_args.sparsespec_adaptive = config.adaptive
    check_supported(server_args, config)

    server_args.sparsespec_config = config
    server_args.speculative_num_steps = config.num_steps
    server_args.speculative_num_draft_tokens = config.num_draft_tokens
    server_args.speculative_eagle_topk = 1
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
    if config.verify_attention == "fused":
        server_args.sparsespec_batch_sizes = _batch_sizes(server_args)
    if config.host_memory_bytes > 0 and not server_args._is_conservativeness_given:
        server_args.schedule_conservativeness = OFFLOAD_CONSERVATIVENESS
    _turn_graphs_off(server_args)


def choose_verify_attention(config: SparseSpecConfig, device: str) -> SparseSpecConfig:
    """Resolve `auto`; anything else is the user's."""
    if config.verify_attention != "auto":
        return config
    needs_ours = config.has_unified or config.verify_sparsity
    is_fused = (device != "cpu" or needs_ours) and can_fuse(config)
    return dataclasses.replace(config, verify_attention="fused" if is_fused else "backend")


def _batch_sizes(server_args: ServerArgs) -> tuple[int, ...]:
    """Where SGLang would capture decode graphs; on a CPU, where nothing is captured, what the user asks to pad to."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    sizes = server_args.cuda_graph_bs_decode
    graphs = server_args.cuda_graph_config
    if server_args.device != "cpu":
        sizes = None if graphs is None or graphs.decode.backend == Backend.DISABLED else graphs.decode.bs
    return tuple(sorted(sizes or ()))


def _turn_graphs_off(server_args: ServerArgs) -> None:
    # SGLang's graph runners know their own algorithms only; ours are in padded_forward.py
    from sglang.srt.model_executor.cuda_graph_config import Backend

    if server_args.cuda_graph_config is not None:
        server_args.cuda_graph_config.decode.backend = Backend.DISABLED
        server_args.cuda_graph_config.prefill.backend = Backend.DISABLED


def install() -> None:
    """Put SparseSpecServerArgs in the place of ServerArgs, for the command line and for Engine."""
    if host.ServerArgs is SparseSpecServerArgs:
        return
    original = host.ServerArgs
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sglang.") and module.__dict__.get("ServerArgs") is original:
            module.ServerArgs = SparseSpecServerArgs  # type: ignore[attr-defined]
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:
        # a class attribute, bound when the module was imported
        engine.Engine.server_args_class = SparseSpecServerArgs
