"""Explanations of a short prompt, piece by piece: `POST /explain/PIECE`.

`tokens` and `cache` are looked up here. The replica's explaining process computes the other pieces.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from tinylm.completions.requests import SamplingFields
from tinylm.explain.engine_answer import EngineAnswer, for_one_token
from tinylm.explain.explainer import as_tokens, cache_use, read_prompt
from tinylm.explain.results import as_json
from tinylm.sampling import SamplingParams
from tinylm.serving.calls import Call
from tinylm.serving.http.completions import check_access, check_model
from tinylm.serving.http.errors import refused
from tinylm.serving.http.requests import read_fields
from tinylm.serving.service import Service


class PromptBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # None means the served model
    prompt: str


class AttentionBody(PromptBody):
    layer: int | None = None  # None means all layers
    head: int | None = None  # None means all heads of the layer


class LensBody(PromptBody):
    position: int | None = None  # None means the last token
    top: int = 5


class LogitsBody(PromptBody):
    top: int = 100


class MatmulBody(PromptBody):
    layer: int
    name: str
    position: int | None = None  # None means all tokens


class ScoresBody(SamplingFields, PromptBody):
    top: int = 20


BODIES: dict[str, type[PromptBody]] = {
    "tokens": PromptBody,
    "norms": PromptBody,
    "attention": AttentionBody,
    "lens": LensBody,
    "logits": LogitsBody,
    "scores": ScoresBody,
    "matmul": MatmulBody,
    "cache": PromptBody,
}


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    for piece in BODIES:
        router.add_route(f"/explain/{piece}", _route(service, piece), methods=["POST"])
    return router


def _route(service: Service, piece: str) -> Callable[[Request], Awaitable[Response]]:
    async def explain(request: Request) -> Response:
        with service.answering(f"POST /explain/{piece}") as call:
            check_access(call, request, service)
            body = await read_fields(request, BODIES[piece])
            check_model(body.model, service)
            return Response(await _explain(service, piece, body, call), media_type="application/json")
        return refused(call)

    return explain


async def _explain(service: Service, piece: str, body: PromptBody, call: Call) -> bytes:
    """Return one piece as JSON. Raise ValueError for a wrong field, Busy if the replica does not explain now."""
    ids = read_prompt(body.prompt, service.tokenizer, service.config)
    if piece == "tokens":
        return _encoded({"tokens": as_json(as_tokens(ids, service.tokenizer))})
    if piece == "cache":
        return _encoded(as_json(cache_use(service.engine.engine, len(ids))))
    service.explanations.check_idle()
    question = {"piece": piece, **body.model_dump(exclude={"model"})}
    if isinstance(body, ScoresBody):
        settings = body.settings()
        settings["max_tokens"] = max(1, body.min_tokens)  # the first token is all that is explained
        answer = await _ask_engine(service, body.prompt, SamplingParams(**settings), call)
        question = {
            "piece": piece,
            "prompt": body.prompt,
            "top": body.top,
            "settings": settings,
            "by_engine": answer.to_json(),
        }
    return await service.explanations.ask(question)


async def _ask_engine(service: Service, prompt: str, params: SamplingParams, call: Call) -> EngineAnswer:
    """Return the next token by the served engine. For the limits of a key, this is a request like any other."""
    params = for_one_token(params)
    [ids] = await service.admit(call, [prompt], params)
    async with aclosing(service.generate(ids, params, None, call, whole=True)) as deltas:
        async for _ in deltas:
            pass
    return EngineAnswer.of(call.answers[-1].progress)


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
