"""The model that continues a story: in this process or behind a service."""

from __future__ import annotations

from typing import Any, Protocol

from tinylm.client import Client
from tinylm.llm import LLM
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream


class Source(Protocol):
    """A model. Closing a stream ends its answer, also in a service."""

    context: int  # the most tokens of a prompt and its answer together

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]: ...

    def token_bytes(self, text: str) -> list[bytes]:
        """Return the bytes of each token of a text."""
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
    def __init__(self, client: Client) -> None:
        """Raise ServiceError when no service answers."""
        self._client = client
        self.context = client.info().context

    def stream(self, prompt: str, params: SamplingParams) -> Stream[Any]:
        return self._client.stream(prompt, params)

    def token_bytes(self, text: str) -> list[bytes]:
        return [piece for _, piece in self._client.tokenize(text)]
