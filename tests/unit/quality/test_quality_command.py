"""`python -m sglang_sparsespec.quality`: settings, outputs, refusals, and the task of recalling lines."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.quality import arguments, cli, measure, needles, plot, report
from sglang_sparsespec.quality.calibrate import Similarity
from sglang_sparsespec.quality.measure import Quality, Workload
from sglang_sparsespec.quality.settings import EVERY_LAYER, Setting, cross
from sglang_sparsespec.quality.walk import Requests
from sglang_sparsespec.sparsity.anchors_file import read_anchors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK = ["--requests", "2", "--length", "120", "--new-tokens", "10", "--device", "cpu", "--threads", "1"]
QUICK += ["--num-steps", "3", "--dense-below", "40", "--block-size", "8"]
MEASURE = ["--own-tokens", "6", "--haystacks", "2", "--lines", "2"]
DEFAULTS: dict[str, list[Any]] = {
    "num_steps": [8],
    "attention_ratio": [1.0],
    "dense_below": [1024],
    "block_size": [16],
    "anchors": [EVERY_LAYER],
    "ffn_threshold": [0.0],
    "dense_every": [0],
}


def run(command: str, model: Path, *options: str) -> int:
    extra = MEASURE if command == "measure" else []
    return cli.main([command, str(model), *QUICK, *extra, *options])


def test_no_attention_kernel_that_is_planned_anew_for_each_shape(tiny_qwen3_path: Path) -> None:
    """A mask here grows with every token; cuDNN, which torch prefers on Hopper, would plan for minutes."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    cli.load(arguments.parse(["measure", str(tiny_qwen3_path), "--device", "cpu"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_from_calibration_to_a_picture(
    tiny_qwen3_path: Path, tiny_llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands from model to files: what is lost is lost after hours on a large model."""
    anchors, lines, picture = tmp_path / "anchors.json", tmp_path / "q.jsonl", tmp_path / "q.png"
    options = ["--write", str(anchors), "--num-anchors", "2", "--output", str(lines)]
    assert run("calibrate", tiny_qwen3_path, *options) == 0
    file = read_anchors(anchors)
    assert len(file.anchors) == 2
    assert file.block_size == 8
    assert file.calibration is not None
    assert (file.calibration.ratio, file.calibration.dense_below) == (0.25, 40)
    out = capsys.readouterr().out
    assert f"anchors: 0 {file.anchors[1]} of 3 layers" in out
    [record] = [json.loads(line) for line in lines.read_text().splitlines()]
    assert record["anchors"] == list(file.anchors)
    assert len(record["similarity"]) == 3
    assert cli.main(["plot", str(lines), "--plot", str(picture)]) == 2
    lines.unlink()

    options = ["--attention-ratio", "1", "0.1", "--anchors", EVERY_LAYER, str(anchors), "--ffn-threshold", "0", "0.1"]
    assert run("measure", tiny_qwen3_path, *options, "--output", str(lines), "--plot", str(picture)) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    # a header, dense, channels alone, attention with and without anchors, each with and without channels
    assert len(rows) == 1 + 6
    assert len({row.count("|") for row in rows}) == 1
    assert "anchors anchors.json" in rows[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    assert cli.main(["plot", str(lines), "--plot", str(again)]) == 0
    drawn = again.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert cli.main(["plot", str(lines), "--plot", str(again), "--only", "ffn_threshold"]) == 0
    assert again.read_bytes() != drawn
    assert cli.main(["plot", str(lines), "--plot", str(again), "--only", "moe_top_k"]) == 2
    assert cli.main(["plot", str(lines), "--plot", str(again), "--only", "moe_topk"]) == 2
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    # what is drawn from a record is what it says
    assert all(report.records([report.quality_of(record)], {})[0].items() <= record.items() for record in records)
    assert [record["lossy"] for record in records] == [False] + [True] * 5
    dense, *others = records
    assert dense["kl_by_text"] == [0.0, 0.0]
    assert dense["agreement_by_text"] == [1.0, 1.0]
    assert dense["equal_greedy_tokens_by_text"] == [6, 6]
    assert (dense["read_share"], dense["channels_kept"]) == (1.0, 1.0)
    for record in others:
        assert min(record["kl_by_text"]) > 0
        assert (record["read_share"] < 1) == (record["attention_ratio"] < 1)
        assert (record["channels_kept"] < 1) == (record["ffn_threshold"] > 0)
    for record in records:
        assert record["command"].startswith("python -m sglang_sparsespec.quality")
        assert len(record["kl_by_round"]) == 3
        assert len(record["recalled_by_haystack"]) == 2

    options = ["--attention-ratio", "0.1", "--anchors", str(anchors)]
    assert run("measure", tiny_llama_path, *options) == 2
    assert "its architectures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "complaint"),
    [
        ("measure", ["--attention-ratio", "1.5"], "--attention-ratio is 1.5; it must be 0 to 1"),
        ("measure", ["--dense-every", "1"], "--dense-every is 1"),
        ("measure", ["--length", "9000"], "--length is 9000; it must be at most"),
        ("measure", ["--lines", "99"], "--lines is 99"),
        ("measure", ["--anchors", "a.json"], "--anchors is ['a.json']; it must be left out"),
        ("measure", ["--moe-top-k", "1"], "without experts"),
        ("calibrate", ["--num-anchors", "4"], "--num-anchors is 4; it must be 1 to 3"),
        ("calibrate", ["--num-anchors", "2", "--attention-ratio", "1"], "--attention-ratio is 1.0"),
        ("calibrate", ["--num-anchors", "2", "--dense-below", "120"], "--length is 120; it must be above"),
    ],
)
def test_refusals_name_the_option(
    tiny_qwen3_path: Path,
    tmp_path: Path,
    command: str,
    options: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback, or a run over something else than was asked for."""
    if command == "calibrate":
        options = [*options, "--write", str(tmp_path / "a.json")]
    assert run(command, tiny_qwen3_path, *options) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_settings_without_doubles() -> None:
    """L0 and blocks mean nothing where all is read; a dense row leads, asked for or not."""
    found = cross({**DEFAULTS, "attention_ratio": [0.5, 1.0], "dense_below": [64, 128], "dense_every": [0, 4]})
    assert [setting.is_dense for setting in found] == [True] + [False] * 4
    # each k has rounds of its own, and so a baseline of its own
    found = cross({**DEFAULTS, "num_steps": [4, 8], "ffn_threshold": [0.1]})
    assert [(setting.num_steps, setting.is_dense) for setting in found] == [
        (4, True),
        (4, False),
        (8, True),
        (8, False),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"attention_ratio": -0.1},
        {"block_size": 0},
        {"ffn_threshold": float("nan")},
        {"moe_thresholds": (0.1, -1.0)},
        {"moe_thresholds": (float("nan"),)},
    ],
)
def test_values_out_of_bounds(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Setting(**options)


def test_lines_stand_in_their_haystack(tiny_qwen3_path: Path) -> None:
    """Answers that cannot be looked up, or that the question gives away."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_path)
    windows = [[120] * 500, [121] * 333]
    found = needles.hide(tokenizer, windows, 3, seed=1)
    for stack, window in zip(found, windows, strict=True):
        text = tokenizer.decode(stack.prompt)
        assert len(stack.prompt) == len(window) + sum(map(len, stack.lines))
        places = []
        for line, answer in zip(stack.lines, stack.answers, strict=True):
            digits = tokenizer.decode(line[answer.start : answer.stop])
            assert digits.isdigit()
            assert len(digits) == needles.NUM_DIGITS
            assert tokenizer.decode(line[: answer.start]).endswith(" is ")
            assert text.count(tokenizer.decode(line)) == 1
            places.append(text.index(tokenizer.decode(line)))
        assert places == sorted(places)
        assert places[0] > 0
    assert needles.hide(tokenizer, windows, 3, seed=1) == found
    assert needles.hide(tokenizer, windows, 3, seed=2) != found


@pytest.mark.parametrize(("wrong", "recalled"), [(None, 1.0), (5, 0.0), (7, 0.0), (4, 1.0), (8, 1.0)])
def test_a_line_is_recalled_if_all_digits_are(
    monkeypatch: pytest.MonkeyPatch, wrong: int | None, recalled: float
) -> None:
    """One digit of five is no answer; words that were given are not asked for."""
    line = list(range(20, 30))
    stack = needles.Haystack([1, 2, 3], [line], [range(5, 8)])

    class Sees:
        def __init__(self, *args: object) -> None: ...

        def along(self, requests: Requests, text: torch.Tensor, *, first: int) -> Iterator[torch.Tensor]:
            following = torch.cat([text[:, 1:], text[:, :1]], dim=1)
            if wrong is not None:
                following[:, wrong - 1] = 40
            logits = torch.nn.functional.one_hot(following, 50).float()
            yield logits[:, :first]
            yield logits[:, first:]

    monkeypatch.setattr(measure, "Verifier", Sees)
    requests = Requests(range(1), torch.tensor([3]), torch.tensor([0]))
    work = Workload(texts=requests, ahead=torch.zeros(1, 2), haystacks=requests, hidden=[stack], own_tokens=1)

    class Model:
        device = torch.device("cpu")

    assert measure.recall(Model(), Setting(), work) == [recalled]  # type: ignore[arg-type]


def test_evenly_spaced_anchors_need_no_weights(
    tmp_path: Path, tiny_qwen3_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark of a shape has a configuration and nothing else; its anchors must not pass for calibrated ones."""
    shape, anchors = tmp_path / "shape", tmp_path / "anchors.json"
    shape.mkdir()
    (shape / "config.json").write_text((tiny_qwen3_path / "config.json").read_text())
    options = ["--evenly-spaced", "--num-anchors", "2", "--block-size", "16", "--write", str(anchors)]
    assert cli.main(["calibrate", str(shape), *options]) == 0
    file = read_anchors(anchors)
    assert (file.anchors, file.block_size, file.calibration) == ((0, 1), 16, None)
    assert "evenly spaced, not calibrated" in capsys.readouterr().err
    assert cli.main(["calibrate", str(shape), *options[:2], "9", *options[3:]]) == 2
    assert "expected 1 to 3" in capsys.readouterr().err


def quality(**changed: Any) -> Quality:
    plain = Quality(
        setting=Setting(attention_ratio=0.25),
        kl=[0.1, 0.3],
        kl_by_round=[0.2],
        agreement=[0.9, 0.7],
        nll=[1.0, 1.2],
        dense_nll=[1.0, 1.0],
        equal_prefix=[4, 8],
        own_tokens=8,
        recalled=[],
        read_share=0.5,
        channels_kept=1.0,
        experts_kept=1.0,
        seconds=1.0,
    )
    return replace(plain, **changed)


def test_table_by_hand() -> None:
    """Errors over texts, and perplexity as a factor: exp(mean excess) - 1."""
    row = report.table([quality()]).splitlines()[-1]
    assert "| 50.0% | 0.2000 ± 0.1000 | 80.0% ± 10.0% | 3.00 (+10.5% ± 11.1%) | 6.0 ± 2.0 of 8 |" in row
    assert row.startswith("| rho 0.25, L0 4096, B 16 |")
    # one text has no error
    assert "| 0.1000 |" in report.table([quality(kl=[0.1])])


def test_pareto_front() -> None:
    """What is on the line: nothing reads less and loses less."""
    points = [(1.0, 0.0), (0.5, 0.2), (0.6, 0.3), (0.3, 0.2), (0.3, 0.4), (0.8, 0.1)]
    assert plot.front(points) == [(0.3, 0.2), (0.8, 0.1), (1.0, 0.0)]


def test_similarity_summary() -> None:
    """Means along diagonals, and of the layers that reuse alone."""
    found = Similarity([[1.0, 0.5, 0.2], [0.5, 1.0, 0.7], [0.2, 0.7, 1.0]], 0.1, 4)
    assert found.at_distance(1) == pytest.approx(0.6)
    assert found.with_anchor((0, 1, 1)) == [0.7]
    assert found.anchors(2) == (0, 1)
    assert report.similarity_table(found).splitlines()[-1] == "| Jaccard similarity | 0.60 | 0.20 | 0.10 |"
