"""Rounds as they were recorded, and what stopping early on the draft's own confidence would have changed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.acceptance import cli
from sglang_sparsespec.acceptance.traces import SIGNALS, Recorder, Trace, certainty

if TYPE_CHECKING:
    from pathlib import Path

# three rounds of two texts, k = 3: all stand; one stands and the draft was unsure of the next; none stands
TRACE = Trace(
    texts=torch.tensor([0, 0, 1]),
    survival=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    top1=torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.3, 0.95], [0.2, 0.9, 0.9]]),
    entropy=torch.tensor([[0.1, 0.2, 0.3], [0.1, 2.0, 0.1], [3.0, 0.1, 0.1]]),
)


@pytest.mark.parametrize(
    ("signal", "threshold", "expected"),
    [
        ("top1", 0.0, [3, 3, 3]),
        ("top1", 0.5, [3, 2, 1]),
        # a confidence that is reached is enough
        ("top1", 0.9, [2, 2, 1]),
        ("top1", 1.0, [1, 1, 1]),
        # .9, .72, .504
        ("product", 0.75, [2, 2, 1]),
        ("product", 0.6, [3, 2, 1]),
        # exp(-.3) = .74, exp(-2) = .14
        ("entropy", 0.81, [3, 2, 1]),
        ("entropy", 0.83, [2, 2, 1]),
    ],
)
def test_drafts_end_with_the_first_unsure_one(signal: str, threshold: float, expected: list[int]) -> None:
    """An unsure draft that is thrown away, or one more made behind it, shifts every number by a draft."""
    assert TRACE.drafts_made(signal, threshold).tolist() == expected
    assert TRACE.drafts_made(signal, threshold, 2).tolist() == [min(made, 2) for made in expected]


def test_stopping_counts_saved_and_lost() -> None:
    """Shares of the wrong whole: a rule that stops everybody at once would look free."""
    found = TRACE.stopped("top1", 0.75)
    # made: 3, 2, 1; by text 2.5 and 1
    assert (found.drafts_made, found.accept_length) == (1.75, ((1 + 3 + 1 + 1) / 2 + 1) / 2)
    # 5 drafts fell, of which 1 + 2 are not made; none that stood is lost
    assert (found.saved, found.lost) == pytest.approx((3 / 5, 0.0))
    found = TRACE.stopped("top1", 0.85)
    # the first round stops behind its second draft: one of 4 that stood is lost
    assert (found.saved, found.lost) == pytest.approx((3 / 5, 1 / 4))
    never = TRACE.stopped("product", 0.0)
    assert (never.drafts_made, never.accept_length, never.saved, never.lost) == (3.0, 2.0, 0.0, 0.0)


def test_expected_survival_is_weighed() -> None:
    """In given text a draft stands with a probability; taken as yes or no, saved and lost would not add up."""
    survival = torch.rand(50, 4).cumprod(dim=1)
    trace = Trace(torch.arange(50) % 5, survival, torch.rand(50, 4), torch.rand(50, 4))
    for signal in SIGNALS:
        made = trace.drafts_made(signal, 0.6)
        by_hand = [1 + sum(row[:m]) for row, m in zip(survival.tolist(), made.tolist(), strict=True)]
        assert trace.accept_lens(made).tolist() == pytest.approx(by_hand)
        found = trace.stopped(signal, 0.6)
        left = sum(4 - m for m in made.tolist())
        assert found.saved * float((1 - survival).sum()) + found.lost * float(survival.sum()) == pytest.approx(left)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_certainty_is_of_the_distribution_that_drafts(temperature: float) -> None:
    """A temperature that is lost, or a token that is ruled out and makes the entropy NaN."""
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    top1, entropy = certainty(probs.log() * (temperature or 1.0), temperature)
    assert top1.tolist() == pytest.approx([0.5, 1.0])
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2), 0.0], abs=1e-6)


def test_recorder_keeps_rounds_apart() -> None:
    """Rounds of a batch that shrinks, noted under the wrong text."""
    recorder = Recorder(1.0)
    logits = torch.randn(3, 2, 8)
    recorder.add(torch.tensor([0, 1, 2]), logits, torch.ones(3, 2))
    recorder.add(torch.tensor([0, 2]), logits[1:], torch.zeros(2, 2, dtype=torch.bool))
    trace = recorder.trace()
    assert trace.texts.tolist() == [0, 1, 2, 0, 2]
    assert trace.by_text(trace.survival.sum(dim=1)).tolist() == [1.0, 2.0, 1.0]
    assert trace.top1[3].tolist() == trace.top1[1].tolist() == pytest.approx(logits[1].softmax(-1).amax(-1).tolist())
    assert trace.of_texts([1, 2]).texts.tolist() == [1, 2, 2]


def test_command_reports_stopping_and_traces(
    tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table that does not follow from what was recorded, or options that reach nothing."""
    lines, traces = tmp_path / "a.jsonl", tmp_path / "t.jsonl"
    options = ["--requests", "2", "--length", "40", "--new-tokens", "8", "--min-budget", "16", "--num-steps", "3"]
    options += ["--selection", "pillar", "--temperature", "0", "0.6", "--device", "cpu", "--threads", "1"]
    options += ["--stop-confidence", "0", "0.05", "1", "--stop-signal", "top1", "entropy"]
    assert cli.main([str(tiny_qwen3_path), *options, "--output", str(lines), "--traces", str(traces)]) == 0
    [_, table] = capsys.readouterr().out.split("\n\n")
    # a header; two texts, two temperatures, two signals, three thresholds
    assert len([row for row in table.splitlines() if row.startswith("| ")]) == 1 + 24
    records, rounds = ([json.loads(line) for line in path.read_text().splitlines()] for path in (lines, traces))
    assert len(records) == len(rounds) == 4
    for record, recorded in zip(records, rounds, strict=True):
        assert (record["text"], record["temperature"]) == (recorded["text"], recorded["temperature"])
        trace = Trace.of_record(recorded)
        assert len(trace.texts) == sum(record["rounds_by_text"])
        for rule in record["stopping"]:
            again = trace.stopped(rule["signal"], rule["threshold"])
            assert rule == pytest.approx(again._asdict(), abs=2e-3)
            made = {0: 3.0, 1: 1.0}.get(rule["threshold"])
            assert made is None or rule["drafts_made"] == made
        # the rule that never stops is the main table's number
        assert record["stopping"][0]["accept_length"] == pytest.approx(record["accept_length"], abs=1e-3)
    with_own_temperature = {recorded["temperature"]: recorded["top1"] for recorded in rounds[:2]}
    assert with_own_temperature[0.0] != with_own_temperature[0.6]
    assert cli.main([str(tiny_qwen3_path), *options, "--stop-confidence", "1.5"]) == 2
    assert "--stop-confidence is [1.5]" in capsys.readouterr().err
