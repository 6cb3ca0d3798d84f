"""Serve the web pages: the files of `tinylm/web` at `/`, and those of `tinylm/web/explain` at `/explain`.

Headers limit the pages to their own origin.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinylm.serving.service import Service

CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # the browser keeps the file, and checks its ETag before each use
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes(service: Service) -> APIRouter:
    """Return a route for each file, and that of the directory for its index.html. They need no key.

    The files are read once, here.
    """
    router = APIRouter()
    root = resources.files("tinylm.web")
    for prefix, directory in (("", root), ("/explain", root / "explain")):
        for file in directory.iterdir():
            content_type = CONTENT_TYPES.get(f".{file.name.rpartition('.')[2]}")
            if content_type is not None:
                path = (prefix or "/") if file.name == "index.html" else f"{prefix}/{file.name}"
                router.add_route(path, _answer(file.read_bytes(), content_type), methods=["GET"])
    return router


def _answer(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "ETag": etag, "Vary": "Accept-Encoding"}
    compressed = gzip.compress(content, mtime=0)

    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            packed = {**headers, "Content-Encoding": "gzip"}
            return Response(compressed, media_type=content_type, headers=packed)
        return Response(content, media_type=content_type, headers=headers)

    return answer
