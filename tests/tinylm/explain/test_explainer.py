"""An explanation shows what the model computes and what the engine chooses, and refuses what it cannot show."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.kernels import logits_of, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import ModelConfig, SamplingParams
from tinylm.engine import Engine
from tinylm.explain.engine_answer import EngineAnswer, difference
from tinylm.explain.explainer import MATMULS, MAX_TOKENS, N_KEPT, Explainer, cache_use
from tinylm.explain.forms import as_json
from tinylm.explain.results import Scores, as_shades
from tinylm.kernels import numpy as kernels
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.tokenizer import Tokenizer

CONFIG = ModelConfig(hidden_size=64, n_layers=3, n_heads=2, mlp_size=96, context=80)
TENSORS = random_tensors(CONFIG, seed=0)
PROMPT = "The dog saw a \U0001f98a and the dog saw a"
EXACT = 1e-4


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(CONFIG, TENSORS, "numpy", request.param)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path("models/stories-8m/tokenizer.model"))


@pytest.fixture(scope="module")
def explainer(model: Model, tokenizer: Tokenizer) -> Explainer:
    return Explainer(tokenizer, model)


@pytest.fixture(scope="module")
def text_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function that returns a text of so many tokens."""

    def text(n_tokens: int) -> str:
        found = "".join(f" {word}" for word in ["dog"] * n_tokens)
        assert len(tokenizer.encode(found)) == n_tokens
        return found

    return text


def test_other_prompts_change_no_answer(model: Model, explainer: Explainer, tokenizer: Tokenizer) -> None:
    def answers(explainer: Explainer, prompt: str) -> list[np.ndarray]:
        return [
            explainer.norms(prompt),
            explainer.attention_of_all(prompt),
            explainer.lens(prompt).ranks,
            explainer.logits(prompt),
            *(explainer.matmul(prompt, 2, name).values for name in MATMULS),
        ]

    prompts = [" ".join(["The dog", *["saw a dog and"] * n, "ran"]) for n in range(N_KEPT + 2)]
    alone = {prompt: answers(Explainer(tokenizer, model), prompt) for prompt in prompts}
    for prompt in [*prompts, *reversed(prompts), prompts[0], prompts[-1], prompts[0]]:
        for found, expected in zip(answers(explainer, prompt), alone[prompt], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_tokens_have_their_bytes(explainer: Explainer, tokenizer: Tokenizer) -> None:
    boundary, *tokens = explainer.tokens(PROMPT)
    assert (boundary.id, boundary.text, boundary.bytes) == (CONFIG.boundary_id, "<|endoftext|>", [])
    assert [token.id for token in tokens] == tokenizer.encode(PROMPT)
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == PROMPT
    assert {"\\xf0", "\\x9f", " dog"} <= {token.text for token in tokens}


# --- equal to a direct computation


def test_scores_are_those_of_the_model(model: Model, explainer: Explainer, tokenizer: Tokenizer) -> None:
    expected = logits_of(model, tokenizer.encode_document(PROMPT))[-1]
    np.testing.assert_allclose(explainer.logits(PROMPT), expected, atol=EXACT)
    scores = explainer.scores(PROMPT, SamplingParams())
    np.testing.assert_allclose(scores.logits, expected[[token.id for token in scores.tokens]], atol=EXACT)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_lens_equals_a_model_with_fewer_layers(
    model: Model, explainer: Explainer, tokenizer: Tokenizer, n_layers: int
) -> None:
    ids = tokenizer.encode_document(PROMPT)
    shorter = Model(dataclasses.replace(CONFIG, n_layers=n_layers), TENSORS, "numpy", model.precision)
    logits, answers = logits_of(shorter, ids), logits_of(model, ids).argmax(axis=1)
    lens = explainer.lens(PROMPT, top=4)
    assert [token.id for token in lens.answers] == answers.tolist()
    order = np.argsort(-logits, axis=1, kind="stable")  # (T, vocab)
    assert lens.ranks[n_layers - 1].tolist() == [
        row.tolist().index(answer) + 1 for row, answer in zip(order, answers, strict=True)
    ]
    probabilities = np.exp(logits[-1] - logits[-1].max())
    probabilities /= probabilities.sum()
    best = lens.top[n_layers - 1]
    assert (lens.position, [one.token.id for one in best]) == (len(ids) - 1, order[-1, :4].tolist())
    assert [one.probability for one in best] == pytest.approx(probabilities[order[-1, :4]].tolist(), abs=EXACT)
    np.testing.assert_allclose(
        explainer.norms(PROMPT)[: n_layers + 1], Explainer(tokenizer, shorter).norms(PROMPT), rtol=EXACT
    )


def test_attention_explains_what_the_next_matmul_reads(
    model: Model, explainer: Explainer, tokenizer: Tokenizer
) -> None:
    """The values in the cache, weighted by the attention, are the input of the matmul `out`."""
    ids = tokenizer.encode_document(PROMPT)
    n = len(ids)
    runner = ModelRunner(model, 1, n, 1)
    runner.forward(np.array(ids), [Chunk(0, 0, n)], np.array([-1]))
    for layer in range(1, CONFIG.n_layers + 1):
        weights = explainer.attention(PROMPT, layer)  # (heads, T, T)
        assert (weights >= 0).all()
        assert not np.triu(weights, 1).any(), "no token looks at a later one"
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=EXACT)
        values = runner._cache.values[layer - 1, 0, :, :n]  # (heads, T, head_dim)
        expected = np.matmul(weights, values).transpose(1, 0, 2).reshape(n, -1)
        found = explainer.matmul(PROMPT, layer, "out")
        np.testing.assert_allclose(
            found.values * found.scales[:, None], expected, atol=0.51 * found.scales.max() + EXACT
        )
        for head in range(1, CONFIG.n_heads + 1):
            np.testing.assert_array_equal(explainer.head(PROMPT, layer, head), weights[head - 1])
        np.testing.assert_array_equal(explainer.attention_of_all(PROMPT)[layer - 1], weights)
        shades = as_shades(weights)
        assert shades.dtype == np.uint8
        np.testing.assert_allclose(shades / 255, weights, atol=0.5 / 255 + 1e-6)


def test_a_rounded_input_and_its_errors(model: Model, explainer: Explainer, tokenizer: Tokenizer) -> None:
    """The first matmul reads the embedding after a norm, so its input follows from the weights alone."""
    ids = tokenizer.encode_document(PROMPT)
    weights = model.weights
    x = kernels.rms_norm(kernels.embed(weights, np.array(ids)), weights.layers[0].attention_norm, CONFIG.norm_eps)
    matrix = weights.layers[0].qkv.values * weights.layers[0].qkv.scale[:, None]  # (3 * hidden, hidden)
    found = explainer.matmul(PROMPT, 1, "qkv")
    rounded = found.values * found.scales[:, None]
    assert (found.values.dtype, found.values.shape) == (np.int8, x.shape)
    assert np.abs(found.values.astype(int)).max(axis=1).tolist() == [127] * len(ids)
    assert np.abs(rounded - x).max() <= 0.51 * found.scales.max()

    def error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)

    np.testing.assert_allclose(found.input_error, error(rounded, x), rtol=0.01)
    np.testing.assert_allclose(found.output_error, error(rounded @ matrix.T, x @ matrix.T), rtol=0.01)
    assert 0 < found.input_error.max() < 0.05
    assert found.input is None
    one = explainer.matmul(PROMPT, 1, "qkv", position=3)
    np.testing.assert_array_equal(one.values[0], found.values[3])
    np.testing.assert_allclose(one.input, x[3], atol=EXACT)
    np.testing.assert_allclose(one.input_error[0], found.input_error[3], rtol=1e-3)
    np.testing.assert_allclose(one.output_error[0], found.output_error[3], rtol=1e-3)
    for name in MATMULS:
        assert explainer.matmul(PROMPT, 3, name).values.shape[1] == getattr(weights.layers[2], name).values.shape[1]


# --- equal to the engine

SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 300]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 4.0]),
    seed=st.none() | st.integers(0, 999),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (300, 7)]),
    bad_words=st.sampled_from([(), ("the", "cat")]),
    dry_multiplier=st.sampled_from([0.0, 5.0]),
    logit_bias=st.dictionaries(st.integers(0, 4095), st.floats(-100, 100), max_size=3),
)


@settings(max_examples=40)
@given(SETTINGS, st.sampled_from([PROMPT, "The", " dog" * 40, "Once upon a time"]))
def test_the_chosen_token_is_the_engine_s(
    model: Model, explainer: Explainer, params: SamplingParams, prompt: str
) -> None:
    engine = Engine(model, n_slots=1)
    answer = explainer.ask(engine, prompt, params)
    scores = explainer.scores(prompt, params, answer)
    assert scores.chosen.id == answer.token
    assert scores.greedy.id == explainer.ask(engine, prompt, dataclasses.replace(params, temperature=0)).token
    assert scores.difference is not None
    assert (scores.difference.token, scores.difference.same_token) == (answer.token, True)
    assert scores.difference.n_compared >= 20
    assert scores.difference.largest < EXACT


@settings(max_examples=40)
@given(SETTINGS)
def test_each_stage_reports_what_it_removed(explainer: Explainer, params: SamplingParams) -> None:
    scores = explainer.scores(PROMPT, params, top=10)
    ids = [token.id for token in scores.tokens]
    assert {scores.greedy.id, scores.chosen.id} <= set(ids)
    assert len(ids) == len(set(ids)) == len(scores.logits) == len(scores.probabilities)
    assert scores.logits.tolist() == sorted(scores.logits.tolist(), reverse=True)
    for i, (before, stage) in enumerate(zip(scores.stages, scores.stages[1:], strict=False)):
        assert stage.n_kept == before.n_kept - stage.n_removed
        assert len(stage.removed) == min(10, stage.n_removed)
        rows = [ids.index(token) for token in stage.removed]
        lost = scores.probabilities[rows, i]
        assert (lost > 0).all()
        assert lost.tolist() == sorted(lost.tolist(), reverse=True)
        assert lost.sum() <= stage.removed_probability + 1e-9
        assert not scores.probabilities[rows, i + 1 :].any()
    assert scores.probabilities[ids.index(scores.chosen.id), -1] > 0 or params.seed is None


def test_a_difference_is_noticed(explainer: Explainer) -> None:
    logits = explainer.logits(PROMPT)
    logs = logits - np.log(np.exp(logits.astype(float)).sum())
    best = int(logits.argmax())
    answer = EngineAnswer(best, {best: float(logs[best]) + 0.5, 5: float(logs[5])})
    found = difference(answer, logits, best)
    assert (found.same_token, found.n_compared) == (True, 2)
    assert found.largest == pytest.approx(0.5, abs=1e-5)
    assert not difference(answer, logits, 5).same_token


def test_cache_use_is_a_share_of_the_slot(model: Model, explainer: Explainer, tokenizer: Tokenizer) -> None:
    use = cache_use(Engine(model, n_slots=3), len(explainer.tokens(PROMPT)))
    of_a_token = 2 * CONFIG.n_layers * CONFIG.hidden_size * 4  # the numpy kernels keep float32
    assert (use.slots, use.slot_positions, use.slot_bytes) == (3, CONFIG.context, CONFIG.context * of_a_token)
    assert use.used_bytes == use.used_positions * of_a_token == len(tokenizer.encode(PROMPT)) * of_a_token + of_a_token


# --- limits


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda e: e.attention(PROMPT, 0), "layer is 0: it must be a whole number, 1 to 3"),
        (lambda e: e.attention(PROMPT, 4), "layer is 4: it must be a whole number, 1 to 3"),
        (lambda e: e.attention(PROMPT, True), "layer is True: it must be a whole number, 1 to 3"),
        (lambda e: e.matmul(PROMPT, 1.0, "up"), "layer is 1.0: it must be a whole number, 1 to 3"),
        (lambda e: e.head(PROMPT, 1, 3), "head is 3: it must be a whole number, 1 to 2"),
        (lambda e: e.matmul(PROMPT, 1, "gate"), "name is 'gate': it must be one of qkv, out, up, down"),
        (lambda e: e.lens(PROMPT, position=99), "position is 99: it must be a whole number, 0 to 14"),
        (lambda e: e.matmul(PROMPT, 1, "up", position=15), "position is 15: it must be a whole number, 0 to 14"),
        (lambda e: e.raw_scores(PROMPT, top=0), "top is 0: it must be a whole number, 1 to 100"),
        (lambda e: e.lens(PROMPT, top=0), "top is 0: it must be a whole number, 1 to 100"),
        (lambda e: e.scores(PROMPT, SamplingParams(), top=101), "top is 101: it must be a whole number, 1 to 100"),
        (lambda e: e.scores(PROMPT, SamplingParams(logit_bias={4096: 1})), "logit_bias holds token 4096"),
        (lambda e: e.norms(""), f"prompt has 0 tokens: it must have 1 to {MAX_TOKENS}"),
        (lambda e: e.norms("\ud800"), "the text must be Unicode"),
        (lambda e: e.norms("a" * 70_000), "prompt has 70000 bytes: it must have at most 65536"),
    ],
)
def test_an_error_names_field_value_and_limit(explainer: Explainer, question: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        question(explainer)


def test_a_prompt_has_at_most_64_tokens(explainer: Explainer, text_of: Callable[[int], str]) -> None:
    assert explainer.norms(text_of(MAX_TOKENS)).shape == (CONFIG.n_layers + 1, MAX_TOKENS + 1)
    with pytest.raises(ValueError, match=r"^prompt has 65 tokens: it must have 1 to 64$"):
        explainer.norms(text_of(MAX_TOKENS + 1))


def test_a_short_context_has_room_for_the_next_token(tokenizer: Tokenizer, text_of: Callable[[int], str]) -> None:
    config = dataclasses.replace(CONFIG, context=10)
    short = Explainer(tokenizer, Model(config, TENSORS, "numpy", "float32"))
    assert short.scores(text_of(8), SamplingParams()).tokens
    with pytest.raises(ValueError, match=r"^prompt has 9 tokens: it must have 1 to 8$"):
        short.tokens(text_of(9))


def test_other_kernels_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^kernels is 'numba, .*': an explanation needs 'numpy'$"):
        Explainer(tokenizer, Model(CONFIG, TENSORS, "numba", "int8"))


def test_results_are_json(explainer: Explainer) -> None:
    results = [
        explainer.tokens(PROMPT),
        explainer.norms(PROMPT),
        as_shades(explainer.attention(PROMPT, 1)),
        explainer.lens(PROMPT),
        explainer.scores(PROMPT, SamplingParams(seed=1)),
        explainer.matmul(PROMPT, 2, "down"),
    ]
    read = json.loads(json.dumps([as_json(result) for result in results], allow_nan=False))
    scores = results[4]
    assert isinstance(scores, Scores)
    assert read[4]["chosen"] == {"id": scores.chosen.id, "text": scores.chosen.text, "bytes": scores.chosen.bytes}
    np.testing.assert_allclose(read[4]["probabilities"], scores.probabilities, rtol=1e-6)
    np.testing.assert_array_equal(read[2], results[2])
