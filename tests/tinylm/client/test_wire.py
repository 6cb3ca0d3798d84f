"""Settings and their messages: what a client sets is what the engine gets, defaults included."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.client.wire import FINISH_REASON_NAMES, FINISH_REASONS, params_from_request, request_from_params
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
)


@given(PARAMS, st.text(max_size=50), st.integers(0, UINT32))
def test_settings_arrive_as_they_were_sent(params, prompt, timeout_ms):
    """Through the bytes of a real message; 0 is not 'unset', and no number loses digits."""
    sent = request_from_params(prompt, params, timeout_ms).SerializeToString()
    request = pb.GenerateRequest.FromString(sent)
    assert params_from_request(request) == params
    assert (request.prompt, request.timeout_ms) == (prompt, timeout_ms)


@pytest.mark.parametrize("field", ["max_tokens", "top_k"])
def test_a_number_that_no_message_holds_is_named(field):
    with pytest.raises(ValueError, match=f"{field} must be .* {UINT32}, got {UINT32 + 1}"):
        request_from_params("x", SamplingParams(**{field: UINT32 + 1}))


def test_text_that_is_no_unicode_is_named():
    with pytest.raises(ValueError, match="prompt must be Unicode text: character 2 "):
        request_from_params("a\udcff", SamplingParams())
    with pytest.raises(ValueError, match="stop must be Unicode text: character 1 "):
        request_from_params("a", SamplingParams(stop="\udcff"))
    with pytest.raises(ValueError, match="prompt must be a string, got NoneType"):
        request_from_params(None, SamplingParams())


def test_an_empty_request_has_the_defaults():
    """A client in another language that sets nothing gets what the library's user gets."""
    assert params_from_request(pb.GenerateRequest(prompt="hi")) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", 2**63),
        ("logprobs", 21),
    ],
)
def test_a_bad_value_of_a_request_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} is "):
        params_from_request(pb.GenerateRequest(prompt="hi", **{field: value}))


def test_a_bad_stop_string_of_a_request_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^stop holds a string of length 0"):
        params_from_request(pb.GenerateRequest(prompt="hi", stop=["fine", ""]))


def test_finish_reasons_go_both_ways():
    for name, number in FINISH_REASONS.items():
        assert FINISH_REASON_NAMES[number] == name
        assert pb.FinishReason.Name(number) == f"FINISH_REASON_{name.upper()}"
    sent = set(pb.FinishReason.values()) - {pb.FINISH_REASON_UNSPECIFIED}
    assert set(FINISH_REASON_NAMES) == sent, "a reason that no client can read, or that is never sent"
