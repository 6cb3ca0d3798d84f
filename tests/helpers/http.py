"""A small HTTP server that always gives the same answer."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def json_server(answer: Any, token: str | None = None) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield its URL, and a list of the method and the body of each request that it has accepted.

    token: requests without this bearer token get status 401 or 403, as from Ray's dashboard.
    """
    accepted: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            authorization = self.headers.get("authorization")
            if token is not None and authorization != f"Bearer {token}":
                status, said = (403, "Forbidden") if authorization else (401, "Unauthorized")
                self._send(status, said.encode())
            else:
                accepted.append((self.command, body))
                self._send(200, json.dumps(answer).encode())

        do_POST = do_PUT = do_GET

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", accepted
        finally:
            server.shutdown()
            thread.join()
