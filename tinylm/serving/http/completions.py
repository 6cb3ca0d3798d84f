"""OpenAI's completions API: `/v1/completions` and `/v1/models`, and `/health`.

`tinylm.completions` has the form of requests and answers. This module sends answers, whole or as server-sent events.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from secrets import token_hex
from typing import Any
from uuid import uuid4

import grpc
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tinylm.completions.requests import CompletionRequest, StreamOptions, read_request
from tinylm.completions.response import ResponseBody, usage
from tinylm.engine import EngineFull
from tinylm.engine.delta import Delta
from tinylm.serving.calls import Call, Refused
from tinylm.serving.http.errors import HEADERS, error_of, error_response, refused
from tinylm.serving.http.merge import merged
from tinylm.serving.http.requests import read_body
from tinylm.serving.ray.internals import is_draining
from tinylm.serving.service import Service
from tinylm.serving.trace_context import TRACEPARENT, read_traceparent

FULL_QUEUE_S = 0.05  # between two looks at a full queue
PADDED = 64  # bytes
ENGINE_REQUEST = b"x-engine-request"
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # otherwise an nginx in front buffers the events
]


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    created = int((service.args.model / "config.json").stat().st_mtime)
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "tinylm"}

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return CompletionResponse(service, request)

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        with service.answering("GET /v1/models") as call:
            check_access(call, request, service)
            return JSONResponse({"object": "list", "data": [model]})
        return refused(call)

    @router.get("/v1/models/{name}")
    async def one_model(request: Request, name: str) -> Response:
        with service.answering("GET /v1/models/{name}") as call:
            check_access(call, request, service)
            check_model(name, service)
            return JSONResponse(model)
        return refused(call)

    @router.get("/health")
    async def health() -> Response:
        """Report the replica's health. The call needs no key, and no load makes it fail."""
        if service.is_healthy() and not is_draining():
            return JSONResponse({"status": "ok"})
        return error_response(503, "this replica is ending: try again", HEADERS[503])

    return router


def check_access(call: Call, request: Request, service: Service) -> None:
    """Raise Refused for a caller without access."""
    call.trace = read_traceparent(request.headers.getlist(TRACEPARENT))
    address = request.client.host if request.client else None
    call.key = service.access.check(address, request.headers.get("authorization"), request.headers.get("host"))


def check_model(name: str | None, service: Service) -> None:
    """Raise Refused unless the name is None or that of the served model."""
    if name is not None and name != service.name:
        raise Refused(grpc.StatusCode.NOT_FOUND, f"model is {name[:256]!r}: this service has only {service.name!r}")


class CompletionResponse(Response):
    """The response to a completions request. It generates the answer while it sends it.

    It sends nothing before the first text, so that an error until then gets its HTTP status. When the client leaves,
    Serve cancels the task that runs this, and the cancellation frees the slots.
    """

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__()
        self._service, self._request = service, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_streaming = False
        with self._service.answering("POST /v1/completions") as call:
            body = await self._read(call)
            prompts = await self._service.admit(call, body.prompts, body.params(0), body.n_generated)
            completions = Completions(self._service, body, prompts, call, self._request.headers.get("x-request-id"))
            if body.stream:
                async with aclosing(completions.events()) as events:
                    async for event in events:
                        if not is_streaming:
                            headers = [*EVENT_HEADERS, (ENGINE_REQUEST, self._engine_request(call))]
                            await send({"type": "http.response.start", "status": 200, "headers": headers})
                            is_streaming = True
                        await send({"type": "http.response.body", "body": event, "more_body": not completions.ended})
            else:
                await JSONResponse(await completions.whole())(scope, receive, send)
        if call.error is not None and is_streaming:
            await send({"type": "http.response.body", "body": _event(error_of(call)[1])})
        elif call.error is not None:
            await refused(call)(scope, receive, send)

    def _engine_request(self, call: Call) -> bytes:
        """Return where `/explain/batch` shows the first answer: the replica, and the number of the request in it."""
        return f"{self._service.replica} {call.answers[0].progress.number}".encode()

    async def _read(self, call: Call) -> CompletionRequest:
        check_access(call, self._request, self._service)
        try:
            body = read_request(await read_body(self._request))
        except ClientDisconnect:
            raise Refused(grpc.StatusCode.CANCELLED, "the client left before it had sent the whole request") from None
        check_model(body.model, self._service)
        return body


class Completions:
    """All answers to one request: `n` answers to each prompt."""

    def __init__(
        self, service: Service, body: CompletionRequest, prompts: list[list[int]], call: Call, request_id: str | None
    ) -> None:
        """prompts: the token ids of each prompt of `body`, from `Service.admit`."""
        self._body = body
        call.n_expected = len(body.prompts) * body.n_generated
        request_id = request_id or uuid4().hex  # Serve's id of the request, which the log has too
        self._response = ResponseBody(body, service.name, request_id, service.tokenizer)
        generators: list[AsyncGenerator[Delta, None]] = []
        for ids in prompts:
            for index in range(body.n_generated):
                params, is_whole = body.params(index), not body.stream
                # Those of the first wave are refused when the queue is full. Later ones wait: they have begun.
                ask = partial(service.generate, ids, params, body.timeout_s, call, index, is_whole)
                generators.append(ask() if len(generators) < service.args.slots else _patient(ask))
        self._deltas = merged(generators, service.args.slots)
        self.ended = False  # whether `events` has yielded the last event

    async def whole(self) -> dict[str, Any]:
        """Return the unstreamed answer. Raise Refused when the time limit passed before it was complete."""
        async with aclosing(self._deltas):
            async for number, delta in self._deltas:
                self._response.choices[number].add(delta)
        if (choice := self._response.timed_out) is not None:
            raise Refused.timeout(self._body.timeout_ms, choice.n_tokens)
        return self._response.whole()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield an event for each piece of a choice. The last one also has the usage and the end of the stream."""
        options = self._body.stream_options or StreamOptions()
        response = self._response
        head = {**response.head, "usage": None} if options.include_usage else response.head
        n_left = len(response.choices)
        async with aclosing(self._deltas):
            async for number, delta in self._deltas:
                choice = response.choices[number]
                choice.add(delta)
                n_left -= delta.completion is not None
                if not choice.has_news:
                    continue
                fields = {**head, "choices": [choice.take()]}
                if options.continuous_usage_stats:
                    fields["usage"] = usage(choice.n_prompt_tokens, choice.n_tokens)
                event = _event(fields, options.include_obfuscation)
                if n_left == 0:
                    if options.include_usage:
                        event += _event({**response.head, "choices": [], "usage": response.usage()})
                    event += b"data: [DONE]\n\n"
                    self.ended = True
                yield event


async def _patient(ask: Callable[[], AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Yield the answer that `ask` gives, and ask again while the queue is full."""
    while True:
        try:
            async with aclosing(ask()) as deltas:
                async for delta in deltas:
                    yield delta
            return
        except EngineFull:
            await asyncio.sleep(FULL_QUEUE_S)


def _event(value: dict[str, Any], pads: bool = False) -> bytes:
    """Return a server-sent event. pads: add random characters up to a multiple of PADDED bytes."""
    data = json.dumps(value, separators=(",", ":")).encode()
    if pads:
        size = -(len(data) + len(',"obfuscation":""')) % PADDED
        data = json.dumps({**value, "obfuscation": token_hex(PADDED)[:size]}, separators=(",", ":")).encode()
    return b"data: " + data + b"\n\n"
