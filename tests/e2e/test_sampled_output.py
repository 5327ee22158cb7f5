"""Sampled output has the target's distribution: thousands of draws against exact joint probabilities.

The first token of an answer comes from the prefill; the ones after it from rounds, so with k = 3 an answer of 5 tokens
holds accepted drafts, residual draws after a rejection and bonus tokens.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support import random_steps, workload
from tests.support.probability_tree import Fit, Sampling, expected_cells, g_test
from tests.support.server import Server, has_gpu
from tests.support.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
# multiples of BATCH; of 4,096 draws one set in six could not tell a temperature of 1.1
NUM_DRAWS = {"temperature": 8192, "filters": 5120}
BATCH = 128
DEPTH = 5
# one test in a million fails by chance
P_VALUE = 1e-6
PROMPT = workload.random_ids(60, seed=99)
SAMPLINGS = {
    "temperature": Sampling(temperature=1.0),
    "filters": Sampling(temperature=1.0, top_k=8, top_p=0.6, min_p=0.15),
}
# what the same draws must be told apart from
WRONG = {
    "temperature": {"temperature of 1.1": {"temperature": 1.1}},
    "filters": {"top_k ignored": {"top_k": -1}, "top_p ignored": {"top_p": 1.0}, "min_p ignored": {"min_p": 0.0}},
}
# every draft distribution differs from the target's, so that acceptance has something to correct
SERVERS = {
    "sampled-drafts": ("--sparsespec-draft-sampling=sampled", "--sparsespec-min-budget=16"),
    "greedy-drafts": ("--sparsespec-draft-sampling=greedy", "--sparsespec-min-budget=1"),
    # chains of every length: requests that come together verify 0 to k drafts in their first round
    "unified": (
        "--sparsespec-draft-sampling=sampled",
        "--sparsespec-min-budget=16",
        "--sparsespec-schedule=unified",
    ),
    # another k every few rounds, plain rounds among them, n-gram guesses, and requests that use one draft at most
    # beside those that use all
    "changing-k": (
        "--sparsespec-draft-sampling=sampled",
        "--sparsespec-min-budget=16",
        "--sparsespec-ngram-assist=2",
        "--sparsespec-adaptive",
        "--sparsespec-verify-attention=fused",
    ),
}
LIMITED = {"custom_params": {"sparsespec": {"max_draft_tokens": 1}}}
BAD_DRAFTS = (
    "--sparsespec-selection=random",
    "--sparsespec-budget-ratio=0.0001",
    "--sparsespec-recent-window=0",
    "--sparsespec-sink=0",
)


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    env, command = dict(TINY_ENV), None
    if request.param == "changing-k":
        env[random_steps.SETTINGS] = "seed=3,every=3,guess=1"
        env[random_steps.FILE] = str(tmp_path_factory.mktemp("steps") / "steps")
        command = [sys.executable, "-m", "tests.support.random_steps"]
    with Server(
        tiny_model,
        "--speculative-algorithm=SPARSESPEC",
        # as the launcher's defaults always had it here; on a machine with a GPU it ran with overlap
        *(() if has_gpu() else ("--disable-overlap-schedule",)),
        "--speculative-num-steps=3",
        f"--max-running-requests={BATCH}",
        "--max-total-tokens=40000",
        "--skip-server-warmup",
        *BAD_DRAFTS,
        *SERVERS[request.param],
        env=env,
        command=command,
        cwd=REPOSITORY,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return Teacher(tiny_model)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_output_has_the_exact_distribution(server: Server, teacher: Teacher, name: str) -> None:
    """A draft accepted too often, a residual from the wrong distribution, a filter that binds at some positions only.

    The same draws are held against wrong distributions, to show that an error of that size would be noticed.
    """
    sampling = SAMPLINGS[name]
    outputs, histogram = draw(server, sampling, NUM_DRAWS[name])
    num_correct = sum(i * count for i, count in histogram.items())
    num_rounds = sum(histogram.values())
    # both branches of the acceptance rule have run, often
    assert num_correct > 0.05 * num_rounds, histogram
    assert histogram[0] > 0.2 * num_rounds, histogram

    fit = fit_of(outputs, teacher, sampling)
    print(f"{name}: {fit}; rounds by correct drafts: {dict(sorted(histogram.items()))}")
    assert fit.p_value > P_VALUE, str(fit)
    for error, changes in WRONG[name].items():
        power = fit_of(outputs, teacher, dataclasses.replace(sampling, **changes))
        print(f"{name}, {error}: {power}")
        assert power.p_value < P_VALUE, f"too few draws to see {error}: {power}"


def fit_of(outputs: list[list[int]], teacher: Teacher, sampling: Sampling) -> Fit:
    return g_test(outputs, expected_cells(teacher, PROMPT, sampling, depth=DEPTH, num_draws=len(outputs)))


def draw(server: Server, sampling: Sampling, num_draws: int) -> tuple[list[list[int]], Counter[int]]:
    """Outputs of DEPTH tokens, and how many rounds had how many correct drafts."""
    params = {**sampling.params, "max_new_tokens": DEPTH, "ignore_eos": True}
    # half of them are limited where k changes
    batch = [params, {**params, **LIMITED}] if "tests.support.random_steps" in server.command else [params, params]
    outputs: list[list[int]] = []
    histogram: Counter[int] = Counter()
    for _ in range(num_draws // BATCH):
        for response in server.generate({"input_ids": [PROMPT] * BATCH, "sampling_params": batch * (BATCH // 2)}):
            outputs.append(response["output_ids"])
            rounds = response["meta_info"]["spec_correct_drafts_histogram"]
            histogram.update({i: count for i, count in enumerate(rounds) if count})
    return outputs, histogram
