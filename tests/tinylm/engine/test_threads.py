"""Several threads share an LLM. They get the texts of single-threaded use, and share a batch."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from threadpoolctl import ThreadpoolController

from tinylm import LLM, SamplingParams
from tinylm.kernels.blas import run_limited

N_THREADS = 8


@pytest.fixture(autouse=True)
def frequent_switches():
    """Switch threads more often than every 5 ms, to find races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def llm(tokenizer, tiny_model):
    return LLM.from_parts(tokenizer, tiny_model, n_slots=4)


def at_once(*functions):
    """Run the functions in threads at the same time. Return their results. Raise the first error."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run, f) for f in functions]]


def uses(llm, i):
    """Return functions for all uses of an LLM, with prompts and settings of thread `i`."""
    prompts = [f"Once upon a time {i}", f"The king {i}", "The fox"]
    params = SamplingParams(seed=i, max_tokens=8 + i, logprobs=i % 2 or None)

    def stream_left_early():
        with llm.stream(prompts[0], params) as stream:
            return next(stream)[0]

    return [
        lambda: [c.token_ids for c in llm.generate(prompts, params)],
        lambda: "".join(llm.stream(prompts[1], params)),
        stream_left_early,
        lambda: llm.logits([1, 5, 7, i]).tolist(),
        lambda: llm.generate(prompts[0], SamplingParams(temperature=0, max_tokens=20, stop=("a", "e")))[0].text,
        lambda: llm.tokenizer.decode(llm.tokenizer.encode(prompts[0] * 20)),
    ]


def test_threads_get_the_texts_of_single_threaded_use(llm):
    def work(i):
        functions = uses(llm, i)
        return [f() for f in functions[i % len(functions) :] + functions[: i % len(functions)]]

    expected = [work(i) for i in range(N_THREADS)]
    assert at_once(*(lambda i=i: work(i) for i in range(N_THREADS))) == expected
    assert not llm._engine.has_work


def test_calls_of_several_threads_share_one_batch(llm, monkeypatch):
    """The step of one thread advances all requests, also those that come during the step."""
    params = SamplingParams(temperature=0, max_tokens=10)
    step, all_came = llm._engine._runner.step, threading.Event()

    def waiting(*arguments):
        for _ in range(10_000):
            if all_came.is_set() or len(llm._engine._unfinished) == 4:
                break
            time.sleep(0.001)
        all_came.set()
        step(*arguments)

    monkeypatch.setattr(llm._engine._runner, "step", waiting)
    one = threading.Thread(target=llm.generate, args=("Story 0", params))
    one.start()
    at_once(*(lambda i=i: llm.generate(f"Story {i}", params) for i in range(1, 4)))
    one.join()
    assert llm._engine.stats.batch_size.counts()[3] > 5


def test_threads_step_the_engine_in_turn(llm, monkeypatch):
    """A thread that has stepped steps again only after the threads that wait."""
    step, go_on, order = llm._engine._runner.step, threading.Event(), []

    def recorded(*arguments):
        order.append(threading.current_thread().name)
        assert go_on.wait(10)
        step(*arguments)

    monkeypatch.setattr(llm._engine._runner, "step", recorded)
    threads = []
    for name in "ABC":
        last = llm._last_in_line
        threads.append(threading.Thread(target=llm.generate, args=(name, SamplingParams(max_tokens=5)), name=name))
        threads[-1].start()
        for _ in range(10_000):
            if llm._last_in_line is not last and order:  # A is in the first step, and the others wait behind it
                break
            time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join()
    assert order[:3] == ["A", "B", "C"]


def test_a_failed_step_fails_only_the_call_that_stepped(llm, monkeypatch):
    params = SamplingParams(seed=2, max_tokens=30)
    [expected] = llm.generate("The king", params)
    step, calls = llm._engine._runner.step, itertools.count(1)

    def failing(*arguments):
        step(*arguments)
        if next(calls) == 10:
            raise MemoryError

    monkeypatch.setattr(llm._engine._runner, "step", failing)

    def ask():
        try:
            return llm.generate("The king", params)[0].text
        except MemoryError:
            return "failed"

    assert sorted(at_once(*[ask] * 4)) == sorted(["failed", *[expected.text] * 3])
    assert not llm._engine.has_work


def test_a_garbage_stream_frees_its_slot(llm, monkeypatch):
    """The garbage collector runs in the middle of a step here, while the thread holds the lock."""
    stream = llm.stream("Once", SamplingParams(max_tokens=50))
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle
    step = llm._engine._runner.step

    def collecting(*arguments):
        gc.collect()
        step(*arguments)

    monkeypatch.setattr(llm._engine._runner, "step", collecting)
    assert len(llm.generate("The king", SamplingParams(temperature=0, max_tokens=3))[0].token_ids) == 3
    assert not llm._engine.has_work


# --- the number of BLAS threads


def n_blas_threads():
    """Return the number of threads of NumPy's library. Tests of PyTorch load another library."""
    return next(
        library.num_threads for library in ThreadpoolController().lib_controllers if "numpy" in library.filepath
    )


def test_overlapping_blas_limits_leave_the_number_from_before():
    """They enter and leave in the same order, where each saved number is already another thread's limit."""
    second_entered, first_left = threading.Event(), threading.Event()

    def first():
        return run_limited(1, lambda: (second_entered.wait(10), n_blas_threads()))[1]

    def second():
        def function():
            second_entered.set()
            assert first_left.wait(10)
            return n_blas_threads()

        return run_limited(2, function)

    with ThreadpoolController().limit(limits=3, user_api="blas"), ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        during_both = one.result(10)
        first_left.set()
        assert (during_both, two.result(10)) == (1, 2)
        assert n_blas_threads() == 3


def test_a_blas_limit_ends_with_an_exception():
    def fail():
        raise KeyboardInterrupt

    before = n_blas_threads()
    with pytest.raises(KeyboardInterrupt):
        run_limited(before + 1, fail)
    assert n_blas_threads() == before


def test_an_unread_stream_blocks_no_other_thread(tokenizer, tiny_model):
    llm = LLM.from_parts(tokenizer, tiny_model, n_slots=1)
    params = SamplingParams(seed=1, max_tokens=30)
    [alone] = llm.generate("Once", params)
    stream = llm.stream("Once", params)
    first = next(stream)
    others = at_once(*(lambda: llm.generate("Once", params)[0].text for _ in range(3)))
    assert others == [alone.text] * 3
    assert first + "".join(stream) == alone.text


def test_a_refusal_in_one_thread_leaves_the_others_right(llm):
    params = SamplingParams(seed=2, max_tokens=30)
    [expected] = llm.generate("The king", params)

    def refused():
        for _ in range(20):
            with pytest.raises(ValueError, match="prompt has"):
                llm.generate(["a", "word " * 100], params)

    texts = at_once(refused, *(lambda: llm.generate("The king", params)[0].text for _ in range(3)))[1:]
    assert texts == [expected.text] * 3
