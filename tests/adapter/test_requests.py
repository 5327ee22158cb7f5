"""Requests that are refused, one by one, with HTTP 400: the hook in SGLang's own validation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


def _manager(algorithm: str | None, **changes: Any) -> Any:
    """As much of a TokenizerManager as validation reads."""
    server_args = SimpleNamespace(
        speculative_algorithm=algorithm,
        skip_tokenizer_init=False,
        enable_custom_logit_processor=True,
        enable_return_hidden_states=False,
        return_hidden_states_mode=None,
    )
    fields = {
        "server_args": server_args,
        "context_len": 100,
        "preferred_sampling_params": None,
        "num_reserved_tokens": 0,
        "allow_auto_truncate": False,
        "validate_total_tokens": True,
        "is_generation": True,
        "model_config": SimpleNamespace(vocab_size=259),
        "_validate_token_ids_logprob": lambda obj: None,
    }
    return SimpleNamespace(**{**fields, **changes})


def _request(**changes: Any) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling_params = changes.pop("sampling_params", {})
    return GenerateReqInput(input_ids=[1, 2, 3], sampling_params=sampling_params, **changes)


REFUSED = [
    ({"custom_logit_processor": "{}"}, "custom_logit_processor is 'set'; "),
    ({"sampling_params": {"sampling_seed": 7}}, "sampling_seed is 7; "),
    ({"sampling_params": {"sampling_seed": 0}}, "sampling_seed is 0; "),
]


@pytest.mark.parametrize(("changes", "start"), REFUSED, ids=str)
def test_inexact_features_are_refused(changes: dict[str, Any], start: str) -> None:
    """SGLang's verify skips these silently: the client would get another distribution than it asked for."""
    from sglang_sparsespec.patches.requests import refuse_what_is_not_exact

    with pytest.raises(RequestError) as caught:
        refuse_what_is_not_exact(_manager("SPARSESPEC"), _request(**changes), [1, 2, 3])
    message = str(caught.value)
    assert message.startswith(start + "under --speculative-algorithm SPARSESPEC it must be absent. ")
    assert message.endswith(".")
    # SGLang answers a ValueError with 400 and goes on; any other exception is a 500
    assert isinstance(caught.value, ValueError)


def with_options(options: Any) -> dict[str, Any]:
    return {"sampling_params": {"custom_params": {"sparsespec": options}}}


NONSENSE = [
    ({"sampling_params": {"custom_params": "no drafts"}}, "custom_params is 'no drafts'; "),
    (with_options(False), "custom_params.sparsespec is False; "),
    (with_options({}), "custom_params.sparsespec is {}; "),
    (with_options({"enable": False}), "custom_params.sparsespec is {'enable': False}; "),
    (with_options({"enabled": "no"}), "custom_params.sparsespec.enabled is 'no'; "),
    (with_options({"enabled": 0}), "custom_params.sparsespec.enabled is 0; "),
    (with_options({"enabled": None}), "custom_params.sparsespec.enabled is None; "),
    (with_options({"max_draft_tokens": -1}), "custom_params.sparsespec.max_draft_tokens is -1; "),
    (with_options({"max_draft_tokens": 2.0}), "custom_params.sparsespec.max_draft_tokens is 2.0; "),
    (with_options({"max_draft_tokens": True}), "custom_params.sparsespec.max_draft_tokens is True; "),
    (with_options({"max_draft_tokens": None}), "custom_params.sparsespec.max_draft_tokens is None; "),
]


@pytest.mark.parametrize(("changes", "start"), NONSENSE, ids=str)
def test_nonsense_about_speculation_is_refused(changes: dict[str, Any], start: str) -> None:
    """A misspelt switch that is accepted leaves speculation on for somebody who turned it off."""
    from sglang_sparsespec.patches.requests import refuse_what_is_not_exact

    with pytest.raises(RequestError) as caught:
        refuse_what_is_not_exact(_manager("SPARSESPEC"), _request(**changes), [1, 2, 3])
    assert str(caught.value).startswith(start + "under --speculative-algorithm SPARSESPEC it must be ")
    # other algorithms have their own meaning for custom_params
    assert refuse_what_is_not_exact(_manager("NGRAM"), _request(**changes), [1]) is None


def test_nonsense_in_the_servers_preferred_parameters_is_refused() -> None:
    """SGLang merges them into the request after its checks; unread, they would fail in the scheduler."""
    from sglang_sparsespec.patches.requests import refuse_what_is_not_exact

    manager = _manager(
        "SPARSESPEC", preferred_sampling_params=with_options({"max_draft_tokens": "3"})["sampling_params"]
    )
    with pytest.raises(RequestError):
        refuse_what_is_not_exact(manager, _request(), [1])
    own = _request(**with_options({"max_draft_tokens": 3}))
    assert refuse_what_is_not_exact(manager, own, [1]) is None


@pytest.mark.parametrize(
    ("custom_params", "limit"),
    [
        (None, None),
        ({}, None),
        ({"thinking_budget": 5}, None),
        ({"sparsespec": {"enabled": True}}, None),
        ({"sparsespec": {"enabled": False}}, 0),
        ({"sparsespec": {"max_draft_tokens": 0}}, 0),
        ({"sparsespec": {"max_draft_tokens": 3}, "thinking_budget": 5}, 3),
        ({"sparsespec": {"enabled": True, "max_draft_tokens": 3}}, 3),
        ({"sparsespec": {"enabled": False, "max_draft_tokens": 3}}, 0),
        ({"sparsespec": {"max_draft_tokens": 10**6}}, 10**6),
    ],
    ids=str,
)
def test_what_a_request_may_ask_of_speculation(custom_params: Any, limit: int | None) -> None:
    """A switch read the wrong way round changes no output, only speed: nothing else would notice."""
    from sglang_sparsespec.request_options import draft_limit

    assert draft_limit(custom_params) == limit


@pytest.mark.parametrize(("changes", "start"), REFUSED, ids=str)
def test_without_the_algorithm_nothing_is_refused(changes: dict[str, Any], start: str) -> None:
    """One process may hold two engines; the one without SPARSESPEC keeps SGLang's behaviour."""
    from sglang_sparsespec.patches.requests import refuse_what_is_not_exact

    for algorithm in (None, "NGRAM"):
        assert refuse_what_is_not_exact(_manager(algorithm), _request(**changes), [1]) is None


@pytest.mark.parametrize(
    "sampling_params",
    [
        None,
        {},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1, "min_new_tokens": 3},
        {"logit_bias": {"5": 1.0}, "stop": ["x"], "stop_token_ids": [3], "stop_regex": "a+", "n": 2},
        {"json_schema": "{}"},
        {"sampling_seed": None},
    ],
    ids=str,
)
def test_exact_features_pass(sampling_params: dict[str, Any] | None) -> None:
    """A refusal that is too broad turns good requests away."""
    from sglang_sparsespec.patches.requests import refuse_what_is_not_exact

    request = _request(return_logprob=True, top_logprobs_num=3, sampling_params=sampling_params)
    assert refuse_what_is_not_exact(_manager("SPARSESPEC"), request, [1]) is None


def test_the_hook_runs_before_the_hosts_validation(server_args: Callable[..., Any]) -> None:
    """In force means: called with SGLang's own arguments, and its validation still happens afterwards."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    server_args()  # applies the patches of the algorithm
    validate = TokenizerManager._validate_one_request
    validate(_manager("SPARSESPEC"), _request(), [1, 2, 3])
    with pytest.raises(RequestError):
        validate(_manager("SPARSESPEC"), _request(custom_logit_processor="{}"), [1, 2, 3])
    with pytest.raises(ValueError, match="longer than the model's context length"):
        validate(_manager("SPARSESPEC"), _request(), [1] * 200)


def test_hidden_states_are_refused_by_the_host(server_args: Callable[..., Any]) -> None:
    """The server option is refused, so SGLang refuses the request; docs/features.md promises that."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    server_args()
    with pytest.raises(ValueError, match="not configured to return hidden states"):
        TokenizerManager._validate_one_request(_manager("SPARSESPEC"), _request(return_hidden_states=True), [1])
