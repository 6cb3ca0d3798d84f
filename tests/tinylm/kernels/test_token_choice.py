"""Which tokens the kernels choose: each setting keeps the right tokens, with the right probabilities."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import ModelConfig, SamplingParams
from tinylm.kernels.batch import FORBIDDEN, Batch

LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-20, 20, width=32))
# Scores that are equal or clearly different, so that rounding never decides which token is more likely.
APART = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-1280, 1280).map(lambda n: n / 64))
# Scores with many ties.
TIED = hnp.arrays(np.float32, st.integers(1, 12), elements=st.sampled_from([-1.0, 0.0, 1.0]))
EPSILON = 2e-5  # the float32 of the compiled kernels may not resolve a smaller difference of probabilities


@pytest.fixture(scope="module", params=["numpy", "numba"])
def kernels(request):
    return importlib.import_module(f"tinylm.kernels.{request.param}")


def choose(kernels, logits, slots, uniforms, params, seen, bias=None):
    """Return the token of each row, for logits (R, vocab), slots (R,), uniforms (R,), params (S,), seen (S, vocab).

    bias (S, vocab): slot 1 uses it.
    """
    n, vocab_size = logits.shape
    config = ModelConfig(vocab_size, hidden_size=2, n_layers=1, n_heads=1, mlp_size=1, context=1, boundary_id=0)
    batch = Batch.empty(config, n_slots=len(params), n_tokens=2 * n, n_rows=n)
    for slot, chosen in enumerate(params):
        batch.set_params(slot, chosen)
    batch.rows[:] = np.arange(2 * n)[::-2]  # every other token, in reverse order
    batch.slots[batch.rows] = slots
    batch.seen[:] = seen
    if bias is not None:
        batch.biased[1], batch.bias[:] = True, bias
    batch.uniforms[:] = uniforms
    batch.logits[:] = 1e9  # padding is no token
    batch.logits[:, :vocab_size] = logits
    kernels.sample(kernels.make_scratch(config, 2 * n, n), batch, n)
    np.testing.assert_array_equal(batch.logits[:, :vocab_size], logits)  # log-probabilities need them
    return batch.chosen.tolist()


@pytest.fixture(scope="module")
def draw(kernels):
    """Return a function of logits (vocab,), params and uniforms that returns the token that each uniform draws."""

    def draw(logits, params, uniforms, seen=False, bias=None):
        other = SamplingParams(temperature=0, repetition_penalty=5.0)
        both_seen = np.stack([np.ones(len(logits), bool), np.broadcast_to(seen, len(logits))])
        n = len(uniforms)
        return choose(kernels, np.tile(logits, (n, 1)), [1] * n, uniforms, [other, params], both_seen, bias)

    return draw


# --- which tokens are kept


def slow_penalty(logits, seen, penalty):
    punished = []
    for score, was_seen in zip(logits, np.broadcast_to(seen, len(logits)), strict=True):
        if was_seen:
            score = score / np.float32(penalty) if score > 0 else score * np.float32(penalty)
        punished.append(score)
    return np.array(punished, np.float32)


def slow_distribution(logits, params):
    """Apply the documented rule step by step to a plain list.

    Return {token: probability} in the order of the ids, and the least distance to a limit, as a share of it.
    """
    peak = float(logits.max())
    weights = {token: math.exp((float(score) - peak) / params.temperature) for token, score in enumerate(logits)}
    margin = 1.0
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        total, reached, kept = math.fsum(weights[token] for token in ranked), 0.0, 0
        for token in ranked:
            margin = min(margin, abs(reached / total - params.top_p))
            if reached >= params.top_p * total:
                break
            reached += weights[token]
            kept += 1
        ranked = ranked[:kept]
    if params.min_p:
        margin = min([margin, *(abs(weight / params.min_p - 1) for weight in weights.values() if weight < 1)])
    kept_weights = {token: weights[token] for token in sorted(ranked) if weights[token] >= params.min_p}
    total = math.fsum(kept_weights.values())
    return {token: weight / total for token, weight in kept_weights.items()}, margin


def assert_draws(draw, logits, params, seen=False, bias=None):
    """Assert that each kept token is drawn by an interval of uniform numbers as long as its probability.

    The intervals are in the order of the ids. This tries a number just inside both ends of some fifty of them.
    """
    scores = slow_penalty(logits, seen, params.repetition_penalty)
    expected, margin = slow_distribution(scores if bias is None else scores + bias, params)
    assume(margin > EPSILON)  # otherwise rounding decides
    ends = np.cumsum(list(expected.values()))
    begins = ends - list(expected.values())
    tried = np.flatnonzero(ends - begins > 3 * EPSILON)
    tried = tried[np.unique(np.linspace(0, len(tried) - 1, 50).round().astype(int))]
    inside = np.concatenate([begins[tried] + EPSILON, ends[tried] - EPSILON])
    first, last, *drawn = draw(logits, params, [0.0, 1 - 2**-53, *inside], seen, bias)
    assert drawn == [list(expected)[i] for i in tried] * 2
    assert {first, last} <= set(expected)


SETTINGS = {
    "temperature": st.floats(0.05, 10),
    "top_p": st.just(1.0) | st.floats(0.001, 0.999),
    "top_k": st.just(0) | st.integers(1, 40),
    "min_p": st.just(0.0) | st.floats(0.001, 1),
}


@given(APART | TIED, st.builds(SamplingParams, **SETTINGS))
@example(
    np.array([0, -2.3, -2.3, -2.3, *[-4.6] * 30], np.float32),
    SamplingParams(temperature=1, top_p=0.9, top_k=40, min_p=0.02),  # tokens below min_p count in top_p
)
@example(np.zeros(12, np.float32), SamplingParams(temperature=1, top_p=0.49, top_k=7))
# The probabilities are 0.1, 0.2, 0.3 and 0.4. The two most likely of top_k's three have 0.78, but only 0.7 of all.
@example(np.log(np.array([1, 2, 3, 4], np.float32)), SamplingParams(temperature=1, top_p=0.75, top_k=3))
def test_tokens_follow_the_documented_rule(draw, logits, params):
    assert_draws(draw, logits, params)


@settings(max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([255, 256, 257, 1000, 4096]),
    st.sampled_from([0.0, 0.02, 0.5, 2.0]),
    st.builds(SamplingParams, **{**SETTINGS, "top_k": st.just(0) | st.integers(1, 5000)}),
)
@example(0, 4096, 0.0, SamplingParams(temperature=1, top_p=0.33333))
@example(0, 4096, 0.0, SamplingParams(temperature=1, top_p=1, top_k=300))
def test_a_whole_vocabulary_follows_the_documented_rule(draw, seed, n, spread, params):
    """Flat, tied and peaked scores. The compiled kernels look first at the few most likely tokens."""
    logits = np.random.default_rng(seed).normal(0, spread, n)
    assert_draws(draw, (np.round(logits * 64) / 64).astype(np.float32), params)


@given(APART | TIED, st.sampled_from([1e-300, 1e-38, 1e-9, 1e-3]), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_temperatures_near_0_draw_the_most_likely_token(draw, logits, temperature, uniform):
    """Scores divided by such temperatures overflow."""
    [token] = draw(logits, SamplingParams(temperature=temperature), [uniform])
    assert logits[token] == logits.max()


@given(APART, st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(-1e4, 1e4, width=32))
def test_only_differences_of_scores_matter(draw, logits, uniform, height):
    """e^1000 overflows, and e^-1000 is 0."""
    logits = (logits + np.float32(height)).astype(np.float32)
    [token] = draw(logits, SamplingParams(temperature=1, top_p=0.5), [uniform])
    weights = np.exp(logits.astype(float) - logits.max())
    assert weights[weights > weights[token] * (1 + EPSILON)].sum() <= (0.5 + EPSILON) * weights.sum()


# --- penalty and temperature 0


@given(APART | TIED, st.sampled_from([0.5, 1.0, 1.75, 4.0]), st.floats(0.5, 2), st.sampled_from([1.0, 0.7]))
def test_the_penalty_precedes_temperature_and_truncation(draw, logits, penalty, temperature, top_p):
    seen = np.arange(len(logits)) % 3 == 0
    params = SamplingParams(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    assert_draws(draw, logits, params, seen)


@given(st.data(), APART | TIED, st.sampled_from([0.5, 1.0, 1.75]), st.builds(SamplingParams, **SETTINGS))
def test_the_bias_follows_the_penalty_and_precedes_the_rest(draw, data, logits, penalty, params):
    steps = st.integers(-640, 640).map(lambda n: n / 64) | st.sampled_from([0.0, FORBIDDEN])
    bias = data.draw(hnp.arrays(np.float32, len(logits), elements=steps))
    assume(bias.max() > FORBIDDEN)
    seen = np.arange(len(logits)) % 3 == 0
    assert_draws(draw, logits, dataclasses.replace(params, repetition_penalty=penalty), seen, bias)


@given(st.data(), LOGITS, st.sampled_from([0.0, 1e-300, 1e-9, 0.7, 10.0]), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_a_forbidden_token_is_never_drawn(draw, data, logits, temperature, uniform):
    allowed = data.draw(hnp.arrays(bool, len(logits)))
    assume(allowed.any())
    bias = np.where(allowed, 0, FORBIDDEN).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_p=1, repetition_penalty=2)
    [token] = draw(logits, params, [uniform], True, bias)
    assert allowed[token]


@given(LOGITS | TIED, st.sampled_from([1.0, 1.7]))
def test_temperature_0_takes_the_first_of_the_most_likely(draw, logits, penalty):
    seen = np.arange(len(logits)) % 3 == 0
    punished = slow_penalty(logits, seen, penalty).tolist()
    params = SamplingParams(temperature=0, repetition_penalty=penalty, top_p=0.5, top_k=2)
    assert draw(logits, params, [0.0, 0.7, 1 - 2**-53], seen) == [punished.index(max(punished))] * 3


@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.lists(st.builds(SamplingParams, **SETTINGS), min_size=1))
def test_rows_of_a_batch_are_independent(kernels, seed, vocab_size, params):
    rng, n = np.random.default_rng(seed), len(params)
    params += [SamplingParams(temperature=0), SamplingParams(repetition_penalty=3.0)]
    slots = rng.permutation(n + 2)[:n]
    logits, uniforms = rng.normal(0, 3, (n, vocab_size)).astype(np.float32), rng.random(n)
    seen, bias = rng.random((n + 2, vocab_size)) < 0.3, rng.normal(0, 3, (n + 2, vocab_size))
    together = choose(kernels, logits, slots, uniforms, params, seen, bias)
    for i, slot in enumerate(slots):
        is_biased = int(slot == 1)  # slot 1 is the one with a bias
        others = [params[slot]] * 2
        alone = choose(kernels, logits[i : i + 1], [is_biased], uniforms[i], others, seen[slot], bias[slot])
        assert alone == [together[i]]
