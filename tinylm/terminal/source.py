"""Where the story prompt's text comes from: a model in this process, or a service."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from tinylm.client import Client
from tinylm.llm import LLM
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream, Update


class Source(Protocol):
    """A model that can be asked; leaving a stream, also by Ctrl-C, ends its answer wherever it is computed."""

    context: int  # tokens that prompt and answer share

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]: ...

    def token_bytes(self, text: str) -> list[bytes]:
        """The bytes of each token of a text."""
        ...


class LocalSource:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.context = llm.config.context

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]:
        return Stream(self._updates(prompt, params))

    def token_bytes(self, text: str) -> list[bytes]:
        tokenizer = self._llm.tokenizer
        return [tokenizer.piece_bytes[token] for token in tokenizer.encode(text)]

    def _updates(self, prompt: str, params: SamplingParams) -> Generator[Update[Any], None, None]:
        with self._llm.stream(prompt, params) as stream:
            while True:
                n_before = len(stream.logprobs)
                with interrupts_held_back():
                    piece = next(stream, None)
                if piece is None:
                    yield "", [], stream.completion
                    return
                yield piece, stream.logprobs[n_before:], None


class ServiceSource:
    """Raises ServiceError when no service answers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.context = client.info().context

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]:
        return self._client.stream(prompt, params)

    def token_bytes(self, text: str) -> list[bytes]:
        return [piece for _, piece in self._client.tokenize(text)]


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C within is raised at the end: the engine is never left in the middle of a step."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
