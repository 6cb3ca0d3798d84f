"""The client for threads. `tinylm.client.common` holds what it shares with the client for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

import grpc

from tinylm.client.common import CUT_OFF, Answer, Attempts, Connection, ServedCompletion, tokens, whole
from tinylm.client.wire import check_text, request_from_params
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream, Update
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

R = TypeVar("R")


class Client(Connection):
    """A connection to a service. Close it, or use it in a `with`.

    Thread-safe. Iterate one stream in one thread at a time.
    """

    def __init__(
        self,
        address: str = "localhost:9000",
        timeout_s: float | None = 60.0,
        retries: int = 6,
        api_key: str | None = None,
        tls: bool | Path = False,
    ) -> None:
        super().__init__(address, timeout_s, retries, api_key, tls)
        self._closed = threading.Event()
        self._channel = self._open(grpc)
        self._stub = TinyLMStub(self._channel)

    __init__.__doc__ = Connection.__init__.__doc__

    def generate(self, prompt: str, params: SamplingParams | None = None) -> ServedCompletion:
        """The whole answer. Raises ValueError for a bad request, ServiceError for whatever else goes wrong."""
        params = params or SamplingParams()
        response, attempt = self._ask(self._stub.Generate, request_from_params(prompt, params))
        return whole(params, response, attempt)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream[ServedCompletion]:
        """The answer piece by piece; its `completion` afterwards. Closing it, or dropping it, cancels the call.

        The call begins with the first piece asked for. Raises as `generate` does; once a piece has come, a stream
        that breaks is not repeated.
        """
        params = params or SamplingParams()
        return Stream(self._updates(request_from_params(prompt, params), params))

    def tokenize(self, text: str) -> list[tuple[int, bytes]]:
        """Return the token ids of a text, each with its bytes."""
        check_text("text", text)
        return tokens(self._ask(self._stub.Tokenize, pb.TokenizeRequest(text=text))[0])

    def info(self) -> pb.GetModelInfoResponse:
        """What the service says of its model, and which replica said it."""
        return self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest())[0]

    def close(self) -> None:
        """Close the connection. Calls of other threads end with ServiceError, and so do later calls."""
        self._is_closed = True
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, method: Callable[..., R], request: object) -> tuple[R, int]:
        """Return the response of a unary call, and how many attempts it took."""
        attempts = self._attempts()
        while True:
            try:
                with self._unless_closed(attempts):
                    return method(request, metadata=self._metadata, timeout=attempts.begin()), attempts.n
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error.code(), error.details())
            self._closed.wait(pause_s)

    def _updates(
        self, request: pb.GenerateRequest, params: SamplingParams
    ) -> Generator[Update[ServedCompletion], None, None]:
        attempts = self._attempts()
        while True:
            with self._unless_closed(attempts):
                call = self._stub.GenerateStream(request, metadata=self._metadata, timeout=attempts.begin())
            answer = Answer(params, attempts.n)
            try:
                while True:
                    with self._unless_closed(attempts):
                        message = next(call, None)
                    if message is None:
                        break
                    update = answer.add(message)
                    yield update
                    if update[-1] is not None:
                        return
                pause_s = attempts.pause_s(*CUT_OFF, answer.has_begun)
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error.code(), error.details(), answer.has_begun)
            finally:
                call.cancel()
            self._closed.wait(pause_s)

    @contextmanager
    def _unless_closed(self, attempts: Attempts) -> Iterator[None]:
        """Raise ServiceError if this client is closed before the block or in it.

        gRPC raises ValueError for a call on a closed channel, RpcError for a call that runs when the channel closes.
        """
        self._require_open(attempts)
        try:
            yield
        except (grpc.RpcError, ValueError):
            self._require_open(attempts)
            raise
