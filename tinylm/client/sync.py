"""The client for threads. It shares `connection`, `attempts` and `answer` with the client for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TypeVar

import grpc

from tinylm.client.answer import ReceivedAnswer, ServedCompletion, completion_of, tokens
from tinylm.client.attempts import CUT_OFF, Attempts
from tinylm.client.connection import Connection
from tinylm.client.wire import check_text, explain_request, request_from_params
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream, Update
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

R = TypeVar("R")


class Client(Connection):
    """A connection to a service. Close it, or use it in a `with`.

    Thread-safe. Iterate one stream in one thread at a time.
    """

    _closed: threading.Event

    def _prepare(self) -> None:
        self._closed = threading.Event()
        self._channel = self._open(grpc)
        self._stub = TinyLMStub(self._channel)

    def generate(self, prompt: str, params: SamplingParams | None = None) -> ServedCompletion:
        """Return the whole answer. Raise ValueError for a bad request, ServiceError for every other failure."""
        params = params or SamplingParams()
        response, attempt = self._ask(self._stub.Generate, request_from_params(prompt, params))
        return completion_of(params, response, attempt)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream[ServedCompletion]:
        """Return the answer as a stream of pieces. Its `completion` is set after the last piece.

        The call begins when the first piece is requested. Closing or dropping the stream cancels the call. The stream
        raises the same errors as `generate`. A call that breaks after its first piece is not retried.
        """
        params = params or SamplingParams()
        return Stream(self._updates(request_from_params(prompt, params), params))

    def tokenize(self, text: str) -> list[tuple[int, bytes]]:
        """Return the token ids of a text, each with its bytes."""
        check_text("text", text)
        return tokens(self._ask(self._stub.Tokenize, pb.TokenizeRequest(text=text))[0])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD."""
        return self._ask(self._stub.Detokenize, pb.DetokenizeRequest(tokens=tokens))[0].text

    def explain(
        self, prompt: str, piece: str, params: SamplingParams | None = None, **fields: int | str
    ) -> pb.ExplainResponse:
        """Return a piece of an explanation of a prompt of at most 64 tokens, in the field of that name.

        piece: tokens, norms, attention, lens, scores, matmul, cache or batch. params: the settings, only for scores;
        None means `SamplingParams()`. fields: those of the piece in `ExplainRequest`, such as `layer`.
        Raise the same errors as `generate`. The client retries after the time that a busy replica names.
        """
        return self._ask(self._stub.Explain, explain_request(prompt, piece, params, fields))[0]

    def info(self) -> pb.GetModelInfoResponse:
        """Return the service's description of its model, and the name of the replica that answered."""
        return self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest())[0]

    def close(self) -> None:
        """Close the connection. Calls of other threads end with ServiceError, and so do later calls."""
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
                pause_s = attempts.pause_after(error)
            self._closed.wait(pause_s)

    def _updates(
        self, request: pb.GenerateRequest, params: SamplingParams
    ) -> Generator[Update[ServedCompletion], None, None]:
        attempts = self._attempts()
        while True:
            with self._unless_closed(attempts):
                call = self._stub.GenerateStream(request, metadata=self._metadata, timeout=attempts.begin())
            answer = ReceivedAnswer(params, attempts.n)
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
                pause_s = attempts.pause_after(error, answer.has_begun)
            finally:
                call.cancel()
            self._closed.wait(pause_s)

    @contextmanager
    def _unless_closed(self, attempts: Attempts) -> Iterator[None]:
        """Raise ServiceError if this client is closed before the block or during it.

        gRPC raises ValueError for a call on a closed channel, RpcError for a call that runs when the channel closes.
        """
        self._require_open(attempts)
        try:
            yield
        except (grpc.RpcError, ValueError):
            self._require_open(attempts)
            raise
