"""One long question to a running server, answered in the terminal as it is generated, with the figures that matter.

Talks HTTP with the standard library only; the server's own tokenizer trims the prompt, so any model will do.

    python -m sglang_sparsespec.model_tools.demo_client --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

QUESTION = "Summarize the text above: which ideas does it explain, and how do they depend on each other?"
CHARACTERS_PER_TOKEN = 4
TIMEOUT_S = 600


@dataclass(frozen=True)
class Figures:
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    """From the request to the first piece of text."""
    total_s: float
    first_token_at: float
    """Unix time."""
    finish_reason: str

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed: what came after the first token. None for an answer of one token."""
        seconds = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 and seconds > 0 else None


def source_text() -> tuple[str, str]:
    """A few thousand words that come with Python, and what they are."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        # some systems package Python without its documentation
        return "the source of Python's module socketserver", inspect.getsource(importlib.import_module("socketserver"))
    chapters = [topics[name] for name in ("execmodel", "exceptions", "import", "classes") if name in topics]
    return "part of the Python language reference", "\n\n".join(chapters)


def build_prompt(url: str, num_tokens: int) -> tuple[str, str]:
    """The question under a text of about `num_tokens`, and what the text is."""
    title, text = source_text()
    try:
        total = _post(url, "/tokenize", {"prompt": text})["count"]
    except RuntimeError:
        # fails in SGLang 0.5.17 for a tokenizer that names no maximum length
        total = len(text) // CHARACTERS_PER_TOKEN
    text = text[: len(text) * num_tokens // total].rsplit("\n\n", 1)[0]
    return f"This is {title}.\n\n{text}\n\n---\n\n{QUESTION}", title


def stream_chat(url: str, prompt: str, *, max_tokens: int) -> Iterator[str | Figures]:
    """Yield the answer piece by piece, and its figures last."""
    payload = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.monotonic()
    first_token_s = first_token_at = None
    usage: dict[str, int] = {}
    finish_reason = "?"
    with _open(url, "/v1/chat/completions", payload) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(f"the server answered with an error: {chunk['error']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                text = choice["delta"].get("content")
                if not text:
                    continue
                if first_token_s is None:
                    first_token_s, first_token_at = time.monotonic() - start, time.time()
                yield text
    total_s = time.monotonic() - start
    yield Figures(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        first_token_s=total_s if first_token_s is None else first_token_s,
        total_s=total_s,
        first_token_at=first_token_at or time.time(),
        finish_reason=finish_reason,
    )


def accept_length(url: str) -> float | None:
    """Completion tokens per verify since the server started; None without speculation.

    SGLang adds to this average every `--decode-log-interval` steps, so a short answer needs a short interval.
    """
    with urllib.request.urlopen(url + "/server_info", timeout=TIMEOUT_S) as response:
        return json.load(response)["internal_states"][0].get("avg_spec_accept_length")


def run(url: str, *, num_prompt_tokens: int, max_tokens: int, since: float | None) -> None:
    prompt, title = build_prompt(url, num_prompt_tokens)
    print(f"\n[{title}, {len(prompt):,} characters, and then:]\n{QUESTION}\n", flush=True)
    figures: Figures | None = None
    for piece in stream_chat(url, prompt, max_tokens=max_tokens):
        if isinstance(piece, Figures):
            figures = piece
        else:
            sys.stdout.write(piece)
            sys.stdout.flush()
    assert figures is not None, "the stream ended without figures"
    length = accept_length(url)
    speed = figures.tokens_per_s
    print("\n")
    print(f"  prompt          {figures.prompt_tokens:,} tokens, first token after {figures.first_token_s:.1f} s")
    print(f"  completion      {figures.completion_tokens:,} tokens (finish reason: {figures.finish_reason})")
    if speed is not None:
        print(f"  speed           {speed:.1f} tokens/s after the first")
    if length is not None:
        print(f"  accept length   {length:.2f} tokens per full-attention pass (1.00 without speculation)")
    if since is not None:
        seconds = figures.first_token_at - since
        print(f"  start-up        {seconds:.0f} s from the end of the downloads to the first token")
    sys.stdout.flush()


def _open(url: str, path: str, payload: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url + path, data=json.dumps(payload).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None
    except urllib.error.URLError as error:
        raise RuntimeError(f"no server answers at {url}: {error.reason}. Start one, or check --url.") from None


def _post(url: str, path: str, payload: dict[str, Any]) -> Any:
    with _open(url, path, payload) as response:
        return json.load(response)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_sparsespec.model_tools.demo_client")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--prompt-tokens", type=int, default=2200, help="length of the text before the question")
    parser.add_argument("--max-tokens", type=int, default=200, help="length of the answer at most")
    parser.add_argument("--since", type=float, help="Unix time from which to count until the first token")
    args = parser.parse_args()
    try:
        run(
            args.url.rstrip("/"),
            num_prompt_tokens=args.prompt_tokens,
            max_tokens=args.max_tokens,
            since=args.since,
        )
    except RuntimeError as error:
        print(f"demo_client: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
