"""OpenAI's completions API on a service: `/v1/completions`, `/v1/models`, and `/health` beside them.

What is asked is read by `tinylm.serving.http.requests`; here it becomes answers, whole or as server-sent events.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import grpc
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tinylm.serving.calls import Call, Refused
from tinylm.serving.http.errors import HEADERS, error_of, error_response, refused
from tinylm.serving.http.merge import merged
from tinylm.serving.http.requests import CompletionRequest, read_body, read_request
from tinylm.serving.ray.internals import is_draining
from tinylm.serving.service import Delta, Service
from tinylm.tokenizer import Tokenizer

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx in front would hold the events back
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
            let_in(call, request, service)
            return JSONResponse({"object": "list", "data": [model]})
        return refused(call)

    @router.get("/v1/models/{name}")
    async def one_model(request: Request, name: str) -> Response:
        with service.answering("GET /v1/models/{name}") as call:
            let_in(call, request, service)
            check_model(name, service)
            return JSONResponse(model)
        return refused(call)

    @router.get("/health")
    async def health() -> Response:
        """Without a key, whatever the load."""
        if service.is_healthy() and not is_draining():
            return JSONResponse({"status": "ok"})
        return error_response(503, "this replica is ending: try again", HEADERS[503])

    return router


def let_in(call: Call, request: Request, service: Service) -> None:
    """Raises Refused for a caller who may not ask."""
    address = request.client.host if request.client else None
    call.key = service.access.check(address, request.headers.get("authorization"), request.headers.get("host"))


def check_model(name: str | None, service: Service) -> None:
    """Raises Refused for another model than the one that is served."""
    if name is not None and name != service.name:
        raise Refused(grpc.StatusCode.NOT_FOUND, f"model is {name[:256]!r}: this service has {service.name!r} alone")


class CompletionResponse(Response):
    """The answer to a request for completions, made while it is sent.

    Nothing is sent before the first text is there, so that whatever goes wrong until then has its HTTP status. When
    the client leaves, Serve cancels the task that this runs in, and that frees the slots.
    """

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__()
        self._service, self._request = service, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_streaming = False
        with self._service.answering("POST /v1/completions") as call:
            body = await self._read(call)
            completions = Completions(self._service, body, call, self._request.headers.get("x-request-id"))
            if body.stream:
                async with aclosing(completions.events()) as events:
                    async for event in events:
                        if not is_streaming:
                            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
                            is_streaming = True
                        await send({"type": "http.response.body", "body": event, "more_body": not completions.ended})
            else:
                await JSONResponse(await completions.whole())(scope, receive, send)
        if call.error is not None and is_streaming:
            await send({"type": "http.response.body", "body": _event(error_of(call)[1])})
        elif call.error is not None:
            await refused(call)(scope, receive, send)

    async def _read(self, call: Call) -> CompletionRequest:
        let_in(call, self._request, self._service)
        try:
            body = read_request(await read_body(self._request))
        except ClientDisconnect:
            raise Refused(grpc.StatusCode.CANCELLED, "the client left before its request was whole") from None
        check_model(body.model, self._service)
        return body


class Completions:
    """All answers to one request: prompt after prompt, `n` to each."""

    def __init__(self, service: Service, body: CompletionRequest, call: Call, request_id: str | None) -> None:
        self._body, self._call = body, call
        call.n_expected = len(body.prompts) * body.n
        self._head: dict[str, Any] = {
            "id": f"cmpl-{request_id or uuid4().hex}",  # with Serve's own id of the request, which is in the log too
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self._choices = [
            Choice(place * body.n + index, prompt, body, service.tokenizer)
            for place, prompt in enumerate(body.prompts)
            for index in range(body.n)
        ]
        self._deltas = merged(
            [
                service.generate(choice.prompt, body.params(choice.index % body.n), body.timeout_s, call,
                                 choice.index % body.n, whole=not body.stream)
                for choice in self._choices
            ]
        )  # fmt: skip
        self.ended = False  # the last event is there

    async def whole(self) -> dict[str, Any]:
        """The answer that is not streamed. Raises Refused when the time was over before it was whole."""
        async with aclosing(self._deltas):
            async for place, delta in self._deltas:
                self._choices[place].add(delta)
        for completion in self._call.completions:
            if completion.finish_reason == "timeout":
                raise Refused.timeout(self._body.timeout_ms, len(completion.token_ids))
        return {**self._head, "choices": [choice.take() for choice in self._choices], "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """An event for whatever has become certain of one choice; the last comes with the usage and the end."""
        with_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        head = {**self._head, "usage": None} if with_usage else self._head
        n_left = len(self._choices)
        async with aclosing(self._deltas):
            async for place, delta in self._deltas:
                choice = self._choices[place]
                choice.add(delta)
                n_left -= delta.completion is not None
                if not choice.has_news:
                    continue
                event = _event({**head, "choices": [choice.take()]})
                if n_left == 0:
                    if with_usage:
                        event += _event({**self._head, "choices": [], "usage": self._usage()})
                    event += b"data: [DONE]\n\n"
                    self.ended = True
                yield event

    def _usage(self) -> dict[str, int]:
        prompt_tokens = sum(answer.n_prompt_tokens for answer in self._call.answers)
        completion_tokens = sum(answer.n_tokens for answer in self._call.answers)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class Choice:
    """One answer on its way: what it has gained since it was last taken, in OpenAI's form."""

    def __init__(self, index: int, prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self.index, self.prompt = index, prompt
        self._tokenizer = tokenizer
        self._text = ""
        self._echoes = body.echo  # with the first of the answer, when the prompt is known to be one
        self._logprobs = _no_logprobs() if body.logprobs is not None else None
        self._finish_reason: str | None = None
        self._offsets = TextOffsets()

    @property
    def has_news(self) -> bool:
        has_tokens = self._logprobs is not None and self._logprobs["tokens"]
        return bool(self._text or has_tokens or self._finish_reason)

    def add(self, delta: Delta) -> None:
        if self._echoes:
            self._text = self.prompt if isinstance(self.prompt, str) else self._tokenizer.decode(self.prompt)
            self._echoes = False
        self._text += delta.text
        if delta.completion is not None:
            self._finish_reason = delta.completion.finish_reason
        if (logprobs := self._logprobs) is None:
            return
        decode = self._tokenizer.decode
        for token, entry in zip(delta.tokens, delta.logprobs, strict=True):
            text = decode([token])
            top = {text: entry.logprob}
            for other, logprob in reversed(entry.top):  # of tokens with the same text the likeliest stays
                top[decode([other])] = logprob
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(entry.logprob)
            logprobs["top_logprobs"].append(dict(sorted(top.items(), key=lambda item: -item[1])))
            logprobs["text_offset"].append(self._offsets.add(self._tokenizer.piece_bytes[token]))

    def take(self) -> dict[str, Any]:
        taken = {
            "text": self._text,
            "index": self.index,
            "logprobs": self._logprobs,
            "finish_reason": self._finish_reason,
        }
        self._text = ""
        self._logprobs = None if self._logprobs is None else _no_logprobs()
        return taken


class TextOffsets:
    """Finds the character of the text at which each token begins.

    Bytes that are not UTF-8 become U+FFFD in the text. A token that begins within a character has its offset.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_characters = 0  # complete ones, so far

    def add(self, token: bytes) -> int:
        """Return the offset of the next token, in Unicode characters."""
        if not token:
            return self._n_characters
        self._n_characters += len(self._decoder.decode(token[:1]))
        is_complete = not self._decoder.getstate()[0]  # the first byte ended a character; else it is the next one's
        offset = self._n_characters - is_complete
        self._n_characters += len(self._decoder.decode(token[1:]))
        return offset


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
