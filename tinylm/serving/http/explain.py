"""Explanations of a short prompt, piece by piece: `POST /explain/PIECE`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from tinylm.completions.requests import SamplingFields
from tinylm.sampling import SamplingParams
from tinylm.serving.explanations import explain
from tinylm.serving.http.completions import check_access, check_model
from tinylm.serving.http.errors import refused
from tinylm.serving.http.requests import read_fields
from tinylm.serving.service import Service


class PromptBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # None means the served model
    prompt: str

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `explain` after the piece. A field that is not set has the default of the piece."""
        return {name: value for name, value in self.model_dump(exclude={"model"}).items() if value is not None}


class AttentionBody(PromptBody):
    layer: int | None = None  # None means all layers
    head: int | None = None  # None means all heads of the layer


class LensBody(PromptBody):
    position: int | None = None  # None means the last token
    top: int | None = None


class LogitsBody(PromptBody):
    top: int | None = None


class MatmulBody(PromptBody):
    layer: int
    name: str
    position: int | None = None  # None means all tokens


class ScoresBody(SamplingFields, PromptBody):
    top: int | None = None

    def arguments(self) -> dict[str, Any]:
        params = SamplingParams(max_tokens=max(1, self.min_tokens), **self.settings())
        return {"prompt": self.prompt, "params": params} | ({} if self.top is None else {"top": self.top})


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
    async def answer(request: Request) -> Response:
        with service.answering(f"POST /explain/{piece}") as call:
            check_access(call, request, service)
            body = await read_fields(request, BODIES[piece])
            check_model(body.model, service)
            content = await explain(service, call, "json", piece, **body.arguments())
            return Response(content, media_type="application/json")
        return refused(call)

    return answer
