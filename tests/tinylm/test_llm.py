"""The library: text in, text out, whole or streamed, one prompt or many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tinylm import LLM, ModelError, SamplingParams

PROMPT = "Once upon a time"


def drained(stream):
    """The pieces of a stream and its completion."""
    return list(stream), stream.completion


def without_times(completion):
    return (completion.text, completion.finish_reason, completion.token_ids, completion.logprobs)


def idle(llm):
    return not llm._engine.has_work


@pytest.fixture(params=["stories", "tiny"])
def llm(request):
    """The committed model, whose text is sense, and the random one, whose text is anything."""
    return request.getfixturevalue(request.param)


# --- streamed is whole


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.5, "top_p": 1, "max_tokens": 50},
        {"seed": 3, "top_k": 5, "repetition_penalty": 1.3, "logprobs": 2},
        {"seed": 4, "min_p": 0.1, "max_tokens": 1},
    ],
)
def test_the_pieces_of_a_stream_are_the_whole_text(llm, settings):
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
    """Whole and streamed, even where the stop string begins or ends inside a token."""
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
    assert llm.tokenizer.decode(whole.token_ids[:-1]).count(stop) == 0, "it should have ended a token earlier"
    assert len(whole.logprobs) == len(whole.token_ids)
    assert idle(llm)


def test_a_stop_string_that_never_comes_loses_nothing(llm):
    """Text held back because it could begin a stop string must come out at the end."""
    [free] = llm.generate(PROMPT, SamplingParams(seed=6, max_tokens=20))
    almost = free.text[-3:] + "\0\0"
    pieces, completion = drained(llm.stream(PROMPT, SamplingParams(seed=6, max_tokens=20, stop=(almost,))))
    assert "".join(pieces) == completion.text == free.text
    assert completion.finish_reason == free.finish_reason


def test_two_streams_at_once_do_not_disturb_each_other(tiny):
    prompts = [PROMPT, "The king"]
    params = [SamplingParams(seed=7, max_tokens=30), SamplingParams(temperature=0, max_tokens=20)]
    expected = [tiny.generate(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    streams = [tiny.stream(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [completion.text for completion in expected]
    assert [stream.completion.token_ids for stream in streams] == [c.token_ids for c in expected]


def test_generate_in_the_middle_of_a_stream_leaves_it_whole(tiny):
    """The stream's tokens come while somebody else steps the engine: none may be lost."""
    params = SamplingParams(seed=8, max_tokens=30)
    [expected] = tiny.generate(PROMPT, params)
    stream = tiny.stream(PROMPT, params)
    first = next(stream)
    other = SamplingParams(seed=9, max_tokens=50)
    [between] = tiny.generate("The king", other)
    pieces, completion = drained(stream)
    assert first + "".join(pieces) == expected.text == completion.text
    assert between.token_ids == tiny.generate("The king", other)[0].token_ids


def test_a_stream_has_its_completion_at_its_end_and_log_probabilities_as_it_goes(tiny):
    stream = tiny.stream(PROMPT, SamplingParams(seed=1, max_tokens=20, logprobs=1))
    seen = 0
    for _ in stream:
        assert len(stream.logprobs) > seen, "a piece without a token of its own"
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


def test_more_prompts_than_slots_are_all_answered_in_their_order(tokenizer, tiny_model):
    llm = LLM.from_parts(tokenizer, tiny_model, n_slots=4)
    prompts = [" ".join(["word"] * (i % 7)) + str(i) for i in range(40)]
    params = SamplingParams(seed=11, max_tokens=9)
    together = llm.generate(prompts, params)
    assert len(together) == 40
    for prompt, completion in zip(prompts, together, strict=True):
        assert without_times(completion) == without_times(llm.generate(prompt, params)[0])
        assert completion.n_prompt_tokens == len(tokenizer.encode_document(prompt))
    assert len({tuple(c.token_ids) for c in together}) > 30


def test_one_prompt_too_long_refuses_them_all_and_takes_no_slot(stories):
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens: it must have at most 255"):
        stories.generate([PROMPT, "word " * 300, PROMPT])
    assert idle(stories)
    assert len(stories.generate(PROMPT, SamplingParams(max_tokens=2))) == 1


def test_a_prompt_that_is_no_text_takes_no_slot(tiny):
    with pytest.raises(ValueError, match="surrogate"):
        tiny.generate([PROMPT, "\ud800"])
    assert idle(tiny)


def test_no_prompts_no_answers(tiny):
    assert tiny.generate([]) == []


def test_an_empty_prompt_begins_a_story(llm):
    [completion] = llm.generate("", SamplingParams(seed=12, max_tokens=8))
    assert completion.n_prompt_tokens == 1
    assert completion.token_ids
    assert completion.text


def test_times_follow_one_another(tiny):
    for completion in tiny.generate([PROMPT] * 20, SamplingParams(max_tokens=3)):
        assert 0 <= completion.queue_s <= completion.first_token_s <= completion.total_s


# --- settings that must be felt


def test_a_seed_gives_the_same_text_again_and_another_gives_another(llm):
    texts = [llm.generate(PROMPT, SamplingParams(seed=s, temperature=1, max_tokens=20))[0].text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_repetition_penalty_makes_text_less_repetitive(stories):
    plain, varied = (
        stories.generate(PROMPT, SamplingParams(temperature=0, max_tokens=120, repetition_penalty=p))[0].token_ids
        for p in (1.0, 1.5)
    )
    assert len(set(varied)) / len(varied) > len(set(plain)) / len(plain)


def test_log_probabilities_are_the_models_own(llm):
    """Of the tokens chosen, before penalty, temperature and truncation: what an evaluation would compute."""
    params = SamplingParams(seed=13, temperature=1.4, top_k=50, repetition_penalty=1.2, max_tokens=12, logprobs=4)
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


def test_greedy_text_is_that_of_the_logits(llm):
    [completion] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=10))
    prompt = llm.tokenizer.encode_document(PROMPT)
    logits = llm.logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(logits)), completion.token_ids]
    assert (logits.max(axis=1) - chosen < 1e-3).all()


@pytest.mark.parametrize(
    ("ids", "told"),
    [([], "0 tokens"), ([1] * 65, "65 tokens"), ([4096], "4095"), ([-1], "4095"), ([1.5], "whole"), (["a"], "whole")],
)
def test_ids_without_logits_are_refused(tiny, ids, told):
    with pytest.raises(ValueError, match=told):
        tiny.logits(ids)


def test_a_missing_model_is_named():
    with pytest.raises(ModelError, match="nowhere/at-all"):
        LLM("nowhere/at-all")


def test_an_llm_without_slots_is_refused(tokenizer, tiny_model):
    with pytest.raises(ValueError, match="n_slots is 0"):
        LLM.from_parts(tokenizer, tiny_model, n_slots=0)
