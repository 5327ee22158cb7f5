"""The cost model against numbers worked out by hand, and against what was measured on an H100."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sglang_sparsespec.bench import cost_model
from sglang_sparsespec.bench.shapes import SHAPES, shape_from_config
from sglang_sparsespec.errors import ConfigError

SMALL = shape_from_config(SHAPES["qwen3-1.7b"])
EXPERTS = shape_from_config(SHAPES["qwen3-30b-a3b"])
LARGE = shape_from_config(SHAPES["qwen3-8b"])
H100 = cost_model.ROOFLINES["H100"]


def test_round_time_is_the_formula() -> None:
    """k (W + s A/u + o) + V + A (1 + c) + extra, at W 2.7, A 15.2: a lost term would move the bar."""
    found = cost_model.round_time(
        2.7, 15.2, num_steps=8, kv_share=0.06, gather_efficiency=0.75, gap_ms=0.2, verify_ms=4.0, extra_ms=1.0
    )
    assert found.terms() == pytest.approx(
        {
            "draft_weights": 21.6,
            "draft_kv": 8 * 0.06 * 15.2 / 0.75,
            "draft_gaps": 1.6,
            "verify_products": 4.0,
            "verify_kv": 15.2,
            "capture": 1.52,
            "extra": 1.0,
        }
    )
    assert found.total == pytest.approx(sum(found.terms().values()))


def test_speedup_of_the_issue() -> None:
    """The design's own example: 6.16 of 8 accepted, 1.7B at 400K tokens, about 2.3 times."""
    verify_ms = 1e3 * cost_model.products_s(SMALL, H100, rows=9 * 128, bytes_per_value=2)
    found = cost_model.round_time(2.7, 15.2, num_steps=8, kv_share=0.06, verify_ms=verify_ms)
    assert cost_model.speedup(7.16, 2.7, 15.2, found.total) == pytest.approx(2.3, abs=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_share": 0.0}, "kv_share"),
        ({"gather_efficiency": 1.5}, "gather_efficiency"),
        ({"gap_ms": -1.0}, "negative"),
        ({"num_steps": 0}, "at least one"),
    ],
)
def test_round_time_refuses_impossible_terms(wrong: dict[str, float], message: str) -> None:
    """A share above 1 or a negative time would give a speed-up that no machine can have."""
    terms: dict[str, float] = {"num_steps": 8, "kv_share": 0.05, "verify_ms": 1.0, **wrong}
    with pytest.raises(ValueError, match=message):
        cost_model.round_time(1.0, 1.0, **terms)  # type: ignore[arg-type]


def test_a_sparse_verify_reads_less() -> None:
    """32K tokens, rho 0.25, L0 4096: 704 blocks of 16 are 11,264 tokens, and K of all where every layer scores."""
    rule: dict[str, float] = {"ratio": 0.25, "dense_below": 4096, "block_size": 16}
    every = cost_model.sparse_verify_share(32_768, **rule, anchor_share=1.0)  # type: ignore[arg-type]
    assert every == pytest.approx(11_264 / 32_768 + 0.5)
    quarter = cost_model.sparse_verify_share(32_768, **rule, anchor_share=0.25)  # type: ignore[arg-type]
    assert quarter == pytest.approx(11_264 / 32_768 + 0.125)
    assert cost_model.sparse_verify_share(4096, **rule, anchor_share=1.0) == 1.0  # type: ignore[arg-type]
    terms: dict[str, float] = {"num_steps": 8, "kv_share": 0.05, "verify_ms": 1.0}
    dense = cost_model.round_time(2.0, 10.0, **terms)  # type: ignore[arg-type]
    sparse = cost_model.round_time(2.0, 10.0, **terms, verify_share=quarter)  # type: ignore[arg-type]
    assert dense.total - sparse.total == pytest.approx(1.1 * (1 - quarter) * 10.0)
    with pytest.raises(ValueError, match="verify_share"):
        cost_model.round_time(2.0, 10.0, **terms, verify_share=1.6)  # type: ignore[arg-type]


def test_budget_share_has_a_floor_and_a_ceiling() -> None:
    """Below the floor a draft reads everything; far above it the ratio alone counts."""
    assert cost_model.budget_share(100) == 1.0
    assert cost_model.budget_share(3125) == pytest.approx(192 / 3125)
    assert cost_model.budget_share(100_000) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("shape", "pool", "measured_ms"), [(SMALL, 400_000, 17.9), (SMALL, 156_000, 8.9), (LARGE, 248_000, 19.7)]
)
def test_step_times_are_near_what_was_measured(shape: object, pool: int, measured_ms: float) -> None:
    """The roofline of an H100 against plain SGLang there (2026-11-22, 127 running): what it leaves out is the gap."""
    weights, kv = cost_model.step_times(shape, H100, rows=127, pool_tokens=pool, bytes_per_value=2)  # type: ignore[arg-type]
    assert 0.75 * measured_ms < weights + kv < measured_ms * 1.02


def test_products_are_bound_by_reading_or_by_multiplying() -> None:
    """A verify of 9 x 128 rows costs more than a read of the weights; one of 9 x 8 rows does not."""
    read = cost_model.products_s(LARGE, H100, rows=1, bytes_per_value=2)
    assert cost_model.products_s(LARGE, H100, rows=72, bytes_per_value=2) == read
    assert cost_model.products_s(LARGE, H100, rows=1152, bytes_per_value=2) > 2 * read


def test_shapes_have_the_parameters_of_their_names() -> None:
    """A wrong width would make W, and with it every speed-up of the model, wrong."""
    sizes = {name: shape_from_config(config).stored_params / 1e9 for name, config in SHAPES.items()}
    assert sizes == pytest.approx(
        {"qwen3-1.7b": 1.72, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-30b-a3b": 30.53}, rel=0.01
    )
    # "A3B" counts the embedding, which is only looked up
    active = EXPERTS.active_layer_params + 2 * EXPERTS.head_params
    assert active / 1e9 == pytest.approx(3.35, rel=0.01)
    assert SMALL.kv_values_per_token * 2 == 114_688


@pytest.mark.parametrize(("experts", "chosen", "rows"), [(3, 1, 4), (4, 2, 3), (5, 3, 2), (6, 2, 1)])
def test_touched_experts_are_the_mean_over_all_choices(experts: int, chosen: int, rows: int) -> None:
    """E (1 - (1 - k / E) ** rows) against every choice that so many tokens can make, each as likely as the next."""
    shape = dataclasses.replace(EXPERTS, experts=experts, experts_per_token=chosen)
    choices = itertools.product(itertools.combinations(range(experts), chosen), repeat=rows)
    sizes = [len(set(itertools.chain(*choice))) for choice in choices]
    assert shape.touched_experts(rows) == pytest.approx(sum(sizes) / len(sizes))


def test_products_of_experts_grow_with_the_batch() -> None:
    """One token reads its own experts, a large batch reads all; a dense model reads all at once."""
    attention = 48 * (2048 * 128 * (2 * 32 + 2 * 4) + 2048 * 128)
    one = attention + 48 * 8 * 3 * 2048 * 768 + 151936 * 2048
    assert cost_model.products_s(EXPERTS, H100, rows=1, bytes_per_value=2) == pytest.approx(2 * one / H100.bandwidth)
    assert EXPERTS.touched_experts(8) == pytest.approx(51.6, abs=0.1)
    every = 2 * (EXPERTS.layer_params + EXPERTS.head_params) / H100.bandwidth
    assert cost_model.products_s(EXPERTS, H100, rows=128, bytes_per_value=2) == pytest.approx(every, rel=1e-3)
    # a verify of 9 x 8 tokens reads more than twice what a decode of 8 does, and 9 x 128 hardly more than 128
    read = [cost_model.products_s(EXPERTS, H100, rows=rows, bytes_per_value=2) for rows in (8, 72, 128, 1152)]
    assert read[1] > 2.2 * read[0]
    assert read[3] == pytest.approx(read[2], rel=1e-3)
    assert (
        SMALL.read_layer_params(1) == SMALL.read_layer_params(1000) == SMALL.layer_params == SMALL.active_layer_params
    )


@pytest.mark.parametrize(
    "config",
    [
        {**SHAPES["qwen3-30b-a3b"], "mlp_only_layers": [0]},
        {**SHAPES["qwen3-30b-a3b"], "decoder_sparse_step": 2},
        {name: value for name, value in SHAPES["qwen3-30b-a3b"].items() if name != "num_experts_per_tok"},
    ],
    ids=["dense layers between", "every other layer", "experts per token missing"],
)
def test_mixtures_that_the_model_does_not_describe_are_refused(config: dict[str, object]) -> None:
    """Counted as if every layer had experts, their weights and W would be wrong."""
    with pytest.raises(ConfigError, match=r"config\.json is "):
        shape_from_config(config)


def test_mixtral_names_its_experts_otherwise() -> None:
    """8x7B: 46.7 B weights, of which a token visits 12.9 B with the embedding; its experts have the whole width."""
    config = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    shape = shape_from_config(config)
    assert shape.stored_params / 1e9 == pytest.approx(46.7, rel=0.01)
    assert (shape.active_layer_params + 2 * shape.head_params) / 1e9 == pytest.approx(12.9, rel=0.01)


def test_fit_step_finds_the_line() -> None:
    """W and A are read off the plain server's steps at several fills."""
    fills = [75_000.0, 156_000.0, 278_000.0, 400_000.0]
    fit = cost_model.fit_step(fills, [5.5, 8.9, 13.3, 17.9])
    assert fit is not None
    assert fit[0] == pytest.approx(2.7, abs=0.3)
    assert fit[1] * 1e6 == pytest.approx(38, abs=1)
    assert cost_model.fit_step([1000.0, 1000.0], [1.0, 2.0]) is None
    assert cost_model.fit_step([], []) is None


def test_terms_are_off_on_either_side() -> None:
    """A round that is much faster than the model says as much about the model as one that is slower."""
    assert [cost_model.is_off(measured, 10.0) for measured in (7.9, 8.1, 11.9, 12.1)] == [True, False, False, True]
