"""Explain what the served model computes, in a process with the lowest priority, one question at a time.

It is no thread of the replica: a thread with a low priority can lose its core while it holds Python's lock, which the
engine and the event loop need. The process starts with the first question, and ends when nobody asks for a while.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tinylm
from tinylm.engine import Engine
from tinylm.explain.worker import OK
from tinylm.serving.calls import Busy

ANSWER_WITHIN_S = 60.0  # an answer takes 0.1 s, but much longer when other programs use all cores
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Explanations:
    """A replica's explaining process. It belongs to one event loop.

    Threads: only one question is under way, and only its thread uses the pipes. `_under_way` is its future.
    """

    def __init__(self, model: Path, precision: str, engine: Engine) -> None:
        """model: the directory of the served model. engine: no question is answered while all its slots are in use."""
        self._command = [sys.executable, "-m", "tinylm.explain.worker", str(model), precision]
        self._engine = engine
        self._process: subprocess.Popen[bytes] | None = None
        self._under_way: asyncio.Future[bytes] | None = None

    def check_idle(self) -> None:
        """Raise Busy if another explanation runs in this replica, or if no slot of the engine is free."""
        if self._under_way is not None and not self._under_way.done():
            raise Busy("this replica works at another explanation")
        if self._engine.n_waiting > 0 or self._engine.n_running >= self._engine.n_slots:
            raise Busy(f"requests use all {self._engine.n_slots} slots of this replica")

    async def ask(self, question: Mapping[str, Any]) -> bytes:
        """Return the JSON object that `tinylm.explain.worker` answers.

        A caller that leaves does not stop the process: the next question is refused until the answer is there.
        Raise ValueError for a wrong question, Busy as `check_idle`, or if the process ends or is too slow.
        """
        self.check_idle()
        loop = asyncio.get_running_loop()
        self._under_way = loop.run_in_executor(None, self._exchange, json.dumps(question).encode())
        self._under_way.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                line = await asyncio.shield(self._under_way)
        except TimeoutError:
            self.stop()
            raise Busy(f"it took longer than {ANSWER_WITHIN_S:.0f} s") from None
        kind, _, answer = line.partition(b" ")
        if kind == OK:
            return answer
        raise ValueError(json.loads(answer))

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _exchange(self, question: bytes) -> bytes:
        """Write a question and read its answer. This blocks, so it runs in a thread."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        source, target = self._process.stdout, self._process.stdin
        if source is None or target is None:
            raise RuntimeError("the process has no pipes")
        try:
            target.write(question + b"\n")
            target.flush()
            line = source.readline()
        except BrokenPipeError:  # it ended because nobody had asked for a while
            line = b""
        if not line:
            raise Busy("its process has ended")
        return line

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(tinylm.__file__).parents[1])  # Ray can import it from a directory that is not in PYTHONPATH
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
