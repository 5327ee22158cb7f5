"""SPARSESPEC's options in SGLang's argument handling: command line, Engine keywords, pickles, defaults."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec import config as cfg
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import write_anchors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

# every option, a value that is not its default
LOSSY_VALUES: dict[str, Any] = {
    "verify_sparsity": ("attention", "ffn"),
    "allow_lossy": True,
    "verify_kv_ratio": 0.5,
    "verify_dense_below": 2048,
    "verify_block_size": 32,
    "verify_anchors": "no-such-anchors.json",
    "verify_ffn_threshold": 0.05,
    "verify_experts": 1,
    "verify_expert_thresholds": (0.1,),
    "dense_verify_every": 4,
}
OTHER_VALUES: dict[str, Any] = {
    "budget_ratio": 0.1,
    "min_budget": 64,
    "recent_window": 7,
    "sink": 3,
    "selection": "window",
    "score_pooling": 2,
    "granularity": "4",
    "sharing": "head",
    "draft_sampling": "greedy",
    "verify_attention": "fused",
    "adaptive": True,
    "plain_steps": 2,
    "profile": "no-such-profile.json",
    "schedule": "lockstep",
    "ngram_assist": 3,
    "draft_ffn_threshold": 0.05,
    "draft_experts": 1,
    **LOSSY_VALUES,
    "host_memory_gb": 0.25,
}


def on_cpu(**options: Any) -> SparseSpecConfig:
    """As a CPU server resolves them: `auto` and None are not kept."""
    return SparseSpecConfig(**{"verify_attention": "backend", "host_memory_gb": 0.0, "adaptive": False, **options})


@pytest.fixture(scope="module")
def parser(_registered: None) -> argparse.ArgumentParser:
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs

    parser = argparse.ArgumentParser()
    SparseSpecServerArgs.add_cli_args(parser)
    return parser


def test_every_config_field_is_an_option(parser: argparse.ArgumentParser) -> None:
    """A field without an option cannot be set; an option without a field is accepted and ignored."""
    options = {
        action.dest.removeprefix("sparsespec_"): action for action in parser._actions if "sparsespec" in action.dest
    }
    fields = {field.name for field in dataclasses.fields(SparseSpecConfig)} - {"num_steps"}
    assert set(options) == fields == set(OTHER_VALUES)
    defaults = SparseSpecConfig()
    for name, action in options.items():
        assert action.default == getattr(defaults, name), name
        no = ["--no-sparsespec-adaptive"] if name == "adaptive" else []
        assert action.option_strings == [f"--sparsespec-{name.replace('_', '-')}", *no]
        assert action.help is not None
        assert str(action.default) in action.help, f"{name}: the default stands in the help"


def test_help_lists_the_options_and_their_choices(parser: argparse.ArgumentParser) -> None:
    """What --help does not show, nobody finds."""
    text = parser.format_help()
    for name in OTHER_VALUES:
        assert f"--sparsespec-{name.replace('_', '-')}" in text
    for choices in (cfg.SELECTIONS, cfg.GRANULARITIES, cfg.SHARINGS, cfg.DRAFT_SAMPLINGS, cfg.SCHEDULES):
        assert "{" + ",".join(choices) + "}" in text
    assert "sparsespec-config" not in text


def test_prepare_server_args_builds_ours(tiny_qwen3_path: Any) -> None:
    """`launch_server` bound the name ServerArgs before the plugin was loaded."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs

    command = ["--model-path", str(tiny_qwen3_path), "--device", "cpu", "--speculative-algorithm", "SPARSESPEC"]
    args = prepare_server_args([*command, "--sparsespec-budget-ratio", "0.25", "--sparsespec-granularity", "4"])
    assert isinstance(args, SparseSpecServerArgs)
    assert args.sparsespec_config == on_cpu(budget_ratio=0.25, granularity="4")


def test_the_command_line_takes_lossy_options(tiny_qwen3_path: Any) -> None:
    """A list option that argparse hands over as one string, or as a list that no config equals."""
    from sglang.srt.server_args import prepare_server_args

    command = ["--model-path", str(tiny_qwen3_path), "--device", "cpu", "--speculative-algorithm", "SPARSESPEC"]
    args = prepare_server_args([*command, "--sparsespec-allow-lossy", "--sparsespec-verify-sparsity", "attention"])
    # only our own verify leaves anything out
    expected = on_cpu(allow_lossy=True, verify_sparsity=("attention",), verify_attention="fused")
    assert args.sparsespec_config == expected
    assert pickle.loads(pickle.dumps(args)).sparsespec_config == expected


def test_engine_takes_the_options_as_keywords() -> None:
    """Engine holds the class as an attribute from its own import."""
    from sglang.srt.entrypoints.engine import Engine

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs, install

    install()
    assert Engine.server_args_class is SparseSpecServerArgs


def test_defaults_resolve_to_the_default_config(server_args: Callable[..., Any]) -> None:
    """SGLang sizes its KV reserve from these fields; a stale value there would let a verify overrun its pages."""
    args = server_args()
    assert args.sparsespec_config == on_cpu()
    assert (args.speculative_num_steps, args.speculative_num_draft_tokens, args.speculative_eagle_topk) == (8, 9, 1)
    assert args.max_running_requests == 128
    assert args.attention_backend == "torch_native"


def anchors_of(server_args: Callable[..., Any], path: Path, **changes: Any) -> str:
    """An anchors file of the served model, with blocks of 32."""
    model = server_args().get_model_config().hf_config.to_dict()
    write_anchors(path / "anchors.json", model={**model, **changes}, block_size=32, anchors=[0, 2])
    return str(path / "anchors.json")


def test_every_option_reaches_the_config(server_args: Callable[..., Any], tmp_path: Path) -> None:
    """An option that is parsed and dropped would be the worst kind of silence."""
    # a dense model has no experts; test_support.py leaves out those of a mixture
    no_experts = {"draft_experts": 0, "verify_experts": 0, "verify_expert_thresholds": ()}
    written = {"verify_anchors": anchors_of(server_args, tmp_path), **no_experts}
    # not all of them can be set together
    for left_out in (("host_memory_gb", "plain_steps"), LOSSY_VALUES):
        values = {name: written.get(name, value) for name, value in OTHER_VALUES.items() if name not in left_out}
        args = server_args(speculative_num_steps=3, **{f"sparsespec_{k}": v for k, v in values.items()})
        assert args.sparsespec_config == SparseSpecConfig(num_steps=3, **{"host_memory_gb": 0.0, **values})
    assert args.speculative_num_draft_tokens == 4


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("disable_overlap", [False, True], ids=["overlap", "no overlap"])
def test_what_is_served_is_accepted(server_args: Callable[..., Any], page_size: int, disable_overlap: bool) -> None:
    """A refusal that is too eager would shut out what the documentation offers."""
    args = server_args(page_size=page_size, disable_overlap_schedule=disable_overlap, max_running_requests=17)
    assert (args.page_size, args.max_running_requests) == (page_size, 17)
    assert args.disable_overlap_schedule is disable_overlap


def test_offloading_admits_more_unless_told_otherwise(server_args: Callable[..., Any]) -> None:
    """Without offloading nothing may change; with it, cautious admission would leave the pool half empty."""
    assert server_args().schedule_conservativeness == 1.0
    assert server_args(sparsespec_host_memory_gb=0.1).schedule_conservativeness == 0.1
    args = server_args(sparsespec_host_memory_gb=0.1, schedule_conservativeness=0.7)
    assert args.schedule_conservativeness == 0.7
    # SGLang's own default, given on purpose
    args = server_args(sparsespec_host_memory_gb=0.1, schedule_conservativeness=1.0)
    assert args.schedule_conservativeness == 1.0
    # a server without the algorithm is SGLang's own
    assert server_args(speculative_algorithm=None).schedule_conservativeness == 1.0


def test_host_memory_beyond_the_machine_is_refused(server_args: Callable[..., Any]) -> None:
    """Pinned memory cannot be swapped out: the machine would hang instead of the start failing."""
    with pytest.raises(ConfigError, match=r"^--sparsespec-host-memory-gb is 1000000; it must be at most \d+\.\d, 80% "):
        server_args(sparsespec_host_memory_gb=1_000_000)


def test_given_num_draft_tokens_must_fit(server_args: Callable[..., Any]) -> None:
    """The verify is k + 1 wide; another width is a contradiction, not a preference."""
    assert server_args(speculative_num_draft_tokens=9).speculative_num_draft_tokens == 9
    with pytest.raises(ConfigError, match=r"^--speculative-num-draft-tokens is 5; it must be 9 "):
        server_args(speculative_num_draft_tokens=5)


@pytest.mark.parametrize("num_steps", [0, -1, 65])
def test_num_steps_out_of_range_is_refused(server_args: Callable[..., Any], num_steps: int) -> None:
    """0 is falsy: `or` would read it as the default."""
    with pytest.raises(ConfigError, match=rf"^--speculative-num-steps is {num_steps}; it must be "):
        server_args(speculative_num_steps=num_steps)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))], ids=["copy", "pickle"]
)
def test_server_args_travel_with_their_config(server_args: Callable[..., Any], copier: Callable[[Any], Any]) -> None:
    """Schedulers get a pickle; one that resolved afresh, or lost the config, would draft otherwise than it was told."""
    args = server_args(sparsespec_sink=3, speculative_num_steps=5)
    travelled = copier(args)
    assert type(travelled) is type(args)
    assert travelled.sparsespec_config == args.sparsespec_config == on_cpu(sink=3, num_steps=5)
    assert travelled.speculative_num_draft_tokens == 6


def test_server_info_shows_the_config(server_args: Callable[..., Any]) -> None:
    """/server_info serialises the dataclass; the validated values must be among its fields."""
    shown = dataclasses.asdict(server_args(sparsespec_sink=3))
    assert shown["sparsespec_config"]["sink"] == 3
    assert shown["sparsespec_sink"] == 3


@pytest.mark.parametrize("name", sorted(set(OTHER_VALUES) - {"schedule"}))
def test_stray_options_are_refused(server_args: Callable[..., Any], name: str) -> None:
    """Without the algorithm the option would have no effect, and nobody would know."""
    kwargs: dict[str, Any] = {"speculative_algorithm": None, f"sparsespec_{name}": OTHER_VALUES[name]}
    with pytest.raises(ConfigError) as caught:
        server_args(**kwargs)
    option = f"--sparsespec-{name.replace('_', '-')}"
    assert str(caught.value).startswith(f"{option} is {OTHER_VALUES[name]!r}; it must be left out without ")
    assert str(caught.value).endswith("Add --speculative-algorithm SPARSESPEC, or drop the option.")


def test_without_the_algorithm_there_is_no_config(server_args: Callable[..., Any]) -> None:
    """The plugin must not change how an ordinary server resolves."""
    args = server_args(speculative_algorithm=None)
    assert args.sparsespec_config is None
    assert args.speculative_num_steps is None
    assert args.max_running_requests is None


def test_stock_server_args_are_refused_under_the_algorithm(server_args: Callable[..., Any]) -> None:
    """A program that bound ServerArgs before plugins were loaded would serve without any of our options."""
    from sglang.srt.server_args import ServerArgs

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs, resolve

    stock = SparseSpecServerArgs.__mro__[1]
    assert ServerArgs is not stock
    args = server_args(speculative_algorithm=None)
    plain = object.__new__(stock)
    plain.__dict__.update(args.__dict__)
    with pytest.raises(ConfigError, match=r"^ServerArgs is 'ServerArgs'; it must be the class that "):
        resolve(plain)


@pytest.mark.parametrize(
    ("device", "selection", "expected"),
    [
        ("cuda", "pillar", "fused"),
        ("cuda", "window", "fused"),
        ("cuda", "first-last", "backend"),
        ("cpu", "pillar", "backend"),
    ],
)
def test_verify_attention_is_chosen_by_device_and_policy(device: str, selection: str, expected: str) -> None:
    """A GPU server would run its rounds eagerly, or one with another rule of capture would not start."""
    from sglang_sparsespec.adapter.server_args import choose_verify_attention

    asked = SparseSpecConfig(selection=selection, verify_attention="auto")
    assert choose_verify_attention(asked, device).verify_attention == expected
    given = SparseSpecConfig(selection=selection, verify_attention="backend")
    assert choose_verify_attention(given, device) == given


LOSSY = {"sparsespec_allow_lossy": True, "sparsespec_verify_sparsity": ["attention"]}


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"sparsespec_verify_attention": "backend"}, "left out with --sparsespec-verify-attention backend"),
        ({"sparsespec_selection": "first-last"}, "--sparsespec-selection first-last"),
    ],
    ids=str,
)
def test_only_our_own_verify_is_sparse(server_args: Callable[..., Any], options: dict[str, str], allowed: str) -> None:
    """The user's backend would verify densely under a lossy label."""
    with pytest.raises(
        ConfigError, match=r"^--sparsespec-verify-sparsity is 'attention'; it must be left out"
    ) as caught:
        server_args(**LOSSY, **options)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tp_size", 2),
        ("sparsespec_host_memory_gb", 0.1),
        ("sparsespec_selection", "quest"),
    ],
)
def test_what_was_not_tested_with_a_sparse_verify_is_refused(
    server_args: Callable[..., Any], option: str, value: Any
) -> None:
    """Lossy and wrong look alike."""
    server_args(**{option: value})
    with pytest.raises(
        ConfigError, match=r"with --sparsespec-verify-sparsity\. The two have not been tested"
    ) as caught:
        server_args(**LOSSY, **{option: value})
    assert str(caught.value).startswith(f"--{option.replace('_', '-')} is {value!r}; ")


@pytest.mark.parametrize(("option", "value"), [("grpc_port", 50051), ("smg_grpc_mode", True)])
def test_ways_to_the_client_without_the_label_are_refused(
    server_args: Callable[..., Any], option: str, value: Any
) -> None:
    """Answers over gRPC have neither header nor meta_info."""
    server_args(**{option: value})
    with pytest.raises(ConfigError, match=r"left out with --sparsespec-verify-sparsity\. Its answers would not say"):
        server_args(**LOSSY, **{option: value})


def test_the_rust_server_is_refused(server_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers instead of the process in which the label is."""
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(ConfigError, match=r"^SGLANG_RUST_SERVER is True; it must be left out with"):
        server_args(**LOSSY)


def test_anchors_of_another_model_or_block_size_are_refused(server_args: Callable[..., Any], tmp_path: Path) -> None:
    """Another model's layers would choose for this one's, without a word."""
    path = anchors_of(server_args, tmp_path)
    server_args(**LOSSY, sparsespec_verify_anchors=path, sparsespec_verify_block_size=32)
    with pytest.raises(
        ConfigError, match=r"^--sparsespec-verify-anchors \(its block_size\) is 32; it must be the server"
    ):
        server_args(**LOSSY, sparsespec_verify_anchors=path)
    path = anchors_of(server_args, tmp_path, hidden_size=7)
    with pytest.raises(
        ConfigError, match=r"^--sparsespec-verify-anchors \(its hidden_size\) is 7; it must be the served"
    ):
        server_args(**LOSSY, sparsespec_verify_anchors=path, sparsespec_verify_block_size=32)
    with pytest.raises(ConfigError, match=r"^--sparsespec-verify-anchors \(its file\) is .no-such"):
        server_args(**LOSSY, sparsespec_verify_anchors="no-such-anchors.json")
