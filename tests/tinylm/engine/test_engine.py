"""Continuous batching: an answer is the same whatever else runs, and every request ends and gives its slot back."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
from helpers.kernels import SETTINGS, quantized
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import LLM, SamplingParams
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
    """The tokens of each prompt's answer when all are submitted at once."""
    engine = Engine(model, **sizes)
    params = params if isinstance(params, list) else [params] * len(prompts)
    sequences = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    run(engine)
    return [s.tokens for s in sequences]


def alone(model, prompts, params):
    params = params if isinstance(params, list) else [params] * len(prompts)
    return [answers(model, [prompt], p, n_slots=1)[0] for prompt, p in zip(prompts, params, strict=True)]


def slow_greedy(model, prompt, max_tokens, penalty=1.0):
    """The obvious loop: all tokens through the model again for each new one. Tokens and how they ended."""
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
    """Kernels and precision: what is so for these two does not depend on them."""
    return request.param


@pytest.fixture(scope="module")
def tiny_model(choice, tiny_config, tiny_quantized):
    return Model(tiny_config, tiny_quantized, *choice)


@pytest.fixture(scope="module")
def loud_boundary(choice, tiny_config, tiny_tensors):
    """The small model, but it ends its text often."""
    embedding = tiny_tensors["model.embed_tokens.weight"].copy()
    embedding[tiny_config.boundary_id] *= 4
    return Model(tiny_config, quantized({**tiny_tensors, "model.embed_tokens.weight": embedding}), *choice)


# --- the same tokens, however they are batched


@pytest.mark.parametrize("max_tokens", [1, 7, 1000])
def test_an_answer_is_that_of_the_obvious_loop(tiny_model, loud_boundary, prompts, max_tokens):
    """Tokens, their number and the reason they end; the boundary that ends an answer is no part of it."""
    reasons = set()
    for model in (tiny_model, loud_boundary):
        engine = Engine(model, n_slots=4)
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        sequences = [engine.submit(prompt, params) for prompt in prompts[:8]]
        run(engine)
        for sequence in sequences:
            assert (sequence.tokens, sequence.finish_reason) == slow_greedy(model, sequence.prompt, max_tokens)
            reasons.add(sequence.finish_reason)
    assert "length" in reasons
    assert max_tokens < 1000 or "stop" in reasons, "no answer ended by itself: the test would not see how"


@pytest.mark.parametrize("choice", SETTINGS, ids="-".join)
def test_sixteen_at_once_answer_as_each_alone(stories_dir, assert_same_greedy, choice):
    """On the committed model, with prompts and answers of many lengths: exactly so by compiled kernels.

    NumPy's sums depend on how many rows there are, and rounding to int8 makes their last bit a step.
    """
    llm = LLM(stories_dir, kernels=choice[0], precision=choice[1])
    text = "Once upon a time there was a little fox. He lived in the woods and he was always hungry. " * 3
    ids = llm.tokenizer.encode(text)
    rng = np.random.default_rng(3)
    starts = [1, 2, 3, 5, 8, 60, 40, 30, 20, 17, 13, 10, 9, 7, 6, 4]
    prompts = [[1, *ids[int(rng.integers(0, 9)) :][:length]] for length in starts]
    params = [SamplingParams(temperature=0, max_tokens=int(n)) for n in rng.integers(1, 40, size=16)]
    together, each = answers(llm.model, prompts, params, n_slots=16), alone(llm.model, prompts, params)
    if choice[0] == "numba":
        assert together == each
    for prompt, ours, theirs in zip(prompts, together, each, strict=True):
        assert_same_greedy(llm, prompt, ours, theirs, tie=0.1 if choice == ("numpy", "int8") else 1e-3)
    assert len({tuple(tokens) for tokens in together}) > 8


@pytest.mark.parametrize("prefill_tokens", [1, 5, 64])
def test_a_long_prompt_among_decoding_ones_is_read_in_parts_and_answered_the_same(
    stories, assert_same_greedy, prefill_tokens
):
    """Others get a token in every step while it is read; neither side's answer changes."""
    greedy = SamplingParams(temperature=0, max_tokens=60)
    short = stories.tokenizer.encode_document("Once upon a time")
    long = stories.tokenizer.encode_document("The king had three sons, and the youngest was a fool. " * 8)[:100]
    engine = Engine(stories.model, n_slots=2, prefill_tokens=prefill_tokens)
    first = engine.submit(short, greedy)
    engine.step()
    second = engine.submit(long, SamplingParams(temperature=0, max_tokens=5))
    steps = 0
    while not second.tokens and first.finish_reason is None:
        gained = len(first.tokens)
        engine.step()
        steps += 1
        assert len(first.tokens) == gained + 1 or first.finish_reason is not None
    if first.finish_reason is None:
        assert steps == -(-len(long) // prefill_tokens)
    run(engine)
    expected = alone(stories.model, [short, long], [greedy, second.params])
    for sequence, tokens in zip([first, second], expected, strict=True):
        assert_same_greedy(stories, sequence.prompt, sequence.tokens, tokens)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(tiny_model, prompts):
    """Each request has random numbers of its own: neighbours, slots and waiting must not move them."""
    params = [SamplingParams(seed=seed, temperature=1.2, max_tokens=20) for seed in range(len(prompts))]
    expected = alone(tiny_model, prompts, params)
    assert answers(tiny_model, prompts, params, n_slots=16) == expected
    assert answers(tiny_model, prompts, params, n_slots=3, prefill_tokens=2) == expected
    backwards = answers(tiny_model, prompts[::-1], params[::-1], n_slots=5)
    assert backwards[::-1] == expected
    other = [SamplingParams(seed=p.seed + 1, temperature=1.2, max_tokens=20) for p in params]
    assert all(a != b for a, b in zip(alone(tiny_model, prompts, other), expected, strict=True))


def test_no_seed_is_a_new_one_each_time(tiny_model):
    params = SamplingParams(temperature=1.5, max_tokens=20)
    assert len({tuple(tokens) for tokens in alone(tiny_model, [[1, 2, 3]] * 5, params)}) == 5


@pytest.mark.parametrize("penalty", [0.3, 4.0])
def test_the_penalty_knows_prompt_and_answer(tiny_model, prompts, penalty):
    """Below 1 it draws the text back to the prompt's own tokens, above 1 away from all there were."""
    params = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=penalty)
    of_prompt = 0
    for prompt, tokens in zip(prompts[:8], answers(tiny_model, prompts[:8], params), strict=True):
        assert (tokens, "length") == slow_greedy(tiny_model, prompt, 12, penalty)
        of_prompt += len(set(tokens) & set(prompt))
    assert (of_prompt > 0) == (penalty < 1), "the prompt made no difference: the test would not see it forgotten"


# --- what was read once is not read again


def with_common_beginnings(rng, n, vocab_size=4096):
    """Prompts of 1 to 50 tokens that branch off from one another, as those of a conversation or a template do."""
    prompts = [[1]]
    while len(prompts) < n:
        begin = prompts[int(rng.integers(len(prompts)))]
        begin = begin[: int(rng.integers(1, len(begin) + 1))]
        prompts.append((begin + rng.integers(2, vocab_size, int(rng.integers(0, 25))).tolist())[:50])
    return prompts


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_there_on(tiny_model, greedy):
    """The answer is that of the whole prompt, and its first step has that much less to do."""
    begin, params = [1, *range(100, 130)], SamplingParams(temperature=0, max_tokens=5)
    prompts = [[*begin, 7, 8, 9], [*begin, 10, 11], [*begin[:20], 12], begin]
    expected = alone(tiny_model, prompts, params)
    engine = Engine(tiny_model, n_slots=1)
    reused = []
    for prompt, tokens in zip(prompts, expected, strict=True):
        sequence = engine.submit(prompt, params)
        run(engine)
        assert sequence.tokens == tokens
        reused.append(sequence.n_reused)
    assert reused == [0, 31, 20, 20]


def test_of_a_prompt_that_is_cached_whole_one_token_is_still_read(tiny_model):
    """Its logits are nowhere: without it there would be nothing to draw from."""
    params = SamplingParams(temperature=0, max_tokens=6)
    engine = Engine(tiny_model, n_slots=1)
    for prompt in ([1], [1, 2], [1, *range(50, 90)]):
        first, again = engine.submit(prompt, params), engine.submit(prompt, params)
        run(engine)
        assert again.n_reused == len(prompt) - 1
        assert again.tokens == first.tokens == alone(tiny_model, [prompt], params)[0]
    shorter = engine.submit([1, *range(50, 70)], params)
    run(engine)
    assert shorter.n_reused == 20


def test_a_conversation_goes_on_from_the_answer(tiny_model):
    """The answer's tokens were computed when they were drawn; all but the last, which nothing followed."""
    params = SamplingParams(temperature=0, max_tokens=6)
    engine = Engine(tiny_model, n_slots=3)
    first = engine.submit([1, 5, 6, 7], params)
    run(engine)
    prompt = [1, 5, 6, 7, *first.tokens, 8, 9]
    second = engine.submit(prompt, params)
    run(engine)
    assert second.n_reused == 4 + len(first.tokens) - 1
    assert [second.tokens] == alone(tiny_model, [prompt], params)


@pytest.mark.parametrize("shared", [LEAST_TO_COPY - 1, LEAST_TO_COPY, 40])
def test_a_beginning_is_copied_from_one_that_is_still_running(tiny_model, shared):
    """Users of one template come at the same time; few tokens are sooner read again than copied."""
    prompts = [[1, *range(100, 99 + shared), token] for token in (7, 8, 9)]
    params = SamplingParams(temperature=0, max_tokens=10)
    engine = Engine(tiny_model, n_slots=4)
    sequences = []
    for prompt in prompts:
        sequences.append(engine.submit(prompt, params))
        engine.step()
        engine.step()
    assert engine.n_running == 3
    run(engine)
    assert [s.n_reused for s in sequences] == [0] + [shared if shared >= LEAST_TO_COPY else 0] * 2
    assert [s.tokens for s in sequences] == alone(tiny_model, prompts, params)


@pytest.mark.parametrize("choice", SETTINGS[:2], ids="-".join, indirect=True)
@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 7, 64]))
def test_an_answer_is_the_same_whatever_was_read_before(tiny_model, seed, n_slots, prefill_tokens):
    """Common beginnings, copies, cancelled and full slots: each gets the tokens of an engine of its own.

    Of compiled kernels, whose bits are always the same: with NumPy one in ten thousand tokens is a tie.
    """
    rng = np.random.default_rng(seed)
    prompts = with_common_beginnings(rng, 25)
    kinds = [{"temperature": 0}, {"seed": 3, "temperature": 1.0}, {"temperature": 0, "repetition_penalty": 1.7}]
    params = [
        SamplingParams(**kinds[int(k)], max_tokens=int(n))
        for k, n in zip(rng.integers(0, 3, 25), rng.integers(1, 20, 25), strict=True)
    ]
    engine = Engine(tiny_model, n_slots=n_slots, prefill_tokens=prefill_tokens)
    sequences = []
    for prompt, p in zip(prompts, params, strict=True):
        sequences.append(engine.submit(prompt, p))
        for _ in range(int(rng.integers(0, 12))):
            engine.step()
        if rng.random() < 0.1:
            engine.cancel(sequences[int(rng.integers(len(sequences)))])
    run(engine)
    assert sum(s.n_reused for s in sequences) > 0
    for sequence, tokens in zip(sequences, alone(tiny_model, prompts, params), strict=True):
        assert sequence.n_reused < len(sequence.prompt)
        n = len(sequence.tokens) if sequence.finish_reason == "cancelled" else None
        assert sequence.tokens == tokens[:n]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_was_interrupted_is_made_again(tiny_model, monkeypatch, when):
    """Ctrl-C in a notebook, and on with the same object: no token may be lost, doubled or read from the wrong place."""
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
    sequences, n_interrupted = [engine.submit(prompt, params) for prompt in prompts], 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted > 5
    assert [s.tokens for s in sequences] == alone(tiny_model, prompts, params)


# --- where an answer ends


@pytest.mark.parametrize("prompt_tokens", [1, 30, 62, 63])
def test_prompt_and_answer_fill_the_context_exactly(tiny_model, prompt_tokens):
    """The last place of the context is used, and nothing past it: a prompt of context - 1 gets one token."""
    prompt = [1, *range(10, 9 + prompt_tokens)]
    engine = Engine(tiny_model, n_slots=1)
    sequence = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=10**6))
    run(engine)
    assert sequence.finish_reason == "length"
    assert len(prompt) + len(sequence.tokens) == tiny_model.config.context


@pytest.mark.parametrize(
    ("prompt", "told"),
    [([], "no tokens"), ([4096], "token 4096: tokens are 0 to 4095"), ([1, -1], "token -1"), ([1] * 64, "64.*63.*64")],
)
def test_a_prompt_that_can_not_be_answered_is_refused_with_numbers(tiny_model, prompt, told):
    engine = Engine(tiny_model)
    with pytest.raises(ValueError, match=told):
        engine.submit(prompt, SamplingParams())
    assert not engine.has_work


@pytest.mark.parametrize("prompt", [[1, 2.5], ["1"], [None]])
def test_ids_that_are_no_whole_numbers_are_refused_before_they_take_a_slot(tiny_model, prompt):
    engine = Engine(tiny_model, n_slots=1)
    with pytest.raises(ValueError, match="token ids are whole numbers"):
        engine.submit(prompt, SamplingParams())
    assert not engine.has_work
    numpy_s = answers(tiny_model, [np.array([1, 20, 30])], SamplingParams(temperature=0, max_tokens=5))
    assert numpy_s == answers(tiny_model, [[1, 20, 30]], SamplingParams(temperature=0, max_tokens=5))


def test_the_penalty_leaves_the_end_alone(tiny_model, loud_boundary):
    """The boundary begins every prompt: penalized as a token that was seen, it would draw every text out."""
    params = SamplingParams(temperature=0, max_tokens=1, repetition_penalty=10.0)
    engine = Engine(loud_boundary, n_slots=1)
    sequence = engine.submit([loud_boundary.config.boundary_id], params)
    run(engine)
    assert sequence.finish_reason == "stop"


def test_log_probabilities_come_one_a_token(tiny_model, prompts):
    params = SamplingParams(seed=1, max_tokens=10, logprobs=3)
    engine = Engine(tiny_model, n_slots=4)
    sequences = [engine.submit(prompt, params) for prompt in prompts[:6]]
    run(engine)
    for sequence in sequences:
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert all(len(entry.top) == 3 for entry in sequence.logprobs)


def test_another_thread_never_sees_a_token_before_its_log_probability(tiny_model):
    """A stream reads while the engine writes: a token seen too early would be sent without its log-probability."""
    engine = Engine(tiny_model, n_slots=1)
    sequences = [engine.submit([1, 5], SamplingParams(seed=s, max_tokens=60, logprobs=20)) for s in range(8)]
    early, done = [], threading.Event()

    def watch():
        while not done.is_set() and not early:
            for sequence in sequences:
                n_tokens = len(sequence.tokens)
                if len(sequence.logprobs) < n_tokens:
                    early.append(n_tokens)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(engine)
    finally:
        done.set()
        watcher.join()
        sys.setswitchinterval(interval)
    assert early == []


# --- slots and the queue before them


def test_first_come_first_served(tiny_model):
    engine = Engine(tiny_model, n_slots=2)
    sequences = [engine.submit([1, 5 + i], SamplingParams(temperature=0, max_tokens=1 + i % 3)) for i in range(9)]
    admitted = []
    while engine.has_work:
        engine.step()
        admitted += [s for s in sequences if s.admitted_at is not None and s not in admitted]
        assert engine.n_running <= 2
    assert admitted == sequences
    times = [s.admitted_at for s in sequences]
    assert times == sorted(times)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(tiny_model, greedy):
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


@pytest.mark.parametrize(("n_slots", "max_waiting"), [(2, 3), (1, 0), (4, 0)])
def test_a_burst_between_two_steps_is_held_to_the_same_limit(tiny_model, greedy, n_slots, max_waiting):
    """Free slots don't make the queue endless: no more may wait than there are slots and places."""
    engine = Engine(tiny_model, n_slots=n_slots, max_waiting=max_waiting)
    taken = [engine.submit([1], greedy) for _ in range(n_slots + max_waiting)]
    with pytest.raises(EngineFull):
        engine.submit([1], greedy)
    run(engine)
    assert all(s.finish_reason == "length" for s in taken)


@pytest.mark.parametrize(("n_slots", "max_waiting"), [(2, 3), (1, 0), (4, 0)])
def test_room_is_told_as_it_will_be_given(tiny_model, greedy, n_slots, max_waiting):
    """After any number of requests, `n_coming` more are said to leave room for one just when they do."""
    for n_taken in range(n_slots + max_waiting + 1):
        for n_coming in range(n_slots + max_waiting + 2):
            engine = Engine(tiny_model, n_slots=n_slots, max_waiting=max_waiting)
            for _ in range(n_taken):
                engine.submit([1], greedy)
            if n_taken + n_coming < n_slots + max_waiting:
                engine.check_room(n_coming)
            else:
                with pytest.raises(EngineFull):
                    engine.check_room(n_coming)


@pytest.mark.parametrize(("name", "value"), [("n_slots", 0), ("max_waiting", -1), ("prefill_tokens", 0)])
def test_an_engine_that_could_not_work_is_refused(tiny_model, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Engine(tiny_model, **{name: value})


def test_a_deadline_ends_running_and_waiting_requests(tiny_model, greedy):
    """Both end with 'timeout', with the tokens they have; the next in line gets the slot."""
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


def test_a_cancelled_request_frees_its_slot_and_gains_nothing(tiny_model, greedy):
    engine = Engine(tiny_model, n_slots=1)
    first, second = engine.submit([1], greedy), engine.submit([1], greedy)
    engine.step()
    engine.cancel(first)
    engine.cancel(first)  # twice does no harm
    assert (first.finish_reason, len(first.tokens)) == ("cancelled", 1)
    run(engine)
    assert len(first.tokens) == 1
    assert second.finish_reason == "length"
    engine.cancel(second)
    assert second.finish_reason == "length"


def test_step_tells_of_every_sequence_that_changed(tiny_model, prompts):
    """A server hears of tokens and endings from here alone: one left out would hang its client."""
    engine = Engine(tiny_model, n_slots=3, prefill_tokens=4)
    rng = np.random.default_rng(4)
    sequences = [engine.submit(p, SamplingParams(seed=1, max_tokens=int(rng.integers(1, 9)))) for p in prompts]
    while engine.has_work:
        before = [(len(s.tokens), s.finish_reason) for s in sequences]
        told = engine.step()
        changed = [s for s, b in zip(sequences, before, strict=True) if (len(s.tokens), s.finish_reason) != b]
        assert set(map(id, told)) == set(map(id, changed))
        assert len(told) == len(changed)


@pytest.mark.parametrize("choice", [("numba", "int8")], ids="-".join, indirect=True)
def test_ten_thousand_random_operations_lose_no_slot_and_starve_no_request(tiny_model, prompts):
    """Submit, cancel, expire, step in any order: all end, slots come back, and no answer has another's tokens.

    Whoever waits is admitted in turn, and soon. 5 slots hold at most 5 * 40 tokens of prompts, read in 200 / 8 steps
    and one that may hold less; 15 tokens follow each. So in 41 steps each slot is left once, and a place further
    ahead is taken each time.
    """
    longest, n_slots = 15, 5
    prompts = [*prompts, *([*prompt[: len(prompt) // 2], 9, 8, 7] for prompt in prompts)]
    greedy = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 4, longest)]
    expected = alone(tiny_model, prompts, greedy[-1])
    engine = Engine(tiny_model, n_slots=n_slots, max_waiting=10, prefill_tokens=8)
    assert max(map(len, prompts)) <= 40
    rng = np.random.default_rng(5)
    submitted, refused, n_steps = [], 0, 0
    waiting = {}  # sequence -> the step until which it must be admitted
    for _ in range(10_000):
        operation = rng.choice(["submit", "step", "cancel"], p=[0.3, 0.62, 0.08])
        if operation == "submit":
            which = int(rng.integers(len(prompts)))
            timeout_s = 0.0 if rng.random() < 0.05 else None
            ahead = engine.n_waiting
            try:
                sequence = engine.submit(prompts[which], greedy[int(rng.integers(3))], timeout_s)
            except EngineFull:
                refused += 1
            else:
                submitted.append((which, sequence))
                waiting[sequence] = n_steps + 41 * (1 + ahead // n_slots)
        elif operation == "step":
            engine.step()
            n_steps += 1
        elif submitted:
            engine.cancel(submitted[-int(rng.integers(1, 1 + min(20, len(submitted))))][1])
        still = [s for s in waiting if s.admitted_at is None and s.finish_reason is None]
        admitted = [s for s in waiting if s.admitted_at is not None]
        in_turn = [s for s in waiting if s in admitted or s in still]
        assert in_turn == admitted + still, "somebody was admitted before one who came earlier"
        assert all(n_steps <= waiting[s] for s in still), "somebody waits too long"
        assert len(still) == engine.n_waiting <= 10 + n_slots
        waiting = {s: waiting[s] for s in still}
        slots = [s.slot for _, s in submitted[-100:] if s.finish_reason is None and s.slot is not None]
        assert len(slots) == len(set(slots)) == engine.n_running <= n_slots
    run(engine)
    assert (engine.n_running, engine.n_waiting) == (0, 0)
    assert {s.finish_reason for _, s in submitted} - {"stop"} == {"length", "cancelled", "timeout"}
    assert refused > 0
    assert sum(s.n_reused > LEAST_TO_COPY for _, s in submitted) > 100
    for which, sequence in submitted:
        assert sequence.tokens == expected[which][: len(sequence.tokens)]
        if sequence.finish_reason in ("length", "stop"):
            assert len(sequence.tokens) == min(sequence.params.max_tokens, len(expected[which]))
    again = [engine.submit([1], greedy[-1]) for _ in range(n_slots)]
    engine.step()
    assert sorted(s.slot for s in again) == list(range(n_slots)), "a slot was lost"


def test_slots_cost_memory_in_proportion(tiny_model):
    assert Engine(tiny_model, 8).cache_bytes == 8 * Engine(tiny_model, 1).cache_bytes > 0
