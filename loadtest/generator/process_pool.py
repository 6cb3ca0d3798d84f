"""The processes that make the calls of a run, and the division of a run among them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from loadtest.generator import worker_process
from loadtest.generator.worker_process import Done, Failed, Job, Ready, Tick
from loadtest.load import Load

START_S = 0.05  # from the command to start to the first call
READY_S = 120.0  # an engine in the process may first compile its kernels


class ProcessPool:
    """Processes that serve all runs of a sweep. They end with the `with` block."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(5)

    def run(
        self,
        load: Load,
        n_processes: int,
        on_begin: Callable[[float], None],
        on_tick: Callable[[Tick], None],
        on_wait: Callable[[], None],
    ) -> list[Done]:
        """Make the calls of a run. Return the results of its processes.

        on_begin: called with the begin of the measured time, before it comes. on_wait: called often.
        Raises RuntimeError if a process fails. A failed call is no error.
        """
        jobs = share_out(load, n_processes)
        pipes = self._start(len(jobs))
        for pipe, job in zip(pipes, jobs, strict=True):
            pipe.send(job)
        _wait_until_ready(pipes)
        begin = time.monotonic() + START_S + load.warmup_s
        for pipe in pipes:
            pipe.send(begin)
        on_begin(begin)
        return _collect(pipes, on_tick, on_wait)

    def _start(self, n: int) -> list[Connection]:
        """Start processes until there are n. Return the pipes to the first n."""
        while len(self._workers) < n:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=worker_process.main, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        return [pipe for _, pipe in self._workers[:n]]


def _wait_until_ready(pipes: Sequence[Connection]) -> None:
    deadline = time.monotonic() + READY_S
    for pipe in pipes:
        if not pipe.poll(max(deadline - time.monotonic(), 0)):
            raise RuntimeError(f"a process of the load generator was not ready within {READY_S:.0f} s")
        if not isinstance(message := _receive(pipe), Ready):
            raise RuntimeError(f"a process of the load generator sent {message!r} instead of Ready")


def _collect(pipes: Sequence[Connection], on_tick: Callable[[Tick], None], on_wait: Callable[[], None]) -> list[Done]:
    """Return the results of all processes when the last one is done."""
    done: dict[Connection, Done] = {}
    while len(done) < len(pipes):
        readable = wait([pipe for pipe in pipes if pipe not in done], timeout=0.1)
        for pipe in [pipe for pipe in pipes if pipe in readable]:
            message = _receive(pipe)
            if isinstance(message, Done):
                done[pipe] = message
            elif isinstance(message, Tick):
                on_tick(message)
        on_wait()
    return [done[pipe] for pipe in pipes]


def _receive(pipe: Connection) -> Ready | Tick | Done:
    try:
        message: Ready | Tick | Done | Failed = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError("a process of the load generator ended unexpectedly") from None
    if isinstance(message, Failed):
        raise RuntimeError(message.error)
    return message


def share_out(load: Load, n_processes: int) -> list[Job]:
    """Divide a run into jobs for at most n processes. Each job has at least one client or request."""
    n = min(n_processes, load.concurrency or n_processes, load.requests or n_processes)
    return [Job(load, i, n) for i in range(n)]
