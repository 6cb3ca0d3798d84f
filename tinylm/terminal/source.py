"""The model that continues a story: in this process or behind a service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinylm.client import Client
from tinylm.llm import LLM
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream


@dataclass(frozen=True, slots=True)
class Source:
    """A model. Closing a stream ends its answer, also in a service."""

    context: int  # the most tokens of a prompt and its answer together
    stream: Callable[[str, SamplingParams], Stream[Any]]
    token_bytes: Callable[[str], list[bytes]]  # text -> the bytes of each of its tokens


def local_source(llm: LLM) -> Source:
    def token_bytes(text: str) -> list[bytes]:
        return [llm.tokenizer.piece_bytes[token] for token in llm.tokenizer.encode(text)]

    return Source(llm.config.context, llm.stream, token_bytes)


def service_source(client: Client) -> Source:
    """Return the model of a service. Raise ServiceError when no service answers."""

    def token_bytes(text: str) -> list[bytes]:
        return [piece for _, piece in client.tokenize(text)]

    return Source(client.info().context, client.stream, token_bytes)
