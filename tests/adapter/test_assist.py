"""Drafting with n-gram guesses around a made-up model whose text repeats itself, or does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.selection.store import DraftKV, SelectionStore

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

VOCAB, K, M, MAX_REQS, CONTEXT, TAIL = 40, 6, 2, 5, 120, 20


def cycle(token: torch.Tensor) -> torch.Tensor:
    """A text with a period of 10."""
    return token // 10 * 10 + (token + 3) % 10


class Engine:
    """A worker's parts around NgramAssist; the model's next token is `follow` of the last one."""

    def __init__(self, follow: Callable[[torch.Tensor], torch.Tensor] = cycle) -> None:
        from sglang_sparsespec.adapter.assist import NgramAssist
        from sglang_sparsespec.adapter.sampling import Drafts, RoundSampler
        from sglang_sparsespec.adapter.static_round import StaticRound

        self.follow = follow
        self.drafts_of = Drafts
        self.page_table = torch.zeros(MAX_REQS + 1, CONTEXT, dtype=torch.int32)
        self.page_table[1:] = torch.arange(1, MAX_REQS + 1)[:, None] * CONTEXT + torch.arange(CONTEXT)
        store = SelectionStore(num_layers=2, num_rows=MAX_REQS + 1, num_heads=1, max_budget=8, device="cpu")
        self.static = StaticRound(max_reqs=MAX_REQS, num_draft_tokens=K + 1, store=store, tail=TAIL, device="cpu")
        self.sampler = RoundSampler(draft_sampling="sampled", sampling_backend="pytorch", seed=1, device="cpu")
        self.fed: list[list[tuple[int, int, int, int]]] = []
        self.assist = NgramAssist(
            M,
            num_steps=K,
            page_table=self.page_table,
            static=self.static,
            sampler=self.sampler,
            batch_sizes=(4,),
            plan_drafts=self._plan_drafts,
            run_model=self._run_model,
        )

    def _plan_drafts(self, draft_kv: DraftKV) -> None:
        self._draft_kv = draft_kv

    def _run_model(
        self, mode: Any, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, spec_info: Any, **_: Any
    ) -> torch.Tensor:
        places, lens = self._draft_kv.places, self._draft_kv.lens
        assert places is not None
        assert len(tokens) == len(positions) == len(slots) == len(places) == len(lens)
        is_fed = lens > 0
        for tensor in (tokens, positions, slots):
            assert (tensor[~is_fed] == 0).all()
        rows = self.rows[places[is_fed]]
        assert torch.equal(slots[is_fed], self.page_table[rows, positions[is_fed]].long())
        # a token sees the list and every position since the selection, its own included
        assert torch.equal(lens[is_fed] - self.base[places[is_fed]], positions[is_fed] - self.lens[places[is_fed]] + 1)
        columns = (places[is_fed], tokens[is_fed], positions[is_fed] - self.lens[places[is_fed]])
        self.fed.append(list(zip(*(column.tolist() for column in columns), strict=True)))
        return torch.nn.functional.one_hot(self.follow(tokens), VOCAB).float() * 8

    def begin(self, texts: list[list[int]], is_greedy: bool = True, limit: int = K) -> tuple[Any, Any, Any]:
        """A batch of requests whose last token is not cached yet."""
        num_reqs = len(texts)
        self.rows = torch.arange(num_reqs, 0, -1)
        self.lens = torch.tensor([len(text) - 1 for text in texts])
        self.base = torch.arange(num_reqs, dtype=torch.int32) + 3
        self.assist.start(
            [
                SimpleNamespace(origin_input_ids=text[:-1], output_ids=[], req_pool_idx=int(row))
                for text, row in zip(texts, self.rows, strict=True)
            ]
        )
        positions = self.lens[:, None] + torch.arange(K + 1)
        plan = SimpleNamespace(
            steps=SimpleNamespace(num_steps=limit),
            rows=self.rows,
            committed_lens=self.lens,
            positions=positions,
            slots=self.page_table[self.rows[:, None], positions].long(),
            max_committed_len=int(self.lens.max()),
            batch_size=self.assist.forward.padded(num_reqs),
            rule=SimpleNamespace(of=lambda reqs: None),
            penalised=None,
        )
        draft_kv = DraftKV(torch.ones(2, num_reqs, 1, 8, dtype=torch.int32), self.base)
        self.static.load(plan.rows, plan.committed_lens, plan.positions, plan.slots, draft_kv, plan.batch_size)
        batch = SimpleNamespace(sampling_info=SimpleNamespace(is_all_greedy=is_greedy, logit_bias=None))
        self.fed.clear()
        return batch, plan, torch.tensor([text[-1] for text in texts])

    def draft(self, texts: list[list[int]], num_forwards: int, limit: int = K) -> tuple[list[list[int]], list[int]]:
        batch, plan, current = self.begin(texts, limit=limit)
        drafts = self.drafts_of(len(texts), limit, "cpu")
        counts = self.assist.draft(batch, plan, drafts, current, num_forwards).tolist()
        assert len(self.fed) == num_forwards
        return [row[:n] for row, n in zip(drafts.tokens.tolist(), counts, strict=True)], counts


def text(start: int, length: int) -> list[int]:
    tokens = [start]
    while len(tokens) < length:
        tokens.append(int(cycle(torch.tensor(tokens[-1]))))
    return tokens


def continuation(last: int, length: int) -> list[int]:
    return text(last, length + 1)[1:]


@pytest.mark.parametrize("num_reqs", [1, 3, 5])
def test_a_text_that_repeats_itself_takes_fewer_forwards(num_reqs: int) -> None:
    """Guesses at the wrong place, drafts out of order, or a forward that yields one draft all the same."""
    host = Engine()
    texts = [text(10 * (i % 4) + i, 25 + i) for i in range(num_reqs)]
    # three drafts of each forward
    drafts, counts = host.draft(texts, 2)
    assert counts == [K] * num_reqs
    assert drafts == [continuation(tokens[-1], K) for tokens in texts]
    assert [[offset for _, _, offset in fed] for fed in host.fed] == [[0, 1, 2] * num_reqs, [3, 4, 5] * num_reqs]
    _, fewer = host.draft(texts, 1)
    assert fewer == [3] * num_reqs


def test_without_a_match_drafts_come_one_by_one() -> None:
    """A guess that is fed although there is none, or a draft that is lost where nothing was guessed."""
    host = Engine()
    texts = [text(0, 25), [7, 5, 30], [21]]
    drafts, counts = host.draft(texts, 4)
    assert counts == [K, 4, 4]
    assert drafts == [continuation(tokens[-1], n) for tokens, n in zip(texts, counts, strict=True)]
    assert [offset for place, _, offset in host.fed[0] if place == 1] == [0]
    # who has all its drafts feeds nothing any more
    assert [place for place, _, _ in host.fed[3]] == [1, 2]


def test_wrong_guesses_are_not_drafts() -> None:
    """The model says something new where the text said something else before."""
    host = Engine(follow=lambda token: (token + 1) % VOCAB)
    drafts, counts = host.draft([text(0, 30)], 3)
    last = text(0, 30)[-1]
    assert counts == [3]
    assert drafts == [[last + 1, last + 2, last + 3]]


def test_drafts_end_at_the_rounds_k() -> None:
    """A guess beyond k has a position that the verify does not cover."""
    host = Engine()
    drafts, counts = host.draft([text(0, 30)], 4, limit=4)
    assert (counts, drafts) == ([4], [continuation(text(0, 30)[-1], 4)])
    assert max(offset for fed in host.fed for _, _, offset in fed) == 3


def test_sampled_drafts_keep_what_they_were_sampled_from() -> None:
    """Acceptance against another draft's distribution, or against memory that was never written."""
    from sglang_sparsespec.speculation.distribution import SamplingRule

    host = Engine()
    texts = [text(0, 30), [7, 5, 30]]
    batch, plan, current = host.begin(texts, is_greedy=False)
    width = M + 1
    plan.rule = SamplingRule(
        temperatures=torch.full((2, 1), 4.0),
        top_ks=torch.full((2,), 1 << 30, dtype=torch.int32),
        top_ps=torch.ones(2),
        min_ps=torch.zeros(2),
        need_top_k=False,
        need_top_p=False,
        need_min_p=False,
        has_greedy=False,
    )
    assert plan.rule.of(torch.arange(2).repeat_interleave(width)).temperatures.shape == (6, 1)
    drafts = host.drafts_of(2, K, "cpu")
    counts = host.assist.draft(batch, plan, drafts, current, 3)
    assert drafts.logits is not None
    assert drafts.probs is not None
    assert drafts.logits.isfinite().all()
    q = torch.softmax(drafts.logits / 4.0, dim=-1).gather(2, drafts.tokens[..., None])[..., 0]
    is_draft = torch.arange(K) < counts[:, None]
    assert torch.allclose(q[is_draft], drafts.probs[is_draft], atol=1e-6)
    # each draft was drawn behind the one before it
    before = torch.cat([current[:, None], drafts.tokens[:, :-1]], dim=1)
    assert torch.equal(drafts.logits.argmax(dim=-1)[is_draft], cycle(before)[is_draft])


def test_what_is_accepted_is_remembered() -> None:
    """Guesses from what was drafted and rejected, or of a request that had the row before."""
    host = Engine()
    texts = [text(0, 24)]
    _, plan, current = host.begin(texts)
    accepted = torch.tensor([[31, 32, 33, 34, 31, 32, 0]])
    # of the request that had the row before
    host.assist._history[1, 23:] = 39
    host.assist.commit(plan, current, SimpleNamespace(accept_tokens=accepted))
    row = host.assist._history[1]
    assert row[:24].tolist() == texts[0]
    assert row[24:30].tolist() == [31, 32, 33, 34, 31, 32]
    host.assist.start([SimpleNamespace(origin_input_ids=[9, 8], output_ids=[7], req_pool_idx=1)])
    assert host.assist._history[1, :3].tolist() == [9, 8, 7]


def test_guesses_are_used_where_they_come_true() -> None:
    """A server that guesses for ever at a text that never repeats, or never where it would pay."""
    host = Engine()
    assert [host.assist.num_forwards(K) for _ in range(3)] == [K, 0, 0]
    host.draft([text(0, 30)], K)
    # six drafts from two forwards
    assert host.assist.num_forwards(K) == 2
    assert host.assist.describe() == {"guesses": M, "drafts_per_forward": 3.0}
    for _ in range(60):
        host.draft([[7, 5, 30]], 2)
        host.assist.num_forwards(K)
    assert host.assist.pace.drafts_per_forward < 1.25
    assert host.assist.num_forwards(0) == 0
    assert [host.assist.num_forwards(K) for _ in range(130)].count(K) == 2
