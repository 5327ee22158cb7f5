"""Ratios, refusals and the page: what may be claimed from which records."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from bench_records import gate_record, turn_record

from sglang_sparsespec.bench import plots
from sglang_sparsespec.bench.cells import Contender, Job, Scene, Skip, Target
from sglang_sparsespec.bench.model_check import check_all, plain_fit, verify_share
from sglang_sparsespec.bench.report import markdown
from sglang_sparsespec.bench.summary import Row, current, rows
from sglang_sparsespec.sparsity.anchors_file import write_anchors

if TYPE_CHECKING:
    from pathlib import Path


def paired(job: Job, plain_speeds: list[float], our_speeds: list[float], **ours_result: Any) -> list[dict[str, Any]]:
    plain, ours = job.contenders
    scene = job.scenes[0]
    records = [turn_record(job, plain, scene, i, tokens_per_s=speed) for i, speed in enumerate(plain_speeds)]
    return records + [
        turn_record(job, ours, scene, i, tokens_per_s=speed, **ours_result) for i, speed in enumerate(our_speeds)
    ]


def row_of(found: list[Row], contender: Contender) -> Row:
    [row] = [row for row in found if row.contender == contender.name]
    return row


def test_ratio_is_of_medians_and_spread_is_told(job: Job) -> None:
    """A mean would let one turn beside a busy neighbour decide."""
    records = [*paired(job, [100, 90, 110], [210, 200, 50]), gate_record(job, job.contenders[1])]
    row = row_of(rows(records), job.contenders[1])
    assert (row.tokens_per_s, row.ratio) == (200, 2.0)
    assert row.spread == pytest.approx(0.4)
    assert row_of(rows(records), job.contenders[0]).ratio == 1.0


@pytest.mark.parametrize(
    ("gates", "refusal"), [([], "no parity check"), ([False], "is red"), ([True, False], "is red"), ([True], "")]
)
def test_speedup_needs_a_green_gate(job: Job, gates: list[bool], refusal: str) -> None:
    """A lossy engine is fast; its speed must not be printed."""
    records = paired(job, [100], [300]) + [gate_record(job, job.contenders[1], ok=ok) for ok in gates]
    row = row_of(rows(records), job.contenders[1])
    assert refusal in row.refusal
    assert (row.ratio is None) == bool(refusal)
    page = markdown(records)
    assert ("3.00" in page) == (not refusal)
    assert ("refused" in page) == bool(refusal)


@pytest.mark.parametrize("said", [False, True])
def test_what_a_server_says_of_itself_is_no_refusal(job: Job, said: bool) -> None:
    """The runner's word in a record stands for an option that the arguments do not show."""
    records = [*paired(job, [100], [300]), gate_record(job, job.contenders[1], ok=False)]
    for record in records:
        if said and not record.get("is_baseline"):
            record["lossy"] = ["attention"]
    assert (row_of(rows(records), job.contenders[1]).ratio is None) != said
    assert ("**LOSSY**, as asked" in markdown(records)) == said


@pytest.mark.parametrize("compared", [False, True])
def test_a_lossy_contender_is_compared_and_named(job: Job, compared: bool) -> None:
    """Asked for, so not refused; but never without its label, nor without the comparison that shows the loss."""
    plain, ours = job.contenders
    args = ("--sparsespec-verify-sparsity=attention", "--sparsespec-allow-lossy")
    ours = dataclasses.replace(ours, name="sparsespec/x-LOSSY", label="**LOSSY**: x", args=(*ours.args, *args))
    records = paired(dataclasses.replace(job, contenders=(plain, ours)), [100], [300])
    records += [gate_record(job, ours, ok=False)] if compared else []
    assert (row_of(rows(records), ours).ratio is None) == (not compared)
    page = markdown(records)
    assert "RED" not in page
    assert ("3.00" in page) == compared
    assert "| **LOSSY**: x |" in page


def test_gate_is_of_the_same_options(job: Job) -> None:
    """A green gate of the default policy says nothing of another one."""
    other = dataclasses.replace(job.contenders[1], args=(*job.contenders[1].args, "--sparsespec-sink", "0"))
    records = [*paired(job, [100], [300]), gate_record(job, other)]
    assert row_of(rows(records), job.contenders[1]).ratio is None


def test_contender_is_compared_with_the_baseline_of_its_pair(job: Job) -> None:
    """The baseline is measured once per pair; minutes later the machine may be another one."""
    records = [*paired(job, [100, 400], [300, 300]), gate_record(job, job.contenders[1])]
    for record in records[:1] + records[2:4]:
        record["pair"] = "sparsespec/pillar"
    records[1]["pair"] = "sparsespec/window"
    assert row_of(rows(records), job.contenders[1]).ratio == 3.0


def test_repeats_that_one_side_lacks_do_not_count(job: Job) -> None:
    """All servers take turns with one baseline; a turn that failed leaves no ratio to another repeat's."""
    records = [*paired(job, [100, 400], [300]), gate_record(job, job.contenders[1])]
    assert row_of(rows(records), job.contenders[1]).ratio == 3.0
    row = row_of(rows(records[1:]), job.contenders[1])
    assert row.ratio is None
    assert "same repeat" in row.refusal


def test_best_plain_backend_is_the_one_to_beat(job: Job) -> None:
    """A speed-up over a slow backend is no speed-up."""
    triton = Contender("plain/fa3", "SGLang, fa3", ("--attention-backend", "fa3"))
    records = [*paired(job, [100], [180]), turn_record(job, triton, job.scenes[0], tokens_per_s=150.0)]
    records.append(gate_record(job, job.contenders[1]))
    found = rows(records)
    ours = row_of(found, job.contenders[1])
    assert (ours.ratio, ours.over_best_plain) == (1.8, pytest.approx(1.2))
    assert row_of(found, triton).over_best_plain == 1.0


@pytest.mark.parametrize("our_rate", [300.0, None])
def test_a_stream_that_is_too_slow_does_not_flatter_us(job: Job, our_rate: float | None) -> None:
    """One chunk per token costs plain more than one per round; the scheduler's clock then decides."""
    plain, ours = job.contenders
    scene = job.scenes[0]
    records = [
        turn_record(job, plain, scene, tokens_per_s=100.0, scheduler_tokens_per_s=150.0),
        turn_record(job, ours, scene, tokens_per_s=300.0, scheduler_tokens_per_s=our_rate),
        gate_record(job, ours),
    ]
    assert row_of(rows(records), ours).ratio == 2.0
    assert "by the scheduler's clock" in markdown(records)


def test_a_lagging_client_does_not_slow_the_plain_server_of_the_model(job: Job) -> None:
    """Steps that a client stretched gave a W twice too large, and the model a speed-up near 1."""
    plain = job.contenders[0]
    records = []
    for fill, ms in ((1000.0, 4.0), (3000.0, 8.0)):
        scene = Scene(2, int(fill), 8)
        record = turn_record(job, plain, scene, tokens_per_s=100.0, scheduler_tokens_per_s=200.0)
        record["result"]["slices"] = [{"pool_tokens": fill, "round_ms": 2 * ms}]
        records.append(record)
    fit = plain_fit(rows(records), job.target.name, 2, 0.0)
    assert fit == pytest.approx((2.0, 0.002))


def test_turns_of_another_pool_are_another_row(job: Job) -> None:
    """`--only` leaves scenes out, and the server then has a smaller pool and fewer places: not the same measurement."""
    records = [gate_record(job, job.contenders[1])]
    for pool, ours in ((1000, 150), (90_000, 300)):
        for record in paired(job, [100], [ours]):
            args = ["--dtype", "float32", "--max-total-tokens", str(pool), "--max-running-requests", "8"]
            records.append({**record, "server_args": args})
    found = [row for row in rows(records) if not row.is_baseline]
    assert [(row.ratio, row.over_best_plain) for row in found] == [(1.5, 1.5), (3.0, 3.0)]
    page = markdown(records)
    assert "Server: pool of 1,000 tokens, at most 8 running." in page
    assert "Server: pool of 90,000 tokens, at most 8 running." in page


def test_records_of_another_context_stay_out(job: Job) -> None:
    """Numbers of two commits in one median belong to neither."""
    old = [{**record, "context": "before"} for record in paired(job, [1], [1])]
    kept, others = current([*old, *paired(job, [100], [200])])
    assert (len(kept), others) == (2, 2)
    assert "2 records of other commits" in markdown([*old, *paired(job, [100], [200])])


def test_page_names_simulation_skips_failures_and_provenance(
    shape_target: Target, plain: Contender, ours: Contender
) -> None:
    """A reader must see at once what is real, what is not, and what is missing."""
    job = Job(shape_target, (plain, ours), (Scene(128, 512, 64),), 1, "small")
    records = [*paired(job, [100], [200]), gate_record(job, ours)]
    failure = {**records[1], "key": "f", "record": "failure", "reason": "the server died\nlog"}
    page = markdown([*records, failure], [Skip("eagle3", "no draft")], ["a.png"])
    for text in (
        "Acceptance **simulated**",
        "simulated, 7.16",
        "* eagle3: no draft",
        "the server died",
        "commit abc",
        "sglang 0.5.17",
        "driver 1",
        "![a](a.png)",
        "bonus counted",
    ):
        assert text in page, text


def test_page_tells_of_a_busy_machine(job: Job) -> None:
    """Ratios that were taken beside somebody else's work look like any others."""
    assert "not quiet" in markdown(paired(job, [100], [200], load_before=2.5))
    assert "not quiet" not in markdown(paired(job, [100], [200], load_before=0.9))


def test_page_says_where_speculation_loses(job: Job) -> None:
    """A table of ratios hides the cells below 1 among those above; and a rival that is ahead is a loss of ours."""
    plain, ours = job.contenders
    ngram = Contender("ngram", "SGLang NGRAM", ("--speculative-algorithm", "NGRAM"), 2.6)
    records = [gate_record(job, ours), gate_record(job, ngram)]
    for scene, speeds in zip(job.scenes, ((80.0, 70.0), (150.0, 190.0)), strict=True):
        records.append(turn_record(job, plain, scene, tokens_per_s=100.0))
        records += [
            turn_record(job, who, scene, tokens_per_s=speed) for who, speed in zip((ours, ngram), speeds, strict=True)
        ]
    page = markdown(records)
    losses = page[page.index("## Where speculation loses") : page.index("## Cost model")].splitlines()
    assert losses[2] == "3 of 4 cells:"
    title = "small, batch {} 64 prompt + 8 new, greedy: {}"
    assert [line for line in losses if line.startswith("* ")] == [
        "* " + title.format("2,", "policy pillar in our engine: 0.80 times the baseline"),
        "* " + title.format("2,", "SGLang NGRAM: 0.70 times the baseline"),
        "* " + title.format("4,", "policy pillar in our engine: 1.50 where SGLang NGRAM has 1.90"),
    ]
    assert "Nowhere on this page" in markdown([*paired(job, [100], [200]), gate_record(job, ours)])
    assert "nothing can be said" in markdown(paired(job, [100], [50]))


def test_page_of_nothing_still_lists_skips() -> None:
    """On a machine where nothing can run, the reasons are the result."""
    page = markdown([], [Skip("set core", "it needs a GPU")])
    assert "Nothing has been measured" in page
    assert "it needs a GPU" in page


def sweep(job: Job, *, our_extra_ms: float) -> list[dict[str, Any]]:
    """Plain with W = 3 ms and A = 40 ns per token, ours exactly on the model's line plus something."""
    plain, ours = job.contenders
    scene = job.scenes[0]
    fills = [100_000.0, 200_000.0, 300_000.0, 400_000.0]

    def slices(times: list[float]) -> list[dict[str, float]]:
        return [
            {"pool_tokens": fill, "running": 128, "tokens_per_s": 1.0, "round_ms": time}
            for fill, time in zip(fills, times, strict=True)
        ]

    plain_slices = slices([3 + 40e-6 * fill for fill in fills])
    records = [turn_record(job, plain, scene, pool_tokens=250_000.0, round_ms=13.0, slices=plain_slices)]
    records.append(turn_record(job, ours, scene, pool_tokens=250_000.0, slices=slices([1.0, 2.0, 3.0, 4.0])))
    [check] = check_all(rows(records), {"machine": "an unknown card"})[0]
    measured = [check.model.total + our_extra_ms] * 4
    records[1]["result"] |= {"round_ms": measured[0], "slices": slices(measured)[:1]}
    return records


def test_model_stands_beside_the_measurement(job: Job) -> None:
    """W and A come from the plain server of the run; a round on the model is not flagged, one above it is."""
    long = dataclasses.replace(job, scenes=(Scene(128, 512, 2600, num_slices=4),))
    [check] = check_all(rows(sweep(long, our_extra_ms=0.0)), {"machine": "an unknown card"})[0]
    assert (check.plain_weights, check.plain_kv) == (pytest.approx(3.0), pytest.approx(10.0))
    assert check.flags() == []
    [check] = check_all(rows(sweep(long, our_extra_ms=20.0)), {"machine": "an unknown card"})[0]
    assert any(flag.startswith("round +") for flag in check.flags())
    assert "round +" in markdown(sweep(long, our_extra_ms=20.0))


def test_round_stands_beside_the_cards_roofline(job: Job) -> None:
    """The model's W and A are measured ones: a plain server that wastes the card flatters our round."""
    long = dataclasses.replace(job, scenes=(Scene(128, 512, 2600, num_slices=4),))
    records = sweep(long, our_extra_ms=0.0)
    [check] = check_all(rows(records), {"machine": "NVIDIA H100 80GB HBM3"})[0]
    assert check.roofline is not None
    assert check.roofline_plain is not None
    weights, kv = check.roofline_plain
    assert check.roofline.draft_weights == pytest.approx(8 * weights)
    assert check.roofline.verify_kv == pytest.approx(kv)
    assert (check.roofline.draft_gaps, check.roofline.capture) == (0.0, 0.0)
    assert 0 < check.roofline.total < check.model.total
    heights = {}
    for machine in ("NVIDIA H100 80GB HBM3", "an unknown card"):
        found = check_all(rows(records), {"machine": machine})[0]
        [(_, figure)] = plots._rounds(plots._pyplot(), found)
        bars = [(round(bar.get_x() + 0.45, 3), bar.get_height()) for bar in figure.axes[0].patches]
        heights[machine] = {place: sum(height for at, height in bars if at == place) for place, _ in bars}
    on_card, elsewhere = heights.values()
    assert on_card[0.0] == pytest.approx(check.roofline.total)
    assert on_card[1.0] == pytest.approx(check.model.total)
    assert set(elsewhere) == {1.0, 2.0}


def test_model_is_not_applied_to_a_pool_that_is_too_small(job: Job) -> None:
    """Requests that wait or start again take time that is in no round."""
    small = dataclasses.replace(job, scenes=(Scene(128, 512, 2600, num_slices=4, pool_share=0.4),))
    records = sweep(dataclasses.replace(job, scenes=(Scene(128, 512, 2600, num_slices=4),)), our_extra_ms=0.0)
    for record in records:
        record["scene"] = vars(small.scenes[0])
    checks, notes = check_all(rows(records), {"machine": "an unknown card"})
    assert (checks, len(notes)) == ([], 1)


def test_model_knows_what_a_sparse_verify_reads(job: Job, tmp_path: Path) -> None:
    """A prediction that takes a sparse verify for a dense one would call every gain a surprise."""
    options = (
        "--sparsespec-verify-sparsity attention ffn --sparsespec-verify-kv-ratio 0 --sparsespec-verify-dense-below 0"
    )
    ours = Contender("x", "x", ("--speculative-algorithm", "SPARSESPEC", *options.split()))
    # 2,000 tokens a request, of which two blocks are read, and K of all in every layer
    share = 2 * 16 / 2000
    assert verify_share(ours, 2000.0) == pytest.approx(share + 0.5)
    anchors = tmp_path / "anchors.json"
    model = {name: 1 for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")}
    model |= {"num_hidden_layers": 8}
    write_anchors(anchors, model={**model, "architectures": ["X"]}, block_size=16, anchors=[0, 4])
    fewer = dataclasses.replace(ours, args=(*ours.args, "--sparsespec-verify-anchors", str(anchors)))
    assert verify_share(fewer, 2000.0) == pytest.approx(share + 0.5 / 4)
    long = dataclasses.replace(
        job, contenders=(job.contenders[0], fewer), scenes=(Scene(128, 512, 2600, num_slices=4),)
    )
    records = sweep(long, our_extra_ms=0.0)
    [check] = check_all(rows(records), {"machine": "an unknown card"})[0]
    context = check.plain_kv / 40e-6 / 128
    assert check.model.verify_kv == pytest.approx(check.plain_kv * verify_share(fewer, context))
    anchors.unlink()
    checks, notes = check_all(rows(records), {"machine": "an unknown card"})
    assert checks == []
    assert "anchors.json" in notes[0]


def test_model_is_not_applied_without_a_fill_sweep(job: Job) -> None:
    """A line through repeats of one fill has any slope."""
    checks, notes = check_all(rows(paired(job, [100], [200])), {"machine": "CPU"})
    assert checks == []
    assert "one pool fill" in notes[0]
