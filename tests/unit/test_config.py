"""SparseSpecConfig: every bound from both sides, and errors that say what to do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from sglang_sparsespec import config as cfg
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError, SparseSpecError
from sglang_sparsespec.selection import POLICIES

VALID: list[tuple[str, Any]] = [
    ("num_steps", 1),
    ("num_steps", 64),
    ("budget_ratio", 1e-9),
    ("budget_ratio", 1.0),
    ("budget_ratio", 1),
    ("min_budget", 1),
    ("min_budget", 10**6),
    ("recent_window", 0),
    ("sink", 0),
    ("score_pooling", 0),
    ("score_pooling", 1024),
    ("host_memory_gb", 0),
    ("host_memory_gb", None),
    ("host_memory_gb", 0.5),
    ("host_memory_gb", 2000),
    ("adaptive", True),
    ("adaptive", False),
    ("adaptive", None),
    ("plain_steps", 1),
    ("plain_steps", 16),
    ("profile", None),
    ("profile", "rounds.json"),
    *(("selection", choice) for choice in cfg.SELECTIONS),
    *(("granularity", choice) for choice in cfg.GRANULARITIES),
    *(("sharing", choice) for choice in cfg.SHARINGS),
    *(("draft_sampling", choice) for choice in cfg.DRAFT_SAMPLINGS),
    *(("verify_attention", choice) for choice in cfg.VERIFY_ATTENTIONS),
    *(("schedule", choice) for choice in cfg.SCHEDULES),
    ("ngram_assist", 0),
    ("ngram_assist", 8),
    ("draft_ffn_threshold", 0),
    ("draft_ffn_threshold", 1e9),
    ("draft_experts", 0),
    ("draft_experts", 64),
    ("verify_sparsity", ()),
    ("verify_sparsity", cfg.VERIFY_SPARSITIES),
    ("allow_lossy", False),
    ("allow_lossy", True),
    ("verify_kv_ratio", 0),
    ("verify_kv_ratio", 1.0),
    ("verify_dense_below", 0),
    ("verify_dense_below", 10**6),
    ("verify_block_size", 1),
    ("verify_block_size", 1024),
    ("verify_anchors", "anchors.json"),
    ("verify_ffn_threshold", 1e9),
    ("verify_experts", 64),
    ("verify_expert_thresholds", (0.2, 0.4)),
    ("dense_verify_every", 0),
    ("dense_verify_every", 1),
]
# what an option that is not at its default needs beside it
LOSSY = {"verify_sparsity": ("attention",), "allow_lossy": True}
ATTENTION_FIELDS = ("verify_kv_ratio", "verify_dense_below", "verify_block_size", "verify_anchors")
FFN = {"verify_sparsity": ("ffn",), "allow_lossy": True, "verify_ffn_threshold": 0.1}
MOE = {"verify_sparsity": ("moe",), "allow_lossy": True, "verify_experts": 1}
# two rules for experts exclude each other
MOE_BY_WEIGHT = {"verify_sparsity": ("moe",), "allow_lossy": True, "verify_expert_thresholds": (0.1,)}
LOSSY_FIELDS = (
    *ATTENTION_FIELDS,
    "verify_ffn_threshold",
    "verify_experts",
    "verify_expert_thresholds",
    "dense_verify_every",
)
NEEDS: dict[str, dict[str, Any]] = {
    "verify_sparsity": {**FFN, **MOE},  # a threshold and a number of experts
    "allow_lossy": {"verify_sparsity": ("attention",)},
    **dict.fromkeys((*ATTENTION_FIELDS, "dense_verify_every"), LOSSY),
    "verify_ffn_threshold": FFN,
    "verify_experts": MOE,
    "verify_expert_thresholds": MOE_BY_WEIGHT,
}

# field, value, the option as the user writes it
INVALID: list[tuple[str, Any, str]] = [
    ("num_steps", 0, "--speculative-num-steps"),
    ("num_steps", -1, "--speculative-num-steps"),
    ("num_steps", 65, "--speculative-num-steps"),
    ("num_steps", 2.0, "--speculative-num-steps"),
    ("num_steps", True, "--speculative-num-steps"),
    ("num_steps", "8", "--speculative-num-steps"),
    ("num_steps", None, "--speculative-num-steps"),
    ("adaptive", 1, "--sparsespec-adaptive"),
    ("adaptive", "on", "--sparsespec-adaptive"),
    ("profile", "", "--sparsespec-profile"),
    ("plain_steps", 0, "--sparsespec-plain-steps"),
    ("plain_steps", 17, "--sparsespec-plain-steps"),
    ("plain_steps", None, "--sparsespec-plain-steps"),
    ("budget_ratio", 0, "--sparsespec-budget-ratio"),
    ("budget_ratio", -0.1, "--sparsespec-budget-ratio"),
    ("budget_ratio", 1.0001, "--sparsespec-budget-ratio"),
    ("budget_ratio", float("nan"), "--sparsespec-budget-ratio"),
    ("budget_ratio", float("inf"), "--sparsespec-budget-ratio"),
    ("min_budget", 0, "--sparsespec-min-budget"),
    ("min_budget", 192.0, "--sparsespec-min-budget"),
    ("min_budget", "192", "--sparsespec-min-budget"),
    ("recent_window", -1, "--sparsespec-recent-window"),
    ("recent_window", 0.5, "--sparsespec-recent-window"),
    ("sink", -1, "--sparsespec-sink"),
    ("sink", True, "--sparsespec-sink"),
    ("score_pooling", -1, "--sparsespec-score-pooling"),
    ("score_pooling", 1025, "--sparsespec-score-pooling"),
    ("score_pooling", 1.5, "--sparsespec-score-pooling"),
    ("selection", "Pillar", "--sparsespec-selection"),
    ("selection", "", "--sparsespec-selection"),
    ("granularity", "2", "--sparsespec-granularity"),
    ("granularity", 4, "--sparsespec-granularity"),
    ("sharing", "none", "--sparsespec-sharing"),
    ("draft_sampling", None, "--sparsespec-draft-sampling"),
    ("verify_attention", "own", "--sparsespec-verify-attention"),
    ("schedule", "staggered", "--sparsespec-schedule"),
    ("ngram_assist", -1, "--sparsespec-ngram-assist"),
    ("ngram_assist", 9, "--sparsespec-ngram-assist"),
    ("ngram_assist", True, "--sparsespec-ngram-assist"),
    ("draft_ffn_threshold", -0.01, "--sparsespec-draft-ffn-threshold"),
    ("draft_ffn_threshold", float("nan"), "--sparsespec-draft-ffn-threshold"),
    ("draft_ffn_threshold", float("inf"), "--sparsespec-draft-ffn-threshold"),
    ("draft_ffn_threshold", "0.1", "--sparsespec-draft-ffn-threshold"),
    ("draft_ffn_threshold", True, "--sparsespec-draft-ffn-threshold"),
    ("draft_experts", -1, "--sparsespec-draft-experts"),
    ("draft_experts", 0.5, "--sparsespec-draft-experts"),
    ("draft_experts", True, "--sparsespec-draft-experts"),
    ("verify_sparsity", "attention", "--sparsespec-verify-sparsity"),
    ("verify_sparsity", ("heads",), "--sparsespec-verify-sparsity"),
    ("verify_sparsity", ("attention", "attention"), "--sparsespec-verify-sparsity"),
    ("verify_sparsity", None, "--sparsespec-verify-sparsity"),
    ("allow_lossy", 1, "--sparsespec-allow-lossy"),
    ("allow_lossy", None, "--sparsespec-allow-lossy"),
    ("verify_kv_ratio", -0.1, "--sparsespec-verify-kv-ratio"),
    ("verify_kv_ratio", 1.01, "--sparsespec-verify-kv-ratio"),
    ("verify_kv_ratio", float("nan"), "--sparsespec-verify-kv-ratio"),
    ("verify_kv_ratio", "0.5", "--sparsespec-verify-kv-ratio"),
    ("verify_dense_below", -1, "--sparsespec-verify-dense-below"),
    ("verify_dense_below", 0.5, "--sparsespec-verify-dense-below"),
    ("verify_block_size", 0, "--sparsespec-verify-block-size"),
    ("verify_block_size", 1025, "--sparsespec-verify-block-size"),
    ("verify_anchors", 3, "--sparsespec-verify-anchors"),
    ("verify_anchors", "", "--sparsespec-verify-anchors"),
    ("verify_ffn_threshold", -0.01, "--sparsespec-verify-ffn-threshold"),
    ("verify_ffn_threshold", float("inf"), "--sparsespec-verify-ffn-threshold"),
    ("verify_ffn_threshold", "0.1", "--sparsespec-verify-ffn-threshold"),
    ("verify_experts", -1, "--sparsespec-verify-experts"),
    ("verify_experts", 1.5, "--sparsespec-verify-experts"),
    ("verify_expert_thresholds", 0.1, "--sparsespec-verify-expert-thresholds"),
    ("verify_expert_thresholds", (0.1, -0.1), "--sparsespec-verify-expert-thresholds"),
    ("verify_expert_thresholds", ("0.1",), "--sparsespec-verify-expert-thresholds"),
    ("dense_verify_every", -1, "--sparsespec-dense-verify-every"),
    ("dense_verify_every", True, "--sparsespec-dense-verify-every"),
    ("host_memory_gb", -0.1, "--sparsespec-host-memory-gb"),
    ("host_memory_gb", float("nan"), "--sparsespec-host-memory-gb"),
    ("host_memory_gb", float("inf"), "--sparsespec-host-memory-gb"),
    ("host_memory_gb", "8", "--sparsespec-host-memory-gb"),
    ("host_memory_gb", True, "--sparsespec-host-memory-gb"),
]


def assert_four_parts(error: BaseException, thing: str, value: object) -> None:
    """The thing, what it was, what is allowed, what to do."""
    message = str(error)
    head = f"{thing} is {value!r}; it must be "
    assert message.startswith(head), message
    allowed, _, advice = message.removeprefix(head).partition(". ")
    assert allowed, message
    assert advice.endswith("."), message


@pytest.mark.parametrize(("field", "value"), VALID, ids=str)
def test_config_accepts_the_ends_of_every_range(field: str, value: Any) -> None:
    """A bound that is off by one would refuse what the documentation offers."""
    needs = {} if value == getattr(SparseSpecConfig(), field) else NEEDS.get(field, {})
    assert getattr(SparseSpecConfig(**{**needs, field: value}), field) == value


@pytest.mark.parametrize(("field", "value", "option"), INVALID, ids=str)
def test_config_refuses_what_lies_outside(field: str, value: Any, option: str) -> None:
    """Without the check a bad value would surface as a crash inside a scheduler, or as silently poor drafts."""
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(**{**NEEDS.get(field, {}), field: value})
    assert_four_parts(caught.value, option, value)


@pytest.mark.parametrize("value", ["0.05", None, True], ids=repr)
def test_config_refuses_a_budget_ratio_of_the_wrong_type(value: Any) -> None:
    """From Engine(...) any type can arrive; a bare TypeError names neither the option nor its range."""
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(budget_ratio=value)
    assert_four_parts(caught.value, "--sparsespec-budget-ratio", value)


def test_every_field_is_tried_on_both_sides() -> None:
    """A new option without a bounds test would go unnoticed."""
    fields = {field.name for field in dataclasses.fields(SparseSpecConfig)}
    assert {name for name, _ in VALID} == fields
    assert {name for name, _, _ in INVALID} == fields


def test_config_refuses_a_budget_below_one_block() -> None:
    """A budget of less than a block selects nothing at all."""
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(min_budget=15, granularity="16")
    assert_four_parts(caught.value, "--sparsespec-min-budget", 15)
    assert SparseSpecConfig(min_budget=16, granularity="16").block_size == 16
    assert SparseSpecConfig(min_budget=1, granularity="token").block_size == 1


def test_config_is_a_value() -> None:
    """It travels to the schedulers by pickle; a mutable or an unequal copy would let ranks disagree."""
    config = SparseSpecConfig(sink=3, granularity="4")
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(SparseSpecConfig(sink=3, granularity="4"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sink = 4  # type: ignore[misc]


def test_num_draft_tokens_counts_the_current_token() -> None:
    """The verify is one token wider than the draft is long."""
    assert SparseSpecConfig(num_steps=5).num_draft_tokens == 6


def test_selection_choices_are_the_policies() -> None:
    """A policy that is registered but no choice cannot be asked for; a choice without a policy fails in the worker."""
    assert set(cfg.SELECTIONS) == set(POLICIES)


def test_config_error_is_a_value_error() -> None:
    """SGLang reports ValueErrors of argument resolution to the user; another base would end in a traceback."""
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SparseSpecError)


@pytest.mark.parametrize(
    ("num_steps", "choices"),
    [
        (1, (0, 1)),
        (2, (0, 1, 2)),
        (3, (0, 1, 2, 3)),
        (5, (0, 1, 2, 4, 5)),
        (8, (0, 1, 2, 4, 8)),
        (64, (0, 1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_step_choices_are_few_and_end_at_k(num_steps: int, choices: tuple[int, ...]) -> None:
    """Each choice is a graph per batch size; without 0 there is no plain decoding, without k no fixed one."""
    assert SparseSpecConfig(num_steps=num_steps, adaptive=True).step_choices == choices
    assert SparseSpecConfig(num_steps=num_steps).step_choices == (num_steps,)


def test_a_lossy_mode_needs_consent() -> None:
    """The whole point: nobody gets another output than the model's by one option."""
    for mode in cfg.VERIFY_SPARSITIES:
        with pytest.raises(ConfigError) as caught:
            SparseSpecConfig(verify_sparsity=(mode,))
        assert_four_parts(caught.value, "--sparsespec-verify-sparsity", mode)
        assert "add --sparsespec-allow-lossy" in str(caught.value)


def test_consent_without_a_lossy_mode_is_refused() -> None:
    """It would do nothing now, and stay in a command line to which somebody adds a mode later."""
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(allow_lossy=True)
    assert_four_parts(caught.value, "--sparsespec-allow-lossy", True)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, v in VALID if f in LOSSY_FIELDS], ids=str)
def test_parameters_of_a_mode_that_is_off_are_refused(field: str, value: Any) -> None:
    """Accepted and ignored, they would make a lossless server look like a sparse one in a measurement."""
    if value == getattr(SparseSpecConfig(), field):
        return
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(**{field: value})
    assert_four_parts(caught.value, f"--sparsespec-{field.replace('_', '-')}", value)
    assert "left out without --sparsespec-verify-sparsity" in str(caught.value)


def test_unified_rounds_are_refused_with_a_sparse_verify() -> None:
    """Mixed forwards verify some requests alone, which has not been tested with lists."""
    for schedule in ("unified", "auto"):
        with pytest.raises(ConfigError) as caught:
            SparseSpecConfig(schedule=schedule, **LOSSY)
        assert_four_parts(caught.value, "--sparsespec-schedule", schedule)


def test_every_nth_round_is_dense() -> None:
    """Off by one, `--sparsespec-dense-verify-every 1` would have sparse rounds; a lossless server never has."""
    rounds = range(1, 7)

    def sparse(**options: Any) -> list[int]:
        config = SparseSpecConfig(**options)
        return [ct for ct in rounds if config.is_sparse_round(ct)]

    assert sparse() == []
    assert sparse(**LOSSY) == list(rounds)
    assert sparse(**LOSSY, dense_verify_every=3) == [1, 2, 4, 5]
    assert sparse(**LOSSY, dense_verify_every=1) == []


def test_what_reads_everything_is_verified_densely() -> None:
    """A verify that chooses all blocks costs its scoring; one that drops channels loses them in any context."""
    assert SparseSpecConfig(**LOSSY, verify_dense_below=512).dense_up_to == 512
    assert SparseSpecConfig(**LOSSY, verify_dense_below=512).has_dense_verify
    assert SparseSpecConfig(**FFN).dense_up_to == -1
    assert not SparseSpecConfig(**FFN).has_dense_verify
    assert SparseSpecConfig(**FFN, dense_verify_every=2).has_dense_verify
    assert not SparseSpecConfig(**LOSSY, verify_dense_below=0).has_dense_verify
    assert SparseSpecConfig().has_dense_verify


def test_loss_is_described_with_its_parameters() -> None:
    """A label that says less than what was set; and none at all on a server that is lossless."""
    assert SparseSpecConfig().describe_loss() == {}
    described = SparseSpecConfig(**LOSSY, verify_kv_ratio=0.5).describe_loss()
    assert described["verify_sparsity"] == ["attention"]
    assert described["verify_kv_ratio"] == 0.5
    assert set(described) == {"verify_sparsity", *ATTENTION_FIELDS, "dense_verify_every"}
    assert SparseSpecConfig(**FFN).describe_loss()["verify_ffn_threshold"] == 0.1


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"verify_sparsity": ("ffn",)}, "--sparsespec-verify-ffn-threshold"),
        ({"verify_sparsity": ("moe",)}, "--sparsespec-verify-experts"),
        ({**MOE, "verify_expert_thresholds": (0.1,)}, "--sparsespec-verify-experts"),
    ],
)
def test_a_mode_says_what_it_leaves_out(options: dict[str, Any], option: str) -> None:
    """A server under a lossy label that leaves out nothing, or by a rule that nobody can tell."""
    with pytest.raises(ConfigError) as caught:
        SparseSpecConfig(**{"allow_lossy": True, **options})
    assert str(caught.value).startswith(option + " is ")
