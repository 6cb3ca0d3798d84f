"""Where the story prompt's text comes from: a model in this process, or a service."""

from __future__ import annotations

from typing import Any, Protocol

from tinylm.client import Client
from tinylm.llm import LLM
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream


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
        return self._llm.stream(prompt, params)

    def token_bytes(self, text: str) -> list[bytes]:
        tokenizer = self._llm.tokenizer
        return [tokenizer.piece_bytes[token] for token in tokenizer.encode(text)]


class ServiceSource:
    """Raises ServiceError when no service answers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.context = client.info().context

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]:
        return self._client.stream(prompt, params)

    def token_bytes(self, text: str) -> list[bytes]:
        return [piece for _, piece in self._client.tokenize(text)]
