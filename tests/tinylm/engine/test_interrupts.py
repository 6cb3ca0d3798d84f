"""An exception at any moment of a call, such as Ctrl-C, leaves an LLM that works."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.kernels import outcome, start_python
from threadpoolctl import ThreadpoolController

import tinylm
from tinylm import LLM, SamplingParams
from tinylm.model import Model

PACKAGE = str(Path(tinylm.__file__).parent)
STRIDE = 8  # of about 1,400 points; 1 takes a minute per test
SAMPLED = SamplingParams(
    **{"seed": 3, "temperature": 1.0, "max_tokens": 4, "repetition_penalty": 1.3},
    **{"frequency_penalty": 0.5, "bad_words": ("the",), "dry_multiplier": 1, "min_tokens": 2},
)
# Two prompts share a prefix that is long enough to be copied from one slot to another.
STORY = "Once upon a time there was a fox who lived in the woods and "
PROMPTS = [STORY + "was hungry", STORY + "had a friend", "The king"]


class Interrupter:
    """Raises KeyboardInterrupt at one chosen point of the code in tinylm/, and optionally at a second point after it.

    A point is the beginning of a line, or the return of a C function: CPython runs signal handlers after such calls,
    when a function begins, and when a loop jumps back. Lines with a `with` statement are no points: Python reports them
    also at the end of the block, where no signal handler runs before the lock is released.
    """

    def __init__(self, first=None, n_between=None):
        """first: the (point, occurrence) to raise at; None raises nothing. n_between: calls until the second raise."""
        self.points: list[tuple] = []
        self.fired = 0
        self._counts: Counter = Counter()
        self._first, self._n_between = first, n_between

    def __enter__(self):
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)
        sys.setprofile(None)

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and (frame.f_code, frame.f_lineno) not in WITH_LINES:
            self._reach((frame.f_code, frame.f_lineno, "line"))
        return self._trace

    def _profile(self, frame, event, arg):
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if self.fired and self._n_between is not None:
            self._n_between -= 1
            if self._n_between == 0:
                self.fired += 1
                raise KeyboardInterrupt
        elif event == "c_return":
            self._reach((frame.f_code, frame.f_lineno, arg.__name__))

    def _reach(self, point):
        if self.fired:
            return
        self._counts[point] += 1
        self.points.append((point, self._counts[point]))
        if self.points[-1] == self._first:
            self.fired += 1
            raise KeyboardInterrupt


class WithLines:
    """The lines that begin with `with`."""

    def __init__(self):
        self._lines: dict[str, list[str]] = {}

    def __contains__(self, place):
        code, line = place
        if code.co_filename not in self._lines:
            self._lines[code.co_filename] = Path(code.co_filename).read_text().splitlines()
        return self._lines[code.co_filename][line - 1].lstrip().startswith("with ")


WITH_LINES = WithLines()


def use_everything(llm):
    """Call every method: more prompts than slots, a stop string, log-probabilities, a stream that is closed early."""
    llm.generate(PROMPTS, SAMPLED)
    llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=3, stop=("\0",), logprobs=1))
    list(llm.stream(PROMPTS[1], SAMPLED))
    with llm.stream(PROMPTS[2], SAMPLED) as stream:
        next(stream)
    llm.logits([1, 2, 3])


def chosen_points(llm):
    """Return the points that `use_everything` reaches, each with its first and its last occurrence."""
    with Interrupter() as recorder:
        use_everything(llm)
    last = dict(recorder.points)
    return sorted({(point, 1) for point in last} | set(last.items()), key=recorder.points.index)


def texts(llm, prompts=PROMPTS):
    return [completion.text for completion in llm.generate(prompts, SAMPLED)]


def check_after(llm, interrupter, expected):
    """Interrupt `use_everything` while another stream is open. Afterwards all texts must be as expected."""
    other = llm.stream("The other", SAMPLED)
    pieces = [next(other)]
    try:
        with interrupter:
            use_everything(llm)
    except KeyboardInterrupt:
        assert interrupter.fired
    else:
        assert not interrupter.fired, "an interrupt was lost"
    pieces += other
    assert "".join(pieces) == expected[-1]
    assert texts(llm) == expected[:-1]
    assert not llm._engine.has_work
    assert (llm._engine.n_running, llm._engine.n_waiting) == (0, 0)
    assert not llm._stepping.locked()


def n_blas_threads():
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]


@pytest.mark.parametrize("n_slots", [1, 2])
def test_an_interrupt_anywhere_leaves_a_working_llm(tokenizer, tiny_model, n_slots):
    llm = LLM.from_parts(tokenizer, tiny_model, n_slots, threads=2)
    expected = [*texts(llm), *texts(llm, ["The other"])]
    points, threads = chosen_points(llm)[n_slots::STRIDE], n_blas_threads()
    n_fired = 0
    for point in points:
        interrupter = Interrupter(point)
        check_after(llm, interrupter, expected)
        n_fired += interrupter.fired
        assert n_blas_threads() == threads, point
    assert n_fired > 0.8 * len(points)


def test_a_second_interrupt_leaves_a_working_llm(tokenizer, tiny_model):
    llm = LLM.from_parts(tokenizer, tiny_model, n_slots=1, threads=2)
    expected = [*texts(llm), *texts(llm, ["The other"])]
    threads, n_twice = n_blas_threads(), 0
    # A raise at a line ends tracing, but not profiling, which raises the second time.
    lines = [point for point in chosen_points(llm)[::STRIDE] if point[0][2] == "line"]
    for i, point in enumerate(lines):
        interrupter = Interrupter(point, n_between=1 + i % 9)
        check_after(llm, interrupter, expected)
        n_twice += interrupter.fired == 2
        assert n_blas_threads() == threads, point
    assert n_twice > 0.5 * len(lines)


def test_an_interrupt_in_the_numpy_kernels_leaves_a_working_llm(tokenizer, tiny_config, tiny_quantized):
    model = Model(tiny_config, tiny_quantized, "numpy", "float32")
    llm = LLM.from_parts(tokenizer, model, n_slots=2)
    expected = [*texts(llm), *texts(llm, ["The other"])]
    for point in chosen_points(llm)[:: 4 * STRIDE]:
        check_after(llm, Interrupter(point), expected)


def test_signals_at_random_moments_leave_a_working_llm(stories_dir):
    """SIGINT, and SIGALRM with a handler that raises, in another process."""
    outcome(start_python(SIGNALLED, str(stories_dir)), timeout_s=120)


SIGNALLED = """
import os, random, signal, sys, threading, time
from tinylm import LLM, SamplingParams

def alarm(number, frame):
    raise TimeoutError

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGALRM, alarm)
llm = LLM(sys.argv[1], n_slots=2)
params = SamplingParams(seed=1, max_tokens=6)
prompts = ["Once upon a time", "The king had a daughter", "One day a fox"]

def ask():
    pieces = "".join(llm.stream(prompts[0], params))
    return [pieces, *(completion.text for completion in llm.generate(prompts, params))]

def send(number, seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), number)

expected, generator = ask(), random.Random(1)
for i in range(12):
    number, error = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, TimeoutError)][i % 2]
    try:
        threading.Thread(target=send, args=(number, generator.uniform(0, 0.03))).start()
        while True:
            ask()
    except error:
        pass
    assert ask() == expected, i
    assert not llm._engine.has_work, i
"""
