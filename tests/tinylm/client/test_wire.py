"""Settings and their messages: the engine gets the settings that the client sets, defaults included."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.client.wire import (
    FINISH_REASON_NAMES,
    FINISH_REASONS,
    STATUS_DETAILS,
    explain_request,
    params_from_request,
    request_from_params,
    retry_after_s,
    retry_details,
)
from tinylm.v1 import tinylm_pb2 as pb

UINT32 = 2**32 - 1
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, UINT32),
    temperature=st.floats(0, 10) | st.integers(0, 10),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, UINT32),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 10),
    stop=st.lists(st.text(min_size=1, max_size=20), max_size=16).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=64),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    bad_words=st.lists(st.text(min_size=1, max_size=20), max_size=8),
    dry_multiplier=st.floats(0, 100),
    dry_base=st.floats(1, 100),
    dry_allowed_length=st.integers(0, 2**31 - 1),
    dry_penalty_last_n=st.integers(-1, 2**31 - 1),
    dry_sequence_breakers=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=16),
)


@given(PARAMS, st.text(max_size=50), st.integers(0, UINT32))
@settings(max_examples=50)
def test_settings_arrive_as_they_were_sent(params, prompt, min_tokens):
    """0 is not the same as unset, and no number loses digits."""
    params = replace(params, min_tokens=min(min_tokens, params.max_tokens))
    sent = request_from_params(prompt, params).SerializeToString()
    request = pb.GenerateRequest.FromString(sent)
    assert params_from_request(request) == params
    assert request.prompt == prompt


@pytest.mark.parametrize("field", ["max_tokens", "top_k"])
def test_a_number_above_32_bits_is_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field} must be .* {UINT32}, got {UINT32 + 1}"):
        request_from_params("x", SamplingParams(**{field: UINT32 + 1}))


def test_text_that_is_not_unicode_is_refused_by_name():
    with pytest.raises(ValueError, match="prompt must be Unicode text: character 2 "):
        request_from_params("a\udcff", SamplingParams())
    for field in ("stop", "bad_words", "dry_sequence_breakers"):
        with pytest.raises(ValueError, match=f"{field} must be Unicode text: character 1 "):
            request_from_params("a", SamplingParams(**{field: "\udcff"}))
    with pytest.raises(ValueError, match="prompt must be a string, got NoneType"):
        request_from_params(None, SamplingParams())


def test_an_empty_request_has_the_defaults():
    assert params_from_request(pb.GenerateRequest(prompt="hi")) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", 0), ("temperature", float("nan")), ("seed", 2**63), ("stop", ["fine", ""])],
        *[("min_tokens", 65), ("stop_token_ids", [2**31]), ("logit_bias", {5: 101}), ("presence_penalty", -3)],
        *[("frequency_penalty", 3), ("bad_words", [""]), ("dry_multiplier", -1), ("dry_base", 0.5)],
        *[("dry_allowed_length", 2**31), ("dry_penalty_last_n", -2), ("dry_sequence_breakers", ["x" * 41])],
    ],
)
def test_a_bad_value_of_a_request_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        params_from_request(pb.GenerateRequest(prompt="hi", **{field: value}))


def test_every_finish_reason_of_the_proto_has_a_name():
    assert set(FINISH_REASON_NAMES) == set(pb.FinishReason.values()) - {pb.FINISH_REASON_UNSPECIFIED}
    for name, number in FINISH_REASONS.items():
        assert pb.FinishReason.Name(number) == f"FINISH_REASON_{name.upper()}"


def test_a_question_has_only_the_fields_that_were_given():
    assert explain_request("a", "lens", None, {}) == pb.ExplainRequest(prompt="a", lens={})
    assert explain_request("a", "lens", None, {"position": 0}) == pb.ExplainRequest(prompt="a", lens={"position": 0})
    request = explain_request("a", "scores", SamplingParams(seed=4, top_k=2), {"top": 3})
    assert params_from_request(request.scores.settings) == SamplingParams(seed=4, top_k=2)
    assert (request.prompt, request.scores.settings.prompt, request.scores.top) == ("a", "", 3)


@pytest.mark.parametrize(
    ("piece", "params", "fields", "message"),
    [
        ("everything", None, {}, "piece is 'everything': it must be one of tokens, norms"),
        ("lens", None, {"layer": 1}, "layer is not a field of the piece 'lens'"),
        ("scores", None, {"settings": {}}, "settings is not a field of the piece 'scores'"),
        ("lens", SamplingParams(), {}, "params is set: the piece 'lens' has no settings, only 'scores' has"),
        ("lens", None, {"top": "5"}, "top is '5': it must be a whole number of 32 bits"),
        ("attention", None, {"layer": 2**31}, "layer is 2147483648: it must be a whole number of 32 bits"),
        ("matmul", None, {"layer": 1, "name": 5}, "name is 5: it must be a string"),
    ],
)
def test_a_question_that_cannot_be_sent_is_refused_by_name(piece, params, fields, message):
    with pytest.raises(ValueError, match=message):
        explain_request("a", piece, params, fields)


@given(st.integers(0, 10**8), st.text(max_size=20))
def test_the_time_to_retry_is_that_of_googles_messages(wait_ms, message):
    """`google.rpc` is what other clients read it with."""
    details = retry_details(8, message, wait_ms / 1000)
    assert retry_after_s([("another", "1"), (STATUS_DETAILS, details)]) == wait_ms / 1000
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.RetryInfo()
    assert (status.code, status.message) == (8, message)
    assert status.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == wait_ms


@given(st.binary(max_size=40))
def test_damaged_details_name_no_time(damaged):
    assert retry_after_s([(STATUS_DETAILS, damaged)]) is None
    assert retry_after_s(None) is None
    cut = retry_details(8, "a message", 12.5)[:-1]
    assert retry_after_s([(STATUS_DETAILS, cut)]) is None
