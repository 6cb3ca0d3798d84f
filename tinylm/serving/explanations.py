"""Explain what the served model computes, in a process with the lowest priority, one question at a time.

It is no thread of the replica: a thread with a low priority can lose its core while it holds Python's lock, which the
engine and the event loop need. The process starts with the first question, and ends when nobody asks for a while.

`tinylm.serving.grpc` and `tinylm.serving.http` read the questions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylm
from tinylm.engine import Engine
from tinylm.explain.engine_answer import EngineAnswer, for_one_token
from tinylm.explain.explainer import as_tokens, cache_use, read_prompt
from tinylm.explain.forms import Form, encoded
from tinylm.explain.worker import OK
from tinylm.sampling import SamplingParams
from tinylm.serving.calls import Busy, Call

if TYPE_CHECKING:
    from tinylm.serving.service import Service

LARGEST_NICENESS = 19
# An answer is slow if it takes SLOW times its CPU time and SLOW_S seconds more. Then others need the cores.
SLOW, SLOW_S = 2.0, 0.05
REST, LONGEST_REST_S = 60.0, 20.0  # after two slow answers in succession: times the time of the second
ANSWER_WITHIN_S = 60.0  # an answer takes 0.1 s, but much longer when other programs use all cores
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


async def explain(
    service: Service,
    call: Call,
    form: Form,
    piece: str,
    prompt: str,
    params: SamplingParams | None = None,
    **fields: object,
) -> bytes:
    """Return one piece in a form of `tinylm.explain.forms`.

    params: the settings that choose the token, for "scores". fields: arguments of the method of `Explainer`.
    Raise ValueError for a wrong field, Busy if the replica does not explain now, or as `Service.admit` and `generate`.
    """
    ids = read_prompt(prompt, service.tokenizer, service.config)
    if piece == "tokens":
        return encoded(piece, {"tokens": as_tokens(ids, service.tokenizer)}, len(ids), form)
    if piece == "cache":
        return encoded(piece, cache_use(service.engine.engine, len(ids)), len(ids), form)
    service.explanations.check_idle()
    question = {"piece": piece, "prompt": prompt, "n_tokens": len(ids), "form": form, "fields": fields}
    if params is not None:
        # The first token is all that is explained.
        params = dataclasses.replace(
            params, max_tokens=max(1, params.min_tokens), stop=(), logprobs=None, prompt_logprobs=None
        )
        answer = await _ask_engine(service, prompt, params, call)
        question |= {"settings": dataclasses.asdict(params), "by_engine": answer.to_json()}
    return await service.explanations.ask(question)


async def _ask_engine(service: Service, prompt: str, params: SamplingParams, call: Call) -> EngineAnswer:
    """Return the next token by the served engine. For the limits of a key, this is a request like any other."""
    params = for_one_token(params)
    [ids] = await service.admit(call, [prompt], params)
    async with aclosing(service.generate(ids, params, None, call, whole=True)) as deltas:
        async for _ in deltas:
            pass
    return EngineAnswer.of(call.answers[-1].progress)


class Explanations:
    """A replica's explaining process. It belongs to one event loop.

    Threads: only one question is under way, and only its thread uses the pipes. `_under_way` is its future.
    """

    def __init__(self, model: Path, precision: str, engine: Engine) -> None:
        """model: the directory of the served model. engine: no question is answered while all its slots are in use."""
        self._command = [sys.executable, "-m", "tinylm.explain.worker", str(model), precision]
        self._engine = engine
        self._process: subprocess.Popen[bytes] | None = None
        self._under_way: asyncio.Future[tuple[bytes, bytes]] | None = None
        self._cpu_s = 0.0  # of the process
        self._was_slow = False  # the last answer
        self._rests_until = 0.0  # by time.monotonic

    def check_idle(self) -> None:
        """Raise Busy if another explanation runs in this replica, no slot is free, or the process rests.

        It rests while the machine's cores are in use, also by other replicas: after each slow answer but the first, as
        a browser that draws a page can delay one. The lowest priority alone is not enough: the process slows other
        cores through the memory and the caches that they share.
        """
        if self._under_way is not None and not self._under_way.done():
            raise Busy("this replica works at another explanation")
        if self._engine.n_waiting > 0 or self._engine.n_running >= self._engine.n_slots:
            raise Busy(f"requests use all {self._engine.n_slots} slots of this replica")
        if time.monotonic() < self._rests_until:
            raise Busy("the machine is busy, and the last one was a short time ago")

    async def ask(self, question: Mapping[str, Any]) -> bytes:
        """Return the answer of `tinylm.explain.worker` to a question.

        A caller that leaves does not stop the process: the next question is refused until the answer is there.
        Raise ValueError for a wrong question, Busy as `check_idle`, or if the process ends or is too slow.
        """
        self.check_idle()
        loop = asyncio.get_running_loop()
        self._under_way = loop.run_in_executor(None, self._exchange, json.dumps(question).encode())
        self._under_way.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                kind, content = await asyncio.shield(self._under_way)
        except TimeoutError:
            self.stop()
            raise Busy(f"it took longer than {ANSWER_WITHIN_S:.0f} s") from None
        if kind == OK:
            return content
        raise ValueError(content.decode())

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _exchange(self, question: bytes) -> tuple[bytes, bytes]:
        """Write a question, and return the kind of its answer and the answer. This blocks, so it runs in a thread."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        source, target = self._process.stdout, self._process.stdin
        if source is None or target is None:
            raise RuntimeError("the process has no pipes")
        began_at = time.monotonic()
        try:
            target.write(question + b"\n")
            target.flush()
            head = source.readline().split()
        except BrokenPipeError:  # it ended because nobody had asked for a while
            head = []
        if not head:
            raise Busy("its process has ended")
        kind, size, cpu_s = head[0], int(head[1]), int(head[2]) / 1e6
        content = source.read(size)
        if len(content) < size:
            raise Busy("its process has ended")
        self._rest(time.monotonic() - began_at, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        return kind, content

    def _rest(self, took_s: float, cpu_s: float) -> None:
        if took_s <= SLOW_S:
            return  # too short to tell
        was_slow, self._was_slow = self._was_slow, took_s > SLOW * cpu_s + SLOW_S
        if was_slow and self._was_slow:
            self._rests_until = time.monotonic() + min(REST * took_s, LONGEST_REST_S)

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(tinylm.__file__).parents[1])  # Ray can import it from a directory that is not in PYTHONPATH
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        self._cpu_s = 0.0
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        give_lowest_priority(process.pid)  # from here, so that its imports have it too
        return process


def give_lowest_priority(pid: int) -> None:
    """Let a process run only when others leave a core free, or almost so where the system has no such policy."""
    os.setpriority(os.PRIO_PROCESS, pid, LARGEST_NICENESS)
    if sys.platform == "linux":
        # With niceness alone, it can keep a core for a moment from a thread of the engine that wakes up.
        with suppress(PermissionError):  # a sandbox can forbid it
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
