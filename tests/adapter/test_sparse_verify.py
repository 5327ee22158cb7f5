"""A sparse verify against the rule of arXiv:2512.21911 applied to one request and one head at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.selection import POLICIES
from sglang_sparsespec.selection.store import SelectionStore
from sglang_sparsespec.sparsity import attention
from sglang_sparsespec.sparsity.anchors_file import weights_digest
from sglang_sparsespec.sparsity.block_lists import BlockRule
from sglang_sparsespec.speculation.memory import LIST_ENTRY_BYTES, num_bytes, plan_memory

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

LAYERS, HEADS, GROUP, DIM, WIDTH = 4, 2, 3, 16, 3
# committed lengths; the last request is padding
LENGTHS = [5, 64, 65, 200, 0]
NUM_QUERIES = [3, 3, 2, 3, 0]
DENSE_BELOW, BLOCK = 64, 16
MAX_LEN = max(LENGTHS) + WIDTH
SCALE = 0.3


class Batch(NamedTuple):
    """A paged context of several requests, and the queries of a verify in every layer."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    rows: torch.Tensor
    queries: torch.Tensor

    def plan(self, is_sparse: bool) -> Any:
        from sglang_sparsespec.adapter.fused_verify import FusedPlan

        lens = torch.tensor(LENGTHS, dtype=torch.int32)
        num_queries = torch.tensor(NUM_QUERIES, dtype=torch.int32)
        return FusedPlan(self.rows, lens, num_queries, WIDTH, MAX_LEN, is_sparse)


@pytest.fixture
def batch() -> Batch:
    """Slots that nobody names hold NaN, and so do positions past a request's end."""
    generator = torch.Generator().manual_seed(0)
    num_slots = sum(LENGTHS) + len(LENGTHS) * WIDTH + 30
    keys = torch.full((LAYERS, num_slots, HEADS, DIM), torch.nan)
    values = keys.clone()
    table = torch.full((len(LENGTHS) + 2, MAX_LEN + 20), 2**31 - 1, dtype=torch.int32)
    rows = torch.tensor([3, 1, 5, 2, 0])
    free = 1 + torch.randperm(num_slots - 1, generator=generator)
    for row, length, count in zip(rows.tolist(), LENGTHS, NUM_QUERIES, strict=True):
        slots, free = free[: length + count], free[length + count :]
        table[row, : length + count] = slots.int()
        keys[:, slots] = torch.randn(LAYERS, len(slots), HEADS, DIM, generator=generator)
        values[:, slots] = torch.randn(LAYERS, len(slots), HEADS, DIM, generator=generator)
    # slot 0 and row 0 are the host's for padding
    keys[:, 0] = values[:, 0] = 0.0
    table[0] = 0
    queries = torch.randn(LAYERS, len(LENGTHS) * WIDTH, HEADS * GROUP * DIM, generator=generator)
    return Batch(keys, values, table, rows, queries)


def make_verify(batch: Batch, rule: BlockRule, anchors: list[int] | None = None, policy: str = "pillar") -> Any:
    from sglang_sparsespec.adapter.sparse_verify import SparseVerify

    pool = SimpleNamespace(
        head_num=HEADS, get_key_buffer=batch.keys.__getitem__, get_value_buffer=batch.values.__getitem__
    )
    runner: Any = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=batch.table), token_to_kv_pool=pool)
    # pooling would give positions that were not read the scores of their neighbours
    options: dict[str, Any] = {"sharing": "head", "recent_window": 0, "score_pooling": 0}
    config = SparseSpecConfig(selection=policy, min_budget=24, budget_ratio=0.1, **options)
    store = SelectionStore(
        num_layers=LAYERS, num_rows=batch.table.shape[0], num_heads=HEADS, max_budget=24, device="cpu"
    )
    return SparseVerify(runner, POLICIES[policy](config), store, sum(LENGTHS), rule=rule, anchors=anchors)


def run(verify: Any, batch: Batch, is_sparse: bool = True) -> torch.Tensor:
    """Outputs of all layers, [L, R, T, HQ, D]."""
    verify.begin(batch.plan(is_sparse))
    outs = []
    for layer_id in range(LAYERS):
        layer = SimpleNamespace(
            layer_id=layer_id,
            tp_q_head_num=HEADS * GROUP,
            tp_k_head_num=HEADS,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            scaling=SCALE,
            logit_cap=0.0,
        )
        outs.append(verify.attend(batch.queries[layer_id], layer))
    return torch.stack(outs).view(LAYERS, len(LENGTHS), WIDTH, HEADS * GROUP, DIM)


def chosen_blocks(batch: Batch, rule: BlockRule, layer: int, r: int) -> torch.Tensor:
    """Of one request in one layer, [H, N], by the rule itself."""
    slots = batch.table[batch.rows[r], : LENGTHS[r]].long()
    query = batch.queries[layer].view(len(LENGTHS), WIDTH, -1, DIM)[r, 0]
    scores = attention.block_scores(query, batch.keys[layer, slots], LENGTHS[r], rule.block_size)
    kept = attention.num_kept_blocks(torch.tensor([LENGTHS[r]]), **rule._asdict())
    return attention.choose_blocks(scores, int(kept))


def reference(batch: Batch, rule: BlockRule, sources: list[int]) -> tuple[torch.Tensor, list[list[list[set[int]]]]]:
    """Outputs, and the committed positions read by layer, request and head."""
    out = torch.zeros(LAYERS, len(LENGTHS), WIDTH, HEADS * GROUP, DIM)
    read: list[list[list[set[int]]]] = []
    for layer in range(LAYERS):
        read.append([])
        for r, length in enumerate(LENGTHS):
            blocks = chosen_blocks(batch, rule, sources[layer], r)
            read[layer].append([])
            for h in range(HEADS):
                chosen = blocks[h].tolist() if length else []
                kept = [p for b in chosen for p in range(b * rule.block_size, min((b + 1) * rule.block_size, length))]
                read[layer][r].append(set(kept))
                for t in range(NUM_QUERIES[r]):
                    positions = torch.tensor([*kept, *range(length, length + t + 1)])
                    slots = batch.table[batch.rows[r], positions].long()
                    for g in range(h * GROUP, (h + 1) * GROUP):
                        query = batch.queries[layer].view(len(LENGTHS), WIDTH, -1, DIM)[r, t, g]
                        weights = torch.softmax(batch.keys[layer, slots, h] @ query * SCALE, dim=0)
                        out[layer, r, t, g] = weights @ batch.values[layer, slots, h]
    return out, read


def selected(verify: Any, batch: Batch, layer: int, r: int, h: int) -> set[int]:
    row = verify._store.positions[layer, batch.rows[r], h].tolist()
    return {position for position in row if position >= 0}


@pytest.mark.parametrize("rule", [BlockRule(0.25, DENSE_BELOW, BLOCK), BlockRule(0.0, 0, 24)], ids=str)
@pytest.mark.parametrize("anchors", [None, [0, 2]])
def test_reads_the_blocks_of_the_rule(batch: Batch, rule: BlockRule, anchors: list[int] | None) -> None:
    """Another query's blocks, another layer's or head's, or a mask off by one: all would look like quality lost."""
    sources = [0, 0, 2, 2] if anchors else [0, 1, 2, 3]
    wanted, read = reference(batch, rule, sources)
    verify = make_verify(batch, rule, anchors)
    torch.testing.assert_close(run(verify, batch), wanted, atol=2e-6, rtol=2e-5)
    for layer in range(LAYERS):
        for r, length in enumerate(LENGTHS):
            for h in range(HEADS):
                # enough was read to fill the budget, so nothing that was not read is selected
                is_filled = len(read[layer][r][h]) >= min(24, length)
                assert is_filled
                assert selected(verify, batch, layer, r, h) <= read[layer][r][h]
    # the longest context: floor(136 / 4) + 64 tokens are 7 blocks of 13, or the two that are always kept
    assert len(read[0][3][0]) == (6 * 16 + 8 if rule.block_size == 16 else 24 + 8)


@pytest.mark.parametrize("rule", [BlockRule(1.0, 0, BLOCK), BlockRule(0.0, max(LENGTHS), BLOCK)], ids=str)
def test_the_dense_limit_is_the_dense_verify(batch: Batch, rule: BlockRule) -> None:
    """Output and selections: a token lost at the seam of context and verify, or scores in the wrong columns."""
    sparse, dense = make_verify(batch, rule), make_verify(batch, rule)
    assert torch.equal(run(sparse, batch), run(dense, batch, is_sparse=False))
    assert torch.equal(sparse._scores[:, :, : sum(LENGTHS)], dense._scores[:, :, : sum(LENGTHS)])
    for layer in range(LAYERS):
        for r, length in enumerate(LENGTHS):
            for h in range(HEADS):
                found = selected(sparse, batch, layer, r, h)
                assert found == selected(dense, batch, layer, r, h)
                assert len(found) == min(24, length)


def test_a_dense_plan_is_not_touched(batch: Batch) -> None:
    """A round that is to be dense, on a server whose other rounds are not."""
    rule = BlockRule(0.0, 0, BLOCK)
    verify = make_verify(batch, rule)
    before = run(verify, batch)
    dense, _ = reference(batch, BlockRule(1.0, 0, BLOCK), [0, 1, 2, 3])
    torch.testing.assert_close(run(verify, batch, is_sparse=False), dense, atol=2e-6, rtol=2e-5)
    # and leaves nothing behind for the next sparse one
    assert torch.equal(run(verify, batch), before)
    assert not torch.allclose(before, dense, atol=1e-2)


@pytest.mark.parametrize(
    ("modes", "dense_below", "longest", "wanted"),
    [
        (["attention"], 64, 64, "dense"),
        (["attention"], 64, 65, "sparse"),
        (["attention", "ffn"], 64, 10, "sparse"),
        (["ffn"], 64, 10, "sparse"),
        (["attention"], 0, 10, "sparse"),
    ],
    ids=str,
)
def test_a_round_of_short_contexts_is_verified_densely(
    modes: list[str], dense_below: int, longest: int, wanted: str
) -> None:
    """Blocks that are scored where all of them are read cost time for nothing; channels are lost in any context."""
    from sglang_sparsespec.adapter.worker import SparseSpecWorker

    ffn = {"verify_ffn_threshold": 0.1} if "ffn" in modes else {}
    attention = {"verify_dense_below": dense_below} if "attention" in modes else {}
    config = SparseSpecConfig(allow_lossy=True, verify_sparsity=tuple(modes), num_steps=2, **ffn, **attention)
    assert config.has_dense_verify == (modes == ["attention"] and dense_below > 0)
    ran = []

    def forward(name: str) -> Callable[[int], torch.Tensor]:
        def run(batch_size: int) -> torch.Tensor:
            ran.append(name)
            return torch.zeros(batch_size * 3, 5)

        return run

    worker: Any = SimpleNamespace(
        config=config,
        _sparse_forwards={3: forward("sparse")},
        _verify_forwards={3: forward("dense")},
        _static=SimpleNamespace(set_chain=lambda *_: None),
    )
    for is_sparse, expected in ((True, wanted), (False, "dense")):
        plan: Any = SimpleNamespace(is_sparse=is_sparse, max_committed_len=longest)
        SparseSpecWorker._verify_static(worker, plan, torch.zeros(2, 3), 2)
        assert ran.pop() == expected


def test_a_digest_is_of_weights_that_the_first_rank_holds(server_args: Callable[..., Any]) -> None:
    """SGLang cuts an output projection by heads: rank 0 must find what a calibration found, on one rank or several."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.linear import RowParallelLinear

    runtime_context.publish(server_args(), role="test")
    weights = torch.randn(HEADS * GROUP * DIM, HEADS * GROUP * DIM)
    digests = set()
    for size in (1, 2):
        model = torch.nn.Module()
        model.model = torch.nn.Module()
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Module()
        layer.self_attn.o_proj = RowParallelLinear(*weights.shape, bias=False, tp_rank=0, tp_size=size)
        layer.self_attn.o_proj.weight_loader(layer.self_attn.o_proj.weight, weights)
        model.model.layers = torch.nn.ModuleList([layer])
        digests.add(weights_digest(model, 1, DIM))
    runtime_context.reset_context()
    plain = torch.nn.Module()
    plain.model = torch.nn.Module()
    layer = torch.nn.Module()
    layer.self_attn = torch.nn.Module()
    layer.self_attn.o_proj = torch.nn.Linear(*weights.shape, bias=False)
    layer.self_attn.o_proj.weight.data = weights
    plain.model.layers = torch.nn.ModuleList([layer])
    assert digests == {weights_digest(plain, 1, DIM)}


def test_policies_without_attention_need_no_scores(batch: Batch) -> None:
    """A selection that asks no attention: nothing is captured, and the output is the same."""
    rule = BlockRule(0.25, DENSE_BELOW, BLOCK)
    found = run(make_verify(batch, rule, policy="window"), batch)
    torch.testing.assert_close(found, run(make_verify(batch, rule), batch), atol=2e-6, rtol=2e-5)


def test_pools_of_other_layouts_are_refused() -> None:
    """Interleaved K and V read as if they were not would be noise."""
    from sglang_sparsespec.adapter.sparse_verify import heads_end_to_end

    pool = torch.randn(5, 2, 3, 4)
    assert torch.equal(heads_end_to_end(pool[:, 0].contiguous())[10, 0], pool[3, 0, 1])
    assert heads_end_to_end(pool[:, 0, :1]).shape == (5, 1, 4)
    with pytest.raises(ValueError, match="evenly spaced"):
        heads_end_to_end(pool[:, 0])


@pytest.mark.parametrize("rule", [BlockRule(0.25, DENSE_BELOW, BLOCK), BlockRule(1.0, 0, BLOCK)], ids=str)
def test_lists_are_in_the_memory_plan(server_args: Callable[..., Any], batch: Batch, rule: BlockRule) -> None:
    """On a card whatever the plan forgets is taken from the KV pool's margin, until it runs out."""
    from sglang_sparsespec.adapter.memory import model_shape, round_shape

    lossy = {"verify_sparsity": ["attention"], "allow_lossy": True, "dense_verify_every": 2}
    options = {"verify_kv_ratio": rule.ratio, "verify_dense_below": rule.dense_below, "verify_block_size": BLOCK}
    args = server_args(**{f"sparsespec_{name}": value for name, value in {**lossy, **options}.items()})
    sizes: dict[str, Any] = {"max_reqs": 8, "batch_sizes": (4, 8), "shares_heads": True}
    more: dict[str, Any] = {"logits_dtype": torch.bfloat16, "device": torch.device("cpu")}
    plans = {}
    for config in (args.sparsespec_config, server_args(sparsespec_verify_attention="fused").sparsespec_config):
        policy = POLICIES["pillar"](config)
        shape = round_shape(args.get_model_config(), config, policy, **sizes, **more)
        plans[bool(config.verify_sparsity)] = (shape, plan_memory(model_shape(args.get_model_config(), 1), shape, 1000))
    shape, plan = plans[True]
    lossless_shape, lossless = plans[False]
    assert (lossless_shape.sparse_list_len, lossless_shape.has_both_verifies) == (0, False)
    assert shape.sparse_list_len >= rule.list_len(shape.context_len, shape.width)
    # two KV heads of eight requests
    assert plan.forward - lossless.forward > LIST_ENTRY_BYTES * 8 * 2 * shape.sparse_list_len
    assert plan.graphs == lossless.graphs * 3 // 2
    verify = make_verify(batch, rule)
    run(verify, batch)
    lists = verify._lists
    places = len(LENGTHS) * HEADS * rule.list_len(MAX_LEN, WIDTH)
    # beside them their scores, as floats and as indices of columns, while they are spread
    assert num_bytes([lists.slots, lists.positions]) + (4 + 4 + 3 * 8) * places <= LIST_ENTRY_BYTES * places
