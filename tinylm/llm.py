"""Generate text in this process: a model directory, its tokenizer and an engine behind three methods.

A server with an event loop uses `tinylm.engine.async_engine` instead.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.engine.engine import Engine
from tinylm.engine.request import Progress, Request
from tinylm.engine.word_tokens import word_tokens
from tinylm.kernels.blas import run_limited
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.sampling import SamplingParams, TokenLogprobs
from tinylm.stream import Stream, Update
from tinylm.system.paths import DEFAULT_MODEL
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TOKENIZER, ModelError, load_model

T = TypeVar("T")

_living: weakref.WeakSet[LLM] = weakref.WeakSet()


def _after_fork() -> None:
    for llm in _living:
        llm._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def load(directory: Path | str, kernels: str = "auto", precision: str = "auto") -> tuple[Tokenizer, Model]:
    """Load a model directory.

    kernels, precision: as for `Model`, which raises ValueError if the model cannot use them. Raise ModelError if a file
    is missing or damaged, or if the tokenizer does not fit the model.
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


@dataclass(frozen=True, slots=True)
class Scored:
    """The tokens of a text, and what the model says of each after the tokens before it."""

    token_ids: list[int]  # without the boundary before the text
    logprobs: list[TokenLogprobs]  # one per token

    @property
    def total(self) -> float:
        """The natural logarithm of the probability that the model begins a document with this text."""
        return sum(token.logprob for token in self.logprobs)


class LLM:
    """A model that generates text.

    >>> llm = LLM()
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=16, temperature=0))[0].text

    There is no background thread: a stream advances while its owner iterates it, or while another request runs. An
    exception at any moment, such as Ctrl-C, ends the call that it interrupts. The LLM and its other calls continue.

    Threads: several threads may call all methods at once, and their requests share the engine's batch. Only the thread
    that holds `_stepping` steps the engine and reads requests, and it takes its snapshots before it releases the lock.
    Use one stream in only one thread at a time. A signal handler must not call the LLM that it interrupts.

    Processes: a forked child may use its copy. If another thread was inside a step during the fork, the copy raises
    RuntimeError.
    """

    def __init__(
        self,
        model: Path | str = DEFAULT_MODEL,
        n_slots: int = 16,
        threads: int = 1,
        kernels: str = "auto",
        precision: str = "auto",
    ) -> None:
        """kernels, precision: as for `Model`.

        threads: the most threads of NumPy's matrix library. Only the numpy kernels with long prompts benefit from more
        than 1.
        """
        self._set_up(*load(model, kernels, precision), n_slots, threads)

    @classmethod
    def from_parts(cls, tokenizer: Tokenizer, model: Model, n_slots: int = 16, threads: int = 1) -> LLM:
        """Return an LLM for a model that is already in memory."""
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
        self._stepping = threading.Lock()
        self._last_in_line = threading.Lock()  # held by the last thread that waits for its turn
        self._forked_in_a_step = False
        _living.add(self)

    def _after_fork(self) -> None:
        """Replace the locks in a forked child: the threads that hold them exist only in the parent."""
        self._forked_in_a_step = self._stepping.locked()
        self._stepping, self._last_in_line = threading.Lock(), threading.Lock()

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Return one completion per prompt, in the prompts' order. Up to `n_slots` prompts share a batch.

        Raise ValueError, before anything is generated, if a prompt is too long.
        """
        params = params or SamplingParams()
        requests = self._requests([prompts] if isinstance(prompts, str) else prompts, params)
        builders = {request: CompletionBuilder(self.tokenizer, params) for request in requests}
        try:
            try:
                for request in requests:
                    self._engine.add(request)
                self._finish(builders.copy())
            finally:
                self._cancel(requests)
        finally:
            self._cancel(requests)  # again: a second Ctrl-C can interrupt the first
        return [builder.completion for builder in builders.values() if builder.completion is not None]

    def score(self, texts: str | Sequence[str], top: int = 0) -> list[Scored]:
        """Return the log-probability of each token of each text, in the texts' order, as the model would write it.

        top: how many of the most likely tokens to report at each place. Up to `n_slots` texts share a batch. Raise
        ValueError, before anything is computed, if a text is longer than the context less its boundary.
        """
        texts = [texts] if isinstance(texts, str) else texts
        completions = self.generate(texts, SamplingParams(max_tokens=0, prompt_logprobs=top))
        return [
            Scored(self.tokenizer.encode(text), completion.prompt_logprobs or [])
            for text, completion in zip(texts, completions, strict=True)
        ]

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream[Completion]:
        """Return a stream of the pieces of one answer. The pieces joined are the text that `generate` returns.

        The request begins with the first `next`, which raises as `generate` does. Closing the stream frees its slot.
        """
        return Stream(self._updates(prompt, params or SamplingParams()))

    def _updates(self, prompt: str, params: SamplingParams) -> Generator[Update[Completion], None, None]:
        [request] = self._requests([prompt], params)
        builder = CompletionBuilder(self.tokenizer, params)

        def advance() -> Progress:
            # Don't step if the steps of other threads have advanced the request.
            if request.finish_reason is None and len(request.tokens) <= builder.n_taken:
                self._step()
            return request.progress()

        try:
            try:
                self._engine.add(request)
                while builder.completion is None:
                    before = builder.n_taken
                    progress = self._in_turn(advance)
                    text = builder.take(progress)
                    yield text, list(progress.logprobs[before : builder.n_taken]), builder.completion
            finally:
                self._engine.cancel(request)
        finally:
            self._engine.cancel(request)  # again: a second Ctrl-C can interrupt the first

    def _requests(self, prompts: Sequence[str], params: SamplingParams) -> list[Request]:
        words, encode = word_tokens(params, self.tokenizer), self.tokenizer.encode_document
        return [self._engine.make_request(encode(prompt), params, words=words) for prompt in prompts]

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

    def _finish(self, pending: dict[Request, CompletionBuilder]) -> None:
        """Step the engine until all these builders have their completion. Remove them from `pending`."""

        def advance() -> list[tuple[Request, Progress]]:
            first = list(islice(pending, self._engine.n_slots))  # no others can have a slot
            if first[0].finish_reason is None:
                self._step()
            due = [request for request in first if request.params.stop or request.finish_reason is not None]
            return [(request, request.progress()) for request in due]

        while pending:
            for request, progress in self._in_turn(advance):
                pending[request].take(progress)
                if pending[request].completion is not None:
                    self._engine.cancel(request)  # it still runs if a stop string ended the text
                    del pending[request]

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            self._engine.cancel(request)

    def _step(self) -> None:
        """Advance the requests of all threads. The caller holds `_stepping`."""
        run_limited(self._threads, self._engine.step)

    def _in_turn(self, function: Callable[[], T]) -> T:
        """Call a function that steps the engine or reads requests, when it is this thread's turn."""
        if self._forked_in_a_step:
            raise RuntimeError("another thread used this LLM when the process forked: load it again in this process")
        # Each thread waits for the thread before it. Otherwise a thread that steps often could keep the others out.
        # The locks of this line only set the order, since an exception can release one of them too early. `_stepping`
        # is the lock that keeps all other threads out.
        mine = threading.Lock()
        with mine:
            ahead, self._last_in_line = self._last_in_line, mine
            with ahead, self._stepping:
                return function()
