"""The engine in its thread: many tasks at once, tasks that leave early, and an engine that dies."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from contextlib import aclosing
from functools import partial
from itertools import pairwise

import pytest

from tinylm import SamplingParams
from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import AsyncEngine, EngineDied, Listener
from tinylm.model import Model, ModelRunner

LONG = SamplingParams(temperature=0, max_tokens=10**6)
SHORT = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def model(tiny_config, tiny_quantized):
    return Model(tiny_config, tiny_quantized)


def on_engine(model, use, niceness=0, **sizes):
    """Run `use(engine)` in an event loop, for at most 30 s, and stop the engine."""

    async def main():
        engine = AsyncEngine(Engine(model, **sizes), niceness=niceness)
        try:
            async with asyncio.timeout(30):
                return await use(engine)
        finally:
            engine.stop()

    return asyncio.run(main())


async def answer(engine, prompt, params, timeout_s=None):
    """Return the last snapshot of a request."""
    async with aclosing(engine.generate(prompt, params, timeout_s)) as updates:
        async for progress in updates:
            last = progress
    return last


async def until(condition):
    """Wait until another thread makes a condition true."""
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def replace_step(monkeypatch):
    """Return a function that replaces the model's step in all later engines by f(step, *arguments)."""

    def replace(new):
        make = ModelRunner.__init__

        def make_and_replace(runner, *arguments, **sizes):
            make(runner, *arguments, **sizes)
            runner.step = partial(new, runner.step)

        monkeypatch.setattr(ModelRunner, "__init__", make_and_replace)

    return replace


@pytest.fixture
def permits(replace_step):
    """Each step of the model needs one permit."""
    permits = threading.Semaphore(0)

    def paced(step, *arguments):
        assert permits.acquire(timeout=10)
        step(*arguments)

    replace_step(paced)
    return permits


def recorded(engine, then=lambda: None):
    """Return the list of all requests submitted from now on. Call `then` in the engine's thread after each."""
    submit, requests = engine.submit, []

    def recording(*arguments):
        requests.append(submit(*arguments))
        then()
        return requests[-1]

    engine.submit = recording
    return requests


async def end(engine, permits):
    """Give permits one by one until the engine has no work. Leave none."""
    while engine.engine.has_work:
        permits.acquire(blocking=False)
        permits.release()
        await asyncio.sleep(0.001)
    permits.acquire(blocking=False)


# --- what tasks get


def test_tasks_get_the_answers_of_the_synchronous_engine(model, prompts):
    params = [
        SamplingParams(temperature=0 if i % 2 else 1.1, seed=i, max_tokens=5 + i, logprobs=i % 3 or None)
        for i in range(len(prompts))
    ]
    expected = []
    for prompt, p in zip(prompts, params, strict=True):
        engine = Engine(model, n_slots=1)
        request = engine.submit(prompt, p)
        while engine.has_work:
            engine.step()
        expected.append((tuple(request.tokens), tuple(request.logprobs), request.finish_reason))

    async def use(engine):
        return await asyncio.gather(*[answer(engine, p, q) for p, q in zip(prompts, params, strict=True)])

    found = on_engine(model, use, n_slots=4)
    assert [(p.tokens, p.logprobs, p.finish_reason) for p in found] == expected


@pytest.mark.parametrize("every_s", [0.0, 0.004, 3600.0, math.inf])
def test_the_interval_changes_only_the_number_of_snapshots(model, prompts, every_s):
    """Every listener hears of the acceptance, of the first token (unless every_s is infinite), and of the end."""
    params = SamplingParams(temperature=0, max_tokens=40)

    async def listen(engine, prompt):
        counts = []
        async for progress in engine.generate(prompt, params, listener=Listener(every_s)):
            counts.append(len(progress.tokens))
        return progress.tokens, counts

    async def use(engine):
        plain = [await answer(engine, prompt, params) for prompt in prompts]
        return plain, await asyncio.gather(*[listen(engine, prompt) for prompt in prompts])

    plain, heard = on_engine(model, use, n_slots=4)
    for expected, (tokens, counts) in zip(plain, heard, strict=True):
        assert tokens == expected.tokens
        assert counts[-1] == len(tokens)
        assert counts == sorted(counts)
        if every_s >= 3600:
            assert len(counts) <= (2 if every_s == math.inf else 3)


def test_tokens_arrive_while_the_answer_is_generated(model, permits):
    async def use(engine):
        seen = []
        async with aclosing(engine.generate([1, 5], SamplingParams(temperature=0, max_tokens=8))) as updates:
            async for progress in updates:
                seen.append(progress.tokens)
                permits.release()  # the next step waits until this snapshot has arrived
        return seen

    seen = on_engine(model, use)
    assert [len(tokens) for tokens in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert all(later[: len(tokens)] == tokens for tokens, later in pairwise(seen))


def test_a_listener_that_sleeps_still_has_recent_progress(model, permits):
    """A service counts the tokens of a cancelled call that wanted to hear only of its end."""
    listener = Listener(math.inf)

    async def use(engine):
        async with aclosing(engine.generate([1, 5], LONG, listener=listener)) as updates:
            await anext(updates)
            permits.release()
            await until(lambda: listener.progress.tokens)
        await end(engine, permits)

    on_engine(model, use)
    assert listener.progress.first_token_at >= listener.progress.admitted_at
    assert listener.progress.finish_reason is None


def test_a_timeout_ends_an_answer_with_its_tokens(model):
    async def use(engine):
        return await answer(engine, [1, 5], LONG, timeout_s=0.0)

    progress = on_engine(model, use)
    assert (progress.finish_reason, progress.tokens) == ("timeout", ())


# --- tasks that leave early


@pytest.mark.parametrize("leave", ["break", "cancel", "error"])
def test_leaving_frees_the_slot_before_the_next_step(model, permits, leave):
    async def use(engine):
        started = asyncio.Event()
        requests = recorded(engine.engine)

        async def leaver():
            async with aclosing(engine.generate([1, 5], LONG)) as updates:
                async for _ in updates:
                    started.set()
                    if leave == "break":
                        return
                    if leave == "error":
                        raise KeyError("the caller's own")

        task = asyncio.create_task(leaver())
        permits.release()
        await started.wait()
        if leave == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        permits.release()  # for the current step; there must be no other
        await until(lambda: not engine.engine.has_work)
        assert requests[0].finish_reason == "cancelled"
        permits.release(2)
        return await answer(engine, [1, 6], SHORT)

    assert len(on_engine(model, use, n_slots=1).tokens) == 2


@pytest.mark.parametrize("turns", range(8))
def test_tasks_cancelled_at_any_moment_leave_the_queue(model, permits, turns):
    """The cancellation comes `turns` turns of the loop later: on the way to the engine, in its queue, or in a step."""

    async def use(engine):
        requests = recorded(engine.engine)
        for _ in range(5):
            tasks = [asyncio.create_task(answer(engine, [1, 5 + i], LONG)) for i in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
        permits.release()
        with pytest.raises(ValueError, match="no tokens"):  # the engine handles it after everything before it
            await answer(engine, [], LONG)
        await end(engine, permits)
        return requests

    assert {request.finish_reason for request in on_engine(model, use, n_slots=2)} <= {"cancelled"}


def test_a_cancellation_during_the_acceptance_leaves_the_queue(model, permits):
    async def use(engine):
        loop = asyncio.get_running_loop()
        tasks = []
        requests = recorded(engine.engine, lambda: loop.call_soon_threadsafe(loop.call_soon, tasks[-1].cancel))
        for i in range(50):
            tasks.append(asyncio.create_task(answer(engine, [1, 5 + i], LONG)))
            with pytest.raises(asyncio.CancelledError):
                await tasks[-1]
            await end(engine, permits)
        assert not engine._listeners, "the engine keeps every request"
        return requests

    assert [request.finish_reason for request in on_engine(model, use, n_slots=1)] == ["cancelled"] * 50


# --- refusals


def test_a_refusal_reaches_only_its_own_task(model, greedy):
    async def use(engine):
        good = asyncio.create_task(answer(engine, [1, 5], greedy))
        for prompt, error, message in [
            ([1] * 64, ValueError, "at most 63"),
            ([4096], ValueError, "token 4096"),
            (["Once", "upon"], ValueError, "'Once': token ids are whole numbers"),
            (None, TypeError, None),
        ]:
            with pytest.raises(error, match=message):
                await answer(engine, prompt, greedy)
        engine.check()
        return await good

    assert len(on_engine(model, use).tokens) == greedy.max_tokens


def test_a_full_engine_refuses_the_rest_of_a_burst(model, permits):
    async def use(engine):
        tasks = [asyncio.create_task(answer(engine, [1, i], SHORT)) for i in range(2, 9)]
        await asyncio.sleep(0.02)
        permits.release(100)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = on_engine(model, use, n_slots=1, max_waiting=2)
    assert sum(isinstance(result, EngineFull) for result in results) == 4
    assert sum(not isinstance(result, BaseException) for result in results) == 3


def test_a_refusal_does_not_wait_for_the_current_step(model, permits):
    """Requests that the engine's thread has not seen yet count too."""

    async def use(engine):
        first = asyncio.create_task(answer(engine, [1, 5], SHORT))
        await until(lambda: engine.engine.n_running)
        waiting = asyncio.create_task(answer(engine, [1, 6], SHORT))
        await asyncio.sleep(0)  # the task has submitted, and the engine's thread is in a step
        with pytest.raises(EngineFull):
            await answer(engine, [1, 7], LONG)
        permits.release(4)
        return await asyncio.gather(first, waiting)

    assert [len(progress.tokens) for progress in on_engine(model, use, n_slots=1, max_waiting=1)] == [2, 2]


# --- the engine's thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_fails_all_its_requests(model, replace_step):
    """Running and waiting requests, requests on the way to the engine, and later ones get an error."""
    broken, in_step = threading.Event(), threading.Event()
    calls = []

    def failing(step, *arguments):
        calls.append(1)
        if len(calls) < 3:
            return step(*arguments)
        in_step.set()
        assert broken.wait(20)
        raise MemoryError("no memory left")

    replace_step(failing)

    async def use(engine):
        tasks = [asyncio.create_task(answer(engine, [1, 5 + i], LONG)) for i in range(4)]
        await until(in_step.is_set)
        tasks += [asyncio.create_task(answer(engine, [1, 50 + i], LONG)) for i in range(3)]
        await asyncio.sleep(0.02)  # the tasks have submitted
        engine.check()
        broken.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDied) and "no memory left" in str(r) for r in results), results
        with pytest.raises(EngineDied, match="no memory left"):
            await answer(engine, [1], LONG)
        with pytest.raises(EngineDied, match="no memory left"):
            engine.check()

    on_engine(model, use, n_slots=2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness per thread")
def test_only_the_engines_thread_gets_the_niceness(model):
    async def use(engine):
        await answer(engine, [1], SHORT)
        return [os.getpriority(os.PRIO_PROCESS, t) for t in (engine._thread.native_id, threading.get_native_id())]

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert on_engine(model, use, niceness=3) == [before + 3, before]


def test_a_system_without_niceness_of_threads_serves_alike(model, monkeypatch):
    """macOS would lower the whole process, with the event loop that answers clients."""
    monkeypatch.setattr(sys, "platform", "darwin")
    before = os.getpriority(os.PRIO_PROCESS, 0)

    async def use(engine):
        await answer(engine, [1], SHORT)
        return os.getpriority(os.PRIO_PROCESS, engine._thread.native_id)

    assert on_engine(model, use, niceness=3) == before


def test_check_reports_a_step_that_hangs(model, permits):
    async def use(engine):
        engine.check(stalled_s=0)  # an engine without work cannot stall
        task = asyncio.create_task(answer(engine, [1], SHORT))
        await until(lambda: engine.engine.n_running)
        engine.check()
        await asyncio.sleep(0.01)
        with pytest.raises(EngineDied, match="not finished a step"):
            engine.check(stalled_s=0.001)
        permits.release(2)
        return await task

    assert on_engine(model, use).finish_reason == "length"


def test_stop_fails_running_and_later_requests(model, permits):
    async def use(engine):
        task = asyncio.create_task(answer(engine, [1, 5], LONG))
        await until(lambda: engine.engine.n_running)
        permits.release()
        engine.stop()
        with pytest.raises(EngineDied):
            await task
        with pytest.raises(EngineDied):
            engine.check()
        with pytest.raises(EngineDied):
            await answer(engine, [1], SHORT)

    on_engine(model, use, n_slots=1)


def test_a_refused_prompt_leaves_no_room_for_others(model, permits):
    """The engine refuses the prompt. Until the next step ends, a full engine must still refuse others at once."""

    async def use(engine):
        running = asyncio.create_task(answer(engine, [1, 5], SamplingParams(temperature=0, max_tokens=4)))
        await until(lambda: engine.engine.n_running)  # the first step has begun
        too_long = asyncio.create_task(answer(engine, [1] * model.config.context, SHORT))
        await until(lambda: engine._submitting)
        permits.release()
        with pytest.raises(ValueError, match="prompt has"):
            await too_long
        waiting = asyncio.create_task(answer(engine, [1, 6], SHORT))
        await until(lambda: engine._submitting or engine.engine.n_waiting)  # the next step may not have begun
        with pytest.raises(EngineFull):
            await asyncio.wait_for(answer(engine, [1, 7], SHORT), 5)
        await end(engine, permits)
        await asyncio.gather(running, waiting)

    on_engine(model, use, n_slots=1, max_waiting=1)
