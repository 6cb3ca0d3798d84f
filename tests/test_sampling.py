"""Sampling: each setting keeps exactly the tokens it says, and each is drawn as often as it should be."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import ModelConfig, SamplingParams
from tinylm.kernels.batch import Batch
from tinylm.kernels.numpy import penalize
from tinylm.logprobs import token_logprobs

NAN, INF = float("nan"), float("inf")
LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-20, 20, width=32))
# Scores that are equal or clearly apart, so that rounding never decides which is likelier.
APART = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-1280, 1280).map(lambda n: n / 64))
# Few different values: ties everywhere.
TIED = hnp.arrays(np.float32, st.integers(1, 12), elements=st.sampled_from([-1.0, 0.0, 1.0]))
EPSILON = 2e-5  # of a probability: what the compiled kernel's float32 may round away


@pytest.fixture(scope="module", params=["numpy", "numba"])
def kernels(request):
    return importlib.import_module(f"tinylm.kernels.{request.param}")


def choose(kernels, logits, slots, uniforms, params, seen):
    """The token of each row: logits (R, vocab), slots (R,), uniforms (R,); params and seen (S, vocab) by slot."""
    n, vocab_size = logits.shape
    config = ModelConfig(vocab_size, hidden_size=2, n_layers=1, n_heads=1, mlp_size=1, context=1, boundary_id=0)
    batch = Batch.empty(config, n_slots=len(params), n_tokens=2 * n, n_rows=n)
    for slot, chosen in enumerate(params):
        batch.set_params(slot, chosen)
    batch.rows[:] = np.arange(2 * n)[::-2]  # half of the tokens, in an order of their own
    batch.slots[batch.rows] = slots
    batch.seen[:] = seen
    batch.uniforms[:] = uniforms
    batch.logits[:] = 1e9  # of padding, which is no token
    batch.logits[:, :vocab_size] = logits
    kernels.sample(kernels.make_scratch(config, 2 * n, n), batch, n)
    np.testing.assert_array_equal(batch.logits[:, :vocab_size], logits)  # they are still needed for log-probabilities
    return batch.chosen.tolist()


@pytest.fixture(scope="module")
def draw(kernels):
    """logits (vocab,), params, uniforms -> the token that each of these random numbers draws."""

    def draw(logits, params, uniforms, seen=False):
        other = SamplingParams(temperature=0, repetition_penalty=5.0)
        both_seen = np.stack([np.ones(len(logits), bool), np.broadcast_to(seen, len(logits))])
        n = len(uniforms)
        return choose(kernels, np.tile(logits, (n, 1)), [1] * n, uniforms, [other, params], both_seen)

    return draw


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


def test_numpy_s_numbers_are_numbers():
    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.uint8(3))
    assert params == SamplingParams(max_tokens=5, temperature=0.5, seed=3)
    assert [type(value) for value in (params.max_tokens, params.temperature, params.seed)] == [int, float, int]


def test_one_stop_string_need_not_be_wrapped():
    """Taken as a sequence of characters, 'END' would end the text at the first E."""
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# --- which tokens are kept


def slow_penalty(logits, seen, penalty):
    punished = []
    for score, was_seen in zip(logits, np.broadcast_to(seen, len(logits)), strict=True):
        if was_seen:
            score = score / np.float32(penalty) if score > 0 else score * np.float32(penalty)
        punished.append(score)
    return np.array(punished, np.float32)


def slow_distribution(logits, params):
    """The documented rule, step by step on a plain list.

    Returns {token: probability} in the order of their ids, and how near it came to a limit: as a share of it.
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


def assert_draws(draw, logits, params, seen=False):
    """Each kept token has the numbers from where those of lower ids end, as many as its probability; nobody else any.

    Tried just inside both ends of a token's share, for some fifty: that shows who is kept and how likely each is.
    """
    expected, margin = slow_distribution(slow_penalty(logits, seen, params.repetition_penalty), params)
    assume(margin > EPSILON)  # else rounding decides
    ends = np.cumsum(list(expected.values()))
    begins = ends - list(expected.values())
    tried = np.flatnonzero(ends - begins > 3 * EPSILON)
    tried = tried[np.unique(np.linspace(0, len(tried) - 1, 50).round().astype(int))]
    inside = np.concatenate([begins[tried] + EPSILON, ends[tried] - EPSILON])
    first, last, *drawn = draw(logits, params, [0.0, 1 - 2**-53, *inside], seen)
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
    SamplingParams(temperature=1, top_p=0.9, top_k=40, min_p=0.02),  # tokens below min_p still count for top_p
)
@example(np.zeros(12, np.float32), SamplingParams(temperature=1, top_p=0.49, top_k=7))
def test_exactly_the_tokens_of_the_obvious_rule_are_drawn(draw, logits, params):
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
def test_the_same_of_a_whole_vocabulary(draw, seed, n, spread, params):
    """Kernels look at the likeliest few first, which must not show: flat, tied and peaked scores of many tokens."""
    logits = np.random.default_rng(seed).normal(0, spread, n)
    assert_draws(draw, (np.round(logits * 64) / 64).astype(np.float32), params)


@given(LOGITS, st.floats(0.05, 10), st.floats(0.001, 0.999), st.data())
def test_no_token_outside_the_nucleus_is_drawn(draw, logits, temperature, top_p, data):
    """The likelier ones must fall short of top_p."""
    params = SamplingParams(temperature=temperature, top_p=top_p)
    uniforms = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
    weights = np.exp((logits.astype(float) - logits.max()) / temperature)
    for token in draw(logits, params, uniforms):
        likelier = weights[weights > weights[token] * (1 + EPSILON)].sum() / weights.sum()
        assert likelier <= top_p + EPSILON


def tokens_drawn(draw, logits, params):
    """The tokens that a hundred even numbers draw."""
    return sorted(set(draw(logits, params, np.linspace(0, 1, 100, endpoint=False))))


@pytest.mark.parametrize("n", [5, 300, 4096])
def test_of_equal_tokens_the_lower_ids_are_kept(draw, n):
    logits = np.zeros(n, np.float32)
    assert tokens_drawn(draw, logits, SamplingParams(temperature=1, top_p=1, top_k=3)) == [0, 1, 2]
    assert tokens_drawn(draw, logits, SamplingParams(temperature=1, top_p=2.5 / n)) == [0, 1, 2]
    logits[-2:] = 1
    assert tokens_drawn(draw, logits, SamplingParams(temperature=1, top_p=1, top_k=3)) == [0, n - 2, n - 1]
    assert tokens_drawn(draw, logits, SamplingParams(temperature=1, top_p=1, top_k=1)) == [n - 2]
    assert tokens_drawn(draw, logits, SamplingParams(temperature=1, top_p=1, min_p=1)) == [n - 2, n - 1]


def test_truncations_follow_one_another(draw):
    """Probabilities .4 .3 .2 .1: of top_k's three, .44 and .33 reach top_p .75, which of all four would need .2 too."""
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    keep = {"temperature": 1, "top_p": 0.75}
    assert tokens_drawn(draw, logits, SamplingParams(**keep)) == [1, 2, 3]
    assert tokens_drawn(draw, logits, SamplingParams(**keep, top_k=3)) == [2, 3]
    assert tokens_drawn(draw, logits, SamplingParams(**keep, top_k=3, min_p=0.8)) == [3]


@given(APART | TIED, st.sampled_from([1e-300, 1e-38, 1e-9, 1e-3]), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_temperatures_next_to_0_draw_the_likeliest(draw, logits, temperature, uniform):
    """Division by them overflows: neither an error nor a token that is less likely may come of it."""
    [token] = draw(logits, SamplingParams(temperature=temperature), [uniform])
    assert logits[token] == logits.max()


@given(APART, st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(-1e4, 1e4, width=32))
def test_scores_of_any_size_give_a_token(draw, logits, uniform, height):
    """What softmax computes must depend on differences alone: e^1000 overflows, e^-1000 vanishes."""
    logits = (logits + np.float32(height)).astype(np.float32)
    [token] = draw(logits, SamplingParams(temperature=1, top_p=0.5), [uniform])
    weights = np.exp(logits.astype(float) - logits.max())
    assert weights[weights > weights[token] * (1 + EPSILON)].sum() <= (0.5 + EPSILON) * weights.sum()


# --- penalty, greedy, drawing


@given(st.data(), LOGITS, st.floats(0.01, 10))
@example(None, np.array([2.0, -2.0, 0.0], np.float32), 2.0)
def test_the_penalty_is_that_of_the_obvious_loop(data, logits, penalty):
    seen = np.ones(3, bool) if data is None else data.draw(hnp.arrays(bool, len(logits)))
    before = logits.copy()
    punished = penalize(logits[None], seen[None], np.array([[penalty]]))
    np.testing.assert_array_equal(punished[0], slow_penalty(logits, seen, penalty))
    np.testing.assert_array_equal(logits, before)  # the model's own scores are still needed for log-probabilities


@given(LOGITS, st.floats(1.001, 10))
def test_a_penalty_above_1_never_makes_a_seen_token_likelier(logits, penalty):
    """Dividing a negative score would."""
    seen = np.arange(len(logits)) % 2 == 0
    punished = penalize(logits[None], seen[None], np.array([[penalty]]))[0]
    assert (punished[seen] <= logits[seen]).all()
    np.testing.assert_array_equal(punished[~seen], logits[~seen])


@given(APART | TIED, st.sampled_from([0.5, 1.0, 1.75, 4.0]), st.floats(0.5, 2), st.sampled_from([1.0, 0.7]))
def test_the_penalty_comes_before_temperature_and_truncation(draw, logits, penalty, temperature, top_p):
    """Probabilities of penalized draws are those of penalized scores."""
    seen = np.arange(len(logits)) % 3 == 0
    params = SamplingParams(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    assert_draws(draw, logits, params, seen)


@given(LOGITS | TIED, st.sampled_from([1.0, 1.7]))
def test_temperature_0_is_the_likeliest_and_the_lower_of_equals(draw, logits, penalty):
    seen = np.arange(len(logits)) % 3 == 0
    punished = slow_penalty(logits, seen, penalty).tolist()
    params = SamplingParams(temperature=0, repetition_penalty=penalty, top_p=0.5, top_k=2)
    assert draw(logits, params, [0.0, 0.7, 1 - 2**-53], seen) == [punished.index(max(punished))] * 3


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
def test_tokens_are_drawn_as_often_as_their_probability_says(draw, settings):
    """Chi-square over 20,000 draws; what is left out must never come."""
    params = SamplingParams(**settings)
    logits = np.array([1.5, -0.5, 0.0, 2.0, 1.0, -3.0, 0.7, 1.9], np.float32)
    seen = np.arange(8) == 3
    n = 20_000
    counts = np.bincount(draw(logits, params, np.random.default_rng(20).random(n), seen), minlength=8)
    distribution, margin = slow_distribution(slow_penalty(logits, seen, params.repetition_penalty), params)
    assert margin > EPSILON
    tokens, probabilities = list(distribution), np.array(list(distribution.values()))
    assert counts[tokens].sum() == n
    chi_square = ((counts[tokens] - n * probabilities) ** 2 / (n * probabilities)).sum()
    freedom = len(tokens) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.lists(st.builds(SamplingParams, **SETTINGS), min_size=1))
def test_rows_of_a_batch_do_not_see_each_other(kernels, seed, vocab_size, params):
    """Each has its own scores, settings, seen tokens and random number, whatever slot and row it has."""
    rng, n = np.random.default_rng(seed), len(params)
    params += [SamplingParams(temperature=0), SamplingParams(repetition_penalty=3.0)]
    slots = rng.permutation(n + 2)[:n]
    logits, uniforms = rng.normal(0, 3, (n, vocab_size)).astype(np.float32), rng.random(n)
    seen = rng.random((n + 2, vocab_size)) < 0.3
    together = choose(kernels, logits, slots, uniforms, params, seen)
    for i, slot in enumerate(slots):
        alone = choose(kernels, logits[i : i + 1], [0], uniforms[i], [params[slot]], seen[slot])
        assert alone == [together[i]]


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
