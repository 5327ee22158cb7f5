"""Requests that use one feature each, greedy, so that the server without speculation can say what the answer is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.workload import EOS_IDS, Exchange, Payload, Response, greedy, random_ids

if TYPE_CHECKING:
    from tests.support.server import Server

NEW_TOKENS = 40
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["color", "size", "tags"],
    "additionalProperties": False,
}
REGEX = "(red|green|blue)( and (red|green|blue)){2}"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


@dataclass(frozen=True)
class FeatureRecord:
    """What the reference server answered, by name."""

    native: dict[str, Exchange]
    openai: dict[str, tuple[str, Payload, Response]]
    long: list[Exchange]
    programs: dict[str, Any]
    plain: dict[str, Exchange]


def _native() -> dict[str, Payload]:
    prompt = random_ids(120, seed=7)

    def ask(**params: Any) -> Payload:
        return greedy(prompt, **{"max_new_tokens": NEW_TOKENS, **params})

    # tokens that come again and again, for penalties to act on
    repetitive: dict[str, Any] = {"logit_bias": {"97": 5.0, "12": 5.0, "30": 5.0}}
    return {
        "frequency_penalty": ask(frequency_penalty=1.9, **repetitive),
        "negative_frequency_penalty": ask(frequency_penalty=-0.4),
        "presence_penalty": ask(presence_penalty=1.7, **repetitive),
        "repetition_penalty": ask(repetition_penalty=1.5, **repetitive),
        "additive_penalties": ask(frequency_penalty=0.9, presence_penalty=-0.5, **repetitive),
        "logit_bias": ask(logit_bias={"97": 4.0, "100": -50.0, "12": 3.0}),
        "logit_bias_and_penalty": ask(logit_bias={"97": 6.0}, frequency_penalty=1.0),
        "regex": ask(regex=REGEX, ignore_eos=False),
        "regex_and_penalty": ask(regex="[0-9a-f]{24}", frequency_penalty=2.0, ignore_eos=False),
        "json_schema": ask(json_schema=json.dumps(SCHEMA), max_new_tokens=90, ignore_eos=False),
        "ebnf": ask(ebnf='root ::= ("yes" | "no") ", " [a-z]{5,9} "."', ignore_eos=False),
        "no_stop_trim": ask(stop=["&", "E", "x"], no_stop_trim=True),
        "stop": ask(stop=["&", "E", "x"]),
        "stop_regex": ask(stop_regex="[a-f0-9]"),
    }


def _openai(stop: str) -> dict[str, tuple[str, Payload]]:
    completion = {"model": "default", "prompt": TEXT, "temperature": 0, "max_tokens": 24}
    chat = {"model": "default", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    return {
        "completion": ("/v1/completions", completion),
        "completion_of_many_prompts": ("/v1/completions", {**completion, "prompt": [TEXT, TEXT[:30], "One"]}),
        "completion_logprobs": ("/v1/completions", {**completion, "logprobs": 3}),
        "completion_echo": ("/v1/completions", {**completion, "echo": True, "logprobs": 1}),
        "completion_n": ("/v1/completions", {**completion, "n": 2}),
        "completion_stop": ("/v1/completions", {**completion, "max_tokens": NEW_TOKENS, "stop": [stop]}),
        "completion_max_tokens_1": ("/v1/completions", {**completion, "max_tokens": 1}),
        "completion_json_schema": (
            "/v1/completions",
            {**completion, "max_tokens": 99, "json_schema": json.dumps(SCHEMA)},
        ),
        "chat": ("/v1/chat/completions", chat),
        "chat_logprobs": ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 3}),
        "chat_n": ("/v1/chat/completions", {**chat, "n": 3}),
        "chat_max_completion_tokens": ("/v1/chat/completions", {**chat, "max_completion_tokens": 9}),
        "chat_json_schema": ("/v1/chat/completions", {**chat, "max_tokens": 99, "response_format": RESPONSE_FORMAT}),
        "chat_regex": ("/v1/chat/completions", {**chat, "regex": REGEX}),
        "chat_penalties": (
            "/v1/chat/completions",
            {**chat, "frequency_penalty": 0.7, "presence_penalty": 0.3, "logit_bias": {"97": 3}},
        ),
    }


def stop_string(text: str) -> str:
    """A short readable part of an output, neither its start nor its end; two characters where two stand together."""
    readable = [character.isascii() and character.isprintable() for character in text]
    pairs = [i for i in range(3, len(text) - 2) if readable[i] and readable[i + 1]]
    single = [i for i in range(3, len(text) - 2) if readable[i]]
    if not single:
        raise ValueError(f"nothing readable in {text!r}")
    return text[pairs[0] : pairs[0] + 2] if pairs else text[single[0]]


def record(server: Server) -> FeatureRecord:
    native = {name: Exchange(payload, server.generate(payload)) for name, payload in _native().items()}
    # the plain output tells which tokens would end it early
    plain = greedy(random_ids(120, seed=8), NEW_TOKENS)
    base = Exchange(plain, server.generate(plain))
    stop_ids = base.response["output_ids"][3:8]
    for name, params in {
        "stop_token_ids": {"stop_token_ids": stop_ids[-1:]},
        "min_new_tokens": {"stop_token_ids": [*stop_ids, *EOS_IDS, *range(0, 256, 4)], "min_new_tokens": 20},
    }.items():
        payload = greedy(plain["input_ids"], NEW_TOKENS, ignore_eos=False, **params)
        native[name] = Exchange(payload, server.generate(payload))

    text = server.generate({"text": TEXT, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}})["text"]
    openai = {}
    for name, (path, payload) in _openai(stop_string(text)).items():
        response = server.post(path, payload)
        assert response.status_code == 200, f"{name}: {response.text}"
        openai[name] = (path, payload, response.json())

    long_payloads = [greedy(random_ids(30 + 40 * i, seed=200 + i), 150) for i in range(6)]
    return FeatureRecord(
        native=native,
        openai=openai,
        long=[Exchange(payload, server.generate(payload)) for payload in long_payloads],
        programs=run_programs(server),
        plain={"plain": base},
    )


def run_programs(server: Server) -> dict[str, Any]:
    """Results of SGLang frontend programs that use each primitive."""
    import sglang as sgl

    @sgl.function
    def chain(s: Any) -> None:
        s += "A story. " + sgl.gen("first", max_tokens=20, temperature=0)
        s += " And then " + sgl.gen("second", max_tokens=9, temperature=0, regex="[a-z ]{9}")

    @sgl.function
    def choose(s: Any, question: str) -> None:
        s += question + " Answer: " + sgl.select("answer", choices=["yes", "no", "perhaps"])
        s += ". Reason: " + sgl.gen("reason", max_tokens=12, temperature=0)

    @sgl.function
    def fork(s: Any) -> None:
        s += "Two ways to go. "
        branches = s.fork(3)
        for i, branch in enumerate(branches):
            branch += f"Way {i}: " + sgl.gen("way", max_tokens=16, temperature=0)
        for branch in branches:
            s += branch["way"]
        s += sgl.gen("end", max_tokens=10, temperature=0)

    backend = sgl.RuntimeEndpoint(server.url)
    sgl.set_default_backend(backend)
    chained = chain.run()
    forked = fork.run()
    streamed = chain.run(stream=True)
    chosen = choose.run_batch([{"question": "Is it late?"}, {"question": "Is it blue?"}], progress_bar=False)
    streamed_text = "".join(streamed.text_iter("first"))
    streamed.sync()  # the rest of the program still runs in its own thread
    return {
        "gen": [chained["first"], chained["second"]],
        "stream": streamed_text,
        "select": [[state["answer"], state["reason"]] for state in chosen],
        "fork": [forked.text(), forked["end"]],
    }
