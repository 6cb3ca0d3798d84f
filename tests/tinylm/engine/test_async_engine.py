"""The engine on its thread: many tasks at once, tasks that leave, and an engine that dies under them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import aclosing
from functools import partial
from itertools import pairwise

import pytest

from tinylm import SamplingParams
from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import AsyncEngine, EngineDied
from tinylm.model import Model, ModelRunner

LONG = SamplingParams(temperature=0, max_tokens=10**6)


@pytest.fixture(scope="module")
def model(tiny_config, tiny_quantized):
    return Model(tiny_config, tiny_quantized)


def on_engine(model, use, **sizes):
    """Run `use(engine)` in an event loop, within a minute, and end the engine's thread."""

    async def main():
        engine = AsyncEngine(Engine(model, **sizes))
        try:
            async with asyncio.timeout(30):
                return await use(engine)
        finally:
            engine.stop()

    return asyncio.run(main())


async def answer(engine, prompt, params, timeout_s=None):
    async with aclosing(engine.generate(prompt, params, timeout_s)) as updates:
        async for sequence in updates:
            last = sequence
    return last


async def until(condition):
    """Wait for something that another thread is about to make true; the loop's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0.001)


def test_concurrent_tasks_get_what_the_synchronous_engine_gives(model, prompts):
    params = [
        SamplingParams(temperature=0 if i % 2 else 1.1, seed=i, max_tokens=5 + i, logprobs=i % 3 or None)
        for i in range(len(prompts))
    ]
    expected = []
    for prompt, p in zip(prompts, params, strict=True):
        engine = Engine(model, n_slots=1)
        sequence = engine.submit(prompt, p)
        while engine.has_work:
            engine.step()
        expected.append((sequence.tokens, sequence.finish_reason))

    async def use(engine):
        return await asyncio.gather(*[answer(engine, p, q) for p, q in zip(prompts, params, strict=True)])

    sequences = on_engine(model, use, n_slots=4)
    assert [(s.tokens, s.finish_reason) for s in sequences] == expected


@pytest.mark.parametrize("every_s", [0.0, 0.004, 3600.0, float("inf")])
def test_how_often_one_listens_changes_nothing_but_how_often_one_hears(model, prompts, every_s):
    """That the engine has taken it, the first token at once (but for infinity), and everything at the end."""
    params = SamplingParams(temperature=0, max_tokens=40)

    async def listen(engine, prompt):
        counts = []
        async for sequence in engine.generate(prompt, params, every_s=every_s):
            counts.append(len(sequence.tokens))
        return sequence.tokens, counts

    async def use(engine):
        plain = [await answer(engine, prompt, params) for prompt in prompts]
        return plain, await asyncio.gather(*[listen(engine, prompt) for prompt in prompts])

    plain, heard = on_engine(model, use, n_slots=4)
    for expected, (tokens, counts) in zip(plain, heard, strict=True):
        assert tokens == expected.tokens
        assert counts[-1] == len(tokens)
        if every_s >= 3600:
            assert len(counts) <= (2 if every_s == float("inf") else 3)  # two at once, if it was looked for late
        else:
            assert counts == sorted(counts)


@pytest.fixture
def replace_step(monkeypatch):
    """Call with f(step, *arguments): what the model's steps shall be in every engine made from now on."""

    def replace(new):
        make = ModelRunner.__init__

        def make_and_replace(runner, *arguments, **sizes):
            make(runner, *arguments, **sizes)
            runner.step = partial(new, runner.step)

        monkeypatch.setattr(ModelRunner, "__init__", make_and_replace)

    return replace


@pytest.fixture
def permits(replace_step):
    """The model makes a step only when a permit is released: who leaves can be seen to leave in time."""
    permits = threading.Semaphore(0)

    def paced(step, *arguments):
        assert permits.acquire(timeout=10)
        step(*arguments)

    replace_step(paced)
    return permits


async def end(sequences, permits):
    """Step by step until all of them have ended. (The engine's own lists are in between while it admits one.)"""
    while any(sequence.finish_reason is None for sequence in sequences):
        permits.acquire(blocking=False)  # never more than one lies ready, and none is left for who comes next
        permits.release()
        await asyncio.sleep(0.001)
    permits.acquire(blocking=False)


def test_tokens_arrive_while_they_are_made(model, permits):
    """A stream that only came at its end would be no stream; no token may be changed afterwards."""

    async def use(engine):
        seen = []
        async with aclosing(engine.generate([1, 5], SamplingParams(temperature=0, max_tokens=8))) as updates:
            async for sequence in updates:
                seen.append(list(sequence.tokens))
                permits.release()  # the next step is made only after this one was seen
        return seen

    seen = on_engine(model, use)
    assert [len(tokens) for tokens in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert all(later[: len(tokens)] == tokens for tokens, later in pairwise(seen))


@pytest.mark.parametrize("leave", ["break", "cancel", "error"])
def test_who_leaves_frees_the_slot_before_the_next_step(model, permits, leave):
    """A user who closes the page must not keep the engine busy; the next in line gets the slot."""

    async def use(engine):
        started = asyncio.Event()
        sequences = []

        async def leaver():
            async with aclosing(engine.generate([1, 5], LONG)) as updates:
                async for sequence in updates:
                    sequences.append(sequence)
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
        permits.release()  # for the step that it is in; there must be no further one
        await until(lambda: not engine.engine.has_work)
        assert sequences[0].finish_reason == "cancelled"
        permits.release(2)
        return await answer(engine, [1, 6], SamplingParams(temperature=0, max_tokens=2))

    assert len(on_engine(model, use, n_slots=1).tokens) == 2


@pytest.mark.parametrize("turns", range(8))
def test_who_leaves_before_a_token_leaves_the_queue(model, permits, turns):
    """Cancelled so many turns of the loop after asking: on the way to the engine, waiting there, running."""

    async def use(engine):
        submitted = recorded(engine.engine)
        for _ in range(5):
            tasks = [asyncio.create_task(answer(engine, [1, 5 + i], LONG)) for i in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
        permits.release()
        with pytest.raises(ValueError, match="no tokens"):  # answered after all that was asked before it
            await answer(engine, [], LONG)
        await end(submitted, permits)
        return submitted

    assert {sequence.finish_reason for sequence in on_engine(model, use, n_slots=2)} <= {"cancelled"}


def test_who_leaves_in_the_moment_of_being_admitted_leaves_the_queue(model, permits):
    """The cancellation and the engine's 'yes' cross each other, now one first and now the other."""

    async def use(engine):
        loop = asyncio.get_running_loop()
        tasks = []
        submitted = recorded(engine.engine, lambda: loop.call_soon_threadsafe(loop.call_soon, tasks[-1].cancel))
        for i in range(50):
            tasks.append(asyncio.create_task(answer(engine, [1, 5 + i], LONG)))
            with pytest.raises(asyncio.CancelledError):
                await tasks[-1]
            await end(submitted, permits)
        assert not engine._listeners, "a service would remember every request that it ever had"
        return submitted

    sequences = on_engine(model, use, n_slots=1)
    assert len(sequences) == 50
    assert {sequence.finish_reason for sequence in sequences} == {"cancelled"}


def recorded(engine, then=lambda: None):
    """The list that every sequence submitted from now on will be in; `then` is called after each, on the thread."""
    submit, sequences = engine.submit, []

    def recording(*arguments):
        sequences.append(submit(*arguments))
        then()
        return sequences[-1]

    engine.submit = recording
    return sequences


def test_refusals_reach_the_one_who_asked_and_nobody_else(model, greedy):
    """A bad request must not end the engine under the others."""

    async def use(engine):
        good = asyncio.create_task(answer(engine, [1, 5], greedy))
        with pytest.raises(ValueError, match="at most 63"):
            await answer(engine, [1] * 64, greedy)
        with pytest.raises(ValueError, match="token 4096"):
            await answer(engine, [4096], greedy)
        with pytest.raises(ValueError, match="'Once': token ids are whole numbers"):
            await answer(engine, ["Once", "upon"], greedy)
        with pytest.raises(TypeError):
            await answer(engine, None, greedy)
        engine.check()
        return await good

    assert len(on_engine(model, use).tokens) == greedy.max_tokens


def test_a_full_engine_says_so(model, greedy, replace_step):
    async def use(engine):
        results = await asyncio.gather(*[answer(engine, [1, i], greedy) for i in range(2, 9)], return_exceptions=True)
        refused = [r for r in results if isinstance(r, EngineFull)]
        answered = [r for r in results if not isinstance(r, BaseException)]
        assert len(refused) + len(answered) == 7
        assert len(answered) >= 3
        return refused

    release = threading.Event()
    replace_step(lambda step, *arguments: release.wait(20) and step(*arguments))

    async def held(engine):
        """All seven are asked for before any step ends."""
        asyncio.get_running_loop().call_later(0.05, release.set)
        return await use(engine)

    assert on_engine(model, held, n_slots=1, max_waiting=2)


def test_a_timeout_ends_an_answer_with_what_there_is(model):
    async def use(engine):
        return await answer(engine, [1, 5], LONG, timeout_s=0.0)

    sequence = on_engine(model, use)
    assert (sequence.finish_reason, sequence.tokens) == ("timeout", [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_tells_all_who_wait(model, replace_step):
    """Whoever runs, waits in the queue, is on the way to it, or comes later: an error, never an endless wait."""
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
        await asyncio.sleep(0.02)  # their requests lie before a step that will not end well
        engine.check()
        broken.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDied) and "no memory left" in str(r) for r in results), results
        with pytest.raises(EngineDied, match="no memory left"):
            await answer(engine, [1], LONG)
        with pytest.raises(EngineDied, match="no memory left"):
            engine.check()

    on_engine(model, use, n_slots=2)


def test_a_refusal_does_not_wait_for_the_step_under_way(model, permits):
    """However long a step takes, whoever finds the engine full hears of it at once; requests on their way count too."""

    async def use(engine):
        first = asyncio.create_task(answer(engine, [1, 5], SamplingParams(temperature=0, max_tokens=2)))
        await until(lambda: engine.engine.n_running)  # in a step that ends when a permit comes
        waiting = asyncio.create_task(answer(engine, [1, 6], SamplingParams(temperature=0, max_tokens=2)))
        await asyncio.sleep(0)  # it has asked, and the engine's thread can't have seen it
        with pytest.raises(EngineFull):
            await answer(engine, [1, 7], LONG)
        permits.release(4)
        return await asyncio.gather(first, waiting)

    assert [len(sequence.tokens) for sequence in on_engine(model, use, n_slots=1, max_waiting=1)] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_the_engine_s_thread_alone_stands_back(model, greedy):
    async def main():
        engine = AsyncEngine(Engine(model), niceness=3)
        try:
            await answer(engine, [1], greedy)
            (thread,) = [thread for thread in threading.enumerate() if thread.name == "tinylm-engine"]
            return [os.getpriority(os.PRIO_PROCESS, t) for t in (thread.native_id, threading.get_native_id())]
        finally:
            engine.stop()

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert asyncio.run(main()) == [before + 3, before]


def test_a_stalled_step_is_noticed(model, greedy, replace_step):
    """`check` is what a service's health check asks: a hung thread must not look healthy."""
    release, in_step = threading.Event(), threading.Event()

    def hanging(step, *arguments):
        in_step.set()
        assert release.wait(20)
        step(*arguments)

    replace_step(hanging)

    async def use(engine):
        engine.check(stalled_s=0)  # without work there is nothing to stall
        task = asyncio.create_task(answer(engine, [1], greedy))
        await until(in_step.is_set)
        engine.check()
        await asyncio.sleep(0.01)
        with pytest.raises(EngineDied, match="not finished a step"):
            engine.check(stalled_s=0.001)
        release.set()
        return await task

    assert on_engine(model, use).finish_reason == "length"


def test_after_stop_nothing_is_answered(model, greedy):
    async def use(engine):
        engine.stop()
        with pytest.raises(EngineDied):
            engine.check()
        with pytest.raises(EngineDied):
            await answer(engine, [1], greedy)

    on_engine(model, use)


def test_stop_ends_those_who_still_wait(model):
    async def use(engine):
        tasks = [asyncio.create_task(answer(engine, [1, 5 + i], LONG)) for i in range(3)]
        await until(lambda: engine.engine.n_running)
        engine.stop()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = on_engine(model, use, n_slots=1)
    assert all(isinstance(r, EngineDied) or r.finish_reason == "length" for r in results)
    assert any(isinstance(r, EngineDied) for r in results)
