"""Where an output ends when a round brings several tokens: as if they had come one by one."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.adapter

EOS = 7


@pytest.fixture
def make_req() -> Any:
    """Builds requests with SGLang's own finish rules; a token's text is its letter."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    class Tokenizer:
        eos_token_id = EOS
        additional_stop_token_ids = None

        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(ord("a") + i) for i in ids)

        def encode(self, text: str, **_: Any) -> list[int]:
            return [ord(letter) - ord("a") for letter in text]

    def build(max_new_tokens: int, stop: list[str]) -> Req:
        tokenizer = Tokenizer()
        params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop)
        params.normalize(tokenizer)
        req = Req("rid", "", [1, 2], params, eos_token_ids={EOS}, vocab_size=30)
        req.tokenizer = tokenizer
        return req

    return build


def finish(req: Any, rounds: list[list[int]], judge: Any) -> tuple[Any, ...]:
    """Feed rounds until the request is done: why, and what the client gets."""
    for tokens in rounds:
        req.output_ids.extend(tokens)
        judge(req, len(tokens))
        if req.finished():
            break
    reason = req.finished_reason
    length = len(req.output_ids) if req.finished_len is None else req.finished_len
    return (type(reason).__name__, getattr(reason, "matched", None), list(req.output_ids[:length]))


@pytest.mark.parametrize("round_len", [2, 3, 5, 9])
@pytest.mark.parametrize("stop", [[], ["cd"], ["b"]])
@pytest.mark.parametrize("max_new_tokens", [1, 4, 6, 50])
def test_rounds_end_where_single_tokens_end(
    make_req: Any, max_new_tokens: int, stop: list[str], round_len: int
) -> None:
    """An EOS or stop string hidden by the limit, or an EOS hidden by a stop string, and the reverse of each."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang_sparsespec.patches.requests import judge_tokens_in_order

    plain = getattr(Req.update_finish_state, "__wrapped__", Req.update_finish_state)

    def patched(req: Any, new_accepted_len: int) -> None:
        judge_tokens_in_order(plain, req, new_accepted_len)

    outputs = [[*head, 0, 0, 0, 0] for head in itertools.permutations([2, 3, EOS, 1, 0])]
    differs = 0
    for tokens in outputs:
        rounds = [tokens[i : i + round_len] for i in range(0, len(tokens), round_len)]
        expected = finish(make_req(max_new_tokens, stop), [[token] for token in tokens], plain)
        assert finish(make_req(max_new_tokens, stop), rounds, patched) == expected
        differs += finish(make_req(max_new_tokens, stop), rounds, plain) != expected
    if max_new_tokens == 6 and round_len == 9:
        assert differs, "SGLang judges in token order by itself now: the patch can go"


def test_tokens_behind_the_end_stay_with_the_request(make_req: Any) -> None:
    """The host frees KV by the length of the output: a token that is lost here is a slot that leaks."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang_sparsespec.patches.requests import judge_tokens_in_order

    plain = getattr(Req.update_finish_state, "__wrapped__", Req.update_finish_state)
    req = make_req(3, [])
    req.grammar = grammar = SimpleNamespace(is_terminated=lambda: True)
    req.output_ids.extend([1, EOS, 2, 3])
    judge_tokens_in_order(plain, req, 4)
    assert list(req.output_ids) == [1, EOS, 2, 3]
    assert req.finished_len == 2
    assert req.grammar is grammar
