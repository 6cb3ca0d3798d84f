"""Continuous batching: other requests never change an answer, and every request ends and frees its slot."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers.kernels import quantized
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.engine import Engine, EngineFull
from tinylm.engine.scheduler import LEAST_TO_COPY
from tinylm.model import Chunk, Model, ModelRunner


def run(engine):
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    pytest.fail("there is work left after 10,000 steps")


def answers(model, prompts, params, **sizes):
    """Return the tokens of each prompt's answer, with all prompts submitted at once."""
    engine = Engine(model, **sizes)
    params = params if isinstance(params, list) else [params] * len(prompts)
    requests = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    run(engine)
    return [s.tokens for s in requests]


def alone(model, prompts, params):
    """Return the tokens of each prompt's answer in an engine without other requests."""
    params = params if isinstance(params, list) else [params] * len(prompts)
    return [answers(model, [prompt], p, n_slots=1)[0] for prompt, p in zip(prompts, params, strict=True)]


def slow_greedy(model, prompt, max_tokens, penalty=1.0):
    """Compute each token from all tokens before it, without a cache. Return the tokens and the finish reason."""
    tokens, runner = [], ModelRunner(model, 1, model.config.context, 1)
    while True:
        ids = [*prompt, *tokens]
        logits = runner.forward(np.array(ids), [Chunk(0, 0, len(ids))], np.array([-1]))
        scores = [
            x if t not in ids or t == model.config.boundary_id else x / penalty if x > 0 else x * penalty
            for t, x in enumerate(logits[0].tolist())
        ]
        token = int(np.argmax(scores))
        if token == model.config.boundary_id:
            return tokens, "stop"
        tokens.append(token)
        if len(tokens) == max_tokens or len(prompt) + len(tokens) == model.config.context:
            return tokens, "length"


@pytest.fixture(scope="module", params=[("numba", "int8"), ("numpy", "float32")], ids="-".join)
def choice(request):
    """Return kernels and precision. The engine's behaviour does not depend on them."""
    return request.param


@pytest.fixture(scope="module")
def tiny_model(choice, tiny_config, tiny_quantized):
    return Model(tiny_config, tiny_quantized, *choice)


@pytest.fixture(scope="module")
def loud_boundary(choice, tiny_config, tiny_tensors):
    """Return the small model with a large boundary embedding, so that its texts end early."""
    embedding = tiny_tensors["model.embed_tokens.weight"].copy()
    embedding[tiny_config.boundary_id] *= 4
    return Model(tiny_config, quantized({**tiny_tensors, "model.embed_tokens.weight": embedding}), *choice)


# --- the same tokens in every batch


@pytest.mark.parametrize("max_tokens", [1, 7, 1000])
def test_answers_equal_a_loop_without_cache(tiny_model, loud_boundary, prompts, max_tokens):
    reasons = set()
    for model in (tiny_model, loud_boundary):
        engine = Engine(model, n_slots=4)
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        requests = [engine.submit(prompt, params) for prompt in prompts[:8]]
        run(engine)
        for request in requests:
            assert (request.tokens, request.finish_reason) == slow_greedy(model, request.prompt, max_tokens)
            reasons.add(request.finish_reason)
    assert "length" in reasons
    assert max_tokens < 1000 or "stop" in reasons, "no answer ended with the boundary"


@pytest.mark.parametrize("prefill_tokens", [1, 5, 64])
def test_others_decode_while_a_long_prompt_is_in_prefill(tiny_model, prefill_tokens):
    params = SamplingParams(temperature=0, max_tokens=60)
    short, long = [1, 5], [1, *range(100, 139)]
    engine = Engine(tiny_model, n_slots=2, prefill_tokens=prefill_tokens)
    first = engine.submit(short, params)
    engine.step()
    second = engine.submit(long, params)
    n_steps = 0
    while not second.tokens:
        engine.step()
        n_steps += 1
        assert len(first.tokens) == 1 + n_steps
    assert n_steps == -(-len(long) // prefill_tokens)
    run(engine)
    assert [first.tokens, second.tokens] == alone(tiny_model, [short, long], params)


def test_a_seed_gives_the_same_tokens_beside_other_requests(tiny_model, prompts):
    params = [SamplingParams(seed=seed, temperature=1.2, max_tokens=20) for seed in range(len(prompts))]
    expected = alone(tiny_model, prompts, params)
    assert answers(tiny_model, prompts, params, n_slots=16) == expected
    assert answers(tiny_model, prompts, params, n_slots=3, prefill_tokens=2) == expected
    backwards = answers(tiny_model, prompts[::-1], params[::-1], n_slots=5)
    assert backwards[::-1] == expected
    other = [SamplingParams(seed=p.seed + 1, temperature=1.2, max_tokens=20) for p in params]
    assert all(a != b for a, b in zip(alone(tiny_model, prompts, other), expected, strict=True))


def test_requests_without_a_seed_differ(tiny_model):
    params = SamplingParams(temperature=1.5, max_tokens=20)
    assert len({tuple(tokens) for tokens in alone(tiny_model, [[1, 2, 3]] * 5, params)}) == 5


@pytest.mark.parametrize("penalty", [0.3, 4.0])
def test_the_penalty_counts_tokens_of_prompt_and_answer(tiny_model, prompts, penalty):
    params = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=penalty)
    of_prompt = 0
    for prompt, tokens in zip(prompts[:8], answers(tiny_model, prompts[:8], params), strict=True):
        assert (tokens, "length") == slow_greedy(tiny_model, prompt, 12, penalty)
        of_prompt += len(set(tokens) & set(prompt))
    assert (of_prompt > 0) == (penalty < 1), "the prompt makes no difference"


# --- cached prefixes


def with_common_beginnings(rng, n, vocab_size=4096):
    """Return prompts of 1 to 50 tokens that share prefixes of many lengths, as in conversations."""
    prompts = [[1]]
    while len(prompts) < n:
        begin = prompts[int(rng.integers(len(prompts)))]
        begin = begin[: int(rng.integers(1, len(begin) + 1))]
        prompts.append((begin + rng.integers(2, vocab_size, int(rng.integers(0, 25))).tolist())[:50])
    return prompts


def test_a_prompt_reuses_the_longest_cached_prefix(tiny_model):
    """The model must compute at least the last token of a prompt, since the cache holds no logits."""
    params = SamplingParams(temperature=0, max_tokens=5)
    begin = [1, *range(100, 130)]
    engine = Engine(tiny_model, n_slots=1)
    answer = []
    for prompt, n_reused in [
        ([*begin, 7, 8, 9], 0),
        ([*begin, 10, 11], 31),
        ([*begin, 10, 11], 32),
        ([*begin[:20], 12], 20),
        (begin, 20),
        (begin[:10], 9),
        ([1], 0),
    ]:
        request = engine.submit(prompt, params)
        run(engine)
        answer = request.tokens
        assert [answer] == alone(tiny_model, [prompt], params)
        assert request.n_reused == n_reused
    conversation = engine.submit([1, *answer, 8, 9], params)
    run(engine)
    assert conversation.n_reused == len(answer), "the last token of an answer is never in the cache"


@pytest.mark.parametrize("shared", [LEAST_TO_COPY - 1, LEAST_TO_COPY, 40])
def test_a_long_prefix_is_copied_from_a_running_request(tiny_model, shared):
    prompts = [[1, *range(100, 99 + shared), token] for token in (7, 8, 9)]
    params = SamplingParams(temperature=0, max_tokens=10)
    engine = Engine(tiny_model, n_slots=4)
    requests = []
    for prompt in prompts:
        requests.append(engine.submit(prompt, params))
        engine.step()
        engine.step()
    assert engine.n_running == 3
    run(engine)
    assert [s.n_reused for s in requests] == [0] + [shared if shared >= LEAST_TO_COPY else 0] * 2
    assert [s.tokens for s in requests] == alone(tiny_model, prompts, params)


@pytest.mark.parametrize("choice", [("numba", "int8"), ("numba", "float32")], ids="-".join, indirect=True)
@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 7, 64]))
def test_cached_prefixes_never_change_an_answer(tiny_model, seed, n_slots, prefill_tokens):
    """Requests share prefixes, copy them, wait and are cancelled. The bits of compiled kernels never change."""
    rng = np.random.default_rng(seed)
    prompts = with_common_beginnings(rng, 25)
    kinds = [{"temperature": 0}, {"seed": 3, "temperature": 1.0}, {"temperature": 0, "repetition_penalty": 1.7}]
    params = [
        SamplingParams(**kinds[int(k)], max_tokens=int(n))
        for k, n in zip(rng.integers(0, 3, 25), rng.integers(1, 20, 25), strict=True)
    ]
    engine = Engine(tiny_model, n_slots=n_slots, prefill_tokens=prefill_tokens)
    requests = []
    for prompt, p in zip(prompts, params, strict=True):
        requests.append(engine.submit(prompt, p))
        for _ in range(int(rng.integers(0, 12))):
            engine.step()
        if rng.random() < 0.1:
            engine.cancel(requests[int(rng.integers(len(requests)))])
    run(engine)
    assert sum(s.n_reused for s in requests) > 0
    for request, tokens in zip(requests, alone(tiny_model, prompts, params), strict=True):
        assert request.n_reused < len(request.prompt)
        n = len(request.tokens) if request.finish_reason == "cancelled" else None
        assert request.tokens == tokens[:n]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_step_loses_no_token(tiny_model, monkeypatch, when):
    prompts = with_common_beginnings(np.random.default_rng(1), 12)
    params = SamplingParams(seed=5, temperature=1.0, max_tokens=8, repetition_penalty=1.2)
    engine = Engine(tiny_model, n_slots=4, prefill_tokens=8)
    step, calls = engine._runner.step, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0 and when == "before":
            raise KeyboardInterrupt
        step(*arguments)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner, "step", interrupted)
    requests, n_interrupted = [engine.submit(prompt, params) for prompt in prompts], 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted > 5
    assert [s.tokens for s in requests] == alone(tiny_model, prompts, params)


# --- where an answer ends


@pytest.mark.parametrize("prompt_tokens", [1, 62, 63])
def test_prompt_and_answer_can_fill_the_context(tiny_model, prompt_tokens):
    prompt = [1, *range(10, 9 + prompt_tokens)]
    engine = Engine(tiny_model, n_slots=1)
    request = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=10**6))
    run(engine)
    assert request.finish_reason == "length"
    assert len(prompt) + len(request.tokens) == tiny_model.config.context


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([4096], "token 4096: tokens are 0 to 4095"),
        ([1, -1], "token -1"),
        ([1] * 64, "64.*63.*64"),
        ([1, 2.5], "2.5: token ids are whole numbers"),
        (["1"], "token ids are whole numbers"),
        ([None], "token ids are whole numbers"),
    ],
)
def test_an_impossible_prompt_is_refused(tiny_model, prompt, message):
    engine = Engine(tiny_model)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams())
    assert not engine.has_work


def test_numpy_ids_are_accepted(tiny_model, greedy):
    assert answers(tiny_model, [np.array([1, 20, 30])], greedy) == answers(tiny_model, [[1, 20, 30]], greedy)


def test_the_penalty_does_not_count_the_boundary(loud_boundary):
    """The boundary begins every prompt. With a penalty for it, every text would become longer."""
    params = SamplingParams(temperature=0, max_tokens=1, repetition_penalty=10.0)
    engine = Engine(loud_boundary, n_slots=1)
    request = engine.submit([loud_boundary.config.boundary_id], params)
    run(engine)
    assert request.finish_reason == "stop"


# --- slots and the queue


def test_a_full_queue_refuses_until_a_request_leaves(tiny_model, greedy):
    engine = Engine(tiny_model, n_slots=2, max_waiting=3)
    for _ in range(2):
        engine.submit([1], greedy)
    engine.step()
    waiting = [engine.submit([1], greedy) for _ in range(3)]
    with pytest.raises(EngineFull, match=r"2 requests are running and 3 waiting"):
        engine.submit([1], greedy)
    engine.cancel(waiting[1])
    engine.submit([1], greedy)
    run(engine)
    assert waiting[2].finish_reason == "length"


@pytest.mark.parametrize(("n_slots", "max_waiting"), [(2, 3), (1, 0)])
def test_slots_and_queue_limit_the_requests_before_a_step(tiny_model, greedy, n_slots, max_waiting):
    engine = Engine(tiny_model, n_slots=n_slots, max_waiting=max_waiting)
    limit = n_slots + max_waiting
    for n_taken in range(limit):
        engine.check_room(limit - n_taken - 1)
        with pytest.raises(EngineFull):
            engine.check_room(limit - n_taken)
        engine.submit([1], greedy)
    with pytest.raises(EngineFull):
        engine.submit([1], greedy)


@pytest.mark.parametrize(("name", "value"), [("n_slots", 0), ("max_waiting", -1), ("prefill_tokens", 0)])
def test_an_impossible_setting_is_refused(tiny_model, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Engine(tiny_model, **{name: value})


def test_a_deadline_ends_running_and_waiting_requests(tiny_model, greedy):
    engine = Engine(tiny_model, n_slots=1)
    running = engine.submit([1, 2], greedy, timeout_s=1)
    late = engine.submit([1, 3], greedy, timeout_s=0)
    patient = engine.submit([1, 4], greedy, timeout_s=3600)
    engine.step()
    assert (late.finish_reason, late.tokens) == ("timeout", [])
    assert len(running.tokens) == 1
    time.sleep(max(0, running.deadline - time.monotonic()))
    changed = engine.step()
    assert running in changed
    assert (running.finish_reason, len(running.tokens)) == ("timeout", 1)
    run(engine)
    assert (patient.finish_reason, len(patient.tokens)) == ("length", greedy.max_tokens)


def test_a_cancelled_request_frees_its_slot(tiny_model, greedy):
    engine = Engine(tiny_model, n_slots=1)
    first, second = engine.submit([1], greedy), engine.submit([1], greedy)
    engine.step()
    engine.cancel(first)
    engine.cancel(first)  # a second call has no effect
    assert (first.finish_reason, len(first.tokens)) == ("cancelled", 1)
    run(engine)
    assert len(first.tokens) == 1
    assert second.finish_reason == "length"
    engine.cancel(second)
    assert second.finish_reason == "length"


def test_step_returns_every_request_that_changed(tiny_model, prompts):
    """A client of a server would wait forever if its request were missing."""
    engine = Engine(tiny_model, n_slots=3, prefill_tokens=4)
    rng = np.random.default_rng(4)
    requests = [engine.submit(p, SamplingParams(seed=1, max_tokens=int(rng.integers(1, 9)))) for p in prompts]
    while engine.has_work:
        before = [(len(s.tokens), s.finish_reason) for s in requests]
        told = engine.step()
        changed = [s for s, b in zip(requests, before, strict=True) if (len(s.tokens), s.finish_reason) != b]
        assert set(map(id, told)) == set(map(id, changed))
        assert len(told) == len(changed)


@pytest.mark.parametrize("choice", [("numba", "int8")], ids="-".join, indirect=True)
def test_random_operations_lose_no_slot_and_delay_no_request(tiny_model, prompts):
    """Ten thousand times submit, cancel, expire or step. All requests end, and their answers are right.

    Requests are admitted in their order, within a number of steps. 5 slots hold at most 5 * 40 tokens of prompts, which
    take 200 / 8 steps and one more. Each answer takes at most 15 steps. So each slot becomes free within 41 steps.
    """
    longest, n_slots = 15, 5
    prompts = [*prompts, *([*prompt[: len(prompt) // 2], 9, 8, 7] for prompt in prompts)]
    greedy = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 4, longest)]
    expected = alone(tiny_model, prompts, greedy[-1])
    engine = Engine(tiny_model, n_slots=n_slots, max_waiting=10, prefill_tokens=8)
    assert max(map(len, prompts)) <= 40
    rng = np.random.default_rng(5)
    submitted, refused, n_steps = [], 0, 0
    waiting = {}  # request -> the step until which it must be admitted
    for _ in range(10_000):
        operation = rng.choice(["submit", "step", "cancel"], p=[0.3, 0.62, 0.08])
        if operation == "submit":
            which = int(rng.integers(len(prompts)))
            timeout_s = 0.0 if rng.random() < 0.05 else None
            ahead = engine.n_waiting
            try:
                request = engine.submit(prompts[which], greedy[int(rng.integers(3))], timeout_s)
            except EngineFull:
                refused += 1
            else:
                submitted.append((which, request))
                waiting[request] = n_steps + 41 * (1 + ahead // n_slots)
        elif operation == "step":
            engine.step()
            n_steps += 1
        elif submitted:
            engine.cancel(submitted[-int(rng.integers(1, 1 + min(20, len(submitted))))][1])
        still = [s for s in waiting if s.admitted_at is None and s.finish_reason is None]
        admitted = [s for s in waiting if s.admitted_at is not None]
        in_turn = [s for s in waiting if s in admitted or s in still]
        assert in_turn == admitted + still, "a request was admitted before an earlier one"
        assert all(n_steps <= waiting[s] for s in still), "a request waits too long"
        assert len(still) == engine.n_waiting <= 10 + n_slots
        waiting = {s: waiting[s] for s in still}
        slots = [s.slot for _, s in submitted[-100:] if s.finish_reason is None and s.slot is not None]
        assert len(slots) == len(set(slots)) == engine.n_running <= n_slots
    run(engine)
    assert (engine.n_running, engine.n_waiting) == (0, 0)
    assert {s.finish_reason for _, s in submitted} - {"stop"} == {"length", "cancelled", "timeout"}
    assert refused > 0
    assert sum(s.n_reused > LEAST_TO_COPY for _, s in submitted) > 100
    for which, request in submitted:
        assert request.tokens == expected[which][: len(request.tokens)]
        if request.finish_reason in ("length", "stop"):
            assert len(request.tokens) == min(request.params.max_tokens, len(expected[which]))
    again = [engine.submit([1], greedy[-1]) for _ in range(n_slots)]
    engine.step()
    assert sorted(s.slot for s in again) == list(range(n_slots)), "a slot was lost"


def test_sixteen_at_once_answer_as_each_alone(stories):
    """On the released model, with prompts and answers of many lengths."""
    text = "Once upon a time there was a little fox. He lived in the woods and he was always hungry. " * 3
    ids = stories.tokenizer.encode(text)
    rng = np.random.default_rng(3)
    starts = [1, 2, 3, 5, 8, 60, 40, 30, 20, 17, 13, 10, 9, 7, 6, 4]
    prompts = [[1, *ids[int(rng.integers(0, 9)) :][:length]] for length in starts]
    params = [SamplingParams(temperature=0, max_tokens=int(n)) for n in rng.integers(1, 40, size=16)]
    together = answers(stories.model, prompts, params, n_slots=16)
    assert together == alone(stories.model, prompts, params)
    assert len({tuple(tokens) for tokens in together}) > 8
