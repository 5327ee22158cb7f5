"""`python -m sglang_sparsespec.acceptance`: its settings, its outputs, its refusals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.acceptance import cli, report
from sglang_sparsespec.acceptance.measure import Measurement
from sglang_sparsespec.acceptance.settings import Setting, cross
from sglang_sparsespec.acceptance.traces import Trace
from sglang_sparsespec.config import SELECTIONS, SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.speculation.cost_model import RoundCost

if TYPE_CHECKING:
    from pathlib import Path

NO_ROUNDS = Trace(torch.zeros(0, dtype=torch.int64), *(torch.zeros(0, 2) for _ in range(3)))
QUICK = ["--requests", "2", "--length", "40", "60", "--new-tokens", "8", "--min-budget", "16", "--num-steps", "3"]


def run(model: Path, *options: str) -> int:
    return cli.main([str(model), *QUICK, "--device", "cpu", "--threads", "1", *options])


def test_command_writes_table_lines_and_picture(
    tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every policy from model to report: an output that is lost is lost after hours on a large model."""
    lines, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    options = ["--weights-ms", "3", "--attention-ms", "9", "--output", str(lines), "--plot", str(picture)]
    assert run(tiny_qwen3_path, "--selection", *SELECTIONS, *options) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    # a header, and each policy on given and on own text, greedy and sampled
    assert len(rows) == 1 + 4 * len(SELECTIONS)
    assert len({row.count("|") for row in rows}) == 1
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    found = {(r["selection"], r["text"], r["temperature"]) for r in records}
    assert found == {(s, text, t) for s in SELECTIONS for text in ("forced", "own") for t in (0.0, 1.0)}
    for record in records:
        assert 1.0 <= record["accept_length"] <= 4.0
        assert record["accept_length"] == pytest.approx(1.0 + sum(record["survival"]), abs=1e-3)
        assert len(record["accept_rates"]) == 3
        # a policy that reads keys in its draft steps has another cost
        assert ("best_num_steps" in record) == (record["selection"] not in ("quest", "oracle"))
        assert record["command"].startswith("python -m sglang_sparsespec.acceptance")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # a second run adds to the file
    assert run(tiny_qwen3_path, "--selection", "window", "--text", "forced", "--output", str(lines)) == 0
    assert len(lines.read_text().splitlines()) == len(records) + 2


def test_texts_of_the_user(tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that are ignored in favour of the built-in ones give believable numbers."""
    short, long = tmp_path / "short.txt", tmp_path / "long.jsonl"
    short.write_text("short")
    long.write_text(json.dumps({"prompt": "0123456789" * 30}) + "\n")
    options = ["--selection", "window", "--text", "forced", "--temperature", "0"]
    assert run(tiny_qwen3_path, *options, "--texts", str(short), str(long)) == 0
    assert run(tiny_qwen3_path, *options, "--texts", str(short)) == 2
    assert "The longest text has 5 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--length", "9000"], "--length is 9000; it must be at most"),
        (["--weights-ms", "3"], "given together"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--new-tokens", "1"], "--new-tokens is 1"),
        (["--min-budget", "2", "--granularity", "16"], "--sparsespec-min-budget is 2"),
    ],
)
def test_refusals_name_the_option(
    tiny_qwen3_path: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or a run over something else than was asked for."""
    assert run(tiny_qwen3_path, *options) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, "num_hidden_layers": 2},
        {"model_type": "mixtral", "sliding_window": 4096, "num_hidden_layers": 2},
    ],
)
def test_other_architectures_are_refused(
    tmp_path: Path, config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A window that the explorer does not know would be attended as if it were none."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(tmp_path) == 2
    assert f"{config['model_type']} with sliding_attention" in capsys.readouterr().err


def test_cross_drops_what_makes_no_difference() -> None:
    """Window with and without pooling is one setting; measured twice it would look like evidence of no effect."""
    settings = cross(
        {"selection": ["pillar", "window", "oracle"], "score_pooling": [0, 8], "sharing": ["head", "layer"]}
    )
    kept = [(s.config.selection, s.config.score_pooling, s.config.sharing) for s in settings]
    assert kept == [
        ("pillar", 0, "head"),
        ("pillar", 0, "layer"),
        ("pillar", 8, "head"),
        ("pillar", 8, "layer"),
        ("window", 0, "head"),
        ("oracle", 0, "head"),
        ("oracle", 0, "layer"),
    ]
    with pytest.raises(ConfigError):
        cross({"selection": ["pillar"], "granularity": ["token", "16"], "min_budget": [4]})


@pytest.mark.parametrize(
    ("selection", "capture", "expected"),
    [
        ("pillar", "policy", [0, 1, 2, 3]),
        ("first-last", "policy", [0, 3]),
        ("first-last", "all", [0, 1, 2, 3]),
        ("pillar", "first", [0]),
        ("pillar", "last", [3]),
    ],
)
def test_capture_rules(selection: str, capture: str, expected: list[int]) -> None:
    """A rule that is read and not obeyed makes two rows of a table equal."""
    setting = Setting(SparseSpecConfig(num_steps=3, selection=selection), capture)
    assert list(setting.captured_queries()) == expected


def test_table_compares_with_the_first_row_of_a_kind() -> None:
    """A gain over another text or temperature is no gain."""

    def make(selection: str, text: str, length: float, rates: list[float]) -> Measurement:
        survival = [[length - 1, 0.0], [length - 1, 0.0]]
        setting = Setting(SparseSpecConfig(num_steps=2, selection=selection))
        return Measurement(setting, text, 0.0, survival, rates, [3, 4], 0.05, 1.0, NO_ROUNDS)

    rows = report.table(
        [
            make("pillar", "own", 1.5, [0.5, 0.25]),
            make("pillar", "forced", 1.25, [0.5, 0.25]),
            make("window", "own", 1.75, [0.5, float("nan")]),
        ],
        RoundCost(weights_ms=1.0, attention_ms=10.0),
    ).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:5] for row in cells] == [
        ["pillar", "given text", "greedy", "1.25 ± 0.00", ""],
        ["pillar", "own text", "greedy", "1.50 ± 0.00", ""],
        ["window", "own text", "greedy", "1.75 ± 0.00", "+0.25 ± 0.00"],
    ]
    assert cells[2][5:9] == ["0.50", "-", "7", "5.0%"]
