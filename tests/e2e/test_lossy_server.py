"""A lossy server: it says so wherever one looks, is exact where it reads everything, and is not where it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from sglang_sparsespec.sparsity.anchors_file import Calibration, weights_digest, write_anchors
from tests.e2e.conftest import TINY_ENV
from tests.support import watched_rounds, workload
from tests.support.server import Server
from tests.support.workload import assert_greedy_parity, concurrently

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.workload import ParityRecord

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
# contexts up to this are verified whole, and of longer ones no more is read
DENSE_BELOW = 256
OURS = "--speculative-algorithm SPARSESPEC --speculative-num-steps 3 --sparsespec-min-budget 32 --skip-server-warmup"
LOSSY = (
    "--sparsespec-verify-sparsity attention --sparsespec-allow-lossy --sparsespec-verify-kv-ratio 0 "
    f"--sparsespec-verify-dense-below {DENSE_BELOW} --sparsespec-verify-block-size 16 "
    "--sparsespec-dense-verify-every 3 --sparsespec-ngram-assist 2 --enable-metrics --cuda-graph-bs-decode 4 16"
)
HEADER = "x-sparsespec-lossy"


@pytest.fixture(scope="module")
def rounds_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds") / "rounds"


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, parity_record: ParityRecord, rounds_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # parity_record first: the reference server is gone before this one starts
    from transformers import AutoModelForCausalLM

    anchors = tmp_path_factory.mktemp("anchors") / "anchors.json"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # of the same checkpoint, read by another library
    weights = weights_digest(model, model.config.num_hidden_layers, model.config.head_dim)
    write_anchors(
        anchors,
        model=model.config.to_dict(),
        block_size=16,
        anchors=[0, 2],
        calibration=Calibration(weights=weights, ratio=0.5, dense_below=DENSE_BELOW),
    )
    args = [*OURS.split(), *LOSSY.split(), "--sparsespec-verify-anchors", str(anchors)]
    env = {**TINY_ENV, watched_rounds.FILE: str(rounds_file)}
    command = [sys.executable, "-m", "tests.support.watched_rounds"]
    with Server(tiny_model, *args, env=env, command=command, cwd=REPOSITORY) as server:
        yield server


def is_read_whole(exchange: workload.Exchange) -> bool:
    return len(exchange.payload["input_ids"]) + workload.NEW_TOKENS <= DENSE_BELOW


def test_dense_limit_is_the_model_s_own_output(server: Server, parity_record: ParityRecord) -> None:
    """Below the bound nothing is left out: a difference there is a fault and not sparsity. In batches with longer
    requests, whose tokens must not reach the short ones."""
    exchanges = parity_record.base
    outputs = concurrently(server, [e.payload for e in exchanges], stagger_s=0.02)
    short = [i for i, e in enumerate(exchanges) if is_read_whole(e)]
    assert len(short) >= 10
    assert_greedy_parity([exchanges[i] for i in short], [outputs[i] for i in short])
    # the other way round: a mode that reads everything under a lossy label
    longer = [i for i, e in enumerate(exchanges) if len(e.payload["input_ids"]) >= 2 * DENSE_BELOW - 16]
    assert any(outputs[i]["output_ids"] != exchanges[i].response["output_ids"] for i in longer)
    server.idle_check()


def test_short_contexts_are_verified_densely(server: Server, rounds_file: Path) -> None:
    """Up to the bound there is nothing to choose: scoring blocks would make short contexts slower than without the
    option. Just above it a sparse verify runs, but for every third round."""
    for length, kinds in ((40, {"verify"}), (DENSE_BELOW + 10, {"verify", "sparse verify"})):
        sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        rid = f"alone-{length}"
        ids = workload.random_ids(length, seed=length)
        server.generate({"rid": rid, "input_ids": ids, "sampling_params": sampling})
        rounds = watched_rounds.rounds_of(rounds_file, rid)
        assert {part.verify for part in rounds} == kinds
        assert any(part.is_sparse for part in rounds)


def test_server_says_lossy_at_start_and_when_asked(server: Server) -> None:
    """An operator looks at the log, /server_info or a dashboard, and never at a response."""
    assert "SPARSESPEC is LOSSY: verifies leave out attention" in server.log_text()
    assert f"anchors.json are calibrated with rho 0.5 and L0 {DENSE_BELOW}." in server.log_text()
    shown = server.get("/server_info")
    assert shown["sparsespec_config"]["verify_sparsity"] == ["attention"]
    lossy = shown["internal_states"][0]["sparsespec"]["lossy"]
    assert lossy["verify_sparsity"] == ["attention"]
    assert (lossy["verify_kv_ratio"], lossy["dense_verify_every"]) == (0.0, 3)
    metrics = requests.get(server.url + "/metrics", timeout=60).text
    values = [line.split()[-1] for line in metrics.splitlines() if line.startswith("sglang:sparsespec_lossy{")]
    assert list(map(float, values)) == [1.0]


PROMPT = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 8, "temperature": 0}
GENERATE: dict[str, Any] = {
    "input_ids": [5, 6, 7],
    "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
}
REQUESTS: dict[str, tuple[str, dict[str, Any] | None, int]] = {
    "health": ("/health", None, 200),
    "server_info": ("/server_info", None, 200),
    "models": ("/v1/models", None, 200),
    "metrics": ("/metrics", None, 200),
    "nowhere": ("/no-such-route", None, 404),
    "generate": ("/generate", GENERATE, 200),
    "generate_stream": ("/generate", {**GENERATE, "stream": True}, 200),
    "generate_refused": ("/generate", {**GENERATE, "custom_logit_processor": "{}"}, 400),
    "completions": ("/v1/completions", PROMPT, 200),
    "completions_stream": ("/v1/completions", {**PROMPT, "stream": True}, 200),
    "chat": ("/v1/chat/completions", CHAT, 200),
    "chat_stream": ("/v1/chat/completions", {**CHAT, "stream": True}, 200),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_response_has_the_header(server: Server, name: str) -> None:
    """The client of an OpenAI route sees nothing but headers and text."""
    path, payload, status = REQUESTS[name]
    if payload is None:
        response = requests.get(server.url + path, timeout=60)
    else:
        response = requests.post(server.url + path, json=payload, timeout=60, stream="stream" in name)
    assert response.status_code == status, response.text
    assert response.headers[HEADER] == "1"
    assert response.text or name == "health"


def test_meta_info_says_lossy_in_every_part(server: Server) -> None:
    """Whoever stores outputs of /generate must be able to tell them apart later."""
    long = {**GENERATE, "sampling_params": {**GENERATE["sampling_params"], "max_new_tokens": 64}}
    parts = [server.generate(GENERATE), *server.stream("/generate", {**long, "stream": True})]
    assert len(parts) > 2
    for part in [*parts, *server.generate({**GENERATE, "input_ids": [[1, 2], [3, 4]]})]:
        assert part["meta_info"]["sparsespec_lossy"] is True
        assert part["meta_info"]["sparsespec_verify_sparsity"] == ["attention"]


@pytest.mark.parametrize(("threshold", "every"), [("1e-30", 0), ("1e30", 4)], ids=["no channel", "every channel"])
def test_channels(tiny_model: Path, parity_record: ParityRecord, threshold: str, every: int) -> None:
    """A threshold that no channel is below is the model's own output; one that all are below is not, and prefills and
    dense rounds have all their channels: an output of nothing but sparse verifies would not begin alike."""
    exchanges = parity_record.base[::2]
    args = [*OURS.split(), "--sparsespec-allow-lossy", "--sparsespec-verify-sparsity", "ffn"]
    args += ["--sparsespec-verify-ffn-threshold", threshold, "--sparsespec-dense-verify-every", str(every)]
    with Server(tiny_model, *args, env=TINY_ENV) as server:
        outputs = concurrently(server, [e.payload for e in exchanges])
        server.idle_check()
    assert {tuple(output["meta_info"]["sparsespec_verify_sparsity"]) for output in outputs} == {("ffn",)}
    if every == 0:
        assert_greedy_parity(exchanges, outputs)
        return
    expected = [e.response["output_ids"] for e in exchanges]
    differ = sum(output["output_ids"] != ids for output, ids in zip(outputs, expected, strict=True))
    assert 2 * differ > len(expected), differ
    assert all(output["output_ids"][0] == ids[0] for output, ids in zip(outputs, expected, strict=True))
