"""What the service answers over HTTP: the routers of its faces, put together.

A face is a module with `routes(service) -> APIRouter`; each answers in its own form, and whatever none of them knows
gets an error in OpenAI's.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tinylm.serving.http import completions, live, web
from tinylm.serving.http.errors import error_response
from tinylm.serving.service import Service


def build_http_app(service: Service) -> FastAPI:
    app = FastAPI(title="TinyLM", docs_url=None, redoc_url=None, openapi_url=None)  # their pages load from elsewhere
    for face in (completions, live, web):
        app.include_router(face.routes(service))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """No such path, or not with this method."""
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, message, headers=error.headers)

    return app
