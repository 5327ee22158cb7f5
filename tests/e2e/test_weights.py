"""New weights from tensors while the engine runs, as reinforcement learning does it: drafts use them at once."""

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

PROGRAM = """
import json, sys
import sglang as sgl
from safetensors.torch import load_file

def main():
    model = sys.argv[1]
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(model + "/model.safetensors")[name]
    engine = sgl.Engine(model_path=model, device="cpu", dtype="float32", max_total_tokens=4000, max_running_requests=4,
                        skip_server_warmup=True, speculative_algorithm="SPARSESPEC", sparsespec_min_budget=32)

    def run():
        output = engine.generate(input_ids=[[7, 8, 9] * 30], sampling_params={"temperature": 0, "max_new_tokens": 40,
                                                                             "ignore_eos": True})[0]
        return output["output_ids"], output["meta_info"]["spec_accept_length"]

    try:
        before = run()
        # an update that meets the scheduler before it has noticed the end of the request ends SGLang
        engine.get_server_info()
        engine.update_weights_from_tensor([(name, -3 * weight)])
        changed = run()
        engine.get_server_info()
        engine.update_weights_from_tensor([(name, weight)])
        after = run()
    finally:
        engine.shutdown()
    print("RESULT " + json.dumps([before, changed, after]))

if __name__ == "__main__":
    main()
"""


def test_weights_from_tensors_reach_drafts_and_verify(tiny_model: Path, tmp_path: Path) -> None:
    """A worker that keeps weights of its own, or a cache of KV from the old ones, would answer as before."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_model)],
        env=server_env(TINY_ENV),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    (before, before_length), (changed, _), (after, after_length) = json.loads(line.removeprefix("RESULT "))
    assert changed != before
    assert after == before
    assert after_length == before_length
