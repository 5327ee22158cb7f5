"""Sparse output is right and not merely different: every token of a server against a replay of its rounds.

Modes combined, k another one every few rounds, prefills in chunks, pages of 16.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.acceptance.model import PagedModel
from sglang_sparsespec.quality.settings import Setting
from sglang_sparsespec.sparsity.anchors_file import write_anchors
from tests.e2e.conftest import TINY_ENV
from tests.support import random_steps, watched_rounds, workload
from tests.support.server import Server
from tests.support.sparse_replay import replay
from tests.support.watched_rounds import rounds_of
from tests.support.workload import concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = (
    "--speculative-algorithm SPARSESPEC --speculative-num-steps 4 --sparsespec-min-budget 32 --skip-server-warmup "
    "--sparsespec-allow-lossy --sparsespec-verify-kv-ratio 0.3 --sparsespec-verify-dense-below 64 "
    "--sparsespec-verify-block-size 16 --enable-metrics --disable-radix-cache"
)
SERVERS = {
    # some rounds are dense, k is another one every few rounds
    "attention-ffn": "--sparsespec-verify-sparsity attention ffn --sparsespec-verify-ffn-threshold 0.05 "
    "--sparsespec-dense-verify-every 4 --sparsespec-adaptive --page-size 16 --chunked-prefill-size 64 "
    "--disable-overlap-schedule",
}
SETTINGS = {
    "attention-ffn": Setting(num_steps=4, attention_ratio=0.3, dense_below=64, ffn_threshold=0.05),
}
START_S = 600
# logits of two float32 implementations that say the same
NEAR_TIE = 2e-3


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def setting(name: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    from transformers import AutoConfig

    anchors = tmp_path_factory.mktemp("anchors") / "anchors.json"
    write_anchors(anchors, model=AutoConfig.from_pretrained(tiny_model).to_dict(), block_size=16, anchors=[0, 2])
    return replace(SETTINGS[name], anchors=str(anchors))


@pytest.fixture(scope="module")
def watched(
    name: str, tiny_model: Path, setting: Setting, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("rounds")
    env = {**TINY_ENV, watched_rounds.FILE: str(folder / "rounds")}
    options = f"{OURS} {SERVERS[name]}".split()
    if "adaptive" in SERVERS[name]:
        (folder / "steps").touch()
        env |= {random_steps.SETTINGS: "seed=3,every=3", random_steps.FILE: str(folder / "steps")}
        options += ["--sparsespec-verify-anchors", setting.anchors]
    command = [sys.executable, "-m", "tests.support.watched_rounds"]
    with Server(tiny_model, *options, env=env, command=command, cwd=REPOSITORY, timeout_s=START_S) as server:
        yield server, folder


def payloads() -> list[dict[str, Any]]:
    """Around L0, and far above it; every third by the path of sampled requests, whose top-k of 1 leaves one token."""
    made = []
    for i, length in enumerate((5, 40, 63, 64, 65, 90, 130, 200, 260, 333, 400, 500)):
        sampling = {"temperature": 0.7, "top_k": 1} if i % 3 == 2 else {"temperature": 0}
        made.append(
            {
                "rid": f"request-{i}",
                "input_ids": workload.random_ids(length, seed=500 + i),
                "sampling_params": {**sampling, "max_new_tokens": 60, "ignore_eos": True},
            }
        )
    return made


def worst_gaps(
    model: PagedModel, setting: Setting, sent: Sequence[dict[str, Any]], outputs: Sequence[Any], file: Path
) -> list[float]:
    """By request, the largest gap of its replay."""
    found = []
    for payload, output in zip(sent, outputs, strict=True):
        rounds = rounds_of(file, payload["rid"])
        found.append(max(replay(model, setting, payload["input_ids"], output["output_ids"], rounds)))
    return found


def test_every_token_is_the_rule_s(watched: tuple[Server, Path], name: str, tiny_model: Path, setting: Setting) -> None:
    """A block or channel too many or too few, blocks of another request or head, an anchor's lists in the wrong
    layer, a dense round that was sparse: all of it is another text, and looks as good."""
    server, folder = watched
    sent = payloads()
    outputs = concurrently(server, sent, stagger_s=0.02)
    model = PagedModel(tiny_model, device="cpu", dtype=torch.float32)
    gaps = worst_gaps(model, setting, sent, outputs, folder / "rounds")
    assert max(gaps) < NEAR_TIE, gaps
    # the comparison can fail: a mode that does nothing, and others that do another thing
    changed: list[dict[str, Any]] = [{"attention_ratio": 1.0}, {"block_size": 8, "anchors": "every-layer"}]
    changed += [{"ffn_threshold": 0.0}]
    for change in changed:
        other = worst_gaps(model, replace(setting, **change), sent[6:], outputs[6:], folder / "rounds")
        assert max(other) > 5 * NEAR_TIE, change
    if "adaptive" in SERVERS[name]:
        assert set(random_steps.chosen(folder / "steps")) == set(range(5))
    server.idle_check()
