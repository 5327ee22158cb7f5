"""What does not start says why: the option, what it was, what it must be and what to do, and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support.server import server_env

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SPARSESPEC = ["--speculative-algorithm", "SPARSESPEC"]
# what the launcher does before it loads anything, for many command lines in one process
PREPARE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
results = []
for argv in json.load(sys.stdin):
    try:
        args = prepare_server_args(argv)
        results.append(["accepted", repr(args.sparsespec_config)])
    except BaseException as error:
        results.append([type(error).__name__, str(error)])
json.dump(results, sys.stdout)
"""
# arguments, then the start and every other part of the message
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "budget_ratio": (
        [*SPARSESPEC, "--sparsespec-budget-ratio", "1.5"],
        ["--sparsespec-budget-ratio is 1.5; it must be in (0, 1].", "the share of KV tokens that drafts read"],
    ),
    "budget_above_context": (
        [*SPARSESPEC, "--sparsespec-min-budget", "2000"],
        ["--sparsespec-min-budget is 2000; it must be at most the context length (1024).", "Lower it"],
    ),
    "intel_amx": (
        [*SPARSESPEC, "--attention-backend", "intel_amx"],
        ["--attention-backend is 'intel_amx'; it must be one of torch_native", "Leave it out."],
    ),
    "num_draft_tokens": (
        [*SPARSESPEC, "--speculative-num-draft-tokens", "4"],
        ["--speculative-num-draft-tokens is 4; it must be 9", "set --speculative-num-steps alone"],
    ),
    "eagle_topk": (
        [*SPARSESPEC, "--speculative-eagle-topk", "4"],
        ["--speculative-eagle-topk is 4; it must be 1", "a chain, not a tree"],
    ),
    "draft_model": (
        [*SPARSESPEC, "--speculative-draft-model-path", "somewhere"],
        ["--speculative-draft-model-path is 'somewhere'; it must be left out.", "drafts for itself"],
    ),
    "page_size": (
        [*SPARSESPEC, "--page-size", "32"],
        ["--page-size is 32; it must be 1 or 16.", "Leave it out"],
    ),
    "pipeline_parallel": (
        [*SPARSESPEC, "--pp-size", "2"],
        ["--pp-size is 2; it must be 1.", "Set it to 1"],
    ),
    "tokenizer_workers": (
        [*SPARSESPEC, "--tokenizer-worker-num", "2"],
        ["--tokenizer-worker-num is 2; it must be 1.", "Set it to 1"],
    ),
    "granularity_above_budget": (
        [*SPARSESPEC, "--sparsespec-granularity", "16", "--sparsespec-min-budget", "8"],
        ["--sparsespec-min-budget is 8; it must be at least one block", "Raise the budget"],
    ),
    "num_steps": (
        [*SPARSESPEC, "--speculative-num-steps", "100"],
        ["--speculative-num-steps is 100; it must be an integer from 1 to 64."],
    ),
    "profile_without_adaptive": (
        [*SPARSESPEC, "--no-sparsespec-adaptive", "--sparsespec-profile", "rounds.json"],
        [
            "--sparsespec-profile is 'rounds.json'; it must be left out without --sparsespec-adaptive.",
            "add --sparsespec",
        ],
    ),
    "stray_option": (
        ["--sparsespec-min-budget", "64"],
        ["--sparsespec-min-budget is 64; it must be left out without --speculative-algorithm SPARSESPEC.", "Add"],
    ),
}
ACCEPTED = {
    "defaults": SPARSESPEC,
    "matching_num_draft_tokens": [*SPARSESPEC, "--speculative-num-steps", "3", "--speculative-num-draft-tokens", "4"],
    "adaptive": [*SPARSESPEC, "--sparsespec-adaptive", "--speculative-num-steps", "6"],
    "adaptive_and_host_memory_on_two_ranks": [
        *SPARSESPEC,
        *["--sparsespec-adaptive", "--sparsespec-host-memory-gb", "0.1", "--tp-size", "2"],
    ],
    "torch_native": [*SPARSESPEC, "--attention-backend", "torch_native", "--page-size", "16"],
    "without_the_algorithm": [],
}


@pytest.fixture(scope="module")
def verdicts(tiny_model: Path) -> dict[str, list[str]]:
    cases = {name: args for name, (args, _) in REFUSED.items()} | ACCEPTED
    model = ["--model-path", str(tiny_model), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE],
        input=json.dumps([[*model, *args] for args in cases.values()]),
        env=server_env(TINY_ENV),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_has_four_parts(verdicts: dict[str, list[str]], name: str) -> None:
    """An option that is accepted and ignored, or refused by an assertion deep inside that helps nobody."""
    kind, message = verdicts[name]
    assert kind == "ConfigError", message
    for part in REFUSED[name][1]:
        assert part in message, message


@pytest.mark.parametrize("name", ACCEPTED)
def test_served_options_are_accepted(verdicts: dict[str, list[str]], name: str) -> None:
    """Refusals that would pass by refusing everything."""
    kind, config = verdicts[name]
    assert kind == "accepted", config
    assert (config == "None") == (name == "without_the_algorithm")


def test_launcher_exits_with_the_message(tiny_model: Path) -> None:
    """A launcher that reports the error and lives on, or ends with exit code 0."""
    args = ["--model-path", str(tiny_model), "--device", "cpu", *SPARSESPEC, "--sparsespec-budget-ratio", "1.5"]
    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", *args],
        env=server_env(TINY_ENV),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode not in (0, None)
    assert "--sparsespec-budget-ratio is 1.5; it must be in (0, 1]." in done.stderr
