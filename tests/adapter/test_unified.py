"""Rounds by the unified schedule around a made-up model, on the device tensors that a server has.

The model's next token follows from the token and its position alone, and drafting rows are wrong now and then. So what
comes out is known, and so is every token, position and slot that goes in.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from sglang_sparsespec.adapter.ranks import Ranks
from sglang_sparsespec.selection.store import DraftKV
from sglang_sparsespec.speculation.phases import assign, load_of, turns

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.adapter

VOCAB, K, MAX_REQS, CONTEXT = 50, 3, 12, 200
WIDTH = K + 1
NUM_COLUMNS = MAX_REQS * CONTEXT


class Seen(NamedTuple):
    """One mixed forward, without its padding."""

    drafts: list[tuple[int, int]]
    """Row and position of each token of a drafting request."""
    list_lens: list[int]
    verifies: list[tuple[int, int, int]]
    """Row, committed length and number of tokens of each verifying request."""


def next_token(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (7 * tokens + 3 * positions + 1) % VOCAB


def together(*columns: torch.Tensor) -> list[Any]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


class Engine:
    """A worker's parts around UnifiedRounds; `requests` are what its batches are made of."""

    def __init__(
        self,
        sampler: Any,
        batch_sizes: tuple[int, ...] = (),
        wrong_every: int = 0,
        device: str = "cpu",
        is_watched: bool = True,
        group: Any = None,
    ) -> None:
        from sglang_sparsespec.adapter.sampling import KeptDrafts
        from sglang_sparsespec.adapter.unified import MixedForward, UnifiedRounds
        from sglang_sparsespec.adapter.unified_state import UnifiedState

        self.page_table = torch.zeros(MAX_REQS + 1, CONTEXT, dtype=torch.int32)
        # row 0 is SGLang's padding; every other position of a row has a slot that tells where it is
        self.page_table[1:] = torch.arange(1, MAX_REQS + 1)[:, None] * CONTEXT + torch.arange(CONTEXT)
        self.page_table = self.page_table.to(device)
        self.device, self._is_watched = device, is_watched
        self.selected = torch.arange(MAX_REQS + 1, device=device) % 3 + 1
        self.laid_out: list[tuple[list[int], list[int]]] = []
        lists = torch.zeros(2, MAX_REQS + 1, 1, 16, dtype=torch.int32, device=device)
        self.state = UnifiedState(num_rows=MAX_REQS + 1, max_reqs=MAX_REQS, num_steps=K, lists=lists)
        self.seen: list[Seen] = []
        self._wrong_every, self._forwards = wrong_every, 0
        backend = SimpleNamespace(policy=SimpleNamespace(needs_attention=True), plan_mixed=self._plan_mixed)
        self.rounds = UnifiedRounds(
            self.state,
            MixedForward(backend, self._run_model, self.page_table, lambda: CONTEXT),
            batch_sizes,
            num_steps=K,
            sampler=sampler,
            kept=KeptDrafts(MAX_REQS + 1, K),
            ranks=Ranks(group or SimpleNamespace(world_size=1)),
            list_slots=self._list_slots,
        )
        self.committed: dict[str, int] = {}
        self.current: dict[str, int] = {}
        self.reqs: list[Any] = []

    def _list_slots(self, rows: torch.Tensor, committed_lens: torch.Tensor, max_len: int) -> DraftKV:
        if self._is_watched:
            assert int(committed_lens.max()) <= max_len + WIDTH
            self.laid_out.append((rows.tolist(), committed_lens.tolist()))
        slots = (1000 * rows + committed_lens).int().view(1, -1, 1, 1).expand(2, -1, 1, 9)
        return DraftKV(slots, (self.selected[rows] + committed_lens).int())

    def _plan_mixed(self, drafts: Any, verify: Any) -> None:
        self._drafts, self._verify = drafts, verify

    def _run_model(
        self,
        mode: Any,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        spec_info: Any,
        *,
        rows: torch.Tensor,
        lens: torch.Tensor,
    ) -> torch.Tensor:
        if self._is_watched:
            self._watch(tokens, positions, slots, rows)
        self._forwards += 1
        num_drafting = self._drafts.places.shape[0]
        wanted = next_token(tokens, positions)
        if self._wrong_every:
            wrong = torch.arange(num_drafting) % self._wrong_every == self._forwards % self._wrong_every
            wanted[:num_drafting][wrong] = (wanted[:num_drafting][wrong] + 1) % VOCAB
        return torch.nn.functional.one_hot(wanted, VOCAB).float() * 10

    def _watch(self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        assert torch.equal(slots, self.page_table[rows, positions].long())
        # padding stays where nobody reads
        assert (positions[rows == 0] == 0).all()
        assert (tokens[rows == 0] == 0).all()
        num_drafting = self._drafts.places.shape[0]
        assert torch.equal(self._drafts.places, rows[:num_drafting])
        verify = self._verify
        assert verify.width == WIDTH
        chains = rows[num_drafting:].view(-1, WIDTH)
        assert torch.equal(chains, verify.rows[:, None].expand(-1, WIDTH))
        offsets = positions[num_drafting:].view(-1, WIDTH) - verify.committed_lens[:, None]
        real = verify.rows > 0
        assert (offsets[real] == torch.arange(WIDTH)).all()
        assert (verify.num_queries[~real] == 0).all()
        is_draft = rows[:num_drafting] > 0
        self.seen.append(
            Seen(
                together(rows[:num_drafting][is_draft], positions[:num_drafting][is_draft]),
                (self._drafts.lens[is_draft] - self.selected[self._drafts.places[is_draft]]).tolist(),
                together(verify.rows[real], verify.committed_lens[real], verify.num_queries[real]),
            )
        )

    # What a scheduler does

    def add(self, rid: str, row: int, length: int) -> None:
        self.reqs.append(SimpleNamespace(rid=rid, req_pool_idx=row))
        self.committed[rid], self.current[rid] = length, length % VOCAB

    def remove(self, rid: str) -> int:
        """The row that it had."""
        [req] = [req for req in self.reqs if req.rid == rid]
        self.reqs.remove(req)
        self.rounds.drop(rid)
        return req.req_pool_idx

    def batch_and_plan(self, limits: list[int] | None = None) -> tuple[Any, Any]:
        from sglang_sparsespec.adapter.adaptive import StepPlan

        lens = torch.tensor([self.committed[req.rid] for req in self.reqs], device=self.device)
        num_reqs = len(self.reqs)
        batch = SimpleNamespace(
            reqs=list(self.reqs),
            spec_info=SimpleNamespace(
                bonus_tokens=torch.tensor([self.current[req.rid] for req in self.reqs], device=self.device)
            ),
            sampling_info=SimpleNamespace(is_all_greedy=True, logit_bias=None),
            return_logprob=True,
            has_grammar=False,
        )
        plan = SimpleNamespace(
            steps=StepPlan(K, limits),
            rows=torch.tensor([req.req_pool_idx for req in self.reqs], device=self.device),
            committed_lens=lens,
            max_committed_len=int(lens.max()),
            len_bounds=lens.tolist(),
            batch_size=self.rounds.forward.padded(num_reqs),
            rule=SimpleNamespace(of=lambda reqs: None),
            penalised=None,
        )
        return batch, plan

    def round(self, limits: list[int] | None = None) -> list[list[int]]:
        """Tokens that each request of the batch got."""
        batch, plan = self.batch_and_plan(limits)
        assert self.rounds.takes(batch, plan, NUM_COLUMNS)
        self.seen.clear()
        self.laid_out.clear()
        acceptance, logits = self.rounds.run(batch, plan)
        assert len(self.seen) == K + 1
        tokens = [row[:n] for row, n in zip(acceptance.accept_tokens.tolist(), acceptance.accept_lens, strict=True)]
        for i, req in enumerate(batch.reqs):
            assert tokens[i][-1] == int(acceptance.bonus_tokens[i])
            # the model's own tokens, whatever was drafted, and the logits of just these positions
            current, position = self.current[req.rid], self.committed[req.rid]
            assert logits is not None
            for j, token in enumerate(tokens[i]):
                assert token == int(next_token(torch.tensor(current), torch.tensor(position + j)))
                assert int(logits.view(len(batch.reqs), WIDTH, VOCAB)[i, j].argmax()) == token
                current = token
            self.committed[req.rid] += len(tokens[i])
            self.current[req.rid] = tokens[i][-1]
        return tokens


def make_sampled(batch: Any, plan: Any, **changes: Any) -> None:
    """All requests of a batch at a temperature of 4."""
    from sglang_sparsespec.speculation.distribution import SamplingRule

    batch.sampling_info.is_all_greedy = False
    num_reqs, device = plan.rows.shape[0], plan.rows.device
    plan.rule = SamplingRule(
        temperatures=torch.full((num_reqs, 1), 4.0, device=device),
        top_ks=torch.full((num_reqs,), 1 << 30, dtype=torch.int32, device=device),
        top_ps=torch.ones(num_reqs, device=device),
        min_ps=torch.zeros(num_reqs, device=device),
        need_top_k=False,
        need_top_p=False,
        need_min_p=False,
        has_greedy=False,
        **changes,
    )


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    from sglang_sparsespec.adapter.sampling import RoundSampler

    def build(**options: Any) -> Engine:
        device = options.get("device", "cpu")
        sampler = RoundSampler(draft_sampling="sampled", sampling_backend="pytorch", seed=1, device=device)
        return Engine(sampler, **options)

    return build


@pytest.mark.parametrize("batch_sizes", [(), (2, 5, 9)], ids=["as it is", "padded"])
@pytest.mark.parametrize("num_reqs", [1, 3, 4, 7, 12])
def test_steady_rounds_verify_whole_chains(
    engine: Callable[..., Engine], num_reqs: int, batch_sizes: tuple[int, ...]
) -> None:
    """Held drafts that are lost, shifted by one, or another request's: all drafts are right here, so all must stand."""
    host = engine(batch_sizes=batch_sizes)
    for i in range(num_reqs):
        host.add(f"r{i}", i + 1, 10 + i)
    host.round()
    for _ in range(3):
        assert [len(tokens) for tokens in host.round()] == [WIDTH] * num_reqs
        assert sorted(row for seen in host.seen for row, _, _ in seen.verifies) == list(range(1, num_reqs + 1))
        assert {queries for seen in host.seen for _, _, queries in seen.verifies} == {WIDTH}
        for seen in host.seen:
            assert len(seen.verifies) <= load_of(num_reqs, K).verify_reqs
            assert len(seen.drafts) <= load_of(num_reqs, K).draft_reqs
            # the lists end with the token that is fed
            assert seen.list_lens == [position + 1 for _, position in seen.drafts]


def test_drafts_that_are_wrong_cost_nothing_else(engine: Callable[..., Engine]) -> None:
    """The state after a rejection: length, current token, list and offsets of what is drafted next."""
    host = engine(wrong_every=4)
    for i in range(9):
        host.add(f"r{i}", 12 - i, 5 + i)
    lens = [len(tokens) for _ in range(20) for tokens in host.round()]
    assert {1, 2, 3, 4} <= set(lens)


class TwoRanks:
    """SGLang's group as rank 0, whose broadcasts are kept, and then as rank 1, which hears them one by one."""

    world_size = 2

    def __init__(self) -> None:
        self.said: list[torch.Tensor] = []
        self.overruled: list[tuple[int, bool]] = []
        """Of each broadcast, dimensions of the tensor, and whether rank 1 had another one."""
        self.rank = 0

    def broadcast(self, tokens: torch.Tensor, src: int = 0) -> torch.Tensor:
        assert src == 0
        if self.rank == 0:
            self.said.append(tokens.clone())
            return tokens
        heard = self.said.pop(0)
        assert heard.shape == tokens.shape
        self.overruled.append((tokens.dim(), not torch.equal(heard, tokens)))
        return tokens.copy_(heard)


def test_ranks_verify_rank_0s_chains(engine: Callable[..., Engine]) -> None:
    """Two ranks that drafted otherwise and each verified its own: chains, [num, K + 1], agree before every forward."""
    group, committed = TwoRanks(), []
    for rank, wrong_every in enumerate((4, 3)):
        group.rank = rank
        host = engine(wrong_every=wrong_every, group=group)
        for i in range(9):
            host.add(f"r{i}", i + 1, 10 + i)
        committed.append([host.round() for _ in range(6)])
    assert committed[0] == committed[1]
    assert group.said == []
    chains = [differs for dims, differs in group.overruled if dims == 2]
    assert sum(chains) > 10
    # greedy, over the same chains: there was nothing left to disagree about
    acceptances = [differs for dims, differs in group.overruled if dims == 1]
    assert len(acceptances) == 6 * (K + 1)
    assert not any(acceptances)


def test_coming_going_and_rows_that_change_hands(engine: Callable[..., Engine]) -> None:
    """Drafts of a request that is gone, verified for the one that has its row now."""
    host = engine(wrong_every=5, batch_sizes=(4, 8))
    for i in range(8):
        host.add(f"r{i}", i + 1, 20 + i)
    host.round()
    row = host.remove("r3")
    host.add("new", row, 9)
    host.round()
    assert ([row], [9]) in host.laid_out[:1]
    # one that sat a round out may have been anywhere
    away = host.reqs.pop(0)
    host.round()
    host.reqs.append(away)
    host.round()
    assert host.laid_out[0][0] == [away.req_pool_idx]
    # and one that comes back to another row
    moved = host.reqs[2]
    moved.req_pool_idx = 11
    host.round()
    assert host.laid_out[0][0] == [11]


def test_after_rounds_of_the_other_schedule_nothing_is_held(engine: Callable[..., Engine]) -> None:
    """Lists that the other schedule has overwritten, and drafts that follow a token which is past."""
    host = engine()
    for i in range(6):
        host.add(f"r{i}", i + 1, 20 + i)
    host.round()
    host.rounds.forget()
    for rid in host.committed:
        host.committed[rid] += 2
        host.current[rid] = (host.current[rid] + 11) % VOCAB
    host.state.lists.fill_(-1)
    host.round()
    assert host.laid_out[0][0] == [1, 2, 3, 4, 5, 6]
    assert (host.state.lists[:, 1:7, :, :9] >= 0).all()
    assert [len(tokens) for tokens in host.round()] == [WIDTH] * 6


def test_limits_bind_whatever_the_phase(engine: Callable[..., Engine]) -> None:
    """A request that allows one draft gets at most two tokens a round, and its neighbours all of theirs."""
    host = engine()
    for i in range(8):
        host.add(f"r{i}", i + 1, 20 + i)
    limits = [K, 0, 1, K, 2, K, K, 1]
    host.round(limits)
    for _ in range(2):
        assert [len(tokens) for tokens in host.round(limits)] == [limit + 1 for limit in limits]


def test_what_the_schedule_does_not_take(engine: Callable[..., Engine]) -> None:
    """Rounds in which a chain's logits depend on its tokens, or with another k."""
    host = engine()
    host.add("r", 1, 10)
    batch, plan = host.batch_and_plan()
    assert host.rounds.takes(batch, plan, NUM_COLUMNS)
    batch.has_grammar = True
    assert not host.rounds.takes(batch, plan, NUM_COLUMNS)
    batch.has_grammar, plan.penalised = False, object()
    assert not host.rounds.takes(batch, plan, NUM_COLUMNS)
    plan.penalised, plan.steps = None, plan.steps._replace(num_steps=K - 1)
    assert not host.rounds.takes(batch, plan, NUM_COLUMNS)
    plan.steps, batch.sampling_info.logit_bias = plan.steps._replace(num_steps=K), torch.zeros(1)
    assert not host.rounds.takes(batch, plan, NUM_COLUMNS)


def test_only_those_that_verify_together_need_to_fit(engine: Callable[..., Engine]) -> None:
    """Requests that share a prefix have more tokens than the pool; rounds that fit must not be lost over that."""
    host = engine()
    num_reqs = 2 * (K + 1)
    for row in range(1, num_reqs + 1):
        host.add(f"r{row}", row, 10)
    batch, plan = host.batch_and_plan()
    together = load_of(plan.batch_size, K).verify_reqs
    assert together < num_reqs
    plan.len_bounds = [5] * (num_reqs - together) + [10] * together
    assert host.rounds.takes(batch, plan, 10 * together)
    assert not host.rounds.takes(batch, plan, 10 * together - 1)


def test_sampled_drafts_keep_what_they_were_sampled_from(engine: Callable[..., Engine]) -> None:
    """Acceptance against another draft's distribution; and drafts from a greedy round have none."""
    host = engine()
    num_reqs = 6
    for i in range(num_reqs):
        host.add(f"r{i}", i + 1, 20 + i)
    host.round()
    held = {rid: h.num_drafts for rid, h in host.rounds._held.items()}
    assert max(held.values()) == K
    seen: list[Any] = []
    accept = host.rounds._sampler.accept

    def watch(logits: Any, drafts: Any, *rest: Any) -> Any:
        seen.append(drafts)
        return accept(logits, drafts, *rest)

    host.rounds._sampler.accept = watch  # type: ignore[assignment,method-assign]

    def sampled(**changes: Any) -> None:
        batch, plan = host.batch_and_plan()
        make_sampled(batch, plan, **changes)
        acceptance, _ = host.rounds.run(batch, plan)
        for i, req in enumerate(batch.reqs):
            host.committed[req.rid] += int(acceptance.accept_lens[i])
            host.current[req.rid] = int(acceptance.bonus_tokens[i])

    def num_queries() -> list[int]:
        return sorted(queries for turn in host.seen[-WIDTH:] for _, _, queries in turn.verifies)

    sampled()
    # who held drafts of the greedy round verifies as if it had come anew
    anew = [1, 2, 3, 3, 4, 4]
    assert num_queries() == anew
    sampled()
    assert num_queries() == [4] * 6
    # and so where the order of the filters is another one, for that changes q
    sampled(filter_order="sequential")
    assert num_queries() == anew
    seen.clear()
    sampled(filter_order="sequential")
    for drafts in seen:
        probs = torch.softmax(drafts.logits / 4.0, dim=-1)
        assert torch.allclose(probs.gather(2, drafts.tokens[..., None])[..., 0], drafts.probs, atol=1e-6)
        assert (drafts.probs < 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
def test_nothing_waits_for_the_device(engine: Callable[..., Engine], is_sampled: bool) -> None:
    """One wait in a round of nine forwards leaves the GPU idle nine times."""
    host = engine(device="cuda", is_watched=False, batch_sizes=(4, 8))
    for i in range(7):
        host.add(f"r{i}", i + 1, 20 + i)
    batch, plan = host.batch_and_plan()
    if is_sampled:
        make_sampled(batch, plan)
    # kernels are compiled, and memory is pinned for the first time
    host.rounds.run(batch, plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            host.rounds.run(batch, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_reqs", [1, 3, 9, 11, 128])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_inputs_are_those_of_the_forwards_by_lists(num_reqs: int, k: int) -> None:
    """The arrays of a round are another way to write down `phases.turns`, padding aside."""
    from sglang_sparsespec.adapter.unified_state import RoundInputs

    rng, width = random.Random(num_reqs), k + 1
    rows = torch.arange(100, 100 + num_reqs)
    for batch_size in (num_reqs, num_reqs + 5):
        held = [rng.randint(0, k) for _ in range(num_reqs)]
        phases = assign(held, k)
        inputs = RoundInputs(held, phases, k, batch_size, torch.device("cpu"))
        load, packed = load_of(batch_size, k), inputs.packed(rows)
        for number, turn in enumerate(turns(held, phases, k)):
            reqs, offsets = inputs.drafting(number)
            assert (reqs.tolist(), offsets.tolist()) == (turn.draft_reqs, turn.draft_offsets)
            reqs, num_drafts = inputs.verifying(number)
            assert (reqs.tolist(), num_drafts.tolist()) == (turn.verify_reqs, turn.num_drafts)
            of_rows, of_numbers = packed[number].chunk(2)
            chains = slice(load.draft_reqs, load.draft_reqs + len(turn.verify_reqs) * width)
            assert of_rows[chains].tolist() == [100 + req for req in turn.verify_reqs for _ in range(width)]
            assert of_numbers[chains].tolist() == list(range(width)) * len(turn.verify_reqs)
            # what is left is padding
            used = 2 * (len(turn.draft_reqs) + len(turn.verify_reqs) * (width + 1))
            assert int((of_rows > 0).sum()) == used // 2
            assert (of_numbers[of_rows == 0] == 0).all()
        assert [inputs.num_verified[req] for turn in turns(held, phases, k) for req in turn.verify_reqs] == [
            count for turn in turns(held, phases, k) for count in turn.num_drafts
        ]
