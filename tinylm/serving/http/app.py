"""Build the HTTP application from the routes of `completions`, `tokens`, `explain`, `live` and `web`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route

from tinylm.serving.http import completions, explain, live, tokens, web
from tinylm.serving.http.errors import error_response
from tinylm.serving.service import Service


def build_http_app(service: Service) -> FastAPI:
    app = FastAPI(title="TinyLM", docs_url=None, redoc_url=None, openapi_url=None)  # those pages load foreign scripts
    for module in (completions, tokens, explain, live, web):
        router = module.routes(service)
        for route in router.routes:
            if isinstance(route, Route) and route.methods and "GET" in route.methods:
                route.methods.add("HEAD")  # for uptime monitors; the server omits the body
        app.include_router(router)

    if service.args.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.args.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after"],
        )

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """Answer an unknown path or method in the form of OpenAI's API."""
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, message, headers=error.headers)

    return app
