"""Run an engine in its own thread for an event loop: token ids in, an asynchronous stream of snapshots out.

Each message from the engine's thread wakes the event loop, which then competes with the engine for the GIL. So one
message carries all results of a step that are due, and a listener chooses how often it gets results.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tinylm.engine.engine import Engine
from tinylm.engine.request import Progress, Request
from tinylm.engine.word_tokens import WordTokens
from tinylm.kernels.blas import run_limited
from tinylm.sampling import SamplingParams

THREAD_NAME = "tinylm-engine"
STREAM_INTERVAL_S = 0.04  # between two messages of a stream: films show 24 pictures per second


class EngineDied(RuntimeError):
    """The engine's thread has ended, or stalls in one step. Its requests fail, and it accepts no new ones."""


class Listener:
    """Receives the progress of one request. Use a new listener for each call of `AsyncEngine.generate`.

    Threads: the engine's thread replaces `progress`, an immutable snapshot, so any thread may read it at any time. Only
    the event loop uses `changed`, and only the engine's thread uses the rest.
    """

    __slots__ = ("_every_s", "_snapshot_at", "_wakes_at", "changed", "progress", "request")

    def __init__(self, every_s: float = 0.0) -> None:
        """every_s: after the first token, the least time between two wake-ups; infinity: wake up only at the end.

        After the first token, `progress` is at most STREAM_INTERVAL_S old, whatever `every_s` is.
        """
        self.progress: Progress | None = None  # None until the engine has accepted the request
        self.changed = asyncio.Event()
        self.request: Request | None = None
        self._every_s = every_s
        self._wakes_at = 0.0 if math.isfinite(every_s) else math.inf
        self._snapshot_at = 0.0

    @property
    def has_ended(self) -> bool:
        """Return whether the last snapshot is that of a request that has ended."""
        return self.progress is not None and self.progress.finish_reason is not None

    def observe(self, request: Request, now: float) -> bool:
        """Take a snapshot if one is due. Return whether to wake up the task that listens."""
        ended = request.finish_reason is not None
        wakes = ended or now >= self._wakes_at
        if wakes or now >= self._snapshot_at:
            self.progress = request.progress()
            self._snapshot_at = now + STREAM_INTERVAL_S
        if wakes:
            self._wakes_at = now + self._every_s
        return wakes


class AsyncEngine:
    """Runs an engine in its own thread for the tasks of one event loop. Create it while that loop runs.

    Threads: any number of tasks of that loop may call `generate`. Any thread may call `check`, and use what `Engine`
    allows to all threads. The engine's thread alone steps the engine and sees its requests. The loop sends it
    functions through the thread-safe queue `_commands`, and gets snapshots. `_submitting` and `_leaving` change by
    single operations on sets, which are atomic, and the loop reads their sizes. The loop reads `_listeners` only after
    the engine's thread has ended. `_error` and `_last_beat` are single references, which one thread writes.
    """

    def __init__(self, engine: Engine, blas_threads: int = 1, niceness: int = 0) -> None:
        """niceness: added to the niceness of the engine's thread, 0 to 19. It has an effect only on Linux."""
        self.engine = engine
        self._blas_threads, self._niceness = blas_threads, niceness
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[Request, Listener] = {}
        self._submitting: set[asyncio.Future[None]] = set()  # requests that the engine has not seen yet
        self._leaving: set[Listener] = set()  # requests that the engine has not cancelled yet
        self._error: BaseException | None = None
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def check(self, stalled_s: float = 30.0) -> None:
        """Raise EngineDied if the thread has ended, or works at one step for longer than `stalled_s`."""
        if self._error is not None or not self._thread.is_alive():
            raise self._died()
        if self.engine.has_work and time.monotonic() - self._last_beat > stalled_s:
            raise EngineDied(f"the engine's thread has not finished a step for {stalled_s} s")

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        timeout_s: float | None = None,
        listener: Listener | None = None,
        words: WordTokens | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Progress, None]:
        """Yield a snapshot when the engine has accepted the request, whenever `listener` wakes up, and at the end.

        words: what `word_tokens` returns for these settings.
        Closing the generator, or cancelling the task that runs it, frees the slot before the next step.
        Raise ValueError or EngineFull as `Engine.submit` does, and EngineDied if the engine's thread has ended.
        """
        listener = listener or Listener()
        self.check()
        # Refuse now instead of after the current step. `Engine.submit` checks again.
        self.engine.check_room(len(self._submitting) - len(self._leaving))
        accepted = self._submit(lambda: self.engine.submit(prompt, params, timeout_s, words, priority), listener)
        try:
            await accepted
        except asyncio.CancelledError:
            self._leave(listener)
            raise
        try:
            while (progress := listener.progress) is not None:  # always: it is set before `accepted` is
                yield progress
                if progress.finish_reason is not None:
                    return
                await listener.changed.wait()
                listener.changed.clear()
                if self._error is not None and not listener.has_ended:
                    raise self._died()
        finally:
            self._leave(listener)

    def stop(self) -> None:
        """End the thread after its current step. Requests that have not ended fail with EngineDied."""
        self._commands.put(None)
        self._thread.join()

    def _submit(self, submit: Callable[[], Request], listener: Listener) -> asyncio.Future[None]:
        """Have the engine's thread call `submit`. Return a future that ends when the engine accepts or refuses."""
        accepted = self._loop.create_future()
        self._submitting.add(accepted)

        def settle(error: Exception | None) -> None:
            if accepted.done():  # the task was cancelled
                return
            if error is None:
                accepted.set_result(None)
            else:
                accepted.set_exception(error)

        def command() -> None:
            self._submitting.discard(accepted)
            try:
                request = submit()
            except Exception as error:  # every error belongs to the caller: the engine has not changed
                self._loop.call_soon_threadsafe(settle, error)
                return
            self._listeners[request] = listener
            listener.request, listener.progress = request, request.progress()
            self._loop.call_soon_threadsafe(settle, None)

        self._commands.put(command)
        return accepted

    def _leave(self, listener: Listener) -> None:
        """Have the engine's thread forget a request, and cancel it if it has not ended."""

        def command() -> None:
            if listener.request is not None:  # None: the engine refused it
                self._listeners.pop(listener.request, None)
                self.engine.cancel(listener.request)
            self._leaving.discard(listener)

        if not listener.has_ended:
            self._leaving.add(listener)
        self._commands.put(command)

    def _run(self) -> None:
        """Run in the engine's thread until it is stopped or an exception ends it."""
        try:
            _show_name()
            _lower_priority(self._niceness)
            run_limited(self._blas_threads, self._step_until_stopped)
            self._end(RuntimeError("it was stopped"))
        except BaseException as error:  # every kind of error must reach the waiting tasks
            self._end(error)
            raise

    def _step_until_stopped(self) -> None:
        while self._run_commands():
            changed = self.engine.step()
            self._last_beat = now = time.monotonic()
            if due := [
                listener.changed
                for request in changed
                if (listener := self._listeners.get(request)) and listener.observe(request, now)
            ]:
                self._loop.call_soon_threadsafe(_wake, due)

    def _run_commands(self) -> bool:
        """Call the functions of the queue. Wait for one if the engine has no work. Return False to stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._last_beat = time.monotonic()
            command()

    def _end(self, error: BaseException) -> None:
        self._error = error
        with suppress(RuntimeError):  # the loop is closed, so no task waits
            self._loop.call_soon_threadsafe(self._deliver_end)

    def _deliver_end(self) -> None:
        _wake([listener.changed for listener in self._listeners.values()])
        for accepted in self._submitting:
            if not accepted.done():
                accepted.set_exception(self._died())

    def _died(self) -> EngineDied:
        return EngineDied(f"the engine's thread has ended: {self._error!r}")


def _show_name() -> None:
    """Let `top -H` show the name of the calling thread. Python before 3.14 keeps it for itself."""
    with suppress(OSError):  # only Linux has the file
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD_NAME, encoding="utf-8")


def _lower_priority(niceness: int) -> None:
    """Add to the niceness of the calling thread. Only Linux has a niceness per thread."""
    if sys.platform == "linux" and niceness > 0:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def _wake(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
