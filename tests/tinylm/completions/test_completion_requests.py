"""Which bodies the completions API accepts, and what it says of the others."""

from __future__ import annotations

import json

import pytest

from tinylm.completions.requests import is_field, read_request
from tinylm.sampling import SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "1"}, "temperature is '1': input should be a valid number"),
        ({"n": 129}, "n is 129: .* 128"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt has 65 prompts .* 128"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "prompt has 65 prompts .* 128"),
        ({"prompt": []}, "prompt has 0 prompts"),
        ({"prompt": [5] * 70_000, "n": 16}, "prompt has 70000 .* 65536"),
        ({"prompt": ["My secret", 1]}, "prompt is of type list: input should be a valid"),
        ({"stop": {"secret": 1}}, "stop is of type dict"),
        ({"stop": ["a", None]}, "stop is of type list"),
        ({"best_of": 2, "n": 3}, "best_of is 2: it must be at least n, 3"),
        ({"best_of": 2, "stream": True}, "best_of is 2: with stream it must be n, 1"),
        ({"suffix": "."}, "suffix is not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported"),
        ({"logit_bias": {"1": "1"}}, "logit_bias is '1': input should be a valid number"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]"),
        ({"ignore_eos": 1}, "ignore_eos is 1: input should be a valid boolean"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids is '5': input should be a valid integer"),
        ({"bad_words": [{"secret": 1}]}, "bad_words is of type dict"),
        ({"dry_sequence_breakers": "secret"}, "dry_sequence_breakers is of type str"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
    ],
)
def test_an_error_begins_with_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        read_request(json.dumps(fields).encode())
    assert is_field(str(caught.value).partition(" ")[0])
    assert "secret" not in str(caught.value)


def test_an_unknown_field_is_refused_by_its_full_name() -> None:
    with pytest.raises(ValueError, match=r"^stream_options\.foo is not a field of this API$"):
        read_request(b'{"stream": true, "stream_options": {"foo": 1}}')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"the secret": 1}}, "logit_bias has the key 'the secret': it must be a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias has the key '-1': it must be a token id"),
        ({"logit_bias": {"5": -101}}, "logit_bias of token 5 is -101"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias has 301 tokens: .* 300"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5: it must be a number, -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5: it must be a number, -2 to 2"),
        ({"min_tokens": 17}, "min_tokens is 17: it must be at most max_tokens, 16"),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids has 65 tokens"),
        ({"bad_words": ["secret" * 99]}, "bad_words holds a string of length 594"),
        ({"dry_base": 0.5}, "dry_base is 0.5"),
        ({"dry_sequence_breakers": []}, "dry_sequence_breakers has 0 strings"),
        ({"seed": -2}, "seed is -2"),
    ],
)
def test_an_error_of_the_settings_begins_with_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        read_request(json.dumps(fields).encode()).params(0)
    assert is_field(str(caught.value).partition(" ")[0])


def test_settings_become_those_of_the_library() -> None:
    settings = {
        **{"max_tokens": 20, "temperature": 0.5, "top_p": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
        **{"seed": 7, "logprobs": 2, "ignore_eos": True, "min_tokens": 3, "presence_penalty": 1, "dry_base": 2},
        **{"frequency_penalty": -0.5, "dry_multiplier": 0.8, "dry_allowed_length": 3, "dry_penalty_last_n": 50},
    }
    lists = {"stop": ["a"], "stop_token_ids": [5, 6], "bad_words": ["dog"], "dry_sequence_breakers": ["."]}
    assert set(settings) | set(lists) | {"logit_bias", "prompt_logprobs"} == set(SamplingParams.__dataclass_fields__)
    body = {**settings, **lists, "logit_bias": {"5": 1, "17": -100.0, "18": None}}
    expected = SamplingParams(**settings, **lists, logit_bias={5: 1, 17: -100})
    assert read_request(json.dumps(body).encode()).params(0) == expected


@pytest.mark.parametrize("body", [b'{"prompt": "\xff"}', b"[" * 100_000, b'"prompt"', b'{"\\ud800": 1}', b'{"a": 1}'])
def test_other_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not a JSON object|not a field"):
        read_request(body)


def test_values_without_effect_are_accepted() -> None:
    neutral = {
        **{"best_of": 1, "suffix": None, "logit_bias": {"1": None}, "presence_penalty": 0.0, "frequency_penalty": 0},
        **{"user": "me", "stop": "", "seed": -1, "logprobs": None, "stream": None},
        **{"ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "stop_token_ids": [], "bad_words": []},
        **{"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1},
    }
    request = read_request(json.dumps(neutral).encode())
    assert request.prompts == [""]
    assert request.params(0) == request.params(1) == SamplingParams(max_tokens=16, temperature=1, top_p=1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": 2}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "max_tokens": 0}, 0),
        ({"echo": True, "max_tokens": 0, "logprobs": 1}, 1),
    ],
)
def test_echo_asks_for_the_logprobs_of_the_prompt(fields: dict, expected: int | None) -> None:
    assert read_request(json.dumps(fields).encode()).params(0).prompt_logprobs == expected


def test_only_echo_allows_an_empty_answer() -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        read_request(b'{"max_tokens": 0}').params(0)


@pytest.mark.parametrize("options", [{"include_usage": None}, {}, None])
def test_null_counts_as_absent_inside_an_object(options: dict | None) -> None:
    request = read_request(json.dumps({"stream": True, "stream_options": options}).encode())
    assert request.stream_options is None or not request.stream_options.include_usage


def test_seeds_of_several_answers_differ_and_stay_within_the_limit() -> None:
    request = read_request(json.dumps({"n": 3, "seed": 2**63 - 1}).encode())
    assert [request.params(index).seed for index in range(3)] == [2**63 - 1, 0, 1]
