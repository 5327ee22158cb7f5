"""What early stops and another budget are worth, on rounds whose answer is known by hand."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_sparsespec.acceptance.effort import (
    WAYS,
    Load,
    Machine,
    Rounds,
    Stop,
    StopStudy,
    budget_gain,
    gain,
    halves,
    rounds_of,
    stop_speedup,
)
from sglang_sparsespec.acceptance.traces import Trace
from sglang_sparsespec.speculation.cost_model import RoundCost

MACHINE = Machine(weights_ms=2.0, kv_ns=1000.0, row_us=100.0, gather_efficiency=0.5, capture_share=0.2)
# A = 10 ms
LOAD = Load(batch=2, context=5000, read_share=0.05)
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "draft_effort.py"


def telling_trace(num_texts: int = 8, num_rounds: int = 40, num_steps: int = 6) -> Trace:
    """Drafts stand until a random step, and the draft is unsure of exactly the one that falls."""
    torch.manual_seed(0)
    fall = torch.randint(0, num_steps + 1, (num_texts * num_rounds,))
    steps = torch.arange(num_steps)
    top1 = torch.where(steps == fall[:, None], 0.1, 0.9)
    survival = (steps < fall[:, None]).float()
    return Trace(torch.arange(num_texts).repeat(num_rounds), survival, top1, -top1.log())


def test_rounds_of_a_rule() -> None:
    """Tokens of drafts that were not made, or a distribution that misses its last step."""
    trace = Trace(
        torch.tensor([0, 0]),
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
        torch.tensor([[0.9, 0.4, 0.9], [0.9, 0.9, 0.9]]),
        torch.zeros(2, 3),
    )
    assert rounds_of(trace, Stop(3, "top1", 0.5)) == Rounds(3.5, 2.5, [0.0, 0.0, 0.5, 1.0])
    assert rounds_of(trace, Stop(3)) == Rounds(3.5, 3.0, [0.0, 0.0, 0.0, 1.0])
    assert rounds_of(trace, Stop(1)) == Rounds(2.0, 1.0, [0.0, 1.0])


@pytest.mark.parametrize("way", WAYS)
def test_time_of_each_way_by_hand(way: str) -> None:
    """What a way cannot spare, counted as spared."""
    # one or three drafts, each in half of the rounds; two requests: one step in a quarter of the rounds
    rounds = Rounds(tokens=2.5, drafts=2.0, stopped_by=[0.0, 0.5, 0.5, 1.0])
    gather, attention = 2.0 * 0.05 * 10.0 / 0.5, 10.0 * 1.2
    steps = 0.25 * 1 + 0.75 * 3
    expected = {
        # rows of 8 are weights all the same
        "gather": 3 * 2.0 + gather + 2.0 + attention,
        "steps": steps * 2.0 + gather + 2.0 + attention,
        "rows": steps * 2.0 + gather + 2.0 + attention,
        "unified": 4 * 2.0 + gather + attention,
        "unified-moving": 3 * 2.0 + gather + attention,
    }[way]
    assert stop_speedup(way, MACHINE, LOAD, rounds) == pytest.approx(2.5 * 12.0 / expected)
    # a verify in which arithmetic is the limit: 1 ms a row
    slow = {
        "gather": expected + 8.0 - 2.0,
        "steps": expected + (0.25 * 4 + 0.75 * 8) - 2.0,
        "rows": expected + 6.0 - 2.0,
    }.get(way, expected)
    assert stop_speedup(way, MACHINE._replace(row_us=1000.0), LOAD, rounds) == pytest.approx(2.5 * 12.0 / slow)


@pytest.mark.parametrize("way", WAYS)
def test_a_fixed_k_costs_what_the_formula_says(way: str) -> None:
    """Stopping that is compared with another base than the served one gains, or loses, by bookkeeping."""
    fixed = Rounds(tokens=4.0, drafts=5.0, stopped_by=[0.0] * 5 + [1.0])
    cost = MACHINE.cost(10000)
    lockstep, unified = cost.round_ms(5, 0.05), cost.unified_round_ms(6, 0.05, 5)
    expected = unified if way.startswith("unified") else lockstep
    assert stop_speedup(way, MACHINE, LOAD, fixed) == pytest.approx(4.0 * 12.0 / expected)


def test_a_perfect_signal_gains_and_noise_does_not() -> None:
    """A study that finds a gain in anything, or in nothing."""
    trace = telling_trace()
    alone = LOAD._replace(batch=1, context=20000)
    thresholds = (0.3, 0.5)
    perfect = StopStudy(trace, thresholds).gain("steps", MACHINE, alone)
    assert perfect.gain > 0.1
    assert all(stop.threshold > 0 for stop in perfect.chosen)  # type: ignore[attr-defined]
    # of many requests one always goes on
    crowd = StopStudy(trace, thresholds).gain("steps", MACHINE, LOAD._replace(batch=128, context=156))
    assert abs(crowd.gain) < 0.25 * perfect.gain
    torch.manual_seed(1)
    noise = torch.rand_like(trace.top1)
    useless = StopStudy(Trace(trace.texts, trace.survival, noise, -noise.log()), thresholds)
    assert useless.gain("steps", MACHINE, alone).gain < 0.02
    # where drafting cannot pay, plain decoding is what both choose
    short = StopStudy(trace, thresholds).gain("steps", MACHINE, Load(1, 10, 1.0))
    assert (short.base_speedup, short.speedup, short.gain) == (1.0, 1.0, 0.0)


def test_the_choice_is_judged_on_texts_that_it_has_not_seen() -> None:
    """The best of many noisy rows is above the first even where all are alike."""
    assert halves([5, 1, 0, 2, 3, 4, 0]) == ([0, 1, 4, 5], [2, 3])
    # choice 1 shines on the first half only, choice 2 on the second
    values = {(0, True): 1.0, (0, False): 1.0, (1, True): 2.0, (1, False): 0.5, (2, True): 0.5, (2, False): 2.0}

    def judge(choice: int, texts: list[int]) -> float:
        return values[choice, texts[0] < 2] + 0.01 * texts[0] * (len(texts) == 1) if len(texts) < 4 else 1.25

    found = gain([0], [0, 1, 2], range(4), judge)
    assert found.chosen == (1, 2)
    assert (found.base_speedup, found.speedup, found.gain, found.best_of_all) == (1.0, 0.5, -0.5, 0.0)
    by_text = [0.52 / 1.02, 0.53 / 1.03, 0.5 / 1.0, 0.51 / 1.01]
    assert found.standard_error == pytest.approx(statistics.stdev(by_text) / 2)
    with pytest.raises(ValueError, match="at least three texts"):
        gain([0], [0], [0, 1], lambda choice, texts: 1.0)


def test_budget_follows_what_is_scarce() -> None:
    """The larger budget where acceptance is the limit, the smaller where the gather is, and no gain from equal ones."""
    torch.manual_seed(0)
    texts = torch.arange(8).repeat(50)

    def trace(rate: float) -> Trace:
        survival = torch.full((400, 8), rate).cumprod(dim=1)
        return Trace(texts, survival, torch.ones(400, 8), torch.zeros(400, 8))

    traces = {0.02: trace(0.85), 0.05: trace(0.88), 0.2: trace(0.95)}

    def chosen(attention: float) -> Any:
        found = budget_gain(RoundCost(weights_ms=1.0, attention_ms=attention, overhead_ms=0.0), traces, 0.05)
        assert found.gain >= -1e-9
        return {share for share, _ in found.chosen}  # type: ignore[misc]

    assert chosen(1.0) == {0.2}
    assert chosen(50.0) == {0.02}
    # a budget that does not follow is best at its own load only
    fixed = [
        budget_gain(RoundCost(weights_ms=1.0, attention_ms=a, overhead_ms=0.0), traces, 0.05, [0.2]).gain
        for a in (1.0, 50.0)
    ]
    assert fixed[0] > 0 > fixed[1]
    same = {share: trace(0.9) for share in (0.05, 0.1)}
    assert budget_gain(RoundCost(weights_ms=1.0, attention_ms=3.0), same, 0.05).gain == 0.0


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("draft_effort", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_writes_what_the_study_finds(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of another text, or of budgets that were mixed up, looks like any other."""
    options = {"text": "own", "prompt_tokens": [2048]}
    traces, rows = tmp_path / "t.jsonl", tmp_path / "rows.jsonl"
    trace = telling_trace()
    other = Trace(trace.texts, torch.zeros_like(trace.survival), trace.top1, trace.entropy)
    records = [
        {**options, "temperature": t, "budget_ratio": ratio, "read_share": ratio, **which.record()}
        for t in (0.0, 0.6)
        for ratio, which in ((0.05, trace), (0.1, other))
    ]
    traces.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert script.main(["budget", str(traces), "--output", str(rows)]) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    # by load, and both budgets
    assert len(found) == 3 * 2 * len(script.RATIOS) * len(script.VERIFIES)
    # nothing is accepted with the larger budget
    assert {row["gain"] for row in found if row["budget"] in ("by load", "5.2%")} == {0.0}
    assert min(row["gain"] for row in found if row["budget"] == "10.2%") < -0.3
    assert capsys.readouterr().out.startswith("own text, mean of greedy, T=0.6")
    script.LOADS, script.THRESHOLDS = ((1, 131072), (128, 2800)), (0.5,)
    traces.write_text(json.dumps(records[0]) + "\n")
    assert script.main(["stop", str(traces), "--max-steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[5:-1] == [f" {way} " for way in WAYS]
    assert len(lines) == 4 + 2 * len(script.MACHINES)
