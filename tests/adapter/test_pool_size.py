"""Memory beside the KV pool: the plan against the adapter's objects, and what SGLang is left with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.selection import POLICIES
from sglang_sparsespec.selection.store import SelectionStore
from sglang_sparsespec.speculation.memory import GIB, ModelShape, RoundShape, num_score_layers, plan_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

CPU = torch.device("cpu")
MODEL = ModelShape(
    num_layers=6,
    hidden_size=64,
    intermediate_size=128,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=500,
    dtype_bytes=2,
)


def rounds(**changes: Any) -> RoundShape:
    shape = RoundShape(
        max_reqs=5,
        num_steps=3,
        tail=9,
        max_budget=32,
        context_len=1000,
        batch_sizes=(1, 4),
        is_fused=True,
        needs_scores=True,
        shares_heads=True,
        samples_drafts=True,
        logits_bytes=2,
        num_sms=132,
    )
    return shape._replace(**changes)


def store_of(shape: RoundShape) -> SelectionStore:
    num_heads = 1 if shape.shares_heads else MODEL.num_kv_heads
    return SelectionStore(
        num_layers=6, num_rows=shape.max_reqs + 1, num_heads=num_heads, max_budget=shape.max_budget, device="cpu"
    )


@pytest.mark.parametrize("shape", [rounds(), rounds(shares_heads=False), rounds(max_budget=0)], ids=str)
def test_round_is_what_the_static_tensors_take(shape: RoundShape) -> None:
    """A tensor that is added to the round without the plan comes out of nothing."""
    from sglang_sparsespec.adapter.static_round import StaticRound

    static = StaticRound(
        max_reqs=shape.max_reqs, num_draft_tokens=shape.width, store=store_of(shape), tail=shape.tail, device="cpu"
    )
    assert plan_memory(MODEL, shape, 1000).round == static.num_bytes


def test_unified_rounds_are_what_their_state_takes() -> None:
    """Chains, lengths and inputs of mixed forwards, beside the lists that both schedules share."""
    from sglang_sparsespec.adapter.static_round import StaticRound
    from sglang_sparsespec.adapter.unified_state import UnifiedState

    shape = rounds(is_unified=True)
    static = StaticRound(
        max_reqs=shape.max_reqs, num_draft_tokens=shape.width, store=store_of(shape), tail=shape.tail, device="cpu"
    )
    state = UnifiedState(
        num_rows=shape.max_reqs + 1, max_reqs=shape.max_reqs, num_steps=shape.num_steps, lists=static.draft_slots
    )
    assert plan_memory(MODEL, shape, 1000).round == static.num_bytes + state.num_bytes


@pytest.mark.parametrize("page_size", [1, 16])
def test_guesses_are_what_their_memory_takes(server_args: Callable[..., Any], page_size: int) -> None:
    """The page table is a little wider than the context: what is planned must not be less, and hardly more."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    from sglang_sparsespec.adapter.assist import NgramAssist
    from sglang_sparsespec.adapter.static_round import StaticRound

    args = server_args(page_size=page_size, speculative_num_steps=3)
    shape = rounds(num_guesses=2)
    width = shape.context_len + get_req_to_token_extra_context_len(args)
    static = StaticRound(
        max_reqs=shape.max_reqs, num_draft_tokens=shape.width, store=store_of(shape), tail=shape.tail, device="cpu"
    )
    nothing: Any = None
    assist = NgramAssist(
        2,
        num_steps=shape.num_steps,
        page_table=torch.zeros(shape.max_reqs + 1, width, dtype=torch.int32),
        static=static,
        sampler=nothing,
        batch_sizes=(),
        plan_drafts=nothing,
        run_model=nothing,
    )
    planned = plan_memory(MODEL, shape, 1000).round - static.num_bytes
    assert assist.num_bytes <= planned <= 1.1 * assist.num_bytes
    graphs = [plan_memory(MODEL, rounds(num_guesses=n), 1000).graphs for n in (0, 2)]
    assert graphs[1] == graphs[0] * 3 // 2


def test_the_page_table_has_one_row_more_than_requests() -> None:
    """The store has as many rows as the page table."""
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    pool = ReqToTokenPool(size=5, max_context_len=8, device="cpu", enable_memory_saver=False)
    assert (pool.size, pool.req_to_token.shape[0]) == (5, 6)


def fused_verify(policy: str, num_columns: int) -> Any:
    from sglang_sparsespec.adapter.fused_verify import FusedVerify
    from sglang_sparsespec.config import SparseSpecConfig

    runner: Any = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(6, 8)),
        token_to_kv_pool=SimpleNamespace(head_num=MODEL.num_kv_heads),
    )
    return FusedVerify(runner, POLICIES[policy](SparseSpecConfig(selection=policy)), store_of(rounds()), num_columns)


@pytest.mark.parametrize("num_columns", [1, 1000, 10**6, 6 * 10**6])
def test_scores_are_what_a_fused_verify_takes(num_columns: int) -> None:
    """The buffer is the one that grows with the pool: a plan that forgets it is right for small cards only."""
    taken = fused_verify("pillar", num_columns).num_bytes
    assert taken == 4 * MODEL.num_kv_heads * num_columns * num_score_layers(6, 2, num_columns)
    planned = plan_memory(MODEL, rounds(), num_columns).scores
    assert taken <= planned < taken + 4 * MODEL.num_kv_heads * num_columns + 1


def test_a_policy_without_attention_has_no_scores() -> None:
    """128 MiB for nobody."""
    assert fused_verify("window", 10**6).num_bytes == 0
    assert plan_memory(MODEL, rounds(needs_scores=False), 10**6).scores == 0


def test_shapes_are_read_off_the_served_model(server_args: Callable[..., Any]) -> None:
    """A wrong attribute of the host's model config would be 0 bytes of something."""
    from sglang_sparsespec.adapter.memory import identity, model_shape, round_shape

    args = server_args(max_running_requests=7)
    config = args.get_model_config()
    text = config.hf_text_config
    assert model_shape(config, 1) == ModelShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_q_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        dtype_bytes=config.dtype.itemsize,
    )
    assert model_shape(config, 2).num_kv_heads == max(1, text.num_key_value_heads // 2)
    assert not any(name.startswith("expert") for name in identity(config, args.sparsespec_config, "", CPU))
    for name in ("pillar", "quest"):
        shape = round_shape(
            config,
            args.sparsespec_config,
            POLICIES[name](args.sparsespec_config),
            max_reqs=7,
            batch_sizes=[1, 2],
            shares_heads=True,
            logits_dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        assert (shape.max_reqs, shape.width, shape.batch_sizes, shape.logits_bytes) == (7, 9, (1, 2), 2)
        assert shape.max_budget == (0 if name == "quest" else math.ceil(0.05 * config.context_len))
        assert shape.needs_scores == (name == "pillar")


class FakeHost:
    """A configurator whose pool takes 10 bytes a token, in pages of 4."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_draft_worker: bool = False) -> None:
        from sglang.srt import runtime_context
        from sglang.srt.model_executor import pool_configurator

        self.is_draft_worker = is_draft_worker
        schedule = SimpleNamespace(page_size=4, mem_fraction_static=0.75)
        monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule)
        monkeypatch.setattr(pool_configurator, "create_memory_pool_configurator", lambda host: self)

    def calculate_pool_sizes(self, num_bytes: int, page_size: int) -> Any:
        from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

        return MemoryPoolConfig(max_total_num_tokens=num_bytes // 10 // page_size * page_size)


@pytest.fixture
def _no_reserve() -> Iterator[None]:
    import sglang_sparsespec.patches as patches

    yield
    patches.install_reserve(None)


@pytest.mark.usefixtures("_no_reserve")
def test_the_host_is_left_with_what_the_plan_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch knows SGLang's units: GiB before, bytes after."""
    import sglang_sparsespec.patches as patches
    from sglang_sparsespec.patches.memory import leave_room

    seen: list[Any] = []

    def reserve(pool_bytes: int, activation_bytes: int, tokens_in: Callable[[int], int]) -> int:
        seen.append((pool_bytes, activation_bytes, tokens_in(199), tokens_in(39), tokens_in(0)))
        return pool_bytes - 300

    host: Any = FakeHost(monkeypatch)
    original: Any = lambda configurator, pre_model_load_memory: 1000  # noqa: E731
    assert leave_room(original, host, 80) == 1000, "without the algorithm nothing changes"
    patches.install_reserve(reserve)
    assert leave_room(original, host, 80) == 700
    assert seen == [(1000, 20 * GIB, 16, 0, 0)]
    assert leave_room(original, FakeHost(monkeypatch, is_draft_worker=True), 80) == 1000  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_reserve")
def test_the_worker_reserves_on_cuda_alone(server_args: Callable[..., Any]) -> None:
    """A CPU's memory is not profiled the same way, and its server would lose half its pool to graphs it never takes."""
    import sglang_sparsespec.patches.memory as hook

    from sglang_sparsespec.adapter.worker import SparseSpecWorker

    args = server_args(max_running_requests=7)
    ps: Any = SimpleNamespace(tp_size=1, tp_rank=0)
    runner = SimpleNamespace(model_config=args.get_model_config(), model=torch.nn.Module())
    target: Any = SimpleNamespace(model_runner=runner)
    worker = SparseSpecWorker(args, 0, ps, 0, target)
    assert hook._reserve is None
    # the rest as on a GPU, but for its multiprocessors
    left = worker._reserve(GIB, 0, lambda num_bytes: num_bytes // 1000)
    plan = plan_memory(*worker._shapes(7), left // 1000)
    assert min(plan.selection, plan.round, plan.moments) > 0
    assert left == GIB - plan.from_pool(0)
    with pytest.raises(ConfigError, match="The KV pool, in tokens, is 0; it must be at least 126, 2 rounds of 7"):
        worker._reserve(1000, 0, lambda num_bytes: num_bytes // 1000)


@pytest.mark.parametrize("limit", [1, 4 * 2 * 40 * 2, 10**9], ids=["one at a time", "two at a time", "all at once"])
def test_prompts_are_captured_some_at_a_time(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Requests that are captured apart must select what they select together, each into its own row."""
    from sglang_sparsespec.adapter import attention_backend
    from sglang_sparsespec.adapter.metrics import RefreshTimer
    from sglang_sparsespec.config import SparseSpecConfig

    torch.manual_seed(0)
    lens = torch.tensor([40, 12, 33], dtype=torch.int32)
    config = SparseSpecConfig(min_budget=8, recent_window=2, sink=1)
    pool: Any = SimpleNamespace(get_key_buffer=lambda layer: keys)
    keys = torch.randn(200, 2, 16)
    table = torch.randperm(180).to(torch.int32).view(4, 45)
    runner: Any = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    queries = torch.randn(3, 4, 4 * 16)
    plan = attention_backend.CapturePlan(
        rows=torch.tensor([2, 1, 3]),
        query_starts=lens - 4,
        query_lens=torch.full((3,), 4, dtype=torch.int32),
        selectable_lens=lens,
        token_index=torch.arange(12).view(3, 4),
        num_queries=4,
        query_step=1,
        max_len=40,
    )
    layer: Any = SimpleNamespace(
        layer_id=0, tp_q_head_num=4, tp_k_head_num=2, qk_head_dim=16, scaling=0.25, logit_cap=0.0
    )
    dense: Any = SimpleNamespace(forward_extend=lambda q, *args, **kwargs: q)

    def select(limit: int) -> SelectionStore:
        monkeypatch.setattr(attention_backend, "SCORE_BYTES", limit)
        store = SelectionStore(num_layers=1, num_rows=4, num_heads=1, max_budget=8, device="cpu")
        backend = attention_backend.SparseSpecAttnBackend(
            dense, runner, POLICIES["pillar"](config), store, num_queries=4, timer=RefreshTimer("cpu", is_apart=True)
        )
        backend._capture = plan
        batch: Any = SimpleNamespace(spec_info=None)
        backend.forward_extend(queries.view(12, -1), queries, queries, layer, batch)
        return store

    expected, store = select(10**12), select(limit)
    assert (expected.num_selected[1:] == 8).all()
    for row in (1, 2, 3):
        assert set(store.positions[0, row, 0].tolist()) == set(expected.positions[0, row, 0].tolist())
    assert torch.equal(store.num_selected, expected.num_selected)
    assert torch.equal(store.until, expected.until)


@pytest.mark.parametrize("arch", ["qwen3-moe", "mixtral"])
def test_experts_are_read_off_the_served_model(server_args: Callable[..., Any], tmp_path: Path, arch: Any) -> None:
    """Families name the number and the width of experts differently; one that is missed is 0 bytes of workspace."""
    from sglang_sparsespec.adapter.memory import identity, model_shape
    from sglang_sparsespec.model_tools.tiny import write_tiny_model

    path = write_tiny_model(tmp_path, arch=arch, layers=1, hidden=64, experts=6, experts_per_token=4)
    args = server_args(model_path=str(path))
    config = args.get_model_config()
    whole, half = model_shape(config, 1), model_shape(config, 2)
    assert (whole.experts, whole.experts_per_token, whole.expert_size) == (6, 4, 32)
    assert (half.experts, half.experts_per_token, half.expert_size) == (6, 4, 16)
    # rounds of another number of experts take other times
    assert identity(config, args.sparsespec_config, "", CPU)["experts_per_token"] == "4"
