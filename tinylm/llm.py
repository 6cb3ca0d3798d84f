"""Text in, text out, in this process: a model directory, its tokenizer and an engine behind three methods.

A server that runs an event loop uses `tinylm.engine.async_engine` instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.engine.engine import Engine
from tinylm.engine.request import Request
from tinylm.kernels.blas import run_limited
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream, Update
from tinylm.system.paths import DEFAULT_MODEL
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TOKENIZER, ModelError, load_model


def load(directory: Path | str, kernels: str = "auto", precision: str = "auto") -> tuple[Tokenizer, Model]:
    """Load a model directory; raises ModelError naming what is missing, damaged, or does not fit together.

    kernels, precision: as `Model` takes them; ValueError when they can't be.
    """
    config, tensors = load_model(directory)
    try:
        tokenizer = Tokenizer(Path(directory) / TOKENIZER)
    except ValueError as error:
        raise ModelError(str(error)) from None
    for name, theirs, ours in (
        ("vocab_size", tokenizer.vocab_size, config.vocab_size),
        ("boundary_id", tokenizer.boundary_id, config.boundary_id),
    ):
        if theirs != ours:
            raise ModelError(f"{Path(directory) / TOKENIZER}: {name} is {theirs}, the model's config says {ours}")
    return tokenizer, Model(config, tensors, kernels, precision)


class LLM:
    """A model to generate with.

    >>> llm = LLM()
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=16, temperature=0))[0].text

    Thread-safe: several threads may call all methods at once, and their requests share the engine's batch. Iterate one
    stream in one thread at a time. A signal handler must not call the LLM that it interrupts. There is no background
    thread: a stream advances while its owner iterates it, or while another request runs.

    An exception at any moment, such as Ctrl-C, ends the call that it interrupts. The LLM and its other calls continue.
    """

    def __init__(
        self,
        model: Path | str = DEFAULT_MODEL,
        n_slots: int = 16,
        threads: int = 1,
        kernels: str = "auto",
        precision: str = "auto",
    ) -> None:
        """kernels, precision: as `Model` takes them.

        threads: the most threads of NumPy's matrix library. Only the numpy kernels with long prompts benefit from more
        than 1.
        """
        self._set_up(*load(model, kernels, precision), n_slots, threads)

    @classmethod
    def from_parts(cls, tokenizer: Tokenizer, model: Model, n_slots: int = 16, threads: int = 1) -> LLM:
        """Return an LLM for a model that is in memory."""
        llm = cls.__new__(cls)
        llm._set_up(tokenizer, model, n_slots, threads)
        return llm

    def _set_up(self, tokenizer: Tokenizer, model: Model, n_slots: int, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: it must be at least 1")
        self.tokenizer, self.model = tokenizer, model
        self.config = model.config
        self._engine = Engine(model, n_slots=n_slots, max_waiting=2**31)
        self._threads = threads
        self._stepping = threading.Lock()  # held by the thread that steps the engine
        self._last_in_line = threading.Lock()  # held by the last thread that waits to step it

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Return one completion per prompt, in the prompts' order. Up to `n_slots` prompts share a batch.

        Raise ValueError, before anything is generated, if a prompt is too long.
        """
        params = params or SamplingParams()
        texts = [prompts] if isinstance(prompts, str) else prompts
        requests = [self._engine.make_request(self.tokenizer.encode_document(text), params) for text in texts]
        builders = [CompletionBuilder(request, self.tokenizer) for request in requests]
        try:
            try:
                for request in requests:
                    self._engine.add(request)
                self._finish(list(zip(requests, builders, strict=True)))
            finally:
                self._cancel(requests)
        finally:
            self._cancel(requests)  # again: a second Ctrl-C can interrupt the first
        return [builder.completion for builder in builders if builder.completion is not None]

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream[Completion]:
        """Return a stream of the pieces of one answer. The pieces joined are the text that `generate` returns.

        The request begins when the first piece is asked for. Raise as `generate` does. Closing the stream frees its
        slot.
        """
        return Stream(self._updates(prompt, params or SamplingParams()))

    def _updates(self, prompt: str, params: SamplingParams) -> Generator[Update[Completion], None, None]:
        request = self._engine.make_request(self.tokenizer.encode_document(prompt), params)
        builder = CompletionBuilder(request, self.tokenizer)
        try:
            try:
                self._engine.add(request)
                while builder.completion is None:
                    before = builder.n_taken
                    self._step(request, before)
                    text = builder.take()
                    yield text, request.logprobs[before : builder.n_taken], builder.completion
            finally:
                self._engine.cancel(request)
        finally:
            self._engine.cancel(request)  # again: a second Ctrl-C can interrupt the first

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the scores of the next token after each of `ids`, (len(ids), vocab) float32, without the KV cache.

        Raise ValueError if there are no ids, unknown ids, or more ids than the context holds.
        """
        if not 1 <= len(ids) <= self.config.context:
            raise ValueError(f"ids has {len(ids)} tokens: it must have 1 to {self.config.context}")
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids has {array.ndim} dimensions: it must be one list of token ids")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.config.vocab_size:
            raise ValueError(f"ids must be whole numbers from 0 to {self.config.vocab_size - 1}")

        def forward() -> np.ndarray:
            runner = ModelRunner(self.model, 1, len(array), len(array))
            return runner.forward(array, [Chunk(0, 0, len(array))], np.arange(len(array))).copy()

        return run_limited(self._threads, forward)

    def _finish(self, pending: list[tuple[Request, CompletionBuilder]]) -> None:
        """Step the engine until all these builders have their completion."""
        while pending:
            self._step(pending[0][0])
            for request, builder in pending[: self._engine.n_slots]:  # no others can have a slot
                if request.params.stop or request.finish_reason is not None:
                    builder.take()
                if builder.completion is not None:
                    self._engine.cancel(request)  # it still runs if a stop string ended the text
                    pending.remove((request, builder))

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            self._engine.cancel(request)

    def _step(self, request: Request, n_taken: float = math.inf) -> None:
        """Wait until it is this thread's turn, then step the engine, which advances the requests of all threads.

        Don't step it if other threads' steps have ended `request` or given it more than `n_taken` tokens.
        """
        # Each thread waits for the one before it, so that a thread that steps often can't keep the others out. The
        # locks of the line only set the order: an exception can release one too early. `_stepping` excludes the others.
        mine = threading.Lock()
        with mine:
            ahead, self._last_in_line = self._last_in_line, mine
            with ahead, self._stepping:
                if request.finish_reason is None and len(request.tokens) <= n_taken:
                    run_limited(self._threads, self._engine.step)
