"""What each set measures, what it skips and why, and the limits that the sets promise."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from sglang_sparsespec.bench import planner, sets
from sglang_sparsespec.bench.cells import Target
from sglang_sparsespec.bench.sets import Request
from sglang_sparsespec.bench.shapes import SHAPES, shape_from_config
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from sglang_sparsespec.bench.machine import Machine


@pytest.fixture
def request_(real_target: Target) -> Request:
    shapes = tuple(
        Target(name, f"/shapes/{name}", "bfloat16", shape_from_config(config), has_weights=False)
        for name, config in SHAPES.items()
    )
    return Request(model=real_target, shapes=shapes, tiny=dataclasses.replace(real_target, name="tiny"))


def names(plan: sets.Plan) -> set[str]:
    return {contender.name for job in plan.jobs for contender in job.contenders}


def reasons(plan: sets.Plan) -> dict[str, str]:
    return {skip.what: skip.reason for skip in plan.skips}


def test_core_starts_at_most_twelve_servers(h100: Machine, request_: Request) -> None:
    """The promise of the set, with every backend and a draft for EAGLE-3 present."""
    plan = sets.core(h100, dataclasses.replace(request_, eagle3_draft="/draft"))
    rivals = {"plain/flashinfer", "plain/triton", "plain/fa3", "ngram", "eagle3"}
    assert rivals | {"sparsespec/pillar", "sparsespec/window", "sparsespec/triforce"} <= names(plan)
    assert sum(planner.num_starts(job, h100) for job in plan.jobs) <= 12
    assert {job.gate_on for job in plan.jobs} == {request_.model.name if request_.model else ""}


def test_gpu_table_holds_the_numbers_that_are_asked_for(h100: Machine, request_: Request) -> None:
    """1.7B to 400K and 8B to 380K pool tokens at 128 running, batches 64, 32, 8, and a real model at 2K to 8K."""
    plan = sets.gpu_table(h100, request_)
    jobs = {job.target.name: job for job in plan.jobs}
    for name, fill in (("qwen3-1.7b", 400_000), ("qwen3-8b", 380_000)):
        scene = jobs[name].scenes[0]
        assert 128 * (scene.prompt_tokens + scene.new_tokens) == pytest.approx(fill, rel=0.01)
        assert {scene.batch for scene in jobs[name].scenes} == {128, 64, 32, 8}
        ours = [c for c in jobs[name].contenders if c.name == "sparsespec/pillar"]
        assert [contender.simulated_accept_length for contender in ours] == [7.16]
    real = jobs["small"].scenes
    assert {scene.temperature for scene in real} == {0.0, 0.6}
    assert {scene.batch for scene in real} == {128}
    assert max(scene.prompt_tokens + scene.new_tokens for scene in real) <= 8192
    assert "not in this set" in reasons(plan)["plain/triton"]


def test_schedules_has_every_cell_that_the_comparison_asks_for(h100: Machine, request_: Request) -> None:
    """Four batches, three models, four contenders on the same load; a default that changes must not drop one."""
    plan = sets.schedules(h100, request_)
    jobs = {job.target.name: job for job in plan.jobs}
    assert {"small", "qwen3-1.7b", "qwen3-8b"} <= set(jobs)
    for name in ("small", "qwen3-1.7b", "qwen3-8b"):
        job = jobs[name]
        assert [scene.batch for scene in job.scenes] == [16, 64, 128, 256]
        wanted = [contender.option("--sparsespec-schedule") for contender in job.contenders]
        assert wanted == [None, None, "unified", "auto"]
        assert [contender.is_plain for contender in job.contenders] == [True, False, False, False]
        assert job.gate_on == "small"
        for scene in job.scenes:
            # long enough for `auto` to have looked at both and to have gone on
            assert scene.new_tokens / 7.16 > 100
    full = jobs["qwen3-8b"].scenes[-1]
    assert full.batch * (full.prompt_tokens + full.new_tokens) == pytest.approx(380_000, rel=0.01)
    assert not any(what.startswith(("small", "qwen3-1.7b", "qwen3-8b")) for what in reasons(plan))


def test_schedules_can_be_measured_in_short_calls(h100: Machine, request_: Request) -> None:
    """A step is a server start with its turns one by one: none may be as long as a call of nine minutes."""
    plan = sets.schedules(h100, request_)
    for job in plan.jobs:
        if job.target.name == "qwen3-30b-a3b":
            continue
        longest = max(planner.predicted_turn_s(turn, h100) for turn in planner.turns(job, h100, {}))
        assert planner.START_S[True] + longest < 4 * 60


@pytest.mark.parametrize("name", ["core", "full", "gpu-table", "schedules"])
def test_gpu_sets_say_so_on_a_cpu(name: str, laptop: Machine, request_: Request) -> None:
    """A set that runs nothing must say why, not succeed silently."""
    plan = sets.SETS[name](laptop, request_)
    assert plan.jobs == ()
    assert "needs a GPU" in reasons(plan)[f"set {name}"]


def test_full_has_what_is_switched_and_what_is_varied(h100: Machine, request_: Request) -> None:
    """Every option that could be on or off, and answers of several lengths: the cross is where they all stand."""
    plan = sets.full(h100, request_)
    assert {"sparsespec/adaptive", "sparsespec/triforce", "sparsespec/host-memory"} <= names(plan)
    cross, small_pool, *_ = plan.jobs
    assert {scene.new_tokens for scene in cross.scenes} == {256, 1024, 4096}
    assert [c.name for c in small_pool.contenders] == [
        "plain/flashinfer",
        "sparsespec/retract",
        "sparsespec/host-memory",
    ]
    assert [c.option("--sparsespec-host-memory-gb") for c in small_pool.contenders] == [None, "0", "16"]
    [scene] = small_pool.scenes
    assert planner.pool_tokens(small_pool, h100) == pytest.approx(0.4 * 128 * (512 + 2048 + 64), rel=0.01)
    assert "pool for 40% of it" in str(scene)
    # others have the pool that they fill
    assert {scene.pool_share for job in plan.jobs if job is not small_pool for scene in job.scenes} == {1.0}


def test_policies_and_schedules_are_compared_at_a_fixed_k(h100: Machine, request_: Request) -> None:
    """On a GPU k is chosen by default: half of a policy's rounds might be plain decoding."""
    named = dataclasses.replace(request_, named=("k4=--speculative-num-steps 4", "mine=--sparsespec-adaptive"))
    for plan in (sets.full(h100, request_), sets.schedules(h100, named)):
        for job in plan.jobs:
            for contender in job.contenders:
                if not contender.name.startswith("sparsespec/"):
                    continue
                fixed = contender.option("--no-sparsespec-adaptive") is not None
                assert fixed is (contender.name not in ("sparsespec/adaptive", "sparsespec/mine")), contender


def test_eagle3_on_shapes_is_skipped_for_its_own_reason(h100: Machine, request_: Request) -> None:
    """A user who gave a draft model was told to give one."""
    plan = sets.full(h100, dataclasses.replace(request_, eagle3_draft="/draft"))
    assert "eagle3" in {contender.name for contender in plan.jobs[0].contenders}
    assert reasons(plan)["eagle3 on shapes"] == "no draft model fits random weights; it runs on the real model"
    assert "eagle3" not in reasons(plan)
    assert "--eagle3-draft PATH" in reasons(sets.full(h100, request_))["eagle3"]


def test_labels_name_what_runs_eagerly(h100: Machine, laptop: Machine, request_: Request) -> None:
    """Rows of a policy without CUDA graphs beside rows with them compare engines and not policies."""
    from sglang_sparsespec.bench import contenders
    from sglang_sparsespec.config import SparseSpecConfig
    from sglang_sparsespec.selection import POLICIES, StepPolicy

    config = SparseSpecConfig()
    eager = set()
    for name, policy in POLICIES.items():
        made = policy(config)
        # as adapter.support.can_fuse, which only a process with SGLang may import
        is_partial = not isinstance(made, StepPolicy) and made.needs_attention
        is_partial &= is_partial and len(made.captured_queries(config.num_draft_tokens)) < config.num_draft_tokens
        if isinstance(made, StepPolicy) or is_partial:
            eager.add(name)
    assert set(contenders.EAGER) == eager - {"oracle"}
    labels = {c.name: c.label for job in sets.full(h100, request_).jobs for c in job.contenders}
    for policy in contenders.useful_policies():
        assert ("eager" in labels[f"sparsespec/{policy}"]) == (policy in eager)
    [job] = sets.cpu_table(laptop, request_).jobs
    assert not any("eager" in contender.label for contender in job.contenders)


def test_cpu_table_is_the_papers_ideas(laptop: Machine, request_: Request) -> None:
    """Each seed's rule on real acceptance, and the rivals that cannot run named."""
    plan = sets.cpu_table(laptop, request_)
    ours = {f"sparsespec/{name}" for name in ("window", "quest", "first-last", "pillar", "triforce")}
    assert names(plan) == {"plain/torch_native", *ours}
    assert "Triton" in reasons(plan)["ngram"]
    assert plan.jobs[0].target == request_.model
    labels = " ".join(contender.label for contender in plan.jobs[0].contenders)
    assert all(origin in labels for origin in ("MagicDec", "Quest", "Vegas", "TriForce", "SparseSpec"))


@pytest.mark.parametrize("name", ["smoke", "paper", "vegas"])
def test_cpu_sets_name_everyone_who_is_missing(name: str, laptop: Machine, request_: Request) -> None:
    """Rivals that cannot run here are part of the answer."""
    plan = sets.SETS[name](laptop, request_)
    assert names(plan) == {"plain/torch_native", "sparsespec/pillar", "sparsespec/window"}
    found = reasons(plan)
    assert "Triton" in found["ngram"]
    assert "--eagle3-draft" in found["eagle3"]
    assert found["plain/flashinfer"] == "it needs a GPU"


@pytest.mark.parametrize("name", ["core", "gpu-table", "schedules", "full", "paper"])
def test_sets_say_when_there_is_no_real_model(name: str, h100: Machine, request_: Request) -> None:
    """Without one there is no real acceptance, and on shapes no gate worth the name."""
    plan = sets.SETS[name](h100, dataclasses.replace(request_, model=None))
    assert "--model" in reasons(plan)["real model"]
    assert all(job.gate_on == job.target.name for job in plan.jobs)


def test_scenes_that_do_not_fit_are_named(h100: Machine, request_: Request) -> None:
    """A 40 GB card, or a model with a short context, drops cells; each with its arithmetic."""
    small_card = dataclasses.replace(h100, memory_bytes=40 << 30)
    found = reasons(sets.gpu_table(small_card, request_))
    assert any("GiB" in reason for what, reason in found.items() if what.startswith("qwen3-8b"))
    assert request_.model is not None
    short = dataclasses.replace(request_.model, shape=dataclasses.replace(request_.model.shape, context=4096))
    found = reasons(sets.core(h100, dataclasses.replace(request_, model=short)))
    assert any("context is 4096" in reason for reason in found.values())


@pytest.mark.parametrize(("memory", "fill"), [(79 << 30, 80_000), (139 << 30, 500_000)], ids=["H100", "H200"])
def test_a_shape_with_large_weights_fills_what_the_card_has(
    h100: Machine, request_: Request, memory: int, fill: int
) -> None:
    """Scenes made for the larger card would all be skipped on the smaller one, and the other way round tell little."""
    shapes = tuple(target for target in request_.shapes if target.name == "qwen3-30b-a3b")
    card = dataclasses.replace(h100, memory_bytes=memory)
    for make in (sets.gpu_table, sets.full):
        plan = make(card, dataclasses.replace(request_, model=None, shapes=shapes))
        [job] = plan.jobs
        first = job.scenes[0]
        assert first.batch * (first.prompt_tokens + first.new_tokens) == pytest.approx(fill, rel=0.01)
        assert {scene.batch for scene in job.scenes} == {128, 64, 32, 8}
        assert min(min(scene.prompt_tokens, scene.new_tokens) for scene in job.scenes) >= sets.MIN_PROMPT_TOKENS
        assert not any(what.startswith("qwen3-30b-a3b") for what in reasons(plan))
        needed = job.target.weights_bytes + planner.pool_tokens(job, card) * job.target.kv_bytes_per_token()
        assert needed + planner.SERVER_BYTES < memory


def test_full_has_every_policy_that_serves(h100: Machine, request_: Request) -> None:
    """A new policy must appear in the cross without being written down twice."""
    from sglang_sparsespec.config import SELECTIONS

    found = names(sets.full(h100, request_))
    assert {f"sparsespec/{policy}" for policy in SELECTIONS if policy not in ("random", "oracle")} <= found
    assert found.isdisjoint({"sparsespec/random", "sparsespec/oracle"})


def test_workloads_are_the_papers(laptop: Machine, request_: Request) -> None:
    """Temperature, truncation, batch and natural ends; the answer never runs past the context."""
    [job] = sets.workload("vegas", laptop, dataclasses.replace(request_, prompts="p.jsonl")).jobs
    [scene] = job.scenes
    assert (scene.temperature, scene.top_p, scene.top_k, scene.batch) == (0.6, 0.95, 20, 128)
    assert scene.sampling == {"temperature": 0.6, "max_new_tokens": scene.new_tokens, "top_p": 0.95, "top_k": 20}
    assert scene.prompt_tokens + scene.new_tokens <= 8192
    assert scene.prompts == "p.jsonl"
    assert scene.prompt_tokens == 1024
    [job] = sets.workload("paper", laptop, dataclasses.replace(request_, batch=4, new_tokens=32, requests=9)).jobs
    [scene] = job.scenes
    assert (scene.temperature, scene.batch, scene.new_tokens, scene.requests) == (0.65, 4, 32, 9)


def test_lossy_measures_long_contexts_in_pieces_of_nine_minutes(h100: Machine, request_: Request) -> None:
    """32 requests of 11.6K tokens and 8 of 32K: far above an L0 of 1K. A call that is cut off goes on with the next
    turn, so no turn and its server may take longer than a call."""
    shapes = tuple(target for target in request_.shapes if "8b" in target.name or "a3b" in target.name)
    anchors = {target.name: f"/shapes/{target.name}/anchors.json" for target in shapes}
    h200 = dataclasses.replace(h100, name="NVIDIA H200", memory_bytes=140 << 30)
    plan = sets.lossy(h200, dataclasses.replace(request_, shapes=shapes, anchors=anchors))
    jobs = {job.target.name: job for job in plan.jobs}
    scenes = [(scene.batch, scene.prompt_tokens) for scene in jobs["qwen3-8b"].scenes]
    assert scenes == [(32, 11_619), (32, 2712), (8, 32_512), (8, 11_619)]
    both = ["plain/flashinfer", "sparsespec/pillar"]
    both += ["sparsespec/attention-LOSSY", "sparsespec/attention-anchors-LOSSY"]
    assert [c.name for c in jobs["qwen3-8b"].contenders] == [*both, "sparsespec/ffn-LOSSY"]
    assert [c.name for c in jobs["qwen3-30b-a3b"].contenders] == [*both, "sparsespec/moe-LOSSY"]
    for job in plan.jobs:
        assert job.gate_on == job.target.name
        for contender in job.contenders[2:]:
            assert contender.label.startswith("**LOSSY**: ")
            if "attention" in contender.name:
                assert contender.option("--sparsespec-verify-dense-below") == "1024"
            if "anchors" in contender.name:
                assert contender.option("--sparsespec-verify-anchors") == anchors[job.target.name]
                assert "not calibrated" in contender.label
        for turn in planner.turns(job, h200, {}):
            assert planner.START_S[True] + planner.predicted_turn_s(turn, h200) < 500
    # on 80 GB the mixture has no room for its contexts
    small = sets.lossy(h100, dataclasses.replace(request_, shapes=shapes, anchors=anchors))
    assert small.jobs[0].target.name == "qwen3-8b"
    assert len(small.jobs[0].scenes) == 4
    assert "--tp-size" in reasons(sets.lossy(dataclasses.replace(h100, tp_size=2), request_))["set lossy"]
    assert "needs a GPU" in reasons(sets.lossy(dataclasses.replace(h100, has_gpu=False), request_))["set lossy"]


def test_contenders_of_the_user_join_and_are_labelled(h100: Machine, request_: Request) -> None:
    """One more configuration without touching the code; its label says whose engine it is."""
    plan = sets.core(h100, dataclasses.replace(request_, named=("k4=--speculative-num-steps 4",)))
    [ours] = [c for c in plan.jobs[0].contenders if c.name == "sparsespec/k4"]
    assert ours.option("--speculative-num-steps") == "4"
    assert ours.label == "--speculative-num-steps 4 in our engine"


@pytest.mark.parametrize(
    "option",
    ["--sparsespec-allow-lossy", "--sparsespec-allow-lossy=1", "--sparsespec-allow", "--sparsespec-al=1"],
)
def test_lossy_contenders_cannot_lose_their_label(option: str, h100: Machine, request_: Request) -> None:
    """Named by the user, or made so by options for all of ours; argparse takes a prefix for the option."""
    named = sets.core(h100, dataclasses.replace(request_, named=(f"x={option}",))).jobs[0].contenders
    assert [c.name for c in named if "LOSSY" in c.name] == ["sparsespec/x-LOSSY"]
    every = sets.core(h100, dataclasses.replace(request_, spec_args=(option,))).jobs[0].contenders
    ours = [c for c in every if c.name.startswith("sparsespec/")]
    assert ours
    assert all(c.name.endswith("-LOSSY") and c.label.startswith("**LOSSY**: ") for c in ours)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch": 4}, "--batch is 4; it must be left out with set core"),
        ({"prompts": "x"}, "--prompts"),
        ({"named": ("pillar=",)}, "Another contender has this name"),
        ({"named": ("a=", "a=--x")}, "Another contender has this name"),
        ({"named": ("triforce=--x",)}, "Another contender has this name"),
        ({"shapes_given": ("qwen3-8b",)}, "--shapes is 'qwen3-8b'; it must be one of qwen3-1.7b with set core"),
        (
            {"accept_lengths_given": ("ngram",)},
            "--accept-length is 'ngram'; it must be one of sparsespec with set core",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: dict[str, object], complaint: str, request_: Request
) -> None:
    """An option that is accepted and ignored makes the wrong table."""
    with pytest.raises(ConfigError, match=complaint):
        sets.check("core", dataclasses.replace(request_, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["smoke", "cpu-table", "paper", "vegas"])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shapes_given": ("qwen3-8b",)}, "--shapes is 'qwen3-8b'; it must be left out"),
        ({"accept_lengths_given": ("sparsespec",)}, "--accept-length is 'sparsespec'; it must be left out"),
    ],
    ids=["shapes", "accept-length"],
)
def test_sets_without_random_weights_take_no_shapes(
    name: str, options: dict[str, object], complaint: str, request_: Request
) -> None:
    """They measure one model, at the acceptance that it has."""
    with pytest.raises(ConfigError, match=complaint):
        sets.check(name, dataclasses.replace(request_, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["smoke", "cpu-table", "gpu-table"])
def test_sets_without_eagle3_take_no_draft(name: str, request_: Request) -> None:
    """A draft model that nobody serves."""
    with pytest.raises(ConfigError, match=f"--eagle3-draft is '/draft'; it must be left out with set {name}"):
        sets.check(name, dataclasses.replace(request_, eagle3_draft="/draft"))


def test_gpu_table_measures_every_shape_that_is_named(h100: Machine, request_: Request) -> None:
    """A shape that was asked for and is in no table, nor among the skips."""
    large = dataclasses.replace(h100, memory_bytes=139 << 30)
    shapes = tuple(target for target in request_.shapes if target.name == "qwen3-14b")
    plan = sets.gpu_table(large, dataclasses.replace(request_, shapes=shapes, shapes_given=("qwen3-14b",)))
    assert "qwen3-14b" in {job.target.name for job in plan.jobs}
    assert not any("14b" in what for what in reasons(plan))


def test_full_has_every_schedule_of_a_policy(h100: Machine, request_: Request) -> None:
    """A server that is refused at start, or a schedule that nobody ever compares."""
    found = names(sets.full(h100, request_))
    assert {"sparsespec/pillar", "sparsespec/pillar/unified", "sparsespec/window/unified", "sparsespec/quest"} <= found
    assert "sparsespec/pillar/auto" in found
    # refused at start, each of them
    policies = ("quest", "first-last")
    assert not {f"sparsespec/{policy}/{schedule}" for policy in policies for schedule in ("unified", "auto")} & found
    [ours] = {c for c in sets.full(h100, request_).jobs[0].contenders if c.name == "sparsespec/pillar/unified"}
    assert ours.args[ours.args.index("--sparsespec-schedule") + 1] == "unified"
    # elsewhere the default alone
    assert "sparsespec/pillar/unified" not in names(sets.core(h100, request_)) | names(sets.gpu_table(h100, request_))
