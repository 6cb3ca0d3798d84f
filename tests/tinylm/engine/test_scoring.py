"""Log-probabilities of prompts: the model's own, in every batch, after every interrupt, and aligned with the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import LLM, SamplingParams
from tinylm.engine import Engine
from tinylm.model import Chunk, Model, ModelRunner


@pytest.fixture(scope="module", params=[("numba", "int8"), ("numpy", "float32")], ids="-".join)
def model(request, tiny_config, tiny_quantized) -> Model:
    return Model(tiny_config, tiny_quantized, *request.param)


def slow_scores(model: Model, ids: list[int], n_top: int) -> list[tuple[float, list[float]]]:
    """Return the log-probability of each token after the first, and of the most likely tokens, one pass per token."""
    runner, scores = ModelRunner(model, 1, model.config.context, 1), []
    for i in range(1, len(ids)):
        logits = runner.forward(np.array(ids[:i]), [Chunk(0, 0, i)], np.array([-1]))[0].astype(float)
        logs = logits - np.log(np.exp(logits).sum())
        scores.append((logs[ids[i]], sorted(logs, reverse=True)[:n_top]))
    return scores


def assert_right(request, model: Model) -> None:
    expected = slow_scores(model, request.prompt, request.params.prompt_logprobs)
    assert [found.logprob for found in request.prompt_logprobs] == pytest.approx([own for own, _ in expected], abs=1e-3)
    for found, (_, top) in zip(request.prompt_logprobs, expected, strict=True):
        assert [value for _, value in found.top] == pytest.approx(top, abs=1e-3)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(2, 90), min_size=1, max_size=25),
        st.sampled_from([None, 0, 3]),  # prompt_logprobs
        st.integers(0, 5),  # max_tokens
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15)
@given(asked=REQUESTS, n_slots=st.integers(1, 3), prefill=st.integers(1, 9), failing=st.sets(st.integers(0, 12)))
def test_scores_equal_a_slow_computation_in_every_batch(model, asked, n_slots, prefill, failing):
    """Prompts share prefixes, answers run beside them, and steps are interrupted before and after they compute."""
    engine = Engine(model, n_slots=n_slots, prefill_tokens=prefill)
    requests = []
    for ids, prompt_logprobs, max_tokens in asked:
        params = SamplingParams(
            max_tokens=max(max_tokens, int(prompt_logprobs is None)), prompt_logprobs=prompt_logprobs, temperature=0
        )
        requests.append(engine.submit([1, *sorted(ids)], params))
    plain = [
        engine.submit(r.prompt, SamplingParams(max_tokens=r.params.max_tokens, temperature=0))
        if r.params.max_tokens
        else None
        for r in requests
    ]
    step, n_steps = engine._runner.step, 0

    def interrupted(*arguments):
        nonlocal n_steps
        n_steps += 1
        if n_steps in failing and n_steps % 2:
            raise KeyboardInterrupt
        step(*arguments)
        if n_steps in failing:
            raise KeyboardInterrupt

    engine._runner.step = interrupted
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            assert n_steps in failing
    for request, same in zip(requests, plain, strict=True):
        assert request.finish_reason in ("length", "stop")
        if request.params.prompt_logprobs is None:
            assert not request.prompt_logprobs
        else:
            assert_right(request, model)
        assert request.tokens == (same.tokens if same else [])  # scoring does not change the answer


def test_a_prompt_that_fills_the_context_can_be_scored(model):
    ids = [1, *([5, 6, 7] * model.config.context)][: model.config.context]
    engine = Engine(model, n_slots=1)
    request = engine.submit(ids, SamplingParams(max_tokens=0, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    assert_right(request, model)
    with pytest.raises(ValueError, match=f"prompt has {len(ids) + 1} tokens: it must have at most {len(ids)}"):
        engine.submit([*ids, 5], SamplingParams(max_tokens=0, prompt_logprobs=0))
    with pytest.raises(ValueError, match=f"it must have at most {len(ids) - 1}"):
        engine.submit(ids, SamplingParams(max_tokens=1, prompt_logprobs=0))


def test_the_token_that_ends_an_answer_has_its_score(model):
    params = {"max_tokens": 6, "temperature": 0, "logprobs": 2}
    engine = Engine(model)
    whole = engine.submit([1, 5, 6], SamplingParams(**params, ignore_eos=True))
    while engine.has_work:
        engine.step()
    end = whole.tokens[-1]
    n = whole.tokens.index(end)
    ended = engine.submit([1, 5, 6], SamplingParams(**params, ignore_eos=True, stop_token_ids=(end,)))
    silent = engine.submit([1, 5, 6], SamplingParams(6, 0, ignore_eos=True, stop_token_ids=(end,)))
    while engine.has_work:
        engine.step()
    assert (ended.tokens, len(ended.logprobs), whole.ending) == (whole.tokens[:n], n, None)
    token, score = ended.ending
    assert (token, score.logprob) == (end, pytest.approx(whole.logprobs[n].logprob, abs=1e-3))
    assert (silent.tokens, silent.ending, silent.finish_reason) == (ended.tokens, None, "stop")


def test_texts_are_scored_without_the_boundary(tiny: LLM):
    texts = ["The fox ran.", "", "\U0001f98a", "The fox"]
    for text, scored in zip(texts, tiny.score(texts, top=2), strict=True):
        assert scored.token_ids == tiny.tokenizer.encode(text)
        ids = tiny.tokenizer.encode_document(text)
        expected = slow_scores(tiny.model, ids, 2)
        assert [token.logprob for token in scored.logprobs] == pytest.approx([own for own, _ in expected], abs=1e-3)
        assert scored.total == pytest.approx(sum(own for own, _ in expected), abs=1e-2)
    assert tiny.score("The fox")[0].total == pytest.approx(tiny.score(texts)[3].total, abs=1e-6)


def test_only_scoring_allows_an_empty_answer():
    with pytest.raises(ValueError, match="max_tokens is 0: it must be a whole number, at least 1"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="prompt_logprobs is 21: it must be a whole number, 0 to 20"):
        SamplingParams(prompt_logprobs=21)
