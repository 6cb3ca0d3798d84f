"""An engine on a thread of its own, asked from an event loop: ids in, an asynchronous stream of tokens out.

The loop only hands requests in and takes tokens out. Each crossing wakes the loop, which then takes the interpreter's
lock from the engine: so the results of a step cross together, and only those that somebody wants by now. Text, gRPC
and Ray are other modules' business.
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

from tinylm.engine.engine import Engine
from tinylm.engine.request import Request
from tinylm.kernels.blas import run_limited
from tinylm.sampling import SamplingParams

STREAM_INTERVAL_S = 0.04  # between two messages of a stream: a film has 24 pictures a second


class EngineDied(RuntimeError):
    """The engine's thread ended by an error; every request on it fails, and so will new ones."""


class _Listener:
    """Whoever waits for a request, and when it wants to hear of it next."""

    __slots__ = ("changed", "every_s", "next_at")

    def __init__(self, every_s: float) -> None:
        self.changed = asyncio.Event()
        self.every_s = every_s
        self.next_at = 0.0 if math.isfinite(every_s) else math.inf  # the first token at once, or none but the last

    def wants(self, request: Request, now: float) -> bool:
        if request.finish_reason is None and now < self.next_at:
            return False
        self.next_at = now + self.every_s
        return True


class AsyncEngine:
    """Runs an engine on its own thread for the tasks of one event loop. Create it while that loop runs.

    Any number of tasks of that loop may call `generate`. Any thread may call `check` and read the properties and the
    `stats` of `engine`.
    """

    def __init__(self, engine: Engine, blas_threads: int = 1, niceness: int = 0) -> None:
        """niceness: how far the engine's thread stands back behind others of this machine, 0 to 19 (Linux only)."""
        self.engine = engine
        self._blas_threads, self._niceness = blas_threads, niceness
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[Request, _Listener] = {}  # the engine's thread adds them and takes them away
        # Those that the engine has yet to see.
        self._submitting: set[asyncio.Future[tuple[Request, asyncio.Event]]] = set()
        self._leaving: set[Request] = set()  # whose place is free as soon as the engine hears of it
        self._error: BaseException | None = None
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tinylm-engine", daemon=True)
        self._thread.start()

    def check(self, stalled_s: float = 30.0) -> None:
        """Raise EngineDied when the thread has ended, or has worked at one step for longer than `stalled_s`."""
        if self._error is not None or not self._thread.is_alive():
            raise self._died()
        if self.engine.has_work and time.monotonic() - self._last_beat > stalled_s:
            raise EngineDied(f"the engine's thread has not finished a step for {stalled_s} s")

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, timeout_s: float | None = None, every_s: float = 0.0
    ) -> AsyncGenerator[Request, None]:
        """Yields the same request once the engine has taken it, when it has gained tokens, and when it has ended.

        every_s: after the first token, not oftener than this; infinity: only when it has ended. Raises ValueError or
        EngineFull as `Engine.submit` does, EngineDied when there is no engine any more. Closing the generator, or
        cancelling the task that runs it, frees the slot before the next step.
        """
        request, changed = await self._submit(lambda: self.engine.submit(prompt, params, timeout_s), every_s)
        try:
            yield request
            finished = False
            while not finished:
                await changed.wait()
                changed.clear()
                finished = request.finish_reason is not None
                if self._error is not None and not finished:
                    raise self._died()
                yield request
        finally:
            self._leave(request)

    def stop(self) -> None:
        """End the thread after the step it is in; whoever still waits for an answer gets EngineDied."""
        self._commands.put(None)
        self._thread.join()

    def _leave(self, request: Request) -> None:
        def command() -> None:
            self._listeners.pop(request, None)
            self.engine.cancel(request)
            self._leaving.discard(request)

        if request.finish_reason is None:
            self._leaving.add(request)
        self._commands.put(command)

    async def _submit(self, submit: Callable[[], Request], every_s: float) -> tuple[Request, asyncio.Event]:
        """Run `submit` on the engine's thread and listen to its request before that can make a step."""
        self.check()
        # A refusal need not wait for the step under way; the engine looks again.
        self.engine.check_room(len(self._submitting) - len(self._leaving))
        future: asyncio.Future[tuple[Request, asyncio.Event]] = self._loop.create_future()
        self._submitting.add(future)

        def accept(request: Request, changed: asyncio.Event) -> None:
            if future.cancelled():
                self._leave(request)
            else:
                future.set_result((request, changed))

        def refuse(error: Exception) -> None:
            if not future.cancelled():
                future.set_exception(error)

        def command() -> None:
            self._submitting.discard(future)
            try:
                request = submit()
            except Exception as error:  # the caller's, whatever it is: the engine has not changed
                self._loop.call_soon_threadsafe(refuse, error)
            else:
                self._listeners[request] = listener = _Listener(every_s)
                self._loop.call_soon_threadsafe(accept, request, listener.changed)

        self._commands.put(command)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._leave(future.result()[0])  # it came in the same moment as the cancellation
            raise

    def _run(self) -> None:
        """Run on the engine's thread until it is stopped or an exception ends it."""
        try:
            _be_nice(self._niceness)
            run_limited(self._blas_threads, self._step_until_stopped)
            self._end(RuntimeError("it was stopped"))
        except BaseException as error:  # the tasks that wait must get every kind of error
            self._end(error)
            raise

    def _step_until_stopped(self) -> None:
        while self._obey():
            changed = self.engine.step()
            self._last_beat = now = time.monotonic()
            if wanted := [
                listener.changed
                for request in changed
                if (listener := self._listeners.get(request)) and listener.wants(request, now)
            ]:
                self._loop.call_soon_threadsafe(_set_all, wanted)

    def _end(self, error: BaseException) -> None:
        self._error = error
        with suppress(RuntimeError):  # a closed loop has nobody left who waits
            self._loop.call_soon_threadsafe(self._deliver_end)

    def _obey(self) -> bool:
        """Carry out the commands that have come, waiting for one when there is nothing else to do; False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._last_beat = time.monotonic()
            command()

    def _deliver_end(self) -> None:
        _set_all([listener.changed for listener in self._listeners.values()])
        for future in self._submitting:
            if not future.done():
                future.set_exception(self._died())

    def _died(self) -> EngineDied:
        return EngineDied(f"the engine's thread has ended: {self._error!r}")


def _be_nice(niceness: int) -> None:
    """Let others have the core sooner than the calling thread; on Linux alone, a thread has a niceness of its own."""
    if sys.platform == "linux" and niceness > 0:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
