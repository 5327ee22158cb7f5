"""What SPARSESPEC refuses at start: every row of the table, every kind of model, each with a message that helps."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

# a value that is refused; fields that are not here take True
REFUSED_VALUES: dict[str, Any] = {
    "pp_size": 2,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "tokenizer_worker_num": 2,
    "disaggregation_mode": "prefill",
    "speculative_draft_model_path": "a folder, or SGLang would look the model up on the network",
    "speculative_token_map": "map.pt",
    "speculative_eagle_topk": 2,
    "speculative_accept_threshold_single": 0.9,
    "speculative_accept_threshold_acc": 0.9,
    "lora_paths": ["a=b"],
    "rl_on_policy_target": "fsdp",
    "dllm_algorithm": "LowConfidence",
    "kv_cache_dtype": "fp8_e4m3",
    "dp_size": 2,
    "tp_size": 3,
    "ep_size": 2,
    "moe_dp_size": 2,
    "dwdp_size": 2,
    "moe_a2a_backend": "deepep",
    "moe_runner_backend": "flashinfer_cutlass",
    "ep_num_redundant_experts": 2,
    "init_expert_location": "experts.json",
    "expert_distribution_recorder_mode": "stat",
    "elastic_ep_backend": "mooncake",
    "kt_weight_path": "/weights",
    "nnodes": 2,
    "quantization": "fp8",
}


def assert_four_parts(error: BaseException, thing: str, value: object) -> None:
    """The thing, what it was, what is allowed, what to do."""
    message = str(error)
    head = f"{thing} is {value!r}; it must be "
    assert message.startswith(head), message
    allowed, _, advice = message.removeprefix(head).partition(". ")
    assert allowed, message
    assert advice.endswith("."), message


def _refusals() -> list[Any]:
    from sglang_sparsespec.adapter.support import REFUSALS

    return list(REFUSALS)


def _fields() -> list[str]:
    # the names of the table, without importing sglang while tests are collected
    source = Path(__file__).parents[2] / "sglang_sparsespec" / "adapter" / "support.py"
    [table] = [
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "REFUSALS"
    ]
    assert isinstance(table, ast.Tuple)
    return [call.args[0].value for call in table.elts]  # type: ignore[attr-defined]


def test_every_refusal_is_walked() -> None:
    """The parametrised tests below read the table from its source; they must not miss a row."""
    assert _fields() == [refusal.field for refusal in _refusals()]
    assert set(REFUSED_VALUES) <= set(_fields())


# of dp attention SGLang keeps a resolved value of its own; it is tested from the command line, below
@pytest.mark.parametrize("field", [field for field in _fields() if field != "enable_dp_attention"])
def test_refusal_is_triggered(server_args: Callable[..., Any], field: str) -> None:
    """A field that SGLang renamed, or a value that slips through, would be accepted and ignored."""
    from sglang_sparsespec.adapter.support import check_supported

    args = server_args()
    check_supported(args, args.sparsespec_config)
    value = REFUSED_VALUES.get(field, True)
    assert hasattr(args, field)
    # ServerArgs is read-only once it is resolved
    object.__setattr__(args, field, value)
    with pytest.raises(ConfigError) as caught:
        check_supported(args, args.sparsespec_config)
    assert_four_parts(caught.value, "--" + field.replace("_", "-"), value)


@pytest.mark.parametrize("field", _fields())
def test_refusal_is_reached_from_the_command_line(
    server_args: Callable[..., Any], tiny_qwen3_path: Path, field: str
) -> None:
    """SGLang changes options while it resolves them: a refusal that is asked too late never speaks."""
    value = REFUSED_VALUES.get(field, True)
    if field == "speculative_draft_model_path":
        value = str(tiny_qwen3_path)
    with pytest.raises(ConfigError) as caught:
        server_args(**{field: value})
    assert_four_parts(caught.value, "--" + field.replace("_", "-"), value)


def test_adaptive_speculation_is_refused(server_args: Callable[..., Any]) -> None:
    """SGLang resets the option for all but EAGLE, with a warning: it would be accepted and ignored."""
    with pytest.raises(ConfigError):
        server_args(speculative_adaptive=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speculative_dflash_block_size", 4),
        ("speculative_draft_attention_backend", "triton"),
        ("speculative_attention_mode", "decode"),
        ("decoupled_spec_role", "drafter"),
    ],
)
def test_options_of_other_algorithms_are_refused(server_args: Callable[..., Any], field: str, value: object) -> None:
    """SGLang reads them for its own algorithms alone: they would be accepted and ignored."""
    with pytest.raises(ConfigError) as caught:
        server_args(**{field: value})
    assert_four_parts(caught.value, "--" + field.replace("_", "-"), value)


@pytest.mark.parametrize(
    ("kwargs", "thing"),
    [
        ({"page_size": 4}, "--page-size"),
        ({"page_size": 64}, "--page-size"),
        ({"attention_backend": "triton"}, "--attention-backend"),
        ({"decode_attention_backend": "triton"}, "--decode-attention-backend"),
    ],
    ids=str,
)
def test_unknown_layouts_and_backends_are_refused(
    server_args: Callable[..., Any], kwargs: dict[str, Any], thing: str
) -> None:
    """A backend whose verify nobody tested may return plausible nonsense."""
    with pytest.raises(ConfigError) as caught:
        server_args(**kwargs)
    assert_four_parts(caught.value, thing, next(iter(kwargs.values())))


@pytest.mark.parametrize(
    ("device", "backends", "thing"),
    [
        ("xpu", ("triton", "triton"), "--device"),
        ("cuda", ("torch_native", "torch_native"), "--attention-backend (--prefill-attention-backend)"),
        ("cuda", ("flashinfer", "fa4"), "--attention-backend (--decode-attention-backend)"),
        ("cuda", ("flashinfer", "triton"), "--decode-attention-backend"),
        ("cpu", ("intel_amx", "intel_amx"), "--attention-backend (--prefill-attention-backend)"),
    ],
    ids=str,
)
def test_backends_of_other_devices_are_refused(device: str, backends: tuple[str, str], thing: str) -> None:
    """The rules for devices that this machine lacks: a stub stands for ServerArgs."""
    from sglang_sparsespec.adapter.support import _check_backends

    stub: Any = SimpleNamespace(device=device, page_size=1)
    with pytest.raises(ConfigError) as caught:
        _check_backends(stub, backends)
    assert str(caught.value).startswith(f"{thing} is ")


@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
def test_backends_of_a_gpu_are_accepted(backend: str) -> None:
    """The two that the documentation names."""
    from sglang_sparsespec.adapter.support import _check_backends

    for page_size in (None, 1, 16):
        stub: Any = SimpleNamespace(device="cuda", page_size=page_size)
        _check_backends(stub, (backend, backend))


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_ranks_are_served_with_host_memory_and_without(
    server_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    """A number of ranks that is refused, or that changes what the user gave for the whole server."""
    # the resolution sets it where it is missing
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "all|all")
    assert server_args(tp_size=tp_size).sparsespec_config.host_memory_gb == 0
    args = server_args(tp_size=tp_size, sparsespec_host_memory_gb=0.1)
    assert args.sparsespec_config.host_memory_gb == 0.1
    assert server_args(tp_size=tp_size, sparsespec_host_memory_gb="auto").sparsespec_config.host_memory_gb > 0


def test_cpu_ranks_need_no_numa_node_each(server_args: Callable[..., Any]) -> None:
    """SGLang ends the schedulers of a machine with fewer nodes than ranks unless their cores are named."""
    server_args()
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ
    server_args(tp_size=2)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "all|all"


@pytest.mark.parametrize("name", ["min_budget", "recent_window", "sink"])
def test_sizes_past_the_context_are_refused(server_args: Callable[..., Any], name: str) -> None:
    """The range of the option ends at the context length, which only the model knows."""
    server_args(**{f"sparsespec_{name}": 4096})
    with pytest.raises(ConfigError) as caught:
        server_args(**{f"sparsespec_{name}": 4097})
    assert_four_parts(caught.value, f"--sparsespec-{name.replace('_', '-')}", 4097)


# Models: SGLang reads config.json alone while it resolves its arguments

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


def _model(model_type: str, architecture: str, **extra: Any) -> dict[str, Any]:
    return {**SMALL, "model_type": model_type, "architectures": [architecture], **extra}


_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_TEXT = {**SMALL, "model_type": "llama"}
_VISION = {"model_type": "clip_vision_model"}

REFUSED_MODELS = [
    pytest.param(
        _model("deepseek_v3", "DeepseekV3ForCausalLM", num_key_value_heads=4, n_routed_experts=8, **_MLA),
        "an MLA model",
        id="DeepSeek-V3",
    ),
    pytest.param(
        _model("qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "a sliding-window model",
        id="Qwen2 with windows",
    ),
    pytest.param(
        _model("gemma2", "Gemma2ForCausalLM", sliding_window=64),
        "a sliding-window model",
        id="Gemma 2",
    ),
    pytest.param(
        _model("gemma3_text", "Gemma3ForCausalLM", sliding_window=64),
        "a sliding-window model",
        id="Gemma 3",
    ),
    pytest.param(
        _model("olmo3", "Olmo3ForCausalLM", sliding_window=64),
        "a sliding-window model",
        id="OLMo 3",
    ),
    pytest.param(
        _model("cohere2", "Cohere2ForCausalLM", sliding_window=64),
        "a sliding-window model",
        id="Command R7B",
    ),
    pytest.param(_model("jamba", "JambaForCausalLM"), "a hybrid linear-attention model", id="Jamba"),
    pytest.param(_model("minimax", "MiniMaxForCausalLM"), "a hybrid linear-attention model", id="MiniMax"),
    pytest.param(
        _model("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
        "a hybrid linear-attention model",
        id="LFM2",
    ),
    pytest.param(
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": _TEXT,
            "vision_config": _VISION,
        },
        "a multimodal model",
        id="LLaVA",
    ),
    pytest.param(
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "is_encoder_decoder": True,
        },
        "an encoder-decoder model",
        id="Whisper",
    ),
    pytest.param(_model("bert", "BertModel"), "an embedding or reward model", id="BERT"),
    pytest.param(
        _model("llama", "LlamaForSequenceClassification"), "an embedding or reward model", id="Llama reward model"
    ),
]


def _write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("config", "kind"), REFUSED_MODELS)
def test_models_that_cannot_be_served_are_refused(
    server_args: Callable[..., Any], tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    """Such a model would run, and its output would not be its own: windows ignored, states not rolled back."""
    path = _write(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        server_args(model_path=path)
    assert_four_parts(caught.value, "--model-path", path)
    assert f"This is {kind}: " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "backends"),
    [
        pytest.param(_model("gpt_oss", "GptOssForCausalLM", sliding_window=64), "attention backend", id="gpt-oss"),
        pytest.param(_model("qwen3_next", "Qwen3NextForCausalLM", full_attention_interval=2), "CUDA", id="Qwen3-Next"),
        pytest.param(_model("falcon_h1", "FalconH1ForCausalLM"), "CUDA", id="Falcon-H1"),
        pytest.param(
            _model("nemotron_h", "NemotronHForCausalLM", hybrid_override_pattern="M*"), "CUDA", id="Nemotron-H"
        ),
    ],
)
def test_models_that_the_host_refuses_on_a_cpu(
    server_args: Callable[..., Any], tmp_path: Path, config: dict[str, Any], backends: str
) -> None:
    """Here SGLang speaks before us; on a GPU the stubs below stand for these kinds."""
    with pytest.raises(AssertionError, match=backends):
        server_args(model_path=_write(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(_model("llama", "LlamaForCausalLM"), id="Llama"),
        pytest.param(_model("qwen2", "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=64), id="Qwen2"),
        pytest.param(_model("qwen3", "Qwen3ForCausalLM"), id="Qwen3"),
        pytest.param(
            _model("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
            id="Qwen3-MoE",
        ),
        pytest.param(
            _model("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
            id="Mixtral",
        ),
        pytest.param(_model("mistral", "MistralForCausalLM", sliding_window=None), id="Mistral"),
    ],
)
def test_plain_decoders_are_accepted(server_args: Callable[..., Any], tmp_path: Path, config: dict[str, Any]) -> None:
    """A marker that is too broad would refuse what most people serve."""
    args = server_args(model_path=_write(tmp_path, config))
    assert args.sparsespec_config is not None


@pytest.mark.parametrize("schedule", ["unified", "auto"])
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"selection": "quest"}, "lockstep with --sparsespec-selection quest"),
        ({"selection": "oracle"}, "lockstep with --sparsespec-selection oracle"),
        ({"selection": "first-last"}, "lockstep with --sparsespec-verify-attention backend, --sparsespec-selection"),
        ({"verify_attention": "backend"}, "lockstep with --sparsespec-verify-attention backend"),
    ],
    ids=str,
)
def test_unified_needs_our_verify_and_selections_made_before(
    server_args: Callable[..., Any], options: dict[str, str], allowed: str, schedule: str
) -> None:
    """A schedule that runs as the other one without a word, or a policy that selects from half a verify."""
    with pytest.raises(ConfigError) as caught:
        server_args(sparsespec_schedule=schedule, **{f"sparsespec_{name}": value for name, value in options.items()})
    assert_four_parts(caught.value, "--sparsespec-schedule", schedule)
    assert allowed in str(caught.value)


def test_guesses_need_selections_made_before_and_rounds_in_lockstep(server_args: Callable[..., Any]) -> None:
    """An option that is accepted and ignored, or one list for tokens that each select anew."""
    for options, allowed in (
        ({"sparsespec_selection": "quest"}, "0 with --sparsespec-selection quest"),
        ({"sparsespec_schedule": "unified"}, "0 with --sparsespec-schedule unified"),
    ):
        with pytest.raises(ConfigError) as caught:
            server_args(sparsespec_ngram_assist=2, **options)
        assert_four_parts(caught.value, "--sparsespec-ngram-assist", 2)
        assert allowed in str(caught.value)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOSSY_MOE = {"allow_lossy": True, "verify_sparsity": ["moe"]}
LOSSY_FFN = {"allow_lossy": True, "verify_sparsity": ["ffn"]}


@pytest.mark.parametrize(
    ("name", "value", "model", "options", "allowed"),
    [
        ("draft_experts", 1, {}, {}, "0 with a dense model"),
        ("draft_experts", 3, MOE, {}, "0 to 2 for this model"),
        ("draft_experts", 1, MOE, {"schedule": "unified"}, "0 with --sparsespec-schedule unified"),
        ("draft_ffn_threshold", 0.5, {"hidden_act": "gelu"}, {}, "0 with the activation gelu"),
        ("draft_ffn_threshold", 0.5, {}, {"schedule": "auto"}, "0 with --sparsespec-schedule auto"),
        ("verify_experts", 1, {}, LOSSY_MOE, "0 with a dense model"),
        ("verify_experts", 3, MOE, LOSSY_MOE, "0 to 2 for this model"),
        ("verify_ffn_threshold", 0.5, {"hidden_act": "gelu"}, LOSSY_FFN, "0 with the activation gelu"),
    ],
    ids=str,
)
def test_there_is_something_to_leave_out(
    server_args: Callable[..., Any],
    tmp_path: Path,
    name: str,
    value: float,
    model: dict[str, Any],
    options: dict[str, Any],
    allowed: str,
) -> None:
    """An option that finds nothing to act on, or forwards in which a verify would lose channels too."""
    kind = ("qwen3_moe", "Qwen3MoeForCausalLM") if "num_experts" in model else ("qwen3", "Qwen3ForCausalLM")
    path = _write(tmp_path, _model(*kind, **model))
    given = {f"sparsespec_{key}": choice for key, choice in {name: value, **options}.items()}
    with pytest.raises(ConfigError) as caught:
        server_args(model_path=path, **given)
    assert_four_parts(caught.value, "--sparsespec-" + name.replace("_", "-"), value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(("thresholds", "allowed"), [([0.1, 0.2], "0 to 1 for this model"), ([0.1], "")])
def test_thresholds_leave_an_expert(
    server_args: Callable[..., Any], tmp_path: Path, thresholds: list[float], allowed: str
) -> None:
    """A rule that may skip all experts of a token would be cut somewhere in a kernel."""
    path = _write(tmp_path, _model("qwen3_moe", "Qwen3MoeForCausalLM", **MOE))
    given = {f"sparsespec_{key}": value for key, value in LOSSY_MOE.items()}
    if not allowed:
        args = server_args(model_path=path, **given, sparsespec_verify_expert_thresholds=thresholds)
        assert args.sparsespec_config.verify_expert_thresholds == (0.1,)
        return
    with pytest.raises(ConfigError, match=allowed):
        server_args(model_path=path, **given, sparsespec_verify_expert_thresholds=thresholds)


@pytest.mark.parametrize("num_experts", [1, 2])
def test_fewer_experts_of_a_mixture_are_served(
    server_args: Callable[..., Any], tmp_path: Path, num_experts: int
) -> None:
    """As many as the model has is no contradiction either."""
    path = _write(tmp_path, _model("qwen3_moe", "Qwen3MoeForCausalLM", **MOE))
    assert (
        server_args(model_path=path, sparsespec_draft_experts=num_experts).sparsespec_config.draft_experts
        == num_experts
    )


@pytest.mark.parametrize("selection", ["pillar", "window", "random"])
def test_unified_takes_our_verify_on_a_cpu_as_well(server_args: Callable[..., Any], selection: str) -> None:
    """There `auto` means the backend otherwise."""
    args = server_args(sparsespec_schedule="unified", sparsespec_selection=selection)
    assert args.sparsespec_config.verify_attention == "fused"


def _stub_model(**changes: Any) -> Any:
    from sglang.srt.configs.model_config import AttentionArch

    text = SimpleNamespace(**changes.pop("text", {}))
    fields = {
        "is_generation": True,
        "is_encoder_decoder": False,
        "is_multimodal": False,
        "attention_arch": AttentionArch.MHA,
        "is_hybrid_swa": False,
        "quantization": None,
        "hf_text_config": text,
        "model_path": "stub",
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"is_generation": False}, "an embedding or reward model"),
        ({"is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"is_multimodal": True}, "a multimodal model"),
        ({"is_hybrid_swa": True}, "a sliding-window model"),
        ({"text": {"use_sliding_window": True}}, "a sliding-window model"),
        ({"text": {"layer_types": ["full_attention", "sliding_attention"]}}, "a sliding-window model"),
        ({"text": {"layer_types": ["full_attention", "conv"]}}, "a hybrid linear-attention model"),
        ({"quantization": "awq"}, "a model quantised by awq"),
        ({"text": {"mamba_d_ssm": 64}}, "a hybrid linear-attention model"),
        ({"text": {"linear_attn_config": {}}}, "a hybrid linear-attention model"),
        ({"text": {"full_attention_interval": 4}}, "a hybrid linear-attention model"),
        ({"text": {"layers_block_type": ["mamba"]}}, "a hybrid linear-attention model"),
        ({"text": {"hybrid_override_pattern": "M*"}}, "a hybrid linear-attention model"),
        ({"text": {"rope_scaling": {"mrope_section": [1, 1, 2]}}}, "a model with multimodal rotary embedding"),
    ],
    ids=str,
)
def test_each_kind_of_model_has_its_reason(changes: dict[str, Any], kind: str) -> None:
    """Each rule alone: in real configurations several hold at once and hide one that does not work."""
    from sglang_sparsespec.adapter.support import _check_model, _model_problems

    _check_model(_stub_model())
    model = _stub_model(**changes)
    assert [found for found, _ in _model_problems(model)] == [kind]
    with pytest.raises(ConfigError) as caught:
        _check_model(model)
    assert_four_parts(caught.value, "--model-path", "stub")
