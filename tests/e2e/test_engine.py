"""The offline engine, in a Python program of its own as a user writes it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.e2e.conftest import TINY_ENV
from tests.support.parity import compare_greedy
from tests.support.server import is_running, server_env

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.workload import ParityRecord

pytestmark = pytest.mark.slow

NUM_PROMPTS = 8
# the guard is needed: SGLang starts its processes by spawning
PROGRAM = """
import json, sys
import psutil
import sglang as sgl

def main():
    model, requests, more = json.load(sys.stdin)
    options = dict(model_path=model, device="cpu", dtype="float32", max_total_tokens=20000, max_running_requests=16,
                   speculative_algorithm="SPARSESPEC", speculative_num_steps=5, **more)
    errors = []
    for wrong in ({"sparsespec_budget_ratio": 1.5}, {"sparsespec_no_such_option": 1}):
        try:
            sgl.Engine(**options, **wrong)
        except Exception as error:
            errors.append([type(error).__name__, str(error)])
    engine = sgl.Engine(**options, sparsespec_min_budget=32, sparsespec_recent_window=4, skip_server_warmup=True)
    try:
        outputs = engine.generate(
            input_ids=[request["input_ids"] for request in requests],
            sampling_params=[request["sampling_params"] for request in requests],
        )
        # a sample of random weights may end at any token
        length = {"max_new_tokens": 12, "ignore_eos": True}
        one = engine.generate(prompt="Hello", sampling_params={"temperature": 0.8, **length})
        greedy = {"temperature": 0, **length}
        stream = list(engine.generate(prompt="Hello", sampling_params=greedy, stream=True))
        info = engine.get_server_info()
        children = [[child.pid, child.create_time()] for child in psutil.Process().children(recursive=True)]
    finally:
        engine.shutdown()
    result = dict(outputs=outputs, one=one, streamed=stream[-1], errors=errors, children=children,
                  config=info["sparsespec_config"])
    print("RESULT " + json.dumps(result))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="lockstep"),
        pytest.param(
            {"sparsespec_schedule": "unified", "sparsespec_verify_attention": "fused"},
            id="unified",
            marks=pytest.mark.long,
        ),
    ],
)
def test_engine_generates_like_the_reference_and_leaves_nothing(
    tiny_model: Path, parity_record: ParityRecord, tmp_path: Path, more: dict[str, str]
) -> None:
    """Options that only the command line has, plugin code that a spawned process lacks, or a shutdown that hangs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    exchanges = parity_record.base[-NUM_PROMPTS:]
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps([str(tiny_model), [exchange.payload for exchange in exchanges], more]),
        env=server_env(TINY_ENV),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))

    report = compare_greedy([exchange.response for exchange in exchanges], result["outputs"])
    assert report.ok, str(report)
    assert all(output["meta_info"]["spec_verify_ct"] > 0 for output in result["outputs"])
    assert len(result["one"]["output_ids"]) == 12
    assert result["streamed"]["meta_info"]["completion_tokens"] == 12
    assert result["config"]["min_budget"] == 32
    assert result["config"]["num_steps"] == 5
    assert result["config"]["schedule"] == more.get("sparsespec_schedule", "lockstep")

    [ratio, unknown] = result["errors"]
    assert ratio[0] == "ConfigError"
    assert ratio[1].startswith("--sparsespec-budget-ratio is 1.5; it must be in (0, 1].")
    assert "sparsespec_no_such_option" in unknown[1]

    assert len(result["children"]) >= 2
    left = survivors(result["children"], timeout_s=15)
    assert not left, f"processes outlived the program: {left}"


def survivors(children: list[tuple[int, float]], timeout_s: float) -> list[int]:
    """Those of `children` (process id, creation time in s) that still run after `timeout_s`.

    A zombie does not count: the program is gone, so it waits for init to collect it, which some containers never do.
    """
    processes = []
    for pid, create_time in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # else the number was given to another process; the clock behind creation times may be corrected by a second
            if abs(process.create_time() - create_time) < 2:
                processes.append(process)
    deadline = time.monotonic() + timeout_s
    while (running := [process.pid for process in processes if is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return running
