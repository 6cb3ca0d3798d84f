"""One replica's work for any protocol: check the caller, generate, log, count.

`tinylm.serving.grpc` and `tinylm.serving.http` convert its answers into their messages.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from tinylm.engine import Engine
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine, EngineDied, Listener
from tinylm.engine.delta import Delta, DeltaBuilder
from tinylm.engine.prompt import prompt_ids
from tinylm.engine.word_tokens import word_tokens
from tinylm.kernels import KernelName, Precision
from tinylm.llm import load
from tinylm.sampling import SamplingParams
from tinylm.serving.access import Access
from tinylm.serving.calls import Answer, Call, answering
from tinylm.serving.explanations import Explanations
from tinylm.serving.keys import Key
from tinylm.serving.live import AllReplicas, counts, steps
from tinylm.serving.metrics import ServiceMetrics
from tinylm.serving.ray.exporter import Exporter
from tinylm.serving.ray.shared_limits import SharedLimits, open_counter
from tinylm.serving.tracing import tracing_from
from tinylm.system.paths import DEFAULT_MODEL

STOP_INTERVAL_S = 0.005  # time between two searches for a stop string


class AppArgs(BaseModel):
    """The `args` of the application in the Serve config."""

    model_config = ConfigDict(extra="forbid")

    model: Path = DEFAULT_MODEL  # a model directory; a relative path starts at the working directory of `serve run`
    slots: int = Field(default=16, ge=1, le=1024)  # requests that a replica decodes together
    max_waiting: int = Field(default=64, ge=0)  # requests that may wait for a slot; the replica refuses more
    prefill_tokens: int = Field(default=64, ge=1)  # prompt tokens in one step while other requests decode
    kernels: KernelName = "auto"  # compiled kernels if the machine supports them, else NumPy
    precision: Precision = "auto"  # of activations and KV cache: int8 or float32
    engine_niceness: int = Field(default=5, ge=0, le=19)  # lowers the engine's CPU priority below the event loop's
    blas_threads: int = Field(default=1, ge=1)  # threads of the numpy kernels, per replica
    stream_interval_ms: float = Field(default=1000 * STREAM_INTERVAL_S, ge=0)  # between messages after the first
    stalled_s: float = Field(default=10.0, gt=0)  # Serve replaces a replica when a step takes longer
    api_keys: Path | None = None  # the key file (`tinylm key`); without it, only callers on this machine are served
    allow_anonymous: bool = False  # without a key file: serve callers from anywhere
    log_prompts: bool = False  # write prompts to the log
    cors_origins: list[str] = []  # web pages that may call the HTTP API from a browser, such as https://example.org


class Service:
    """A replica's engine, with its own weights and KV cache, and its access control, log and metrics."""

    def __init__(self, args: AppArgs) -> None:
        """Start the engine. Call it inside the replica's running event loop. Raise ValueError for unusable `args`."""
        self.args = args
        self.access = Access(args.api_keys, args.allow_anonymous)
        self.tokenizer, model = load(args.model, args.kernels, args.precision)
        self.config, self.weights, self.arithmetic = model.config, model.weight_type, model.arithmetic
        self.name = args.model.name
        context = serve.get_replica_context()
        self.replica: str = context.replica_id.unique_id
        self.limits = SharedLimits(partial(open_counter, context.app_name))
        engine = Engine(model, args.slots, args.max_waiting, args.prefill_tokens)
        self.engine = AsyncEngine(engine, args.blas_threads, args.engine_niceness)
        self.explanations = Explanations(args.model, model.precision, engine)
        self.metrics = ServiceMetrics(engine)
        self.counts = AllReplicas("live_counts", partial(counts, self))
        self.steps = AllReplicas("live_steps", partial(steps, self))
        self._exporter = Exporter(self.metrics)
        self._tracing = tracing_from(os.environ, self.replica, self.name)

    def check_health(self) -> None:
        """Raise EngineDied when the engine has ended or stalled. Serve then replaces the replica."""
        self.engine.check(self.args.stalled_s)

    def is_healthy(self) -> bool:
        try:
            self.check_health()
        except EngineDied:
            return False
        return True

    def answering(self, method: str) -> AbstractContextManager[Call]:
        """Follow a call: turn an exception into its status, and log and count it at its end."""
        return answering(method, self._end)

    def _end(self, call: Call) -> None:
        self.metrics.count(call)
        if call.reservation is not None:  # a call that the engine did not accept counts nothing
            call.reservation.end(int(bool(call.answers)), call.n_prompt_tokens + call.n_tokens)
        if self._tracing is not None:
            self._tracing.record(call)

    async def admit(
        self, call: Call, prompts: Sequence[str | Sequence[int]], params: SamplingParams, n: int = 1
    ) -> list[list[int]]:
        """Return the token ids of each prompt, if the limits of the caller's key admit `n` answers to each.

        prompts: texts, or token ids with or without the boundary in front.
        Raise ValueError for an invalid prompt, or a call that is too large for its key. Raise RateLimited.
        """
        ids = [prompt_ids(prompt, params.max_tokens, self.tokenizer, self.config) for prompt in prompts]
        if self.args.log_prompts:
            call.prompt = "\n".join(p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts)
        if call.key is not None and call.key.limits.is_set:
            most = [len(prompt) + n * min(params.max_tokens, self.config.context - len(prompt)) for prompt in ids]
            check_tokens(params.max_tokens, sum(most), call.key)
            call.reservation = self.limits.reservation(call.key, sum(most))
            await call.reservation.take()
        return ids

    async def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        timeout_s: float | None,
        call: Call,
        index: int = 0,
        whole: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Yield an answer piece by piece. Closing the generator frees the slot.

        ids: a prompt from `admit`. index: the answer's number among the answers of `call` to the same prompt.
        whole: the caller needs no pieces, so one delta may hold everything. Raise EngineFull, EngineDied.
        """
        every_s = math.inf if whole else self.args.stream_interval_ms / 1000
        if params.stop:  # the engine would generate tokens after the stop string in vain
            every_s = min(every_s, STOP_INTERVAL_S)
        words = word_tokens(params, self.tokenizer)
        priority = 0 if call.key is None else call.key.priority
        answer: Answer | None = None
        listener, builder = Listener(every_s), DeltaBuilder(ids, params, self.tokenizer)
        async with aclosing(self.engine.generate(ids, params, timeout_s, listener, words, priority)) as updates:
            async for progress in updates:
                if answer is None:
                    answer = Answer(listener, index=index)
                    call.answers.append(answer)
                delta = builder.take(progress)
                answer.completion = builder.completion
                if delta is not None:
                    yield delta
                if builder.completion is not None:
                    return


def check_tokens(max_tokens: int, n_tokens: int, key: Key) -> None:
    """Raise ValueError for a call that can need more tokens than its key may use in a minute."""
    limit = key.limits.tokens_per_minute
    if limit is not None and n_tokens > limit:
        raise ValueError(
            f"max_tokens is {max_tokens}: with the prompt, the call can need {n_tokens} tokens, but the key "
            f"{key.name!r} may use at most {limit} per minute"
        )
