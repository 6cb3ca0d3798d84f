"""A client of the TinyLM service over gRPC: the same parameters and nearly the same answers as `tinylm.LLM`.

    client = Client("localhost:9000")
    client.generate("Once upon a time").text

Knows nothing of Ray beyond the metadata that its ingress wants.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import grpc

from tinylm.engine import FinishReason
from tinylm.sampling import SamplingParams, TokenLogprobs
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub
from tinylm.wire import FINISH_REASON_NAMES, request_from_params

METADATA = (("application", "tinylm"),)
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is not meant for this
    ("grpc.initial_reconnect_backoff_ms", 100),  # a proxy is back in seconds; gRPC's own pauses grow to two minutes
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# What a caller may see when a replica or the proxy dies under a call; a call that has produced nothing may be repeated.
RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.NOT_FOUND,  # by a proxy that has just started: it has not heard of the application yet
    }
)
T = TypeVar("T")


class ServiceError(RuntimeError):
    """The service refused or failed a call; `code` is the gRPC status, the message what it said."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


@dataclass(frozen=True, slots=True)
class ServedCompletion:
    """An answer of the service; times are the replica's own, without the network."""

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_tokens: int
    logprobs: list[TokenLogprobs] | None
    queue_s: float
    first_token_s: float
    total_s: float
    replica: str


class Client:
    """A connection to a service; close it, or use it in a `with`. Safe for several threads."""

    def __init__(
        self,
        address: str = "localhost:9000",
        timeout_s: float | None = 60.0,
        retries: int = 6,
        api_key: str | None = None,
        tls: bool | Path = False,
    ) -> None:
        """address: host:port, or several as `ipv4:10.0.0.1:9000,10.0.0.2:9000`: the first that answers is used.

        timeout_s: of one call, on this side. retries: of a call that failed before it produced anything; the default
        takes about 5 seconds, in which Serve replaces a dead proxy.
        api_key: by default what TINYLM_API_KEY in the environment says, if anything.
        tls: True trusts the usual authorities, a PEM file those in it alone; OSError or ValueError if it can't be read.
        """
        api_key = api_key or os.environ.get("TINYLM_API_KEY")
        self.address = address
        self._timeout_s = timeout_s
        self._retries = retries
        self._metadata = (*METADATA, *([("authorization", f"Bearer {api_key}")] if api_key else []))
        self._channel = _channel(address, tls)
        self._stub = TinyLMStub(self._channel)

    def generate(self, prompt: str, params: SamplingParams | None = None) -> ServedCompletion:
        """The whole answer. Raises ValueError for a bad request, ServiceError for whatever else goes wrong."""
        params = params or SamplingParams()
        request = request_from_params(prompt, params)
        response = self._call(lambda: self._stub.Generate(request, metadata=self._metadata, timeout=self._timeout_s))
        return _completion(response.text, response, list(response.logprobs), params)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Generator[str, None, ServedCompletion]:
        """The answer piece by piece; the generator's return value is the completion. Leaving it early cancels the call.

        Raises as `generate` does; a stream that breaks after its first piece is not repeated.
        """
        params = params or SamplingParams()
        request = request_from_params(prompt, params)
        opened: list[grpc.RpcContext] = []

        def start() -> tuple[Iterator[pb.GenerateStreamResponse], pb.GenerateStreamResponse | None]:
            responses = self._stub.GenerateStream(request, metadata=self._metadata, timeout=self._timeout_s)
            opened.append(responses)
            # A refused stream has one empty message before its status.
            return responses, next((r for r in responses if r.text or r.logprobs or r.finish_reason), None)

        pieces: list[str] = []
        logprobs: list[pb.TokenLogprob] = []
        try:
            responses, response = self._call(start)
            while response is not None:
                logprobs += response.logprobs
                if response.text:
                    pieces.append(response.text)
                    yield response.text
                if response.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                    return _completion("".join(pieces), response, logprobs, params)
                try:
                    response = next(responses, None)
                except grpc.RpcError as error:
                    raise _exception(error) from None
            raise ServiceError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the answer did")
        finally:
            for call in opened:
                call.cancel()

    def tokenize(self, text: str) -> list[tuple[int, bytes]]:
        """Token ids of a text, each with its own bytes."""
        request = pb.TokenizeRequest(text=text)
        response = self._call(lambda: self._stub.Tokenize(request, metadata=self._metadata, timeout=self._timeout_s))
        return [(token.id, token.bytes) for token in response.tokens]

    def info(self) -> pb.GetModelInfoResponse:
        """What the service says of its model, and which replica said it."""
        request = pb.GetModelInfoRequest()
        return self._call(lambda: self._stub.GetModelInfo(request, metadata=self._metadata, timeout=self._timeout_s))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, call: Callable[[], T]) -> T:
        """`call`, repeated with growing pauses while it fails with a status that a dying replica gives."""
        for attempt in range(self._retries + 1):
            try:
                return call()
            except grpc.RpcError as error:
                if attempt == self._retries or error.code() not in RETRIED:
                    raise _exception(error) from None
            time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**attempt)
        raise AssertionError("unreachable")


def _channel(address: str, tls: bool | Path) -> grpc.Channel:
    if tls is False:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    authorities = None if tls is True else tls.read_bytes()
    if authorities is not None and b"-----BEGIN CERTIFICATE-----" not in authorities:
        raise ValueError(f"tls is {tls}: there is no PEM certificate in it")
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities), options=CHANNEL_OPTIONS)


def _exception(error: grpc.RpcError) -> Exception:
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return ValueError(error.details())
    return ServiceError(error.code(), error.details() or "no details given")


def _completion(
    text: str,
    response: pb.GenerateResponse | pb.GenerateStreamResponse,
    logprobs: list[pb.TokenLogprob],
    params: SamplingParams,
) -> ServedCompletion:
    entries = [TokenLogprobs(e.logprob, tuple((top.token, top.logprob) for top in e.top)) for e in logprobs]
    return ServedCompletion(
        text=text,
        finish_reason=FINISH_REASON_NAMES[response.finish_reason],
        n_prompt_tokens=response.usage.prompt_tokens,
        n_tokens=response.usage.completion_tokens,
        logprobs=entries if params.logprobs is not None else None,
        queue_s=response.timings.queue_ms / 1000,
        first_token_s=response.timings.first_token_ms / 1000,
        total_s=response.timings.total_ms / 1000,
        replica=response.replica,
    )
