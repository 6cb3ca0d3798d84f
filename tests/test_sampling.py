"""Sampling: each setting keeps exactly the tokens it says, and each is drawn as often as it should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import SamplingParams
from tinylm.sampling import distribution, penalize, sample, token_logprobs

NAN, INF = float("nan"), float("inf")
LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-20, 20, width=32))
# Few different values: ties everywhere.
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
    ],
)
def test_a_value_outside_the_limits_is_refused_by_field_and_value(field, values):
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
    ],
)
def test_a_value_at_the_limits_is_accepted(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("stop", "told"),
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
def test_a_stop_string_that_could_not_work_is_refused(stop, told):
    with pytest.raises(ValueError, match=r"^stop ") as caught:
        SamplingParams(stop=stop)
    assert told in str(caught.value)


def test_one_stop_string_need_not_be_wrapped():
    """Taken as a sequence of characters, 'END' would end the text at the first E."""
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# --- which tokens are kept


def slow_distribution(logits, params):
    """The documented rule, step by step on a plain list: tokens and probabilities, likeliest first."""
    ranked = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    peak = float(logits[ranked[0]])
    weights = [math.exp((float(logits[token]) - peak) / params.temperature) for token in ranked]
    if params.top_p < 1:
        total, reached, kept = sum(weights), 0.0, 0
        for weight in weights:
            assume(abs(reached - params.top_p * total) > 1e-9 * total)  # else rounding decides
            if reached >= params.top_p * total:
                break
            reached += weight
            kept += 1
        ranked, weights = ranked[:kept], weights[:kept]
    if params.min_p:
        assume(all(abs(weight - params.min_p * weights[0]) > 1e-9 or weight == weights[0] for weight in weights))
        kept = sum(weight >= params.min_p * weights[0] for weight in weights)
        ranked, weights = ranked[:kept], weights[:kept]
    return ranked, [weight / sum(weights) for weight in weights]


@given(
    LOGITS | TIED,
    st.floats(0.05, 10),
    st.just(1.0) | st.floats(0.001, 0.999),
    st.just(0) | st.integers(1, 40),
    st.just(0.0) | st.floats(0.001, 1),
)
def test_exactly_the_tokens_of_the_obvious_rule_are_kept(logits, temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    expected_tokens, expected = slow_distribution(logits, params)
    tokens, probabilities = distribution(logits, params)
    assert tokens.tolist() == expected_tokens
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1)


@given(LOGITS, st.floats(0.05, 10), st.floats(0.001, 0.999))
def test_the_nucleus_is_large_enough_and_no_larger(logits, temperature, top_p):
    everything = distribution(logits, SamplingParams(temperature=temperature, top_p=1))[1]
    kept = len(distribution(logits, SamplingParams(temperature=temperature, top_p=top_p))[0])
    assert everything[:kept].sum() >= top_p - 1e-9
    assert everything[: kept - 1].sum() <= top_p + 1e-9


@given(LOGITS | TIED, st.integers(1, 40))
def test_top_k_keeps_k_tokens_and_none_that_is_likelier_is_left_out(logits, top_k):
    tokens, _ = distribution(logits, SamplingParams(temperature=1, top_p=1, top_k=top_k))
    assert len(tokens) == min(top_k, len(logits))
    left_out = np.delete(logits, tokens)
    assert left_out.max(initial=-np.inf) <= logits[tokens].min()


@given(LOGITS | TIED, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, min_p):
    everything = np.exp(logits.astype(float) - logits.max())
    assume(np.abs(everything - min_p)[everything < 1].min(initial=1) > 1e-9)
    tokens, _ = distribution(logits, SamplingParams(temperature=1, top_p=1, min_p=min_p))
    assert sorted(tokens) == np.flatnonzero(everything >= min_p).tolist()


def test_truncations_follow_one_another():
    """Probabilities .4 .3 .2 .1: of top_k's three, .44 and .33 reach top_p .7, which of all four would need .2 too."""
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    keep = {"temperature": 1, "top_p": 0.75}
    assert distribution(logits, SamplingParams(**keep))[0].tolist() == [3, 2, 1]
    assert distribution(logits, SamplingParams(**keep, top_k=3))[0].tolist() == [3, 2]
    assert distribution(logits, SamplingParams(**keep, top_k=3, min_p=0.8))[0].tolist() == [3]


@given(LOGITS, st.sampled_from([1e-9, 1e-3, 10.0]))
def test_extreme_temperatures_give_probabilities(logits, temperature):
    tokens, probabilities = distribution(logits, SamplingParams(temperature=temperature))
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1)
    assert logits[tokens[0]] == logits.max()


# --- penalty, greedy, drawing


def slow_penalty(logits, seen, penalty):
    punished = []
    for score, was_seen in zip(logits, seen, strict=True):
        if was_seen:
            score = score / np.float32(penalty) if score > 0 else score * np.float32(penalty)
        punished.append(score)
    return np.array(punished, np.float32)


@given(st.data(), LOGITS, st.floats(0.01, 10))
@example(None, np.array([2.0, -2.0, 0.0], np.float32), 2.0)
def test_the_penalty_is_that_of_the_obvious_loop(data, logits, penalty):
    seen = np.ones(3, bool) if data is None else data.draw(hnp.arrays(bool, len(logits)))
    before = logits.copy()
    np.testing.assert_array_equal(penalize(logits, seen, penalty), slow_penalty(logits, seen, penalty))
    np.testing.assert_array_equal(logits, before)  # the model's own scores are still needed for log-probabilities


@given(LOGITS, st.floats(1.001, 10))
def test_a_penalty_above_1_never_makes_a_seen_token_likelier(logits, penalty):
    """Dividing a negative score would."""
    seen = np.arange(len(logits)) % 2 == 0
    punished = penalize(logits, seen, penalty)
    assert (punished[seen] <= logits[seen]).all()
    np.testing.assert_array_equal(punished[~seen], logits[~seen])


@given(LOGITS | TIED, st.sampled_from([1.0, 1.7]))
def test_temperature_0_is_the_likeliest_and_the_lower_of_equals(logits, penalty):
    seen = np.arange(len(logits)) % 3 == 0
    punished = slow_penalty(logits, seen, penalty).tolist()
    params = SamplingParams(temperature=0, repetition_penalty=penalty, top_p=0.5, top_k=2)
    assert sample(logits, params, seen, np.random.default_rng()) == punished.index(max(punished))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1, "top_p": 1},
        {"temperature": 0.5, "top_p": 1},
        {"temperature": 2, "top_p": 0.8},
        {"temperature": 1, "top_p": 1, "top_k": 3},
        {"temperature": 1.5, "top_p": 1, "min_p": 0.3},
        {"temperature": 1, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings):
    """Chi-square over 20,000 draws; what is left out must never come."""
    params = SamplingParams(**settings)
    logits = np.array([1.5, -0.5, 0.0, 2.0, 1.0, -3.0, 0.7, 1.9], np.float32)
    seen = np.arange(8) == 3
    rng = np.random.default_rng(20)
    n = 20_000
    counts = np.bincount([sample(logits, params, seen, rng) for _ in range(n)], minlength=8)
    tokens, probabilities = distribution(penalize(logits, seen, params.repetition_penalty), params)
    assert counts[tokens].sum() == n
    chi_square = ((counts[tokens] - n * probabilities) ** 2 / (n * probabilities)).sum()
    freedom = len(tokens) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@given(LOGITS, st.integers(0, 2**63 - 1), st.floats(0.1, 3))
def test_a_draw_takes_one_number_whatever_is_kept(logits, seed, temperature):
    """So that a seed gives the same text on every version that keeps the same tokens."""
    for params in (
        SamplingParams(temperature=temperature, top_p=1),
        SamplingParams(temperature=temperature, top_k=1),
    ):
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        sample(logits, params, np.zeros(len(logits), bool), rng)
        other.random()
        assert rng.random() == other.random()


# --- log-probabilities


@given(st.data(), LOGITS | TIED, st.integers(0, 20))
def test_log_probabilities_are_those_of_the_model(data, logits, n_top):
    token = data.draw(st.integers(0, len(logits) - 1))
    entry = token_logprobs(logits, token, n_top)
    total = sum(math.exp(float(score)) for score in logits)
    assert entry.logprob == pytest.approx(float(logits[token]) - math.log(total), abs=1e-9)
    ranked = sorted(range(len(logits)), key=lambda t: (-float(logits[t]), t))[:n_top]
    assert [t for t, _ in entry.top] == ranked
    for t, logprob in entry.top:
        assert logprob == token_logprobs(logits, t, 0).logprob


@given(LOGITS)
def test_probabilities_of_all_tokens_sum_to_1(logits):
    logprobs = [token_logprobs(logits, token, 0).logprob for token in range(len(logits))]
    assert sum(map(math.exp, logprobs)) == pytest.approx(1)
    assert dict(token_logprobs(logits, 0, len(logits)).top) == dict(enumerate(logprobs))


def test_log_probabilities_survive_large_scores():
    """exp(1000) overflows; a certain token still has log-probability 0."""
    entry = token_logprobs(np.array([1000.0, -1000.0], np.float32), 0, 2)
    assert entry.logprob == 0
    assert entry.top == ((0, 0.0), (1, -2000.0))
