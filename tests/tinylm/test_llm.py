"""`LLM`: whole answers and streams, one prompt or many."""

from __future__ import annotations

import numpy as np
import pytest

from tinylm import LLM, ModelError, SamplingParams

PROMPT = "Once upon a time"


def drained(stream):
    """Return the pieces of a stream and its completion."""
    return list(stream), stream.completion


def without_times(completion):
    return (completion.text, completion.finish_reason, completion.token_ids, completion.logprobs)


def idle(llm):
    return not llm._engine.has_work


@pytest.fixture(params=["stories", "tiny"])
def llm(request):
    """Return the committed model, and one whose text is random."""
    return request.getfixturevalue(request.param)


# --- streams


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.5, "top_p": 1, "max_tokens": 50},
        {"seed": 3, "top_k": 5, "repetition_penalty": 1.3, "logprobs": 2},
        {"seed": 4, "min_p": 0.1, "max_tokens": 1},
        {"seed": 5, "bad_words": ["was", "the"], "dry_multiplier": 1, "presence_penalty": 0.5, "logit_bias": {300: 2}},
    ],
)
def test_a_stream_gives_the_text_of_generate(llm, settings):
    params = SamplingParams(**{"max_tokens": 24, **settings})
    [whole] = llm.generate(PROMPT, params)
    pieces, completion = drained(llm.stream(PROMPT, params))
    assert "".join(pieces) == whole.text == completion.text
    assert without_times(completion) == without_times(whole)
    assert "" not in pieces
    assert whole.text == llm.tokenizer.decode(whole.token_ids)
    assert len(whole.token_ids) == params.max_tokens or whole.finish_reason == "stop"


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_a_stop_string_ends_the_text_before_it(llm, where):
    """Also if the stop string begins or ends inside a token."""
    params = SamplingParams(seed=5, max_tokens=40)
    [free] = llm.generate(PROMPT, params)
    begin = int(where * (len(free.text) - 4))
    stop = free.text[begin : begin + 4]
    stopped = SamplingParams(seed=5, max_tokens=40, stop=("never written \0", stop), logprobs=0)
    [whole] = llm.generate(PROMPT, stopped)
    pieces, completion = drained(llm.stream(PROMPT, stopped))
    assert whole.text == free.text[: free.text.index(stop)]
    assert "".join(pieces) == whole.text
    assert without_times(completion) == without_times(whole)
    assert whole.finish_reason == "stop"
    assert whole.token_ids == free.token_ids[: len(whole.token_ids)]
    assert llm.tokenizer.decode(whole.token_ids[:-1]).count(stop) == 0, "the answer has a token too many"
    assert len(whole.logprobs) == len(whole.token_ids)
    assert idle(llm)


def test_a_stop_string_does_not_end_the_text_before_min_tokens(stories):
    llm = stories
    [free] = llm.generate(PROMPT, SamplingParams(seed=5, max_tokens=40))
    stop = llm.tokenizer.decode(free.token_ids[3:5])
    found = [n for n in range(41) if stop in llm.tokenizer.decode(free.token_ids[:n])]
    for min_tokens in (0, found[0] - 1, found[0], 40):
        params = SamplingParams(seed=5, max_tokens=40, min_tokens=min_tokens, stop=stop, ignore_eos=True)
        [whole] = llm.generate(PROMPT, params)
        pieces, completion = drained(llm.stream(PROMPT, params))
        assert "".join(pieces) == whole.text == completion.text
        assert (whole.finish_reason == "stop") <= (len(whole.token_ids) > min_tokens)
        if min_tokens < found[0]:
            assert whole.text == free.text[: free.text.index(stop)]
        else:
            assert whole.text.startswith(llm.tokenizer.decode(free.token_ids[: found[0]]))


def test_a_stop_token_ends_the_text_without_its_own(llm):
    [free] = llm.generate(PROMPT, SamplingParams(seed=5, max_tokens=40))
    stop = free.token_ids[20]
    [stopped] = llm.generate(PROMPT, SamplingParams(seed=5, max_tokens=40, stop_token_ids=[stop], logprobs=0))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]
    assert stopped.text == llm.tokenizer.decode(stopped.token_ids)
    assert (stopped.finish_reason, len(stopped.logprobs)) == ("stop", len(stopped.token_ids))


def test_bad_words_are_not_in_the_text(stories):
    """With one word at a time, so that the model finds no other tokens for it."""
    [free] = stories.generate(PROMPT, SamplingParams(temperature=0, max_tokens=60))
    words = sorted({word.strip('.,"!?') for word in free.text.split()} - {""})
    assert len(words) > 10
    for word in words[:6]:
        [without] = stories.generate(PROMPT, SamplingParams(temperature=0, max_tokens=60, bad_words=[word]))
        for written in (word, f" {word}"):
            ids = stories.tokenizer.encode(written)
            places = range(len(without.token_ids))
            assert not any(without.token_ids[place:][: len(ids)] == ids for place in places)


def test_dry_ends_a_repetition_unless_it_has_breakers(stories):
    """Both tokens of the repetition are breakers in the last request."""
    prompt, greedy = "No, no, no, no, no, no,", {"temperature": 0, "max_tokens": 12}
    dry = {"dry_multiplier": 1, "dry_sequence_breakers": "\n"}
    assert stories.generate(prompt, SamplingParams(**greedy))[0].text == " no," * 6
    assert " no, no" not in stories.generate(prompt, SamplingParams(**greedy, **dry))[0].text
    with_comma = SamplingParams(**greedy, **{**dry, "dry_sequence_breakers": (",", " no")})
    assert stories.generate(prompt, with_comma)[0].text == " no," * 6


def test_text_that_only_begins_a_stop_string_is_kept(llm):
    [free] = llm.generate(PROMPT, SamplingParams(seed=6, max_tokens=20))
    almost = free.text[-3:] + "\0\0"
    pieces, completion = drained(llm.stream(PROMPT, SamplingParams(seed=6, max_tokens=20, stop=(almost,))))
    assert "".join(pieces) == completion.text == free.text
    assert completion.finish_reason == free.finish_reason


def test_generate_during_a_stream_loses_none_of_its_tokens(tiny):
    params = SamplingParams(seed=8, max_tokens=30)
    [expected] = tiny.generate(PROMPT, params)
    stream = tiny.stream(PROMPT, params)
    first = next(stream)
    other = SamplingParams(seed=9, max_tokens=50)
    [between] = tiny.generate("The king", other)
    pieces, completion = drained(stream)
    assert first + "".join(pieces) == expected.text == completion.text
    assert between.token_ids == tiny.generate("The king", other)[0].token_ids


def test_a_stream_has_its_completion_only_at_its_end(tiny):
    stream = tiny.stream(PROMPT, SamplingParams(seed=1, max_tokens=20, logprobs=1))
    seen = 0
    for _ in stream:
        assert len(stream.logprobs) > seen, "a piece without a token"
        seen = len(stream.logprobs)
        if seen < 15:
            with pytest.raises(RuntimeError, match="end"):
                _ = stream.completion
    assert stream.logprobs == stream.completion.logprobs


def test_leaving_a_stream_early_frees_its_slot(tiny):
    stream = tiny.stream(PROMPT, SamplingParams(seed=1, max_tokens=1000))
    next(stream)
    assert not idle(tiny)
    stream.close()
    assert idle(tiny)


# --- many prompts


def test_answers_have_the_order_of_the_prompts(tokenizer, tiny_model):
    llm = LLM.from_parts(tokenizer, tiny_model, n_slots=4)
    prompts = [" ".join(["word"] * (i % 7)) + str(i) for i in range(40)]
    params = SamplingParams(seed=11, max_tokens=9)
    together = llm.generate(prompts, params)
    assert len(together) == 40
    for prompt, completion in zip(prompts, together, strict=True):
        assert without_times(completion) == without_times(llm.generate(prompt, params)[0])
        assert completion.n_prompt_tokens == len(tokenizer.encode_document(prompt))
    assert len({tuple(c.token_ids) for c in together}) > 30


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("word " * 300, r"prompt has \d+ tokens: it must have at most 63"), ("\ud800", "surrogate")],
)
def test_one_impossible_prompt_refuses_all_prompts(tiny, prompt, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate([PROMPT, prompt, PROMPT])
    assert idle(tiny)
    assert tiny.generate([]) == []


def test_an_empty_prompt_begins_a_story(llm):
    [completion] = llm.generate("", SamplingParams(seed=12, max_tokens=8))
    assert completion.n_prompt_tokens == 1
    assert completion.token_ids
    assert completion.text


def test_the_times_of_an_answer_are_in_order(tiny):
    for completion in tiny.generate([PROMPT] * 20, SamplingParams(max_tokens=3)):
        assert 0 <= completion.queue_s <= completion.first_token_s <= completion.total_s


def test_log_probabilities_are_the_models_own(llm):
    """They ignore penalties, biases, temperature and truncation."""
    changes = {"logit_bias": {300: 5, 301: -5}, "frequency_penalty": 1, "bad_words": ["the"], "dry_multiplier": 1}
    params = SamplingParams(
        **{"seed": 13, "temperature": 1.4, "top_k": 50, "repetition_penalty": 1.2, "max_tokens": 12, "logprobs": 4},
        **changes,
    )
    [completion] = llm.generate(PROMPT, params)
    assert len(completion.logprobs) == len(completion.token_ids)
    prompt = llm.tokenizer.encode_document(PROMPT)
    logits = llm.logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1].astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for token, entry, row in zip(completion.token_ids, completion.logprobs, logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert [p for _, p in entry.top] == pytest.approx(sorted(row, reverse=True)[:4], abs=1e-3)
    assert llm.generate(PROMPT, SamplingParams(max_tokens=1))[0].logprobs is None


# --- logits


def test_logits_are_one_row_a_token(tiny):
    logits = tiny.logits(range(2, 34))
    assert logits.shape == (32, 4096)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(tiny.logits(range(2, 10)), logits[:8], atol=1e-4)
    assert tiny.logits([1] * 64).shape == (64, 4096)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "0 tokens"), ([1] * 65, "65 tokens"), ([4096], "4095"), ([-1], "4095"), ([1.5], "whole"), (["a"], "whole")],
)
def test_logits_refuse_impossible_ids(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        tiny.logits(ids)


def test_a_missing_model_is_named():
    with pytest.raises(ModelError, match="nowhere/at-all"):
        LLM("nowhere/at-all")


def test_an_llm_without_slots_is_refused(tokenizer, tiny_model):
    with pytest.raises(ValueError, match="n_slots is 0"):
        LLM.from_parts(tokenizer, tiny_model, n_slots=0)
