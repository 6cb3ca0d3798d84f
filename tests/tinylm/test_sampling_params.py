"""The limits of the sampling settings, and log-probabilities."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import SamplingParams
from tinylm.engine.logprobs import token_logprobs

NAN, INF = float("nan"), float("inf")
LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-20, 20, width=32))
TIED = hnp.arrays(np.float32, st.integers(1, 12), elements=st.sampled_from([-1.0, 0.0, 1.0]))

# --- the limits of every setting


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 1.0, 64.5, NAN, INF, True, "64", None, [64]]),
        ("temperature", [-0.1, 10.1, NAN, INF, -INF, True, "1", None, [1], 10**400]),
        ("top_p", [0, 0.0, -0.5, 1.0001, NAN, INF, True, "1", None]),
        ("top_k", [-1, 0.5, 40.0, NAN, INF, True, "40", None]),
        ("min_p", [-0.01, 1.01, NAN, INF, False, "0", None]),
        ("repetition_penalty", [0, 0.0, 0.009, 1e-40, -1, 10.5, NAN, INF, True, "1", None, 10**400]),
        ("seed", [-1, 2**63, 0.0, NAN, True, "7"]),
        ("logprobs", [-1, 21, 1.0, NAN, True, "5"]),
        ("ignore_eos", [0, 1, "yes", None]),
        ("min_tokens", [-1, 65, 1.0, NAN, True, "5", None]),
        ("stop_token_ids", [5, None, "5", b"5"]),
        ("logit_bias", [None, 5, "5", [(5, 1)]]),
        ("presence_penalty", [-2.1, 2.1, NAN, INF, True, "1", None]),
        ("frequency_penalty", [-2.1, 2.1, NAN, INF, True, "1", None]),
        ("dry_multiplier", [-0.1, 100.5, NAN, INF, True, "1", None]),
        ("dry_base", [0.99, 100.5, NAN, INF, True, "1", None]),
        ("dry_allowed_length", [-1, 2**31, 1.0, NAN, True, "1", None]),
        ("dry_penalty_last_n", [-2, 2**31, 1.0, NAN, True, "1", None]),
    ],
)
def test_a_value_outside_the_limits_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} is ") as caught:
            SamplingParams(**{field: value})
        assert repr(value)[:50] in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [1, 10**9]),
        ("temperature", [0, 0.0, 1, 10, 1e-9]),
        ("top_p", [1, 1.0, 1e-9]),
        ("top_k", [0, 1, 10**9]),
        ("min_p", [0, 1, 0.5]),
        ("repetition_penalty", [0.01, 1, 10]),
        ("seed", [None, 0, 2**63 - 1]),
        ("logprobs", [None, 0, 20]),
        ("stop", [(), ("a",), ("x" * 256,), ("a",) * 16]),
        ("ignore_eos", [True, False]),
        ("min_tokens", [0, 64]),
        ("stop_token_ids", [(), (0, 2**31 - 1), (5,) * 64]),
        ("logit_bias", [{}, {0: -100, 2**31 - 1: 100}, dict.fromkeys(range(300), 0.5)]),
        ("presence_penalty", [-2, 0, 2.0]),
        ("frequency_penalty", [-2, 0, 2.0]),
        ("bad_words", [(), ("x" * 256,), ("a",) * 64]),
        ("dry_multiplier", [0, 0.8, 100]),
        ("dry_base", [1, 1.75, 100]),
        ("dry_allowed_length", [0, 2, 2**31 - 1]),
        ("dry_penalty_last_n", [-1, 0, 2**31 - 1]),
        ("dry_sequence_breakers", [("x" * 40,), ("a",) * 16]),
    ],
)
def test_a_value_at_the_limits_is_accepted(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("",), "length 0"),
        (("fine", "x" * 257), "length 257"),
        ((1,), "length int"),
        ((None,), "NoneType"),
        (("a",) * 17, "17 strings"),
        (5, "5"),
        (None, "None"),
    ],
)
def test_an_impossible_stop_string_is_refused(stop, message):
    with pytest.raises(ValueError, match=r"^stop ") as caught:
        SamplingParams(stop=stop)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bad_words": ["fine", ""]}, "bad_words holds a string of length 0: it must be 1 to 256 characters"),
        ({"bad_words": ["a"] * 65}, "bad_words has 65 strings: it must have 0 to 64"),
        ({"dry_sequence_breakers": ()}, "dry_sequence_breakers has 0 strings: it must have 1 to 16"),
        ({"dry_sequence_breakers": "x" * 41}, "dry_sequence_breakers holds a string of length 41"),
        ({"stop_token_ids": range(65)}, "stop_token_ids has 65 tokens: it must have 0 to 64"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1: it must be a whole number, 0 to 2147483647"),
        ({"stop_token_ids": [1, 2.0]}, "stop_token_ids is 2.0"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias has 301 tokens: it must have 0 to 300"),
        ({"logit_bias": {5: 100.5}}, "logit_bias of token 5 is 100.5: it must be a number, -100 to 100"),
        ({"logit_bias": {5: NAN}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {"5": 1}}, "logit_bias token is '5': it must be a whole number"),
        ({"logit_bias": {-1: 1}}, "logit_bias token is -1"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens is 6: it must be at most max_tokens, 5"),
    ],
)
def test_an_error_names_field_value_and_limit(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SamplingParams(**fields)


def test_later_changes_of_a_dictionary_change_no_settings():
    biases = {np.int64(5): np.float32(1.5)}
    params = SamplingParams(logit_bias=biases)
    biases[6] = 2.0
    assert params.logit_bias == {5: 1.5}
    assert [(type(token), type(bias)) for token, bias in params.logit_bias.items()] == [(int, float)]
    assert hash(params) == hash(SamplingParams(logit_bias={5: 1.5}))


def test_numpy_numbers_become_python_numbers():
    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.uint8(3))
    assert params == SamplingParams(max_tokens=5, temperature=0.5, seed=3)
    assert [type(value) for value in (params.max_tokens, params.temperature, params.seed)] == [int, float, int]


def test_stop_takes_one_string_or_several():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# --- log-probabilities


@given(st.data(), LOGITS | TIED, st.integers(0, 20))
def test_log_probabilities_are_the_softmax_of_the_logits(data, logits, n_top):
    tokens = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=2, max_size=2))
    token, (other, entry) = tokens[1], token_logprobs(np.stack([logits[::-1], logits]), tokens, n_top)
    assert [other] == token_logprobs(logits[None, ::-1], tokens[:1], n_top)
    total = sum(math.exp(float(score)) for score in logits)
    assert entry.logprob == pytest.approx(float(logits[token]) - math.log(total), abs=1e-9)
    ranked = sorted(range(len(logits)), key=lambda t: (-float(logits[t]), t))[:n_top]
    assert [t for t, _ in entry.top] == ranked
    for t, logprob in entry.top:
        assert logprob == token_logprobs(logits[None], [t], 0)[0].logprob


def test_log_probabilities_survive_large_scores():
    """exp(1000) overflows."""
    (entry,) = token_logprobs(np.array([[1000.0, -1000.0]], np.float32), [0], 2)
    assert entry.logprob == 0
    assert entry.top == ((0, 0.0), (1, -2000.0))
