"""The order in which waiting requests get slots: by priority, then by arrival, and none waits for ever."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.engine import Engine, engine
from tinylm.engine.async_engine import AsyncEngine
from tinylm.engine.request import Request
from tinylm.model import Model

ONE_STEP = SamplingParams(temperature=0, max_tokens=1)  # with a prompt of one token
PRIORITIES = st.integers(0, 3)
# A number submits a request with that priority; "step" runs the engine; "cancel" ends the oldest waiting request.
OPERATIONS = st.lists(st.one_of(PRIORITIES, st.sampled_from(["step", "cancel"])), max_size=40)
examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tiny_config, tiny_quantized):
    return Model(tiny_config, tiny_quantized, "numpy", "float32")


@given(operations=OPERATIONS, n_slots=st.integers(1, 3))
@examples
def test_slots_go_to_the_highest_priority_then_the_oldest(model, operations, n_slots):
    engine = Engine(model, n_slots=n_slots)
    waiting: list[Request] = []  # in the order they came
    for operation in [*operations, *["step"] * len(operations)]:
        if operation == "step":
            expected = [waiting.pop(waiting.index(max(waiting, key=lambda r: r.priority)))
                        for _ in range(min(n_slots, len(waiting)))]  # fmt: skip
            assert set(engine.step()) == set(expected)  # each takes one step
        elif operation == "cancel":
            if waiting:
                engine.cancel(waiting.pop(0))
        else:
            waiting.append(engine.submit([1], ONE_STEP, priority=operation))
        assert engine.n_waiting == len(waiting)
    assert not engine.has_work


@given(priorities=st.lists(st.one_of(PRIORITIES, st.just("step")), max_size=60), limit=st.integers(0, 4))
@examples
def test_a_waiting_request_is_overtaken_a_limited_number_of_times(model, monkeypatch, priorities, limit):
    monkeypatch.setattr(engine, "MAX_OVERTAKEN", limit)
    one = Engine(model, n_slots=1)
    came: list[Request] = []
    went: list[Request] = []
    for operation in [*priorities, *["step"] * len(priorities)]:
        if operation == "step":
            went += one.step()
        else:
            came.append(one.submit([1], ONE_STEP, priority=operation))
    assert sorted(map(came.index, went)) == list(range(len(came)))
    for place, request in enumerate(came):
        overtaking = [other for other in came[place + 1 :] if went.index(other) < went.index(request)]
        assert len(overtaking) <= limit
        assert all(other.priority > request.priority for other in overtaking)


def test_a_high_priority_does_not_take_the_slot_of_a_running_request(model):
    one = Engine(model, n_slots=1)
    running = one.submit([1], SamplingParams(temperature=0, max_tokens=8))
    one.step()
    urgent = one.submit([1], ONE_STEP, priority=9)
    while running.finish_reason is None:
        assert urgent.admitted_at is None
        one.step()
    assert one.step() == [urgent]


def test_a_negative_priority_is_refused(model):
    one = Engine(model, n_slots=1)
    with pytest.raises(ValueError, match="priority is -1: it must be at least 0"):
        one.submit([1], ONE_STEP, priority=-1)
    assert not one.has_work


def test_a_task_with_a_priority_gets_the_next_slot(model, monkeypatch):
    step, permits = Engine.step, threading.Semaphore(0)
    ended: list[tuple[int, int]] = []  # (tokens, priority) of each request, in the order in which the engine ends them

    def paced(self):
        assert permits.acquire(timeout=60)
        changed = step(self)
        ended.extend((r.params.max_tokens, r.priority) for r in changed if len(r.tokens) == r.params.max_tokens)
        return changed

    async def check() -> None:
        runner, has_begun = AsyncEngine(Engine(model, n_slots=1)), asyncio.Event()

        async def ask(n_tokens: int, priority: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=n_tokens)
            async for progress in runner.generate([1], params, priority=priority):
                if progress.tokens:
                    has_begun.set()

        permits.release()
        tasks = [asyncio.create_task(ask(3, 0))]
        await has_begun.wait()
        tasks += [asyncio.create_task(ask(1, priority)) for priority in range(3)]
        await asyncio.sleep(0)  # all three tasks submit their requests
        permits.release(100)
        await asyncio.wait(tasks)
        runner.stop()

    monkeypatch.setattr(Engine, "step", paced)
    asyncio.run(check())
    assert ended == [(3, 0), (1, 2), (1, 1), (1, 0)]
