"""The command line without servers: dry runs, refusals, reports and plots of records on file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from bench_records import gate_record, turn_record

from sglang_sparsespec.bench import cli, plots, prompts, provenance
from sglang_sparsespec.bench.cells import Job, Scene
from sglang_sparsespec.bench.client import COMPLETION_TOKENS, VERIFY_CT, Load
from sglang_sparsespec.bench.machine import detect
from sglang_sparsespec.bench.measure import scheduler_rate, summarise
from sglang_sparsespec.bench.records import append_record
from sglang_sparsespec.bench.report import markdown
from sglang_sparsespec.bench.shapes import SHAPES, read_shape, write_shape
from sglang_sparsespec.bench.summary import gate_refusal
from sglang_sparsespec.bench.window import Trace
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.model_tools.texts import own_sources

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_sparsespec.bench.machine import Machine

PNG = b"\x89PNG\r\n"


def test_dry_run_lists_cells_skips_and_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user reads before an hour of a card is spent."""
    assert cli.main(["smoke", "--dry-run", "--out", str(tmp_path)]) == cli.FINISHED
    text = capsys.readouterr().out
    for part in (
        "plain/torch_native",
        "policy pillar",
        "batch 8, 1024+",
        "skipped: ngram:",
        "minutes for the 40 turns",
    ):
        assert part in text, part
    assert not (tmp_path / "results.jsonl").exists()


def test_some_scenes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lent card may have time for a part of a set; a name with a typo must not pass for "nothing to do"."""
    argv = ["smoke", "--dry-run", "--out", str(tmp_path), "--only", "batch 8, 1024+"]
    assert cli.main([*argv, "--only", "T=0.65"]) == cli.FINISHED
    text = capsys.readouterr().out
    assert "2 scenes" in text
    assert "batch 2," not in text
    assert cli.main([*argv, "--only", "batch 9,"]) == cli.REFUSED
    error = capsys.readouterr().err
    assert "--only is 'batch 9,'" in error
    assert "tiny-qwen3: batch 8, 1024+" in error


def test_a_lent_card_can_do_without_gates_on_random_weights(
    h100: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a start of a minute, to compare nearly tied tokens; what nobody compared gets no speed-up."""
    monkeypatch.setattr(cli, "detect", lambda *args: h100)
    argv = ["lossy", "--dry-run", "--repeats", "1", "--out", str(tmp_path), "--only", "batch 32, 11619"]
    assert cli.main(argv) == cli.FINISHED
    # five contenders, of which four are compared
    assert "9 server starts in all" in capsys.readouterr().out
    assert cli.main([*argv, "--no-gate"]) == cli.FINISHED
    assert "5 server starts in all" in capsys.readouterr().out
    refused = {"acceptance": "simulated", "gate_on": cli.NO_GATE, "contender_args": []}
    assert gate_refusal(refused, []) == "no parity check on anything (--no-gate) yet"


def test_ranks_are_part_of_the_plan(tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--tp-size 2` is one command for both sides of the ratio; a model that does not split is named, not tried."""
    argv = ["--device", "cpu", "--dry-run", "--out", str(tmp_path)]
    assert cli.main(["smoke", "--tp-size", "2", *argv]) == cli.FINISHED
    assert "minutes for the 40 turns" in capsys.readouterr().out
    args = cli.parser().parse_args(["paper", "--model", str(tiny_qwen3_path), "--tp-size", "4", *argv])
    machine = detect("cpu", args.tp_size)
    assert machine.tp_size == 4
    assert cli.build_request(args, machine, tmp_path).model is not None
    odd = tmp_path / "odd"
    odd.mkdir()
    config = json.loads((tiny_qwen3_path / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "num_attention_heads": 9, "num_key_value_heads": 3}))
    assert cli.main(["paper", "--model", str(odd), "--tp-size", "2", *argv]) == cli.FINISHED
    assert "the heads of odd (9, KV 3) do not split over 2 ranks" in capsys.readouterr().out


def test_page_says_how_many_ranks(job: Job, tmp_path: Path) -> None:
    """A number of two cards beside one of one card."""
    records = write_results(job, tmp_path)
    assert "--tp-size" not in markdown(records)
    for record in records:
        record["provenance"]["tp_size"] = 2
    assert "every server on 2 ranks (--tp-size 2)" in markdown(records)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["smoke", "--model", "/x"], "--model is '/x'; it must be left out with set smoke"),
        (["smoke", "--batch", "4"], "--batch is 4; it must be left out"),
        (["paper", "--model", "/nowhere"], "a folder with a config.json"),
        (["paper", "--repeats", "0"], "--repeats is 0; it must be more than 0"),
        (["paper", "--prompts", "/nowhere.jsonl"], "--prompts is '/nowhere.jsonl'"),
        (["core", "--accept-length", "magic=7"], "WHO one of sparsespec, ngram and"),
        (["core", "--accept-length", "eagle3=2"], "WHO one of sparsespec, ngram and"),
        (["core", "--accept-length", "ngram=2"], "--accept-length is 'ngram'"),
        (["core", "--shapes", "qwen3-8b"], "--shapes is 'qwen3-8b'; it must be one of qwen3-1.7b"),
        (["smoke", "--shapes", "qwen3-8b"], "--shapes is 'qwen3-8b'; it must be left out with set smoke"),
        (["smoke", "--profile"], "set smoke leaves a GPU out of account"),
        (["gpu-table", "--profile"], "there is no GPU here"),
        (["smoke", "--eagle3-draft", "/x"], "--eagle3-draft is '/x'; it must be left out with set smoke"),
        (["gpu-table", "--eagle3-draft", "/x"], "it must be left out with set gpu-table"),
        (["core", "--accept-length", "ngram=0.5"], "N at least 1"),
    ],
)
def test_arguments_are_refused_clearly(
    argv: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything starts, in one line, with what is allowed."""
    assert cli.main([*argv, "--device", "cpu", "--dry-run", "--out", str(tmp_path)]) == cli.REFUSED
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert complaint in line


def test_a_contender_needs_a_name(tiny_qwen3_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two unnamed configurations would share a row of the table."""
    argv = ["paper", "--model", str(tiny_qwen3_path), "--contender=--x", "--device", "cpu", "--dry-run"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == cli.REFUSED
    assert "NAME=OPTIONS" in capsys.readouterr().err


def write_results(job: Job, out: Path) -> list[dict[str, Any]]:
    plain, ours = job.contenders
    records = [gate_record(job, ours)]
    for scene in (Scene(8, 512, 64), Scene(32, 512, 64), Scene(8, 2048, 64), Scene(32, 512, 2048, num_slices=3)):
        for contender in (plain, ours):
            slices = [
                {"pool_tokens": fill, "running": 8, "tokens_per_s": 1e6 / fill, "round_ms": 3 + fill / 1e4}
                for fill in (1e5, 2e5, 3e5)
            ]
            speed = 100.0 if contender is plain else 150.0
            pool = 10.0 * scene.batch * scene.prompt_tokens
            extra = {"slices": slices} if scene.num_slices > 1 else {}
            step = 3 + pool / 1e4
            records.append(
                turn_record(job, contender, scene, tokens_per_s=speed, pool_tokens=pool, round_ms=step, **extra)
            )
    for record in records:
        append_record(out / "results.jsonl", record)
    return records


def test_report_draws_every_kind_of_plot(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file alone: a card's host may have no matplotlib, and the plots are made elsewhere."""
    monkeypatch.setattr(cli, "real_target", lambda *args: job.target)
    write_results(job, tmp_path)
    assert cli.main(["paper", "--device", "cpu", "--report", "--out", str(tmp_path)]) == cli.FINISHED
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {
        "throughput-small-by-batch-512.png",
        "throughput-small-by-prompt-tokens-8.png",
        "speedup-small-by-fill.png",
        "round-small.png",
    }
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
    page = (tmp_path / "report.md").read_text()
    assert all(f"({name})" in page for name in drawn)
    assert "1.50" in capsys.readouterr().out


def test_skips_travel_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of a card's run is often made on a laptop, which would skip everything for reasons of its own."""
    argv = ["core", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(argv) == cli.FINISHED
    assert cli.main(argv) == cli.FINISHED
    [record] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (record["record"], record["what"]) == ("skip", "set core")
    capsys.readouterr()
    assert cli.main([*argv, "--report"]) == cli.FINISHED
    assert "* set core: it needs a GPU" in capsys.readouterr().out


def test_report_without_matplotlib_says_so(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables need no extra; the missing plots are named with the command that brings them."""
    monkeypatch.setattr(cli, "real_target", lambda *args: job.target)
    monkeypatch.setattr(plots, "is_available", lambda: False)
    write_results(job, tmp_path)
    assert cli.main(["paper", "--device", "cpu", "--report", "--out", str(tmp_path)]) == cli.FINISHED
    assert "sglang-sparsespec[bench]" in (tmp_path / "report.md").read_text()
    assert list(tmp_path.glob("*.png")) == []


def test_red_parity_draws_no_speedup_and_fails(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot is a claim as well, and a script that goes on by exit code must stop here."""
    monkeypatch.setattr(cli, "real_target", lambda *args: job.target)
    write_results(job, tmp_path)
    append_record(tmp_path / "results.jsonl", gate_record(job, job.contenders[1], ok=False))
    assert cli.main(["paper", "--device", "cpu", "--report", "--out", str(tmp_path)]) == cli.FAILED
    assert not (tmp_path / "speedup-small-by-fill.png").exists()
    assert (tmp_path / "throughput-small-by-batch-512.png").exists()


def test_speedup_by_fill_compares_equal_fills(job: Job, tmp_path: Path) -> None:
    """Slices of two runs of different speed lie at different fills; the baseline is read off between its own."""
    plain, ours = job.contenders
    scene = Scene(8, 512, 64, num_slices=2)

    def part(fill: float, speed: float) -> dict[str, float]:
        return {"pool_tokens": fill, "running": 8, "tokens_per_s": speed, "round_ms": 1.0}

    records = [
        gate_record(job, ours),
        turn_record(job, plain, scene, slices=[part(100, 40.0), part(300, 20.0)]),
        turn_record(job, ours, scene, slices=[part(200, 60.0), part(400, 50.0)]),
    ]
    found = plots.rows(records)
    [row] = [row for row in found if not row.is_baseline]
    assert plots.speedup_by_fill(row, found) == [(200, 2.0)]


def test_lines_join_answers_of_one_length(job: Job) -> None:
    """A line from 64 to 256 tokens over the batch shows the answers' length and not the batch."""
    plain, ours = job.contenders
    scenes = (Scene(2, 1024, 64), Scene(8, 1024, 256), Scene(8, 1024, 64))
    found = plots.rows([turn_record(job, who, scene) for who in (plain, ours) for scene in scenes])
    [(name, figure)] = plots._lines_by(plots._pyplot(), found, "batch", "prompt_tokens")
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert name == "throughput-small-by-batch-1024.png"
    assert lines == {f"{who.label}, 64 new, greedy": [2, 8] for who in (plain, ours)}


def test_summarise_cuts_warm_up_and_drain() -> None:
    """One turn from traces to numbers: rate, round, gaps and pool."""
    traces = [
        Trace(100, 0.0, tuple(1 + 0.1 * i for i in range(41)), tuple(1 + 4 * i for i in range(41)), 40),
        Trace(100, 0.0, tuple(2 + 0.1 * i for i in range(41)), tuple(1 + 4 * i for i in range(41)), 40),
    ]
    loads = [Load(0.5, 999, 1000), *(Load(2.2 + 0.5 * i, 300 + i, 1000) for i in range(5))]
    found = summarise(traces, loads, Scene(2, 100, 161, num_slices=2))
    assert found["tokens_per_s"] == pytest.approx(80, rel=0.06)
    assert found["accept_length"] == 4.0
    assert found["round_ms"] == pytest.approx(100, rel=0.06)
    assert (found["itl_p50_ms"], found["chunk_gap_p99_ms"]) == (pytest.approx(25), pytest.approx(100))
    assert found["pool_used_peak"] == 304
    assert len(found["slices"]) == 2


def test_scheduler_rate_is_of_full_batches() -> None:
    """The check on a client that cannot keep up; a line from the filling or draining batch would raise false alarms."""
    line = (
        "[x] Decode batch, #running-req: {}, #token: 77, token usage: 0.68, gen throughput (token/s): {}, #queue-req: 1"
    )
    log = "\n".join(line.format(*pair) for pair in [(4, 9.0), (8, 5.0), (8, 100.0), (8, 50.0), (3, 1.0)])
    assert scheduler_rate(log, 8) == pytest.approx(66.667)
    assert scheduler_rate(log, 4) is None


def test_client_reads_the_counts_of_a_chunk() -> None:
    """Chunks are searched, not parsed; a field that SGLang renames must not read as zero."""
    chunk = json.dumps({"text": "x", "meta_info": {"completion_tokens": 17, "spec_verify_ct": 4}}).encode()
    found, verified = COMPLETION_TOKENS.search(chunk), VERIFY_CT.search(chunk)
    assert found is not None
    assert verified is not None
    assert (int(found[1]), int(verified[1])) == (17, 4)


def test_token_prompts_have_their_length(tiny_qwen3_path: Path) -> None:
    """A text that is shorter than the prompt would make a shorter context than the table says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_path)
    lengths = [5, 300, 200_000]
    found = prompts.token_prompts(tokenizer, lengths)
    assert [len(ids) for ids in found] == lengths
    assert prompts.token_prompts(tokenizer, lengths, seed=1) != found
    own = tokenizer.decode(prompts.token_prompts(tokenizer, [16] * 3)[prompts.OWN_PLACE])
    assert own in tokenizer.decode(tokenizer(own_sources(), verbose=False)["input_ids"])
    path = tiny_qwen3_path / "prompts.jsonl"
    path.write_text('"one"\n{"prompt": "two"}\n')
    chats = prompts.file_prompts(tokenizer, path, 3)
    assert chats[0] == chats[2]
    assert "<|im_start|>user\none<|im_end|>" in tokenizer.decode(chats[0])


def test_commit_of_a_copy_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number without a commit cannot be traced; a card's host gets a copy without .git."""
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    assert provenance.commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert provenance.commit(tmp_path) == "abc1234"
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "def5678")
    assert provenance.commit(tmp_path) == "def5678"


def test_every_edit_is_another_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All edits of a checkout are the same "-dirty" commit, a copy has none: old turns would pass for new."""
    (tmp_path / "package" / "ops").mkdir(parents=True)
    (tmp_path / "patches").mkdir()
    kernel, patch = tmp_path / "package" / "ops" / "x.py", tmp_path / "patches" / "y.py"
    found = set()
    for file, text in ((kernel, "a"), (kernel, "b"), (patch, "a"), (tmp_path / "package" / "z.py", "")):
        file.write_text(text)
        found.add(provenance.sources_digest(tmp_path / "package"))
        (tmp_path / "package" / "notes.md").write_text(text)
    assert len(found) == 4
    contexts = []
    monkeypatch.setattr(cli, "Runner", lambda *args, context, **_: contexts.append(context) or pytest.fail("made"))
    for sources in ("one", "two"):
        monkeypatch.setattr(provenance, "sources_digest", lambda sources=sources: sources)
        with pytest.raises(pytest.fail.Exception):
            cli.main(["smoke", "--dry-run", "--out", str(tmp_path)])
    assert contexts[0]["commit"] == contexts[1]["commit"]
    assert [context["sources"] for context in contexts] == ["one", "two"]


def test_command_is_one_that_others_can_type() -> None:
    """Python puts the file's path on this machine in the place of `-m package`."""
    argv = ["/home/me/sglang_sparsespec/sglang_sparsespec/bench/__main__.py", "core", "--repeats", "3"]
    assert provenance.command(argv) == "python -m sglang_sparsespec.bench core --repeats 3"
    script = str(provenance.ROOT / "scripts" / "bench" / "parity.py")
    assert provenance.command([script, "--model", "M"]) == "python scripts/bench/parity.py --model M"


def test_shapes_are_served_from_a_folder(tmp_path: Path) -> None:
    """What SGLang gets for `--load-format dummy`, and what the cost model reads, are the same file."""
    for name, config in SHAPES.items():
        assert read_shape(write_shape(name, tmp_path / name)).layers == config["num_hidden_layers"]
    with pytest.raises(ConfigError, match="one of qwen3"):
        write_shape("qwen4", tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match="num_attention_heads"):
        read_shape(tmp_path)
