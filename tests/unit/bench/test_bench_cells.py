"""Keys, order, server starts and the file of results: what makes a run resumable."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.bench import planner
from sglang_sparsespec.bench.cells import Contender, Job, Scene, Target, turn_key
from sglang_sparsespec.bench.records import append_record, read_records
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from sglang_sparsespec.bench.machine import Machine

CONTEXT: dict[str, Any] = {"machine": "x", "commit": "abc", "versions": {"sglang": "0.5.17"}}


def test_key_follows_everything_that_decides_a_number(job: Job) -> None:
    """Two configurations under one key: the second is never measured and gets the first one's number."""
    target, contender, scene = job.target, job.contenders[1], job.scenes[0]

    def key(**other: Any) -> str:
        whole: dict[str, Any] = {
            "target": target,
            "contender": contender,
            "scene": scene,
            "pair": "",
            "repeat": 0,
            "context": CONTEXT,
        } | other
        return turn_key(whole.pop("target"), whole.pop("contender"), whole.pop("scene"), **whole)

    keys = [
        key(),
        key(target=dataclasses.replace(target, dtype="float16")),
        key(target=dataclasses.replace(target, has_weights=False)),
        key(contender=dataclasses.replace(contender, args=(*contender.args, "--sparsespec-sink", "0"))),
        key(contender=dataclasses.replace(contender, simulated_accept_length=5.0)),
        key(scene=dataclasses.replace(scene, temperature=0.6)),
        key(pair="x"),
        key(repeat=1),
        key(context={**CONTEXT, "commit": "def"}),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    # a shape's folder is made anew beside each file of results
    shape = dataclasses.replace(target, has_weights=False)
    assert key(target=shape) == key(target=dataclasses.replace(shape, path="/elsewhere"))


def test_pairs_take_turns(job: Job, h100: Machine) -> None:
    """All of one, then all of the other, would take a drift of the machine for a difference."""
    assert planner.side_by_side(job, h100)
    order = [(turn.contender.name, turn.scene.batch, turn.repeat) for turn in planner.turns(job, h100, CONTEXT)]
    a, b = (contender.name for contender in job.contenders)
    expected = [(name, scene.batch, i) for scene in job.scenes for i in range(2) for name in (a, b)]
    assert order == expected
    assert planner.num_starts(job, h100) == 2


def test_all_contenders_together_where_they_fit(
    job: Job, ours: Contender, h100: Machine, small_card: Machine, laptop: Machine
) -> None:
    """The baseline once a repeat and scene; pools as given, whatever the others take while they start."""
    trio = dataclasses.replace(job, contenders=(*job.contenders, dataclasses.replace(ours, name="b")))
    assert planner.together(trio, h100)
    found = planner.turns(trio, h100, CONTEXT)
    names = [contender.name for contender in trio.contenders]
    order = [(turn.contender.name, turn.scene.batch, turn.repeat) for turn in found]
    there = [(name, scene.batch, 0) for scene in job.scenes for name in names]
    assert order == there + [(name, scene.batch, 1) for scene in job.scenes for name in reversed(names)]
    assert {turn.pair for turn in found} == {""}
    options = dict(itertools.pairwise(planner.common_args(trio, h100)))
    assert float(options["--mem-fraction-static"]) > 0.9
    assert planner.num_starts(trio, h100) == 3
    seconds = planner.predicted_s((trio,), h100, found) - planner.predicted_visit_s(found, h100)
    gates_s = 3 * planner.predicted_gate_s(trio, h100)
    assert seconds == pytest.approx(planner.TOGETHER_STARTS * planner.START_S[True] + gates_s)
    # a pair takes turns as before; ranks start one server at a time; a CPU has no room for idle servers
    two = dataclasses.replace(h100, memory_bytes=2 * h100.memory_bytes, tp_size=2)
    assert not any(planner.together(*each) for each in ((job, h100), (trio, small_card), (trio, laptop), (trio, two)))
    assert planner.side_by_side(trio, small_card)


def test_servers_that_do_not_fit_together_alternate(
    shape_target: Target, plain: Contender, ours: Contender, h100: Machine
) -> None:
    """46 GB of KV leave no room for a second server: ABAB over restarts."""
    scene = Scene(128, 512, 2600)
    job = Job(shape_target, (plain, ours), (scene,), 2, "small")
    assert not planner.side_by_side(job, h100)
    names = [turn.contender.name for turn in planner.turns(job, h100, CONTEXT)]
    assert names == [plain.name, ours.name] * 2
    assert planner.num_starts(job, h100) == 4
    # without a real model the gate needs a server of its own, without simulation
    alone = dataclasses.replace(job, gate_on=shape_target.name)
    assert planner.num_starts(alone, h100) == 5


def test_servers_get_the_pool_and_the_batch_of_their_largest_scene(job: Job, h100: Machine) -> None:
    """A pool below batch x context queues requests, and the batch that was asked for never runs."""
    scenes = (Scene(64, 4096, 256), Scene(128, 1024, 256))
    args = planner.common_args(dataclasses.replace(job, scenes=scenes), h100)
    options = dict(itertools.pairwise(args))
    assert int(options["--max-total-tokens"]) >= 64 * (4096 + 256)
    assert int(options["--max-running-requests"]) > 128


def test_ranks_are_everybodys(shape_target: Target, plain: Contender, ours: Contender, h100: Machine) -> None:
    """A baseline on one card would make two cards look like a speed-up, and its number would count for both."""
    job = Job(shape_target, (plain, ours), (Scene(128, 512, 2600),), 1, "small")
    two = dataclasses.replace(h100, memory_bytes=2 * h100.memory_bytes, tp_size=2)
    assert ("--tp-size", "2") in itertools.pairwise(planner.common_args(job, two))
    assert "--tp-size" not in planner.common_args(job, h100)
    keys = [{turn.key for turn in planner.turns(job, machine, CONTEXT)} for machine in (h100, two)]
    assert keys[0].isdisjoint(keys[1])
    # the same pool on twice the memory leaves room for a second server
    assert not planner.side_by_side(job, h100)
    assert planner.side_by_side(job, two)
    assert planner.predicted_turn_s(planner.turns(job, two, CONTEXT)[0], two) < planner.predicted_turn_s(
        planner.turns(job, h100, CONTEXT)[0], h100
    )


def test_kv_heads_are_copied_to_ranks_that_outnumber_them(shape_target: Target) -> None:
    """Eight ranks of a model with two KV heads hold four copies: a pool that is planned without them does not fit."""
    few = dataclasses.replace(shape_target, shape=dataclasses.replace(shape_target.shape, kv_heads=2))
    assert [few.kv_bytes_per_token(ranks) // few.kv_bytes_per_token() for ranks in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert few.shape.splits_over(8)
    assert not dataclasses.replace(few.shape, heads=9, kv_heads=3).splits_over(2)


def test_records_come_back_and_the_later_of_two_counts(tmp_path: Path) -> None:
    """A failure that a later turn has mended must not stay failed."""
    path = tmp_path / "out" / "results.jsonl"
    assert read_records(path) == []
    for record in ({"key": "a", "n": 1}, {"key": "b", "n": 2}, {"key": "a", "n": 3}):
        append_record(path, record)
    assert read_records(path) == [{"key": "b", "n": 2}, {"key": "a", "n": 3}]


def test_a_line_that_was_cut_off_is_lost_alone(tmp_path: Path) -> None:
    """A killed run leaves half a line; the records before it took minutes each."""
    path = tmp_path / "results.jsonl"
    append_record(path, {"key": "a"})
    with path.open("a") as file:
        file.write('{"key": "b", "resu')
    assert read_records(path) == [{"key": "a"}]
    append_record(path, {"key": "c"})
    assert read_records(path) == [{"key": "a"}, {"key": "c"}]


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    """Something else wrote to this file; going on would drop its results silently."""
    path = tmp_path / "results.jsonl"
    path.write_text('nonsense\n{"key": "a"}\n')
    with pytest.raises(ConfigError, match="line 1 of"):
        read_records(path)
