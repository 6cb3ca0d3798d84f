"""The record of steps says which requests shared them, without their text, and only while somebody watches."""

from __future__ import annotations

import time

import pytest
from helpers.kernels import random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import ModelConfig, SamplingParams
from tinylm.engine import Engine
from tinylm.engine.steps import N_KEPT, WATCHED_S, StepLog
from tinylm.model import Model

CONFIG = ModelConfig(vocab_size=64, hidden_size=16, n_layers=1, n_heads=1, mlp_size=16, context=64)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_tensors(CONFIG, seed=0), "numpy", "float32")


REQUEST = st.tuples(st.lists(st.integers(0, 63), min_size=1, max_size=40), st.integers(1, 6))


@settings(max_examples=30)
@given(st.lists(REQUEST, min_size=1, max_size=6), st.integers(1, 8))
def test_shares_are_the_tokens_that_each_step_cached(
    model: Model, prompts: list[tuple[list[int], int]], prefill_tokens: int
) -> None:
    engine = Engine(model, n_slots=2, prefill_tokens=prefill_tokens)
    engine.steps.watch()
    requests = [engine.submit(ids, SamplingParams(n, ignore_eos=True)) for ids, n in prompts]
    expected, cached = [], [0] * len(requests)
    while engine.has_work:
        engine.step()
        shares = set()
        for i, request in enumerate(requests):
            begin = max(cached[i], request.n_reused)
            if request.n_cached > begin:
                kind = "prompt" if begin < len(request.prompt) else "answer"
                shares.add((request.number, request.slot, request.n_cached - begin, kind))
                cached[i] = request.n_cached
        expected.append((shares, engine.n_waiting))
    found = engine.steps.watch()
    assert [(set(step.shares), step.n_waiting) for step in found] == expected[-N_KEPT:]
    assert [step.number for step in found] == list(range(1, len(expected) + 1))[-N_KEPT:]
    assert sorted(request.number for request in requests) == list(range(1, len(requests) + 1))


def test_the_parts_of_a_step_add_up_to_its_time(model: Model) -> None:
    engine = Engine(model, n_slots=1)
    engine.steps.watch()
    engine.submit([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    while engine.has_work:
        engine.step()
    steps = engine.steps.watch()
    total = sum(step.prepare_s + step.model_s + step.results_s for step in steps)
    assert total == pytest.approx(engine.stats.step_s.sum)
    assert all(min(step.prepare_s, step.model_s, step.results_s) >= 0 for step in steps)
    assert [step.began_at for step in steps] == sorted(step.began_at for step in steps)


def test_nothing_is_recorded_while_nobody_watches(model: Model) -> None:
    engine = Engine(model, n_slots=1)
    engine.submit([1, 2, 3], SamplingParams(max_tokens=5))
    while engine.has_work:
        engine.step()
    assert engine.steps.watch() == []
    assert engine.steps.is_watched(time.monotonic())
    assert not engine.steps.is_watched(time.monotonic() + WATCHED_S)


@given(st.integers(0, 3 * N_KEPT))
def test_the_last_steps_are_kept_in_their_order(n: int) -> None:
    log = StepLog()
    for i in range(n):
        log.record((i, i + 0.25, i + 0.5, i + 0.875), 0, [])
    kept = log.watch()
    assert [step.began_at for step in kept] == [float(i) for i in range(n)][-N_KEPT:]
    assert all((step.prepare_s, step.model_s, step.results_s) == (0.25, 0.25, 0.375) for step in kept)
