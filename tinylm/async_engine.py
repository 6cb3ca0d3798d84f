"""An engine on a thread of its own, asked from an event loop: ids in, an asynchronous stream of tokens out.

The loop only hands requests in and takes tokens out; each step's results cross over in one call. Text, gRPC and Ray
are other modules' business.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress

from threadpoolctl import ThreadpoolController

from tinylm.engine import Engine
from tinylm.engine import Sequence as EngineSequence
from tinylm.sampling import SamplingParams


class EngineDied(RuntimeError):
    """The engine's thread ended by an error; every request on it fails, and so will new ones."""


class AsyncEngine:
    """Start it inside a running event loop; `generate` may be called by any number of tasks of that loop."""

    def __init__(self, engine: Engine, blas_threads: int = 1) -> None:
        self.engine = engine
        self._blas_threads = blas_threads
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiters: dict[EngineSequence, asyncio.Event] = {}
        self._submitting: set[asyncio.Future[EngineSequence]] = set()
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
        self, prompt: Sequence[int], params: SamplingParams, timeout_s: float | None = None
    ) -> AsyncGenerator[EngineSequence, None]:
        """Yields the same sequence whenever it has gained tokens, and a last time when it has ended.

        Raises ValueError or EngineFull as `Engine.submit` does, EngineDied when there is no engine any more. Closing
        the generator, or cancelling the task that runs it, frees the slot before the next step.
        """
        sequence = await self._submit(lambda: self.engine.submit(prompt, params, timeout_s))
        changed = self._waiters[sequence]
        try:
            finished = False
            while not finished:
                await changed.wait()
                changed.clear()
                finished = sequence.finish_reason is not None
                if self._error is not None and not finished:
                    raise self._died()
                yield sequence
        finally:
            self._leave(sequence)

    def stop(self) -> None:
        """End the thread after the step it is in; whoever still waits for an answer gets EngineDied."""
        self._commands.put(None)
        self._thread.join()

    def _leave(self, sequence: EngineSequence) -> None:
        self._waiters.pop(sequence, None)
        self._commands.put(lambda: self.engine.cancel(sequence))

    async def _submit(self, submit: Callable[[], EngineSequence]) -> EngineSequence:
        """Run `submit` on the engine's thread and register its sequence before that can make a step."""
        self.check()
        future: asyncio.Future[EngineSequence] = self._loop.create_future()
        self._submitting.add(future)
        future.add_done_callback(self._submitting.discard)

        def answer(sequence: EngineSequence | None, error: Exception | None) -> None:
            if future.cancelled():
                if sequence is not None:
                    self._leave(sequence)
            elif error is not None:
                future.set_exception(error)
            elif sequence is not None:
                self._waiters[sequence] = asyncio.Event()
                future.set_result(sequence)

        def command() -> None:
            try:
                sequence = submit()
            except Exception as error:  # the caller's, whatever it is: the engine has not changed
                self._loop.call_soon_threadsafe(answer, None, error)
            else:
                self._loop.call_soon_threadsafe(answer, sequence, None)

        self._commands.put(command)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._leave(future.result())  # it came in the same moment as the cancellation
            raise

    def _run(self) -> None:
        try:
            with ThreadpoolController().limit(limits=self._blas_threads, user_api="blas"):
                while self._obey():
                    changed = self.engine.step()
                    self._last_beat = time.monotonic()
                    if changed:
                        self._loop.call_soon_threadsafe(self._deliver, changed)
            self._end(RuntimeError("it was stopped"))
        except BaseException as error:  # whatever it was, those who wait must hear of it
            self._end(error)
            raise

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

    def _deliver(self, changed: list[EngineSequence]) -> None:
        for sequence in changed:
            if event := self._waiters.get(sequence):
                event.set()

    def _deliver_end(self) -> None:
        for event in self._waiters.values():
            event.set()
        for future in self._submitting:
            if not future.done():
                future.set_exception(self._died())

    def _died(self) -> EngineDied:
        return EngineDied(f"the engine's thread has ended: {self._error!r}")
