"""Rounds of an adaptive server that neither draft nor verify, and what has to happen before drafts go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.config import SparseSpecConfig

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

CONFIG = SparseSpecConfig(adaptive=True, verify_attention="fused", plain_steps=4)


def requests(*left: int) -> list[Any]:
    """As much of Req as is read: requests that may say so much more."""
    return [
        SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=None, max_new_tokens=10 + tokens),
            output_ids=[0] * 10,
            spec_verify_ct=0,
            is_retracted=False,
            finished=lambda: False,
        )
        for tokens in left
    ]


class Chooser:
    """RoundSteps whose controller is told what to choose, and notes what it is told."""

    def __init__(self, config: SparseSpecConfig = CONFIG, **settings: Any) -> None:
        from sglang_sparsespec.adapter.adaptive import RoundSteps, round_of

        self.now = 100.0
        self.steps = RoundSteps(config, clock=lambda: self.now, **settings)
        self.observed: list[tuple[int, int, int | None]] = []
        self.deferred = 0
        self.k = 8
        if self.steps.controller is not None:
            controller: Any = self.steps.controller
            controller.choose = lambda pool, limits: round_of(self.k, pool, limits)
            controller.deferred = self._defer
            controller.observe = self._observe

    def _defer(self, chosen: Any) -> None:
        self.deferred += 1

    def _observe(self, done: Any, num_correct: list[int], round_ms: float | None) -> None:
        self.observed.append((done.num_steps, done.plain_steps, None if round_ms is None else round(round_ms)))

    def plan(self, k: int, reqs: list[Any] | None = None, *, allows_plain: bool = True) -> tuple[int, int]:
        """(k, tokens of a plain round) of the next round."""
        self.k = k
        plan = self.steps.next_round(reqs or requests(100, 100), 1000, allows_plain=allows_plain)
        return plan.num_steps, plan.plain_steps

    def arrive(self, num_reqs: int = 2, ms: float = 10.0) -> None:
        self.now += ms / 1e3
        self.steps.verified([0] * num_reqs)


def test_a_spell_of_plain_decoding_ends_with_a_new_selection() -> None:
    """Drafts from a selection of long ago would see neither what it left out since nor, past the list, anything."""
    chooser = Chooser()
    assert [chooser.plan(k) for k in (8, 0, 0)] == [(8, 0), (0, 4), (0, 4)]
    assert chooser.steps.is_stale
    # wanted are drafts; what runs is a verify of one token
    assert chooser.plan(4) == (0, 0)
    assert (chooser.steps.is_stale, chooser.deferred) == (False, 1)
    assert chooser.plan(4) == (4, 0)
    assert chooser.deferred == 1


def test_a_verify_of_one_token_is_as_good_as_any() -> None:
    """Penalties, grammars: such rounds verify, and a second verify behind them would be for nothing."""
    chooser = Chooser()
    assert [chooser.plan(0, allows_plain=False), chooser.plan(8)] == [(0, 0), (8, 0)]
    assert chooser.deferred == 0
    assert [chooser.plan(0), chooser.plan(0, allows_plain=False), chooser.plan(8)] == [(0, 4), (0, 0), (8, 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": False},
        {"adaptive": None},
        {"verify_attention": "backend"},
        {"allow_lossy": True, "verify_sparsity": ("attention",)},
    ],
    ids=str,
)
def test_other_servers_verify_every_round(options: dict[str, Any]) -> None:
    """A lossy server's tokens come out of its verify; nobody captured a plain decode for the others."""
    config = SparseSpecConfig(**{"adaptive": True, "verify_attention": "fused", **options})
    assert config.most_plain_steps == 0
    chooser = Chooser(config)
    chooser.steps.wanted = lambda pool, limits: SimpleNamespace(num_steps=0, allowed=(0, 0), pool_tokens=pool)  # type: ignore[method-assign, assignment, return-value]
    assert chooser.plan(0) == (0, 0)


def test_no_more_tokens_than_a_round_has_slots_for() -> None:
    """Slots are reserved for k + 1 tokens."""
    assert SparseSpecConfig(adaptive=True, verify_attention="fused", num_steps=2).most_plain_steps == 3


@pytest.mark.parametrize(
    ("left", "steps"),
    [
        ([100], 4),
        ([4, 4], 4),
        ([2, 2], 2),
        ([1], 1),
        # one of many may be done in vain for a few tokens
        ([1] + [100] * 31, 4),
        ([1] * 16 + [100] * 16, 1),
        ([3] * 16 + [100] * 16, 3),
    ],
    ids=str,
)
def test_little_is_done_for_requests_that_have_ended(left: list[int], steps: int) -> None:
    """Short answers would pay for tokens that nobody gets."""
    from sglang_sparsespec.adapter.adaptive import worthwhile_steps

    assert worthwhile_steps(left, 4) == steps
    assert Chooser().plan(0, requests(*left)) == (0, steps)


def test_the_controller_hears_of_plain_rounds_as_they_were() -> None:
    """A round's time for a token's makes plain decoding four times too slow; one that made a selection is neither."""
    chooser = Chooser()
    for k in (0, 0, 8, 8, 8):
        chooser.plan(k)
    for _ in range(5):
        chooser.arrive()
    # the first has nothing before it
    assert chooser.observed == [(0, 4, None), (0, 4, 10), (0, 1, None), (8, 1, 10), (8, 1, 10)]


def test_the_controllers_times_are_of_a_token() -> None:
    from sglang_sparsespec.speculation.controller import Controller, Round

    controller = Controller((0, 1, 2, 4, 8), plain_steps=4)
    for _ in range(20):
        controller.observe(Round(8, 1000, (8, 8)), [5, 6], 40.0)
        controller.observe(Round(0, 1000, (0, 0), plain_steps=4), [0, 0], 20.0)
    times = controller.times.of(2)
    assert times.round_ms(0, 1000) == pytest.approx(5.0, rel=0.02)
    assert times.round_ms(8, 1000) == pytest.approx(40.0, rel=0.02)
    # 13 tokens in 40 ms and 8 in 20, where plain decoding has 2 in 5
    assert controller.status.measured_speedup == pytest.approx((6.5 * 5 + 20) / 60, rel=0.1)


def test_a_try_that_needs_a_selection_first_is_not_cut_short() -> None:
    """The verify in between took one of its rounds."""
    from sglang_sparsespec.speculation.controller import BURST, Controller

    controller = Controller((0, 1, 2, 4, 8))
    controller._start(4)
    tried = controller.choose(1000, [8, 8])
    assert (tried.num_steps, tried.is_try) == (4, True)
    controller.deferred(tried)
    again = [controller.choose(1000, [8, 8]) for _ in range(BURST)]
    assert [done.num_steps for done in again if done.is_try] == [4] * (BURST - 1)
    # and its drafts saw a selection that one query had made
    assert again[0].follows_plain


def test_a_request_that_left_in_a_plain_spell_brings_its_age_back() -> None:
    """Fresh as all others are, this one's selection is from before it left."""
    chooser = Chooser()
    assert chooser.plan(8) == (8, 0)
    chooser.steps.brought_back(is_stale=False)
    assert chooser.plan(8) == (8, 0)
    chooser.steps.brought_back(is_stale=True)
    assert [chooser.plan(8), chooser.plan(8)] == [(0, 0), (8, 0)]


def test_every_rank_makes_the_same_rounds() -> None:
    """A rank that verified while the others decode would wait for a collective that nobody joins."""

    class Follower(HostRanks):
        def __init__(self, ks: list[int]) -> None:
            super().__init__(None, rank=1, size=2)
            self.ks = ks

        def of_rank_0(self, value: int) -> int:
            return self.ks.pop(0)

    wanted = [0, 0, 8, 8, 0, 2]
    leader, follower = Chooser(), Chooser(ranks=Follower(list(wanted)))
    assert follower.steps.controller is None
    assert [leader.plan(k) for k in wanted] == [follower.plan(k) for k in wanted]


def test_tokens_of_plain_rounds_are_no_drafts_that_stood() -> None:
    """SGLang takes what was accepted, less one, for drafts: a server that drafts nothing would accept all of them."""
    from sglang_sparsespec.adapter.worker import PlainRoundResult

    result = PlainRoundResult(accept_lens=torch.tensor([4, 4, 4]))
    # as SGLang fills it in
    result.num_correct_drafts = 9
    result.num_correct_drafts_per_req_cpu = [3, 3, 3]
    assert result.num_correct_drafts == 0
    assert result.num_correct_drafts_per_req_cpu == [0, 0, 0]
    assert PlainRoundResult().num_correct_drafts_per_req_cpu is None

    chooser = Chooser()
    reqs = requests(100, 100, 100)
    reqs[1].is_retracted = True
    reqs[2].finished = lambda: True
    chooser.plan(0, reqs)
    chooser.arrive(3)
    # SGLang counts the round itself once
    assert [req.spec_verify_ct for req in reqs] == [3, 0, 0]


@pytest.mark.parametrize("sharing", ["layer", "head"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_prefill_selects_sinks_and_newest_where_it_captures_nothing(sharing: str, fused: bool) -> None:
    """A row's last request's selection, of other positions, would be drafted from."""
    from sglang_sparsespec.adapter.attention_backend import SparseSpecAttnBackend
    from sglang_sparsespec.selection import POLICIES
    from sglang_sparsespec.selection.store import SelectionStore

    config = SparseSpecConfig(min_budget=8, sink=2, recent_window=3, sharing=sharing)
    store = SelectionStore(
        num_layers=3, num_rows=5, num_heads=2 if sharing == "head" else 1, max_budget=12, device="cpu"
    )
    store.positions.fill_(77)
    runner: Any = SimpleNamespace(req_to_token_pool=None, token_to_kv_pool=None)
    policy: Any = POLICIES["pillar"](config)
    timer: Any = None
    verify: Any = object() if fused else None
    backend = SparseSpecAttnBackend(object(), runner, policy, store, 4, timer, fused=verify)  # type: ignore[arg-type]
    backend.select_after_prefill(torch.tensor([3, 1]), torch.tensor([20, 5], dtype=torch.int32), 20)
    if not fused:
        # it captures the prompt's last queries instead
        assert (store.positions == 77).all()
        return
    assert store.num_selected[[3, 1]].tolist() == [8, 5]
    assert store.until[[3, 1]].tolist() == [20, 5]
    for row, expected in ((3, {0, 1, *range(14, 20)}), (1, set(range(5)))):
        for heads in store.positions[:, row]:
            for positions in heads:
                assert set(positions[: len(expected)].tolist()) == expected
    assert (store.positions[:, [0, 2, 4]] == 77).all()


@pytest.mark.parametrize(
    ("device", "options", "adapts"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"adaptive": False}, False),
        ("cpu", {"adaptive": True}, True),
        ("cpu", {"profile": "rounds.json"}, True),
        ("cuda", {"verify_attention": "backend"}, False),
        ("cuda", {"allow_lossy": True, "verify_sparsity": ("attention",)}, False),
    ],
    ids=str,
)
def test_k_is_chosen_where_that_was_measured(device: str, options: dict[str, Any], adapts: bool) -> None:
    """A default that nobody measured, or an option that the default overrules."""
    assert SparseSpecConfig(**{"verify_attention": "fused", **options}).adapts(device) is adapts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"adaptive": False}, "left out without --sparsespec-adaptive"),
        ({"verify_attention": "backend"}, "left out without --sparsespec-verify-attention fused"),
        ({"allow_lossy": True, "verify_sparsity": ("attention",)}, "left out with --sparsespec-verify-sparsity"),
    ],
    ids=str,
)
def test_plain_steps_without_plain_rounds_are_refused(options: dict[str, Any], why: str) -> None:
    """An option that is accepted and ignored."""
    from sglang_sparsespec.errors import ConfigError

    with pytest.raises(ConfigError, match=f"^--sparsespec-plain-steps is 2; it must be {why}"):
        SparseSpecConfig(plain_steps=2, **options)
