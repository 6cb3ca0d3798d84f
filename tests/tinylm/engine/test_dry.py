"""DRY penalties are those of llama.cpp: against a slow definition, and against the examples of its own tests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.engine.dry import MAX_PENALTY, Dry

TOKENS = st.integers(0, 4)
TAILS = st.lists(st.lists(TOKENS, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


def slow_dry(ids, params, breakers):
    """Compare each earlier place of each token with the end of the text, token by token."""
    window = ids if params.dry_penalty_last_n < 0 else ids[max(0, len(ids) - params.dry_penalty_last_n) :]
    limit = len(window)
    for begin in reversed(range(len(window))):
        tails = breakers.get(window[begin], ())
        ends = [begin + 1 + len(t) for t in tails if tuple(window[begin + 1 :][: len(t)]) == t]
        if ends:
            limit = len(window) - max(ends)
            break
    penalties = {}
    for at in range(1, len(window)):
        length = 0
        while length < min(at, limit) and window[at - 1 - length] == window[-1 - length]:
            length += 1
        token = window[at]
        if length >= params.dry_allowed_length and () not in breakers.get(token, ()):
            penalty = params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
            penalties[token] = max(penalty, penalties.get(token, 0))
    return penalties


def penalties(ids, params, breakers, n_prompt=0):
    """Return the penalties after a prompt and an answer. The text before it must not matter."""
    dry = Dry(params, breakers, context=len(ids) + 5)
    dry.begin([3, 1, 3, 1, 2])
    dry.begin(ids[:n_prompt])
    for token in ids[n_prompt:]:
        dry.penalties()
        dry.add(token)
    return dry.penalties()


@given(
    st.lists(TOKENS, max_size=40) | st.lists(TOKENS, max_size=6).map(lambda part: part * 5),
    st.builds(
        SamplingParams,
        dry_multiplier=st.floats(0.1, 3),
        dry_base=st.floats(1, 2),
        dry_allowed_length=st.integers(0, 6),
        dry_penalty_last_n=st.just(-1) | st.integers(1, 50),
    ),
    st.dictionaries(TOKENS, TAILS, max_size=2),
    st.integers(0, 40),
)
def test_penalties_are_those_of_the_definition(ids, params, breakers, n_prompt):
    assert penalties(ids, params, breakers, n_prompt) == pytest.approx(slow_dry(ids, params, breakers))


@pytest.mark.parametrize(
    ("ids", "probabilities", "multiplier", "allowed", "last_n", "breakers"),
    [
        ([0, 1], [0.25] * 4, 1.0, 2, 4, {}),
        ([0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923], 1.0, 2, 5, {}),
        ([0, 1, 3, 4, 0, 1], [0.2] * 5, 1.0, 2, 6, {3: ((),)}),
        ([0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818], 2.0, 2, 5, {}),
        ([0, 1, 2, 3, 4, 0, 1], [0.2] * 5, 1.0, 4, 7, {}),
    ],
)
def test_llama_cpps_examples_give_its_probabilities(ids, probabilities, multiplier, allowed, last_n, breakers):
    """From tests/test-sampling.cpp of llama.cpp. All tokens have the same probability before the penalties."""
    params = SamplingParams(
        dry_multiplier=multiplier, dry_base=1.1, dry_allowed_length=allowed, dry_penalty_last_n=last_n
    )
    found = penalties(ids, params, breakers)
    weights = [math.exp(-found.get(token, 0)) for token in range(len(probabilities))]
    assert [weight / sum(weights) for weight in weights] == pytest.approx(probabilities, abs=1e-5)


def test_a_very_long_repetition_has_a_finite_penalty():
    """2^200 does not fit into a float32."""
    assert penalties([7] * 201, SamplingParams(dry_multiplier=1, dry_base=2), {}) == {7: MAX_PENALTY}
