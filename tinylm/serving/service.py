"""What a replica does for any protocol: admit a caller, generate, log, count.

`tinylm.serving.grpc` and `tinylm.serving.http` use it. This module does not know their messages.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from tinylm.engine import Engine, check_ids, check_length
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine, EngineDied, Listener
from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.kernels import KernelName, Precision
from tinylm.llm import load
from tinylm.paths import DEFAULT_MODEL
from tinylm.sampling import SamplingParams, TokenLogprobs
from tinylm.serving.access import Access
from tinylm.serving.calls import Answer, Call, answering
from tinylm.serving.metrics import ServiceMetrics
from tinylm.serving.ray.exporter import Exporter

STOP_INTERVAL_S = 0.005  # between two looks for a stop string
MAX_TEXT_BYTES = 64 * 1024  # of a prompt or a text to tokenize; far more than the context holds


class AppArgs(BaseModel):
    """What `args` in the Serve config may say."""

    model_config = ConfigDict(extra="forbid")

    model: Path = DEFAULT_MODEL  # a model directory; relative to the directory that Serve was started in
    slots: int = Field(default=16, ge=1, le=1024)  # requests decoded together
    max_waiting: int = Field(default=64, ge=0)  # requests queued behind them; more are refused
    prefill_tokens: int = Field(default=64, ge=1)  # prompt tokens a step takes while others decode
    kernels: KernelName = "auto"  # compiled ones where they can be, else NumPy
    precision: Precision = "auto"  # of activations and KV cache: int8, float32
    engine_niceness: int = Field(default=5, ge=0, le=19)  # what answers callers gets a core before what decodes
    blas_threads: int = Field(default=1, ge=1)  # of one replica, for the numpy kernels
    # Between a stream's messages, from its second.
    stream_interval_ms: float = Field(default=1000 * STREAM_INTERVAL_S, ge=0)
    stalled_s: float = Field(default=10.0, gt=0)  # a step that takes longer gets the replica replaced
    api_keys: Path | None = None  # the key file (`tinylm key`); without one, callers on this machine alone are served
    allow_anonymous: bool = False  # without a key file: serve callers from anywhere
    log_prompts: bool = False  # write prompts into the log


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has gained; joined, the texts are the answer."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]  # one a token, if asked for
    completion: Completion | None  # with the last


class Service:
    """An engine with its own weights in memory and its own KV cache, and all that stands between it and a caller."""

    def __init__(self, args: AppArgs) -> None:
        """Inside the replica's running event loop. Raises ValueError for what can't be served as `args` says."""
        self.args = args
        self.access = Access(args.api_keys, args.allow_anonymous)
        self.tokenizer, model = load(args.model, args.kernels, args.precision)
        self.config, self.weights, self.arithmetic = model.config, model.weight_type, model.arithmetic
        self.name = args.model.name
        self.replica: str = serve.get_replica_context().replica_id.unique_id
        engine = Engine(model, args.slots, args.max_waiting, args.prefill_tokens)
        self.engine = AsyncEngine(engine, args.blas_threads, args.engine_niceness)
        self.metrics = ServiceMetrics(engine)
        self._exporter = Exporter(self.metrics)

    def check_health(self) -> None:
        """Raises EngineDied when the engine died or stalled: the replica must be replaced."""
        self.engine.check(self.args.stalled_s)

    def is_healthy(self) -> bool:
        try:
            self.check_health()
        except EngineDied:
            return False
        return True

    def answering(self, method: str) -> AbstractContextManager[Call]:
        """Around a call's work, an error in which becomes the call's status; it is logged and counted when it ends."""
        return answering(method, self.metrics.count)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        timeout_s: float | None,
        call: Call,
        index: int = 0,
        whole: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """An answer as it becomes certain. `index` is its place among the answers of `call` to the same prompt.

        prompt: a text, or its token ids with or without the boundary before them. whole: nobody reads on the way, so
        that it may come all at the end. Raises ValueError for a prompt that can't be answered, EngineFull, EngineDied.
        Closing the generator frees the slot.
        """
        every_s = math.inf if whole else self.args.stream_interval_ms / 1000
        if params.stop:  # what follows the stop string is drawn for nobody
            every_s = min(every_s, STOP_INTERVAL_S)
        ids = self._ids(prompt)
        if self.args.log_prompts:
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
            call.prompt = text if call.prompt is None or index > 0 else f"{call.prompt}\n{text}"
        answer: Answer | None = None
        listener, builder = Listener(every_s), CompletionBuilder(self.tokenizer, params)
        n_sent = 0
        async with aclosing(self.engine.generate(ids, params, timeout_s, listener)) as updates:
            async for progress in updates:
                if answer is None:
                    answer = Answer(listener, index=index)
                    call.answers.append(answer)
                text = builder.take(progress)
                answer.completion = builder.completion
                if text or builder.completion is not None:
                    new = slice(n_sent, builder.n_taken)
                    n_sent = builder.n_taken
                    yield Delta(text, list(progress.tokens[new]), list(progress.logprobs[new]), builder.completion)
                if builder.completion is not None:
                    return

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            check_size("prompt", prompt)
            return self.tokenizer.encode_document(prompt)
        begins = bool(prompt) and prompt[0] == self.tokenizer.boundary_id
        check_length(len(prompt) + (not begins), self.config.context)  # here, before it is copied and queued
        check_ids(prompt, self.config.vocab_size)
        return list(prompt) if begins else [self.tokenizer.boundary_id, *prompt]


def check_size(field: str, text: str) -> None:
    """Raises ValueError for a text that is longer than any that could be answered."""
    size = len(text.encode(errors="surrogatepass"))  # what is no text is the tokenizer's to refuse
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{field} has {size} bytes: it must have at most {MAX_TEXT_BYTES}")
