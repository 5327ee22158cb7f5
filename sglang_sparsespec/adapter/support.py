"""What SPARSESPEC does not serve, and why: refused at start, before anything is loaded.

docs/features.md shows the same verdicts for people; `tests/adapter/test_support.py` walks this table.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_sparsespec.adapter.memory import experts_of
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.selection import POLICIES, SelectionPolicy
from sglang_sparsespec.sparsity.anchors_file import read_anchors
from sglang_sparsespec.speculation.profile import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    from sglang_sparsespec.config import SparseSpecConfig

CUDA_ATTENTION_BACKENDS = ("flashinfer", "triton", "fa3")
CPU_ATTENTION_BACKENDS = ("torch_native",)
_WITHOUT = "start without --speculative-algorithm SPARSESPEC"


class Refusal(NamedTuple):
    """A ServerArgs field, the values that are served, and the advice for the rest."""

    field: str
    is_served: Callable[[Any], bool]
    allowed: str
    advice: str

    @property
    def option(self) -> str:
        return "--" + self.field.replace("_", "-")


def _off(field: str, reason: str) -> Refusal:
    return Refusal(field, lambda value: not value, "left out", f"{reason} Leave it out, or {_WITHOUT}.")


def _one(field: str, reason: str) -> Refusal:
    return Refusal(field, lambda value: value in (None, 1), "1", f"{reason} Set it to 1, or {_WITHOUT}.")


REFUSALS = (
    _one("pp_size", "A draft step would have to travel through every pipeline stage."),
    _one("dcp_size", "Selections are kept per rank over whole contexts."),
    _one("attn_cp_size", "Selections are kept per rank over whole contexts."),
    _one("tokenizer_worker_num", "SGLang does not load plugins in its tokenizer workers."),
    _one("nnodes", "Several nodes are not tested."),
    _off("enable_dp_attention", "SGLang sizes idle ranks by the names of its own algorithms."),
    Refusal(
        "tp_size",
        lambda value: value in (None, 1, 2, 4, 8),
        "1, 2, 4 or 8",
        "Heads and vocabulary are split evenly over ranks. Name one of them.",
    ),
    _one("ep_size", "Experts on several ranks are not tested."),
    _one("moe_dp_size", "Experts on several ranks are not tested."),
    _one("dwdp_size", "Experts on several ranks are not tested."),
    Refusal(
        "moe_a2a_backend",
        lambda value: value in (None, "none"),
        "none",
        f"Experts on several ranks are not tested. Leave it out, or {_WITHOUT}.",
    ),
    Refusal(
        "moe_runner_backend",
        lambda value: value in (None, "auto", "triton"),
        "auto or triton",
        "Some others tune themselves on a dummy verify that SGLang makes for its own algorithms only. Name triton: "
        "what auto stands for depends on the model and the card.",
    ),
    _off("enable_eplb", "It counts which experts a forward visits, and draft steps pass that counter by."),
    _off("ep_num_redundant_experts", "They belong to experts on several ranks, which are not tested."),
    Refusal(
        "init_expert_location",
        lambda value: value in (None, "trivial"),
        "trivial",
        "Places of experts belong to several ranks, which are not tested. Leave it out.",
    ),
    _off("expert_distribution_recorder_mode", "Draft steps and fused verifies pass the recorder by."),
    _off("enable_expert_distribution_metrics", "Draft steps and fused verifies pass the recorder by."),
    _off("elastic_ep_backend", "Experts on several ranks are not tested."),
    _off("kt_weight_path", "Experts on the host's processors are not tested."),
    _one("dp_size", "SGLang does not load plugins in its data-parallel controller; start one server per replica."),
    Refusal(
        "disaggregation_mode",
        lambda value: value in (None, "null"),
        "null",
        f"Selection state is not transferred between prefill and decode servers. Serve both on one, or {_WITHOUT}.",
    ),
    _off("enable_pdmux", "Prefill and decode would share the capture buffers of one stream."),
    _off("enable_two_batch_overlap", "It splits batches below the level at which drafts are planned."),
    _off("enable_mixed_chunk", "SGLang asserts against it for every speculative algorithm."),
    _off("speculative_adaptive", "It switches between draft models' states; --sparsespec-adaptive is our own."),
    _off("speculative_draft_model_path", "The served model drafts for itself."),
    _off("speculative_token_map", "Drafts come from the served model's own head, over its whole vocabulary."),
    _off("enable_multi_layer_eagle", "It belongs to EAGLE."),
    Refusal(
        "speculative_eagle_topk",
        lambda value: value in (None, 1),
        "1 (or left out)",
        "Drafts form a chain, not a tree. Leave it out.",
    ),
    Refusal(
        "speculative_accept_threshold_single",
        lambda value: value == 1.0,
        "1.0",
        "Lower thresholds accept drafts that the model would not have sampled. Leave it out.",
    ),
    Refusal(
        "speculative_accept_threshold_acc",
        lambda value: value == 1.0,
        "1.0",
        "Lower thresholds accept drafts that the model would not have sampled. Leave it out.",
    ),
    _off(
        "speculative_use_rejection_sampling",
        "SPARSESPEC has its own switch: --sparsespec-draft-sampling sampled is rejection sampling, and the default.",
    ),
    _off("enable_lora", "Adapters in sparse draft steps are not tested yet."),
    _off("lora_paths", "Adapters in sparse draft steps are not tested yet."),
    _off(
        "enable_hierarchical_cache",
        "Its layer-wise loading is not tested with score capture yet. It moves cached prefixes, never running "
        "requests; for those there is --sparsespec-host-memory-gb.",
    ),
    _off("enable_hisparse", "It is a sparse attention of its own."),
    _off("enable_unified_memory", "Its pool is not laid out as [slots, heads, head_dim]."),
    _off(
        "enable_deterministic_inference",
        "A verify has k + 1 rows where a decode has one; they round differently.",
    ),
    _off("rl_on_policy_target", "A trainer wants bitwise equality; a verify rounds differently from a decode."),
    _off("enable_return_hidden_states", "Hidden states of a verify are not returned."),
    _off("enable_return_routed_experts", "Experts of rejected drafts would be among them."),
    _off("dllm_algorithm", "Diffusion models do not decode token by token."),
    _off("enable_mis", "Multi-item scoring masks attention in ways that selections do not know."),
    _off("enable_torch_compile", "Draft steps call the model outside the compiled runner."),
    _off("quantization", "Quantised weights are not tested yet."),
    _off("enable_memory_saver", "Selections outside the saver's memory are not tested with release and resume yet."),
    Refusal(
        "kv_cache_dtype",
        lambda value: value in ("auto", "bf16", "bfloat16", "float16", "fp16", "float32"),
        "auto or bfloat16",
        "The sparse kernels read bf16, fp16 and fp32 keys. Leave it out.",
    ),
)


# SGLang's speculative options that mean something here; the others belong to its own algorithms
SERVED_SPECULATIVE_OPTIONS = (
    "speculative_algorithm",
    "speculative_num_steps",
    "speculative_num_draft_tokens",
    "speculative_eagle_topk",
)


def check_requested(server_args: ServerArgs) -> None:
    """Raise for the first option as the user gave it, before SGLang resolves, replaces or drops it.

    Raises:
        ConfigError: naming the option, its value, what is allowed and what to do.
    """
    _check_options(server_args)
    for field in dataclasses.fields(server_args):
        value = getattr(server_args, field.name)
        is_foreign = field.name.startswith(("speculative_", "decoupled_spec_"))
        if is_foreign and field.name not in SERVED_SPECULATIVE_OPTIONS and value != field.default:
            raise ConfigError(
                "--" + field.name.replace("_", "-"), value, "left out", "It belongs to another algorithm. Leave it out."
            )
    if server_args.device == "cpu":
        for field_name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
            backend = getattr(server_args, field_name)
            if backend not in (None, *CPU_ATTENTION_BACKENDS):
                raise ConfigError(
                    "--" + field_name.replace("_", "-"),
                    backend,
                    f"one of {', '.join(CPU_ATTENTION_BACKENDS)}, or left out, on a CPU",
                    "Leave it out.",
                )


def check_supported(server_args: ServerArgs, config: SparseSpecConfig) -> None:
    """Raise for the first resolved option, backend or model that cannot be served.

    Raises:
        ConfigError: naming the option, its value, what is allowed and what to do.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    # declared values are not on the fields yet while ServerArgs resolves itself
    resolved = resolved_view(server_args)
    _check_options(resolved)
    _check_num_draft_tokens(server_args, config)
    _check_backends(resolved, server_args._resolved_attention_backends())
    _check_model(server_args.get_model_config())
    _check_budget(server_args.get_model_config(), config)
    _check_verify_attention(config)
    _check_schedule(config)
    _check_ngram_assist(config)
    _check_layers(server_args.get_model_config(), config)
    if config.verify_sparsity:
        _check_verify_sparsity(server_args, config)
        _check_label(server_args)
        _check_anchors(server_args.get_model_config(), config)
    if config.profile is not None:
        check_path(config.profile)


def _check_options(server_args: ServerArgs) -> None:
    for refusal in REFUSALS:
        value = getattr(server_args, refusal.field)
        if not refusal.is_served(value):
            raise ConfigError(refusal.option, value, refusal.allowed, refusal.advice)


def _check_num_draft_tokens(server_args: ServerArgs, config: SparseSpecConfig) -> None:
    given = server_args.speculative_num_draft_tokens
    if given not in (None, config.num_draft_tokens):
        raise ConfigError(
            "--speculative-num-draft-tokens",
            given,
            f"{config.num_draft_tokens} (--speculative-num-steps + 1) or left out",
            "A verify holds the current token and the k drafts; set --speculative-num-steps alone.",
        )


def can_fuse(config: SparseSpecConfig) -> bool:
    """Whether the policy scores by all queries of a verify, as the fused kernel does, or by none."""
    policy = POLICIES[config.selection](config)
    if not isinstance(policy, SelectionPolicy) or not policy.needs_attention:
        return True
    return len(policy.captured_queries(config.num_draft_tokens)) == config.num_draft_tokens


def _check_verify_attention(config: SparseSpecConfig) -> None:
    if config.verify_attention == "fused" and not can_fuse(config):
        raise ConfigError(
            "--sparsespec-verify-attention",
            "fused",
            f"auto or backend with --sparsespec-selection {config.selection}",
            "The fused kernel scores by all queries of a verify. Use --sparsespec-selection pillar, or backend.",
        )


def _check_ngram_assist(config: SparseSpecConfig) -> None:
    if config.ngram_assist > 0 and not isinstance(POLICIES[config.selection](config), SelectionPolicy):
        raise ConfigError(
            "--sparsespec-ngram-assist",
            config.ngram_assist,
            f"0 with --sparsespec-selection {config.selection}",
            "That policy selects anew for each token that is fed, one at a time. Leave it out, or use pillar.",
        )


def _check_layers(model: ModelConfig, config: SparseSpecConfig) -> None:
    """Options of drafts and of verifies alike must find something to leave out."""
    experts, experts_per_token = experts_of(model.hf_text_config)
    num_betas = len(config.verify_expert_thresholds)
    for option, value, most in (
        ("--sparsespec-draft-experts", config.draft_experts, experts_per_token),
        ("--sparsespec-verify-experts", config.verify_experts, experts_per_token),
        # one expert is left at least
        ("the number of --sparsespec-verify-expert-thresholds", num_betas, max(0, experts_per_token - 1)),
    ):
        if value > 0 and experts == 0:
            advice = "There are no experts to do without. Leave it out."
            raise ConfigError(option, value, "0 with a dense model", advice)
        if value > most:
            advice = "Its tokens visit no more experts than that. Lower it."
            raise ConfigError(option, value, f"0 to {most} for this model", advice)
    for option, threshold in (
        ("--sparsespec-draft-ffn-threshold", config.draft_ffn_threshold),
        ("--sparsespec-verify-ffn-threshold", config.verify_ffn_threshold),
    ):
        if threshold == 0:
            continue
        activation = getattr(model.hf_text_config, "hidden_act", None)
        if activation != "silu":
            raise ConfigError(
                option,
                threshold,
                f"0 with the activation {activation}",
                "Channels are dropped behind a gated silu alone. Leave it out.",
            )


def _check_schedule(config: SparseSpecConfig) -> None:
    if not config.has_unified:
        return
    if not isinstance(POLICIES[config.selection](config), SelectionPolicy):
        raise ConfigError(
            "--sparsespec-schedule",
            config.schedule,
            f"lockstep with --sparsespec-selection {config.selection}",
            "Drafts beside verifies read selections that were made before. Use pillar, window or random, or lockstep.",
        )
    if config.verify_attention != "fused":
        raise ConfigError(
            "--sparsespec-schedule",
            config.schedule,
            f"lockstep with --sparsespec-verify-attention {config.verify_attention}, --sparsespec-selection "
            f"{config.selection}",
            "Only our own kernel verifies some requests of a forward. Use --sparsespec-verify-attention fused with a "
            "policy that scores by all queries of a verify, or by none; or lockstep.",
        )


def _check_verify_sparsity(server_args: ServerArgs, config: SparseSpecConfig) -> None:
    if config.verify_attention != "fused":
        raise ConfigError(
            "--sparsespec-verify-sparsity",
            " ".join(config.verify_sparsity),
            f"left out with --sparsespec-verify-attention {config.verify_attention}, --sparsespec-selection "
            f"{config.selection}",
            "Only our own verify leaves anything out. Use --sparsespec-verify-attention fused with a policy that "
            "scores by all queries of a verify, or by none.",
        )
    is_stored = isinstance(POLICIES[config.selection](config), SelectionPolicy)
    # each is expected to work; whoever tests one takes it out
    untested = (
        ("--tp-size", server_args.tp_size, "1", server_args.tp_size == 1),
        ("--sparsespec-host-memory-gb", config.host_memory_gb, "0", not config.host_memory_bytes),
        ("--sparsespec-selection", config.selection, "pillar, window or random", is_stored),
    )
    for option, value, allowed, is_tested in untested:
        if not is_tested:
            allowed = f"{allowed} with --sparsespec-verify-sparsity"
            raise ConfigError(option, value, allowed, "The two have not been tested together. Leave one of them out.")


def _check_label(server_args: ServerArgs) -> None:
    """Refuse ways to the client on which a lossy answer would not be told from others."""
    from sglang.srt.environ import envs

    unlabelled = {
        "--grpc-port": server_args.grpc_port,
        "--smg-grpc-mode": server_args.smg_grpc_mode,
        "--grpc-mode": server_args.grpc_mode,
        "--encoder-only": server_args.encoder_only,
        "--use-ray": server_args.use_ray,
        "SGLANG_RUST_SERVER": envs.SGLANG_RUST_SERVER.get(),
    }
    for option, value in unlabelled.items():
        if value:
            raise ConfigError(
                option,
                value,
                "left out with --sparsespec-verify-sparsity",
                "Its answers would not say that they are lossy. Serve over SGLang's own HTTP server, or losslessly.",
            )


def _check_anchors(model: ModelConfig, config: SparseSpecConfig) -> None:
    if config.verify_anchors is not None:
        read_anchors(config.verify_anchors).check(model.hf_config.to_dict(), config.verify_block_size)


def _check_backends(server_args: ServerArgs, attention_backends: tuple[str, str]) -> None:
    allowed = CPU_ATTENTION_BACKENDS if server_args.device == "cpu" else CUDA_ATTENTION_BACKENDS
    if server_args.device not in ("cpu", "cuda"):
        raise ConfigError("--device", server_args.device, "cuda or cpu", f"Use one of them, or {_WITHOUT}.")
    prefill, decode = attention_backends
    for option, backend in (("--prefill-attention-backend", prefill), ("--decode-attention-backend", decode)):
        if backend not in allowed:
            raise ConfigError(
                f"--attention-backend ({option})", backend, f"one of {', '.join(allowed)}", "Name one of them."
            )
    if prefill != decode:
        raise ConfigError(
            "--decode-attention-backend",
            decode,
            f"the prefill backend ({prefill})",
            "Drafts, verify and prefill share one backend. Set --attention-backend alone.",
        )
    if server_args.page_size not in (None, 1, 16):
        raise ConfigError("--page-size", server_args.page_size, "1 or 16", "Leave it out, or name one of them.")


def _model_problems(model: ModelConfig) -> Iterator[tuple[str, str]]:
    from sglang.srt.configs.model_config import AttentionArch

    if not model.is_generation:
        yield "an embedding or reward model", "it does not generate."
    if model.is_encoder_decoder:
        yield "an encoder-decoder model", "cross attention has no growing KV to select from."
    if model.is_multimodal:
        yield "a multimodal model", "draft positions are not computed for image tokens."
    if model.attention_arch != AttentionArch.MHA:
        yield f"an {model.attention_arch.name} model", "its KV is compressed; there are no per-head keys to select."
    if model.is_hybrid_swa or getattr(model.hf_text_config, "use_sliding_window", False):
        yield "a sliding-window model", "its windows hide tokens that a selection may hold."
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ()) - {"full_attention"}
    windowed = layer_types & {"sliding_attention", "chunked_attention"}
    if windowed:
        yield "a sliding-window model", f"its {', '.join(sorted(windowed))} hides tokens that a selection may hold."
    if layer_types - windowed:
        yield "a hybrid linear-attention model", "recurrent state cannot be rolled back to the accepted token."
    if model.quantization is not None:
        yield f"a model quantised by {model.quantization}", "quantised weights are not tested yet."
    hybrid_markers = ("mamba", "linear_attn", "full_attention_interval", "layers_block_type", "hybrid_override_pattern")
    if any(marker in key for key in vars(model.hf_text_config) for marker in hybrid_markers):
        yield "a hybrid linear-attention model", "recurrent state cannot be rolled back to the accepted token."
    if getattr(model.hf_text_config, "rope_scaling", None) and "mrope_section" in str(
        model.hf_text_config.rope_scaling
    ):
        yield "a model with multimodal rotary embedding", "draft positions are one-dimensional."


def _check_model(model: ModelConfig) -> None:
    for kind, reason in _model_problems(model):
        raise ConfigError(
            "--model-path",
            model.model_path,
            "a decoder with full multi-head or grouped-query attention (Llama, Qwen2, Qwen3, ...)",
            f"This is {kind}: {reason} Choose another model, or {_WITHOUT}.",
        )


def _check_budget(model: ModelConfig, config: SparseSpecConfig) -> None:
    for name, value in (
        ("min-budget", config.min_budget),
        ("recent-window", config.recent_window),
        ("sink", config.sink),
    ):
        if value > model.context_len:
            raise ConfigError(
                f"--sparsespec-{name}",
                value,
                f"at most the context length ({model.context_len})",
                "Lower it, or raise --context-length.",
            )
