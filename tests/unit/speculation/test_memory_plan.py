"""The plan of memory against the objects and launches that it counts, and against the issue's two points."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.ops import _launch
from sglang_sparsespec.selection.store import SelectionStore
from sglang_sparsespec.speculation import memory
from sglang_sparsespec.speculation.budget import max_budget
from sglang_sparsespec.speculation.memory import GIB, MemoryPlan, RoundShape, fit_pool, plan_memory
from tests.support.model_shapes import QWEN3_8B

KV_BYTES = 36 * 8 * (128 + 128) * 2
# SGLang's own for a speculative algorithm, up to 128
CAPTURED = (*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 129, 8))
CONTEXT = 40960


def rounds(max_reqs: int, **changes: object) -> RoundShape:
    config = SparseSpecConfig()
    shape = RoundShape(
        max_reqs=max_reqs,
        num_steps=config.num_steps,
        tail=config.draft_tail,
        max_budget=max_budget(CONTEXT, config.budget_ratio, config.min_budget),
        context_len=CONTEXT,
        batch_sizes=tuple(size for size in CAPTURED if size <= max_reqs),
        is_fused=True,
        needs_scores=True,
        shares_heads=True,
        samples_drafts=True,
        logits_bytes=2,
        num_sms=132,
    )
    return shape._replace(**changes)


@pytest.mark.parametrize("max_reqs", [128, 24], ids=["128 x 3K", "24 x 16K"])
def test_takes_less_than_three_percent_of_the_pool(max_reqs: int) -> None:
    """The promise: an 80 GB card with 16.4 GB of weights keeps about 370K tokens, and SPARSESPEC takes little of them.

    A term that grows with the batch, the vocabulary or the context without anybody noticing fails here.
    """
    num_tokens = 370_000
    plan = plan_memory(QWEN3_8B, rounds(max_reqs), num_tokens)
    assert plan.total < 0.03 * num_tokens * KV_BYTES, plan.describe()
    # moments share what SGLang leaves free: 8 GB where a pool of that size fits
    assert plan.from_pool(8 * 10**9) == plan.total, plan.describe()


@pytest.mark.parametrize("shares_heads", [True, False])
@pytest.mark.parametrize("max_reqs", [1, 5])
def test_selection_is_what_the_store_takes(shares_heads: bool, max_reqs: int) -> None:
    """A store that grew without the plan would be allocated out of nothing."""
    model = QWEN3_8B._replace(num_layers=3)
    store = SelectionStore(
        num_layers=3, num_rows=max_reqs + 1, num_heads=1 if shares_heads else 8, max_budget=64, device="cpu"
    )
    plan = plan_memory(model, rounds(max_reqs, shares_heads=shares_heads, max_budget=64), 1000)
    assert plan.selection == store.num_bytes


@pytest.mark.parametrize("num_sms", [1, 78, 132])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "num_steps"), [(32, 8, 8), (64, 8, 8), (7, 1, 8), (8, 8, 1)])
def test_split_results_have_room_at_every_batch_size(
    num_sms: int, num_q_heads: int, num_kv_heads: int, num_steps: int
) -> None:
    """Splits depend on the batch, and a smaller batch may split more: the largest is not always the most."""
    model = QWEN3_8B._replace(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    narrower = tuple(range(1, num_steps + 1))
    shape = rounds(200, num_sms=num_sms, num_steps=num_steps, narrower=narrower)
    room = memory._split_bytes(model, shape, shape.max_reqs)
    group = num_q_heads // num_kv_heads
    for num_reqs in range(1, shape.max_reqs + 1):
        for num_rows in (group, *(group * width for width in (*narrower, shape.width))):
            programs = num_reqs * num_kv_heads * _launch.num_row_tiles(num_rows)
            sizes = (programs, 10**6, 32, num_sms)
            # of short heads and of longer ones
            verifies = [_launch.choose_verify_splits(*sizes, _launch.verify_resident(num_rows, d)) for d in (64, 128)]
            for splits in (_launch.choose_splits(*sizes), *verifies):
                # a log-sum-exp in any case, an output where it is split
                elements = model.head_dim + 1 if splits > 1 else 1
                assert 4 * num_reqs * num_kv_heads * splits * num_rows * elements <= room


@pytest.mark.parametrize(
    ("num_programs", "splits"), [(1, 32), (8, 32), (64, 4), (120, 2), (256, 2), (264, 2), (265, 1), (1024, 1)]
)
def test_a_verify_fills_one_wave(num_programs: int, splits: int) -> None:
    """More leave the last wave half empty; none leave the card to the longest request."""
    assert _launch.choose_verify_splits(num_programs, 10**6, 64, 132) == splits
    assert _launch.choose_verify_splits(num_programs, 64, 64, 132) == 1


@pytest.mark.parametrize("context_len", [1, 4096, 40960, 10**7])
@pytest.mark.parametrize("num_reqs", [1, 24, 128])
def test_selections_have_room_for_scratch_and_result(context_len: int, num_reqs: int) -> None:
    """Scratch is bounded for all programs together, but a single one needs two rows whatever they take."""
    shape = rounds(num_reqs, context_len=context_len)
    room = memory._select_bytes(QWEN3_8B, shape, num_reqs)
    for layers in (1, 11, 36):
        programs = _launch.num_select_programs(layers * num_reqs, context_len, shape.num_sms)
        assert 8 * context_len * programs + 4 * layers * num_reqs * shape.max_budget <= room


def test_scores_have_room_in_pools_of_any_size() -> None:
    """The buffer has whole layers, so its bytes go up and down as the pool grows; the plan must not."""
    before = 0
    for num_tokens in [*range(0, 400_000, 7_001), 3 * 10**6, 10**7]:
        layers = memory.num_score_layers(36, 8, num_tokens)
        room = memory._score_bytes(QWEN3_8B, rounds(8), num_tokens)
        assert 4 * 8 * layers * num_tokens <= room <= 4 * 8 * (layers + 1) * num_tokens
        assert room >= before
        before = room


def test_nothing_is_counted_for_what_does_not_run() -> None:
    """Options that spare memory must give it to the pool."""
    full = plan_memory(QWEN3_8B, rounds(128), 370_000)
    eager = plan_memory(QWEN3_8B, rounds(128, is_fused=False, batch_sizes=()), 370_000)
    assert (eager.scores, eager.forward, eager.graphs) == (0, 0, 0)
    # a verify in groups keeps the logits of all; an eager one of all at once holds them among what it computes
    assert full.moments <= eager.moments + 128 * 9 * 151936 * 2
    assert plan_memory(QWEN3_8B, rounds(128, samples_drafts=False), 370_000).drafts == 0
    assert plan_memory(QWEN3_8B, rounds(128, needs_scores=False), 370_000).scores == 0
    fewer = plan_memory(QWEN3_8B, rounds(128, batch_sizes=CAPTURED[:4]), 370_000)
    assert 4 * 9 * 151936 * 2 < fewer.forward < full.forward / 4
    assert fewer.graphs == 2 * 4 * memory.GRAPH_BYTES
    # a draft and five verifies of each size, the widest of which are the size of the one there was
    adaptive = plan_memory(QWEN3_8B, rounds(128, batch_sizes=CAPTURED[:4], narrower=(1, 2, 3, 5)), 370_000)
    assert adaptive.graphs == 6 * 4 * memory.GRAPH_BYTES
    assert dataclasses.replace(adaptive, graphs=fewer.graphs) == fewer
    plain = plan_memory(QWEN3_8B, rounds(128, batch_sizes=CAPTURED[:4], narrower=(1, 2, 3, 5), has_plain=True), 370_000)
    assert plain.graphs == 7 * 4 * memory.GRAPH_BYTES


def test_unified_rounds_keep_drafts_and_capture_mixed_forwards() -> None:
    """A set of graphs more, and what drafts were sampled from by page-table row; still within the promise."""
    plain, unified = (plan_memory(QWEN3_8B, rounds(128, is_unified=value), 370_000) for value in (False, True))
    assert unified.graphs == plain.graphs * 3 // 2
    assert unified.drafts - plain.drafts == 8 * 151936 * 2
    # both kinds of split results at a time
    assert plain.forward < unified.forward < 1.1 * plain.forward
    assert unified.total < 0.03 * 370_000 * KV_BYTES, unified.describe()


def test_wide_groups_count_their_score_planes() -> None:
    """With more than 64 query rows to a KV head each tile of them writes scores of its own."""
    wide = QWEN3_8B._replace(num_q_heads=64)
    assert memory._plane_bytes(QWEN3_8B, rounds(8), 1000) == 0
    assert memory._plane_bytes(wide, rounds(8), 1000) == 2 * 8 * 1000 * 4


@pytest.mark.parametrize("num_reqs", [1, 16, 128])
@pytest.mark.parametrize(
    ("experts", "per_token", "size"), [(128, 8, 768), (8, 2, 14336), (8, 8, 64)], ids=["30B-A3B", "8x7B", "narrow"]
)
def test_experts_have_room_for_what_the_host_allocates(experts: int, per_token: int, size: int, num_reqs: int) -> None:
    """SGLang's Triton path, buffer by buffer: halves and product, then product and outputs, with tiles and without."""
    model = QWEN3_8B._replace(intermediate_size=0, experts=experts, experts_per_token=per_token, expert_size=size)
    shape = rounds(num_reqs)
    num_rows = num_reqs * shape.width
    dense = model._replace(experts=0)
    room = memory._forward_bytes(model, shape, num_reqs, 0) - memory._forward_bytes(dense, shape, num_reqs, 0)
    # that part of the dense plan is the attention's, whose buffers are gone when the experts run
    room += num_rows * (2 * 32 + 2 * 8) * 128 * 2
    for tile in (0, 127):
        pairs = num_rows * per_token
        padded = pairs + min(pairs, experts + 1) * tile
        halves, product, outputs = padded * 2 * size, padded * size, pairs * 4096
        sorted_ids = 128 * pairs if pairs < experts + 1 else pairs + (experts + 1) * 127
        choices = pairs * (4 + 4) + 4 * sorted_ids
        taken = 2 * (max(halves + product, product + outputs) + num_rows * experts) + choices
        assert taken <= room
    # and nothing for a model without
    assert memory._expert_elements(dense, num_rows, False) == 0
    # where channels are dropped: their sizes and which are small, while both halves and the product are there
    more = memory._expert_elements(model, num_rows, True)
    assert more >= num_rows * per_token * (2 * size + size + size + size / 2)


@pytest.mark.parametrize("activation_gib", [0, 1, 8])
@pytest.mark.parametrize("pool_gib", [4, 16, 51, 110, 1000])
@pytest.mark.parametrize("num_q_heads", [32, 64])
def test_pool_and_plan_fit_together(pool_gib: int, activation_gib: int, num_q_heads: int) -> None:
    """Scores depend on the pool and the pool on the scores; whichever comes first, both must fit."""
    model, shape = QWEN3_8B._replace(num_q_heads=num_q_heads), rounds(128)
    left = fit_pool(
        model,
        shape,
        pool_bytes=pool_gib * GIB,
        activation_bytes=activation_gib * GIB,
        tokens_in=lambda num_bytes: num_bytes // KV_BYTES,
    )
    plan = plan_memory(model, shape, left // KV_BYTES)
    assert left + plan.from_pool(activation_gib * GIB) <= pool_gib * GIB
    # and little is given away: less than what a second look would find
    assert left + plan.from_pool(activation_gib * GIB) >= 0.99 * pool_gib * GIB


@pytest.mark.parametrize(("pool_gib", "num_tokens"), [(0.1, 0), (1.3, 2000)])
def test_a_plan_that_leaves_too_small_a_pool_is_refused(pool_gib: float, num_tokens: int) -> None:
    """A server that starts with a pool of nothing fails at its first request, and says something else."""
    with pytest.raises(ConfigError) as caught:
        fit_pool(
            QWEN3_8B,
            rounds(128),
            pool_bytes=int(pool_gib * GIB),
            activation_bytes=8 * GIB,
            tokens_in=lambda num_bytes: num_bytes // KV_BYTES,
        )
    message = str(caught.value)
    assert message.startswith("The KV pool, in tokens, is ")
    assert 0 <= int(message.split()[6].rstrip(";")) <= num_tokens
    assert f"at least 2304, 2 rounds of 128 requests. Weights and --mem-fraction-static leave {pool_gib:.2f}" in message
    for option in ("--max-running-requests", "--cuda-graph-max-bs-decode", "--speculative-num-steps"):
        assert option in message


def test_moments_beyond_what_the_host_leaves_come_out_of_the_pool() -> None:
    """A user who leaves SGLang next to nothing for activations would meet the first round without memory."""
    plan = plan_memory(QWEN3_8B, rounds(128), 370_000)
    assert plan.from_pool(0) == plan.total + plan.moments
    assert plan.from_pool(2 * plan.moments) == plan.total


def test_the_line_names_every_term() -> None:
    """The log is where somebody finds out what to turn."""
    names = [field.name for field in dataclasses.fields(MemoryPlan)]
    plan = MemoryPlan(**{name: (i + 1) * GIB for i, name in enumerate(names)})
    assert plan.describe() == (
        "21.00 GiB beside the KV pool: selection 1.000, round 2.000, scores 3.000, drafts 4.000, "
        "forward (reserved) 5.000, graphs (reserved) 6.000; 7.00 GiB at moments"
    )
