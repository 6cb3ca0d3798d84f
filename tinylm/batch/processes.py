"""Answer the lines of a batch job with one engine in each of several processes."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection, wait

from tinylm.batch.engine import N_SLOTS, BatchEngine, EngineSettings, LineAnswer
from tinylm.kernels.blas import run_limited
from tinylm.system.machine import usable_cores

LINES_PER_WORKER = 2 * N_SLOTS  # that a process has at once, so that it never waits for its next line
LINES_AHEAD = 1024  # no line begins this far after the first one without an answer: later answers stay in memory

NumberedLine = tuple[int, str]
NumberedAnswer = tuple[int, LineAnswer]


def answers(
    lines: Iterable[str], n_lines: int, on_ready: Callable[[], None], settings: EngineSettings, n_workers: int | None
) -> Generator[LineAnswer, None, None]:
    """Yield the answer to each line, in the order of the lines. Closing the generator ends the processes.

    n_workers: the most processes; None means one for each core that this process may use.
    on_ready: called when the first process has loaded the model. Raise ValueError if a process cannot load it, and
    ChildProcessError if a process ends.
    """
    numbered, in_order = enumerate(lines), InOrder()
    n_sent, is_ready = 0, False
    with ExitStack() as stack:
        n_processes = min(n_workers or usable_cores(), n_lines)
        workers = [stack.enter_context(_Worker(settings)) for _ in range(n_processes)]
        while True:
            while n_sent < in_order.n_taken + LINES_AHEAD:
                worker = min(workers, key=lambda worker: worker.n_lines)
                if worker.n_lines >= LINES_PER_WORKER or (line := next(numbered, None)) is None:
                    break
                worker.send(line)
                n_sent += 1
            if n_sent == in_order.n_taken:
                return
            readable = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in readable]:
                ended = worker.receive()
                if not is_ready:
                    is_ready = True
                    on_ready()
                for number, answer in ended:
                    yield from in_order.add(number, answer)


class InOrder:
    """Puts numbered answers into the order of their numbers. `n_taken` is the number of the next one."""

    def __init__(self) -> None:
        self.n_taken = 0
        self._ahead: dict[int, LineAnswer] = {}

    def add(self, number: int, answer: LineAnswer) -> Iterator[LineAnswer]:
        """Yield the answers that are next now."""
        self._ahead[number] = answer
        while (following := self._ahead.pop(self.n_taken, None)) is not None:
            self.n_taken += 1
            yield following


class _Worker:
    """A process with an engine, and the pipe to it. The process ends with the `with` block."""

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.n_lines = 0  # that the process has
        self._process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, line: NumberedLine) -> None:
        try:
            self.pipe.send(line)
        except OSError:
            raise self._died() from None
        self.n_lines += 1

    def receive(self) -> list[NumberedAnswer]:
        """Return answers. The first message has none: the process is ready."""
        try:
            message: list[NumberedAnswer] | str = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, str):
            raise ValueError(message)
        self.n_lines -= len(message)
        return message

    def _died(self) -> ChildProcessError:
        self._process.join(5)
        status = self._process.exitcode
        return ChildProcessError(f"a process with an engine ended with status {status}: the same command resumes")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join(5)


def _work(pipe: Connection, settings: EngineSettings) -> None:
    """Answer the lines that come through the pipe, until it closes. This runs in a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the pipe
    lines: queue.SimpleQueue[NumberedLine | None] = queue.SimpleQueue()
    # Without a thread that always reads, both ends could wait until the other one reads.
    threading.Thread(target=_read, args=(pipe, lines), daemon=True).start()
    try:
        engine = BatchEngine(settings)
    except (OSError, ValueError) as error:
        pipe.send(str(error))
        return
    with suppress(OSError):  # the parent has ended
        pipe.send([])
        run_limited(1, partial(_answer, engine, lines, pipe))


def _read(pipe: Connection, lines: queue.SimpleQueue[NumberedLine | None]) -> None:
    with suppress(EOFError, OSError):
        while True:
            lines.put(pipe.recv())
    lines.put(None)


def _answer(engine: BatchEngine, lines: queue.SimpleQueue[NumberedLine | None], pipe: Connection) -> None:
    while True:
        with suppress(queue.Empty):
            while True:
                line = lines.get(block=not engine.has_work)
                if line is None:
                    return
                engine.add(*line)
        if ended := engine.step():
            pipe.send(ended)
