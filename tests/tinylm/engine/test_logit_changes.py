"""The settings that change logits and the end of an answer, against a loop that does what each setting says."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers.kernels import random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dry import slow_dry

from tinylm import ModelConfig, SamplingParams
from tinylm.engine import Engine
from tinylm.engine.word_tokens import WordTokens
from tinylm.model import Chunk, Model, ModelRunner

VOCAB = 24  # few tokens, so that they repeat
BOUNDARY = 1
CONFIG = ModelConfig(VOCAB, hidden_size=32, n_layers=2, n_heads=2, mlp_size=64, context=48, boundary_id=BOUNDARY)
TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(TOKENS, max_size=12).map(lambda ids: [BOUNDARY, *ids])
LENGTHS = st.integers(1, 60)
PENALTIES = st.floats(-2, 2)
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)
FIELDS = {
    "ignore_eos": {"ignore_eos": st.just(True)},
    "min_tokens": {"min_tokens": st.integers(1, 30), "stop_token_ids": st.lists(TOKENS, max_size=3)},
    "stop_token_ids": {"stop_token_ids": st.lists(TOKENS, min_size=1, max_size=5)},
    "logit_bias": {"logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100) | st.floats(-3, 3), max_size=8)},
    "penalties": {"presence_penalty": PENALTIES, "frequency_penalty": PENALTIES},
    "bad_words": {"ignore_eos": st.booleans()},  # the words are drawn as token ids
    "dry": {
        "dry_multiplier": st.floats(0.1, 5),
        "dry_base": st.floats(1, 2),
        "dry_allowed_length": st.integers(1, 4),
        "dry_penalty_last_n": st.just(-1) | st.integers(1, 20),
    },
}
ALL = {name: strategy for of_one in FIELDS.values() for name, strategy in of_one.items()}


@pytest.fixture(scope="module", params=[("numba", "int8"), ("numpy", "float32")], ids="-".join)
def model(request):
    """Return a random model. It writes the boundary after 5 to 34 tokens of many of its prompts."""
    tensors = random_tensors(CONFIG, seed=4)
    tensors["model.embed_tokens.weight"].scale[BOUNDARY] *= 3
    return Model(CONFIG, tensors, *request.param)


@st.composite
def requests(draw, fields):
    """Return a prompt, settings with these fields, and the token ids of their strings."""
    max_tokens = draw(LENGTHS)
    chosen = {name: draw(strategy) for name, strategy in fields.items()}
    if "min_tokens" in chosen:
        chosen["min_tokens"] = min(chosen["min_tokens"], max_tokens)
    words = None
    if fields is FIELDS["bad_words"] or "dry_multiplier" in fields:
        bad_words = draw(SEQUENCES) if "ignore_eos" in fields else ()
        words = WordTokens(bad_words, dict.fromkeys(draw(st.lists(TOKENS, max_size=2)), ((),)))
    return draw(PROMPTS), SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, **chosen}), words


def slow_changes(prompt, tokens, params, words):
    """Return what the settings add to the logits, as they are documented, (vocab,)."""
    dry = slow_dry(prompt + tokens, params, words.breakers) if params.dry_multiplier else {}
    added = []
    for token in range(VOCAB):
        count = tokens.count(token)
        bias = (
            params.logit_bias.get(token, 0) - params.presence_penalty * (count > 0) - params.frequency_penalty * count
        )
        bias -= dry.get(token, 0)
        if params.ignore_eos and token == BOUNDARY:
            bias = -np.inf
        if len(tokens) < params.min_tokens and token in (BOUNDARY, *params.stop_token_ids):
            bias = -np.inf
        if words is not None and any(tuple([*tokens, token][-len(word) :]) == word for word in words.bad_words):
            bias = -np.inf
        added.append(bias)
    return np.array(added)


def slow_greedy(model, prompt, params, words):
    """Compute each token from all tokens before it, without a cache. Return the tokens and the finish reason."""
    tokens, runner = [], ModelRunner(model, 1, CONFIG.context, 1)
    while len(tokens) < params.max_tokens and len(prompt) + len(tokens) < CONFIG.context:
        ids = [*prompt, *tokens]
        logits = runner.forward(np.array(ids), [Chunk(0, 0, len(ids))], np.array([-1]))[0].astype(float)
        token = int(np.argmax(logits + slow_changes(prompt, tokens, params, words)))
        if token in (BOUNDARY, *params.stop_token_ids):
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


def run(engine):
    while engine.has_work:
        engine.step()


def alone(model, prompt, params, words=None):
    engine = Engine(model, n_slots=1)
    request = engine.submit(prompt, params, words=words)
    run(engine)
    return request.tokens, request.finish_reason


# --- every setting does what it says


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=25)
@given(data=st.data())
def test_an_answer_follows_the_definition_of_a_field(model, field, data):
    prompt, params, words = data.draw(requests(FIELDS[field]))
    assert alone(model, prompt, params, words) == slow_greedy(model, prompt, params, words)


@settings(max_examples=50)
@given(data=st.data(), prompt=PROMPTS)
def test_only_the_last_token_of_a_bad_word_is_forbidden(model, data, prompt):
    """The words are parts of the answer without them. In some, the first token is another one."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, presence_penalty=1)
    free, _ = alone(model, prompt, params)
    places = data.draw(st.lists(st.tuples(st.integers(0, 26), st.integers(1, 4), st.none() | TOKENS), max_size=4))
    parts = [(free[begin : begin + n], first) for begin, n, first in places]
    words = WordTokens(tuple(tuple(part) if first is None else (first, *part[1:]) for part, first in parts))
    assert alone(model, prompt, params, words) == slow_greedy(model, prompt, params, words)


@settings(max_examples=50)
@given(data=st.data())
def test_all_fields_together_follow_their_definitions(model, data):
    prompt, params, words = data.draw(requests(ALL))
    assert alone(model, prompt, params, words) == slow_greedy(model, prompt, params, words)


def test_the_examples_above_reach_every_ending(model):
    """Otherwise they would prove little."""

    def answer_to(first, **fields):
        return alone(model, [BOUNDARY, first], SamplingParams(temperature=0, max_tokens=40, **fields))

    first = next(token for token in range(2, VOCAB) if answer_to(token)[1] == "stop")
    answer = partial(answer_to, first)
    tokens, _ = answer()
    assert answer(ignore_eos=True)[1] == "length"
    assert len(answer(min_tokens=len(tokens) + 1)[0]) > len(tokens)
    assert answer(stop_token_ids=[tokens[0]]) == ([], "stop")
    assert answer(stop_token_ids=[tokens[0]], min_tokens=5)[0][0] != tokens[0]
    assert tokens[0] not in answer(logit_bias={tokens[0]: -100})[0]
    assert set(answer(logit_bias={7: 100})[0]) == {7}
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert len(set(answer(**fields, ignore_eos=True)[0])) > len(set(answer(ignore_eos=True)[0]))


# --- other requests and interruptions change nothing

SAMPLED = {"seed": st.integers(0, 100), "temperature": st.floats(0, 2), "repetition_penalty": st.sampled_from([1, 1.5])}


@settings(max_examples=30)
@given(
    st.lists(requests({**ALL, **SAMPLED}) | requests(SAMPLED) | requests({}), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_a_mixed_batch_gives_each_request_its_own_answer(model, submitted, n_slots, seed):
    """Also if requests join in the middle, reuse prefixes, and follow others in a slot."""
    rng, engine, running = np.random.default_rng(seed), Engine(model, n_slots=n_slots, prefill_tokens=4), []
    for prompt, params, words in submitted:
        running.append(engine.submit(prompt, params, words=words))
        for _ in range(int(rng.integers(0, 4))):
            engine.step()
    run(engine)
    for request, (prompt, params, words) in zip(running, submitted, strict=True):
        assert (request.tokens, request.finish_reason) == alone(model, prompt, params, words)


@pytest.mark.parametrize("when", ["before", "after"])
@settings(max_examples=15)
@given(submitted=st.lists(requests({**ALL, **SAMPLED}), min_size=1, max_size=6))
def test_an_interrupted_step_changes_no_answer(model, when, submitted):
    engine = Engine(model, n_slots=2, prefill_tokens=8)
    step, calls = engine._runner.step, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0 and when == "before":
            raise KeyboardInterrupt
        step(*arguments)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt

    engine._runner.step = interrupted
    running = [engine.submit(prompt, params, words=words) for prompt, params, words in submitted]
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    for request, (prompt, params, words) in zip(running, submitted, strict=True):
        assert request.tokens == alone(model, prompt, params, words)[0]


def test_requests_without_the_fields_never_use_the_bias(model):
    """Their logits are not even copied, so their text is what it was without these fields."""
    engine = Engine(model, n_slots=2)
    batch = engine._runner.batch
    batch.bias[:] = 50 * np.arange(VOCAB)  # would change every token
    plain = SamplingParams(seed=1, max_tokens=10, repetition_penalty=1.3, stop_token_ids=[3])
    neutral = SamplingParams(
        **{"seed": 1, "max_tokens": 10, "repetition_penalty": 1.3, "stop_token_ids": [3]},
        **{"ignore_eos": False, "min_tokens": 0, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
        **{"bad_words": (), "dry_multiplier": 0, "dry_base": 2, "dry_allowed_length": 1},
    )
    running = [engine.submit([BOUNDARY, 4], params) for params in (plain, neutral)]
    assert [request.changes for request in running] == [None, None]
    run(engine)
    assert not batch.biased.any()
    assert running[0].tokens == running[1].tokens == alone(model, [BOUNDARY, 4], plain)[0]


# --- impossible settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": [3, VOCAB]}, f"^stop_token_ids holds token {VOCAB}: tokens are 0 to {VOCAB - 1}"),
        ({"logit_bias": {VOCAB: 1}}, f"^logit_bias holds token {VOCAB}: tokens are 0 to {VOCAB - 1}"),
        ({"bad_words": ["dog"]}, "^bad_words and dry_multiplier need token ids"),
        ({"dry_multiplier": 1}, "^bad_words and dry_multiplier need token ids"),
    ],
)
def test_impossible_settings_are_refused(model, fields, message):
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.submit([BOUNDARY], SamplingParams(**fields))
    assert not engine.has_work


@pytest.mark.parametrize("min_tokens", [0, 1])
def test_settings_that_forbid_every_token_are_refused(model, min_tokens):
    """The boundary is forbidden only if min_tokens is above 0."""
    engine, words = Engine(model), WordTokens(tuple((5, t) for t in range(VOCAB) if t != BOUNDARY))
    params = SamplingParams(max_tokens=3, min_tokens=min_tokens)
    if min_tokens == 0:
        engine.submit([BOUNDARY], params, words=words)
        run(engine)
        return
    with pytest.raises(ValueError, match=f"forbid all {VOCAB} tokens: leave at least one"):
        engine.submit([BOUNDARY], params, words=words)
