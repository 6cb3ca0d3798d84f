"""Text to tokens and back, in the form of vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from tinylm.completions.requests import MAX_PROMPT_ITEMS
from tinylm.engine import check_ids
from tinylm.engine.prompt import check_size
from tinylm.serving.http.completions import check_access, check_model
from tinylm.serving.http.errors import refused
from tinylm.serving.http.requests import read_fields
from tinylm.serving.service import Service


class TokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True  # put the boundary in front, as a request does
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_PROMPT_ITEMS)


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    tokenizer = service.tokenizer

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        with service.answering("POST /tokenize") as call:
            check_access(call, request, service)
            body = await read_fields(request, TokenizeBody)
            check_model(body.model, service)
            check_size("prompt", body.prompt)
            ids = (tokenizer.encode_document if body.add_special_tokens else tokenizer.encode)(body.prompt)
            strings = [tokenizer.piece(token) for token in ids] if body.return_token_strs else None
            context = service.config.context
            return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": strings})
        return refused(call)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        with service.answering("POST /detokenize") as call:
            check_access(call, request, service)
            body = await read_fields(request, DetokenizeBody)
            check_model(body.model, service)
            check_ids(body.tokens, service.config.vocab_size)
            return JSONResponse({"prompt": tokenizer.decode(body.tokens)})
        return refused(call)

    return router
