"""scripts/bench/offload.py: what it makes of logs and metrics, and the verdicts that it prints."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import pytest

from sglang_sparsespec.bench.planner import SIMULATION
from tests.support.scripts import load_script

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("bench/offload.py", monkeypatch)


LOG = """
[x] Prefill batch, #new-seq: 2, #new-token: 300, #cached-token: 0, token usage: 0.10
[x] Decode batch, #running-req: 3, #token: 9
[x] Prefill batch, #new-seq: 1, #new-token: 200, #cached-token: 0
"""


def test_recomputed_tokens_are_those_beyond_the_prompts(script: ModuleType) -> None:
    """A first prefill counted as a second one, or prefills after a retraction that nobody counts."""
    assert script.recomputed(LOG, 450) == {"retracted": 0, "reprefilled_tokens": 0}, "one prompt is on its way"
    stock = LOG + "KV cache pool is full. Retract requests. #retracted_reqs: 2, #new_tokens_gained: 70\n"
    assert script.recomputed(stock, 380) == {"retracted": 2, "reprefilled_tokens": 120}
    ours = LOG + "SPARSESPEC: host memory is full (3 requests, 1.0 of 1.0 GB); retracting 1 request(s), which\n"
    assert script.recomputed(ours, 400)["retracted"] == 1


BEGIN = {"offloads": 5.0, "copied_out_bytes": 1e9, "full_pool_rounds": 10.0, "full_pool_round_seconds": 1.0}
END = {
    "offloads": 15.0,
    "copied_out_bytes": 21e9,
    "copied_in_bytes": 10e9,
    "copy_out_seconds": 0.5,
    "copy_in_seconds": 0.2,
    "offload_lost_rounds": 9.0,
    "offload_stalls": 2.0,
    "offload_refusals": 0.0,
    "full_pool_rounds": 100.0,
    "full_pool_round_seconds": 10.0,
    "one_copy_rounds": 10.0,
    "one_copy_round_seconds": 1.1,
    "both_copies_rounds": 10.0,
    "both_copies_round_seconds": 1.05,
}


def test_moves_are_those_of_the_measured_part(script: ModuleType) -> None:
    """What happened before the pool was full, or a cost divided by the wrong rounds."""
    found = script.moves(BEGIN, END)
    assert (found["moves"], found["gb_out"], found["gb_in"]) == (10, 20, 10)
    assert (found["gb_per_s_out"], found["gb_per_s_in"]) == (40, 50)
    assert found["lost_rounds_per_move"] == 0.9
    assert (found["ms_full_pool"], found["ms_one_copy"], found["ms_both_copies"]) == (100, 110, 105)
    # 10 rounds of 10 ms more and 10 of 5, over 110 of 100 ms
    assert found["added_time_average"] == pytest.approx(150 / 11000, abs=1e-4)
    assert found["added_time_both_copies"] == 1.05
    nothing = script.moves(END, END)
    assert (nothing["moves"], nothing["lost_rounds_per_move"], nothing["added_time_average"]) == (0, None, None)


def test_criteria_say_what_was_met_missed_and_not_measured(script: ModuleType) -> None:
    """A bound that is read the wrong way round passes whatever is measured."""
    ours = {"pool_use": 0.96, "reprefilled_tokens": 0, "moves": script.moves(BEGIN, END)}
    plain = {"out": 49.0, "in": 64.0}
    found = {name: check["met"] for name, check in script.criteria(ours, plain).items()}
    assert found == {
        "average pool use": True,
        "re-prefilled tokens": True,
        "lost rounds per move": True,
        "added time, average": False,
        "added time, rounds with copies both ways": False,
        "copy out over a plain pinned copy": True,
        "copy in over a plain pinned copy": False,
    }
    worse = {**ours, "pool_use": 0.94, "reprefilled_tokens": 1}
    found = {name: check["met"] for name, check in script.criteria(worse, None).items()}
    assert (found["average pool use"], found["re-prefilled tokens"]) == (False, False)
    assert found["copy out over a plain pinned copy"] is None


def test_contenders_differ_in_memory_alone(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation left on for plain SGLang, or a careful one that becomes bold after some steps."""
    names = ["host-memory", "stock", "careful", "retract", "bold"]
    args = Namespace(host_memory_gb="3", spec_arg=["--a"], simulate_accept_length=5.0, tiny=False, contenders=names)
    ours, stock, careful, retract, bold = script.contenders(args)
    assert ours.args == ("--speculative-algorithm", "SPARSESPEC", "--a", "--sparsespec-host-memory-gb", "3")
    off = ("--sparsespec-host-memory-gb", "0")
    assert retract.args == ("--speculative-algorithm", "SPARSESPEC", "--a", "--schedule-conservativeness", "0.1", *off)
    assert ours.env == retract.env == dict(zip(SIMULATION, ("5.0", "match-expected"), strict=True))
    assert (stock.args, stock.env) == ((), dict.fromkeys(SIMULATION))
    assert (bold.args, bold.env) == (("--schedule-conservativeness", "0.1"), dict.fromkeys(SIMULATION))
    assert careful.env == {**dict.fromkeys(SIMULATION), "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "1"}
    args.contenders = ["careful"]
    assert script.contenders(args) == [careful]


def test_load_is_the_same_for_everybody(script: ModuleType) -> None:
    """Another stream of requests for each server would compare luck."""
    args = Namespace(seed=3, prompt=[2, 9], output=[4, 4])
    first, second = script.load(args, 50), script.load(args, 50)
    pairs = [(next(first), next(second)) for _ in range(20)]
    assert all(a == b for a, b in pairs)
    assert {len(a.prompt) for a, _ in pairs} <= set(range(2, 10))
    assert all(a.new_tokens == 4 and max(a.prompt) < 50 for a, _ in pairs)
    assert script.mean_tokens(args) == 9.5
