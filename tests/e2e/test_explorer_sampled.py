"""The acceptance explorer against a server that samples: equal within the error of both samples.

Greedy they can be compared round by round (`test_smollm2.py`). Sampled, each draws its own text, so means are compared.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.acceptance.measure import measure_own
from sglang_sparsespec.acceptance.model import PagedModel
from sglang_sparsespec.acceptance.rounds import prefill
from sglang_sparsespec.acceptance.settings import Setting
from sglang_sparsespec.config import SparseSpecConfig
from tests.e2e.conftest import TINY_ENV
from tests.support.server import Server
from tests.support.workload import concurrently

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow

NUM_REQS, PROMPT_LEN, NEW_TOKENS, TEMPERATURE = 64, 160, 48, 0.6
STANDARD_ERRORS = 4.0
"""Chance passes this once in 15,000 runs."""
# what drafts of this budget reach differs by policy and budget by far more than the bound
CASES = [
    pytest.param({"selection": "window", "min_budget": 40, "recent_window": 8}, id="window"),
    pytest.param({"selection": "pillar", "min_budget": 64, "recent_window": 8}, id="pillar", marks=pytest.mark.long),
]


@pytest.mark.parametrize("options", CASES)
def test_explorer_finds_the_servers_verifies_when_sampling(
    tiny_model: Path, options: dict[str, str | int], record_property: Any
) -> None:
    """An explorer that draws, accepts or resamples by another rule than the server, at a temperature that is in use."""
    config = SparseSpecConfig(**options, budget_ratio=0.01)  # type: ignore[arg-type]
    rng = random.Random(5)
    prompts = [rng.choices(range(33, 127), k=PROMPT_LEN) for _ in range(NUM_REQS)]
    sampling = {"temperature": TEMPERATURE, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    args = [f"--sparsespec-{name.replace('_', '-')}={value}" for name, value in options.items()]
    args += ["--speculative-algorithm=SPARSESPEC", "--sparsespec-budget-ratio=0.01", "--skip-server-warmup"]
    with Server(tiny_model, *args, env=TINY_ENV) as server:
        answers = concurrently(server, [{"input_ids": ids, "sampling_params": sampling} for ids in prompts])
    served = [answer["meta_info"]["spec_verify_ct"] for answer in answers]
    model = PagedModel(tiny_model, device="cpu", dtype=torch.float32)
    model.allocate(NUM_REQS, PROMPT_LEN + NEW_TOKENS + 2 * config.num_draft_tokens)
    explored = measure_own(
        model,
        Setting(config),
        prefill(model, prompts, keep=config.num_draft_tokens),
        TEMPERATURE,
        new_tokens=NEW_TOKENS,
        seed=11,
    ).rounds
    bound = STANDARD_ERRORS * math.hypot(standard_error(served), standard_error(explored))
    difference = statistics.fmean(served) - statistics.fmean(explored)
    means = f"{statistics.fmean(served):.2f} served, {statistics.fmean(explored):.2f} explored, bound {bound:.2f}"
    record_property("verifies", means)
    print(f"verifies for {NEW_TOKENS} tokens: {means}")
    # a test that could not tell a policy from another would pass for any explorer
    assert bound < 0.1 * statistics.fmean(served)
    assert abs(difference) < bound


def standard_error(sample: Sequence[float]) -> float:
    return statistics.stdev(sample) / math.sqrt(len(sample))
