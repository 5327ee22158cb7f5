"""The explorer's rounds against transformers' own attention, and against what must be true of any round."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_sparsespec.acceptance import rounds as rounds_module
from sglang_sparsespec.acceptance.measure import Measurement, _Sampler, measure_forced, measure_own, overlap
from sglang_sparsespec.acceptance.model import PagedModel
from sglang_sparsespec.acceptance.rounds import Drafter, Prompts, RoundLogits, prefill
from sglang_sparsespec.acceptance.settings import Setting
from sglang_sparsespec.acceptance.traces import Trace
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.ops.paged_attention.reference import anchored_scores_reference

if TYPE_CHECKING:
    from pathlib import Path

LENS = [70, 33, 1]
MAX_LEN = 140
SMALL = {"min_budget": 16, "budget_ratio": 0.01, "recent_window": 2, "sink": 1, "num_steps": 3}


@pytest.fixture(params=["qwen3", "llama"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_path")


@pytest.fixture
def windows() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(MAX_LEN)] for _ in LENS]


def load(path: Path, windows: list[list[int]], keep: int = 9) -> tuple[PagedModel, Prompts]:
    model = PagedModel(path, device="cpu", dtype=torch.float32)
    model.allocate(len(LENS), MAX_LEN)
    # what earlier requests may have left
    for pool in (*model.k_pool, *model.v_pool):
        pool.fill_(torch.nan)
    return model, prefill(model, [window[:n] for window, n in zip(windows, LENS, strict=True)], keep=keep)


def setting(**options: object) -> Setting:
    return Setting(SparseSpecConfig(**{**SMALL, **options}))  # type: ignore[arg-type]


def test_dense_passes_are_the_model(path: Path, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill in chunks, or a verify over KV that bad drafts wrote first, that is not the model's own forward."""
    monkeypatch.setattr(rounds_module, "PREFILL_CHUNK", 32)
    model, prompts = load(path, windows)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    drafter = Drafter(model, setting(selection="random"), prompts)
    rows = torch.arange(len(LENS))
    tokens = [window[:n] for window, n in zip(windows, LENS, strict=True)]
    for i in range(3):
        committed = prompts.lens + 4 * i
        ahead = torch.tensor([w[n + 4 * i : n + 4 * i + 4] for w, n in zip(windows, LENS, strict=True)])
        # drafts that the next round overwrites are as wrong as can be: the text's tokens in another order
        drafter.round(rows, committed, ahead[:, 0], lambda step, logits: logits.argmin(-1))
        logits = drafter.round(rows, committed, ahead[:, 0], lambda step, _, ahead=ahead: ahead[:, step + 1])
        tokens = [t + a for t, a in zip(tokens, ahead.tolist(), strict=True)]
    with torch.no_grad():
        for r, sequence in enumerate(tokens):
            expected = reference(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(logits.target[r], expected[-4:], atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(prompts.next_logits[r], expected[LENS[r] - 1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("capture", ["policy", "first-last", "last"])
def test_selection_is_the_policy_on_captured_attention(path: Path, windows: list[list[int]], capture: str) -> None:
    """Scores of the wrong queries, heads or positions: accept lengths of a rule that no server has."""
    model, prompts = load(path, windows)
    config = SparseSpecConfig(**{**SMALL, "sharing": "head", "score_pooling": 2})  # type: ignore[arg-type]
    drafter = Drafter(model, Setting(config, capture), prompts)
    captured = {"policy": [0, 1, 2, 3], "first-last": [0, 3], "last": [3]}[capture]
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)

    def check(made_at: list[int], queries: list[list[int]], seen: list[int]) -> None:
        for r, n in enumerate(made_at):
            with torch.no_grad():
                out = reference(torch.tensor([windows[r][: seen[r]]]), output_attentions=True)
            for layer, attention in enumerate(out.attentions):
                # [HQ, T, N] -> mean over queries and the group
                by_head = attention[0][:, queries[r]].mean(1).unflatten(0, (model.num_kv_heads, -1)).mean(1)
                scores = by_head[None, :, :]
                expected = drafter.policy.select(scores, torch.tensor([n], dtype=torch.int32), seen[r])  # type: ignore[call-arg,arg-type]
                num = int(expected.num_selected[0])
                assert int(drafter.store.num_selected[r]) == num
                for head in range(model.num_kv_heads):
                    actual = drafter.store.positions[layer, r, head, :num].tolist()
                    assert set(actual) == set(expected.positions[0, head, :num].tolist()), (r, layer, head)

    # a prompt's last k + 1 queries, fewer where there are fewer
    check(LENS, [list(range(max(0, n - 4), n)) for n in LENS], LENS)
    ahead = torch.tensor([w[n : n + 4] for w, n in zip(windows, LENS, strict=True)])
    drafter.round(torch.arange(len(LENS)), prompts.lens, ahead[:, 0], lambda step, _: ahead[:, step + 1])
    check(LENS, [[n + i for i in captured] for n in LENS], [n + 4 for n in LENS])


def test_anchored_capture_is_the_op(tiny_llama_path: Path, windows: list[list[int]]) -> None:
    """Columns of one request read as another's, or of the wrong head, still make a selection."""
    model, prompts = load(tiny_llama_path, windows)
    config = SparseSpecConfig(**{**SMALL, "sharing": "head", "score_pooling": 0})  # type: ignore[arg-type]
    drafter = Drafter(model, Setting(config, "anchored"), prompts)
    seen: list[tuple[int, torch.Tensor, float]] = []
    rows, ahead = torch.arange(len(LENS)), torch.tensor([w[n : n + 4] for w, n in zip(windows, LENS, strict=True)])
    verify_pass = drafter._verify_pass

    def spied(rows: torch.Tensor, positions: torch.Tensor) -> rounds_module.DensePass:
        dense = verify_pass(rows, positions)
        observe = dense.observe
        dense.observe = lambda layer, q, scale: (seen.append((layer, q, scale)), observe(layer, q, scale))[1]
        return dense

    drafter._verify_pass = spied  # type: ignore[method-assign]
    drafter.round(rows, prompts.lens, ahead[:, 0], lambda step, _: ahead[:, step + 1])
    assert len(seen) == model.num_layers
    lens = prompts.lens.to(torch.int32)
    for layer, q, scale in seen:
        scores = anchored_scores_reference(
            q, model.k_pool[layer], model.req_to_token, rows, lens, torch.full_like(lens, 4), scale=scale, max_len=74
        )
        expected = drafter.policy.select(scores, lens, 74)  # type: ignore[call-arg,arg-type]
        for r in range(len(LENS)):
            num = int(expected.num_selected[r])
            for head in range(model.num_kv_heads):
                actual = drafter.store.positions[layer, r, head, :num].tolist()
                assert set(actual) == set(expected.positions[r, head, :num].tolist())


@pytest.mark.parametrize("selection", ["pillar", "first-last", "window", "quest", "oracle"])
def test_drafts_that_see_everything_are_the_target(path: Path, windows: list[list[int]], selection: str) -> None:
    """A draft that misses a token, or reads a stale one, drafts worse than its policy deserves."""
    model, prompts = load(path, windows)
    everything = setting(selection=selection, min_budget=MAX_LEN, granularity="4")
    for m in measure_forced(model, everything, prompts, windows, [0.0, 1.0], new_tokens=40):
        assert m.accept_rates == pytest.approx([1.0] * 3, abs=2e-3)
        assert m.rounds == [10] * 3
    own = measure_own(model, everything, prompts, 0.0, new_tokens=30)
    assert own.accept_length == 4.0
    assert own.rounds == [8] * 3
    assert own.read_share == 1.0


def test_own_text_counts_what_a_server_counts(path: Path, windows: list[list[int]]) -> None:
    """Rounds of requests that are done, or a bonus token counted twice, shift every accept length."""
    model, prompts = load(path, windows)
    for temperature in (0.0, 0.8):
        m = measure_own(model, setting(selection="random"), prompts, temperature, new_tokens=20)
        for num_rounds, length in zip(m.rounds, m.accept_lengths, strict=True):
            produced = 1 + num_rounds * length
            # the last round may run past the end, and no round was needless
            assert 20 - 1e-6 <= produced < 20 + 4
        correct = sum(num_rounds * (length - 1) for num_rounds, length in zip(m.rounds, m.accept_lengths, strict=True))
        reached = sum(m.rounds)
        for rate in filter(math.isfinite, m.accept_rates):
            reached *= rate
            correct -= reached
        assert correct == pytest.approx(0.0, abs=1e-6)


def test_a_better_budget_is_accepted_more(windows: list[list[int]], tiny_qwen3_path: Path) -> None:
    """A budget that reaches no draft gives the same number everywhere."""
    model, prompts = load(tiny_qwen3_path, windows)
    lengths = [
        measure_forced(model, setting(selection="oracle", min_budget=b), prompts, windows, [1.0], new_tokens=60)[0]
        for b in (1, 32)
    ]
    gain, _ = lengths[1].gain_over(lengths[0])
    assert gain > 0.1


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_sampled_acceptance_is_the_overlap(temperature: float) -> None:
    """Own text accepts with the probability that given text counts on; a temperature lost on one side breaks that."""
    num_reqs = 4000
    drafts, target = torch.randn(2, 12) * 2
    if temperature == 0:
        target[drafts.argmax()] = 9.0
    sampler = _Sampler(temperature, 0, torch.device("cpu"))
    tokens = sampler.draft(0, drafts.expand(num_reqs, -1))
    logits = RoundLogits(drafts.expand(num_reqs, 1, -1), target.expand(num_reqs, 2, -1), tokens[:, None])
    rate = float((sampler.accept(logits).accept_lens - 1).float().mean())
    expected = float(overlap(drafts, target, temperature))
    assert abs(rate - expected) <= 4 * (expected * (1 - expected) / num_reqs) ** 0.5


def test_overlap_of_known_distributions() -> None:
    """A sum over the wrong axis, or of the larger probabilities, is still a number between 0 and 2."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.3, 0.6]).log()
    assert float(overlap(p, q, 1.0)) == pytest.approx(0.1 + 0.3 + 0.2)
    assert float(overlap(p, q, 0.0)) == 0.0
    assert float(overlap(p, p + 3.0, 0.5)) == pytest.approx(1.0)


def test_measurement_statistics() -> None:
    """Standard errors over rounds, which are correlated, would promise too much."""

    def make(survival: list[list[float]]) -> Measurement:
        rounds = Trace(torch.arange(len(survival)), *(torch.tensor(survival) for _ in range(3)))
        return Measurement(setting(), "own", 0.0, survival, [0.0] * 3, [1] * len(survival), 0.1, 0.0, rounds)

    m, other = make([[1.0, 0.5, 0.5], [1.0, 1.0, 1.0]]), make([[0.5, 0.0, 0.0], [1.0, 0.5, 0.5]])
    assert m.accept_lengths == [3.0, 4.0]
    assert (m.accept_length, m.standard_error) == (3.5, 0.5)
    assert m.mean_survival == [1.0, 0.75, 0.75]
    assert m.gain_over(other) == (1.25, 0.25)
