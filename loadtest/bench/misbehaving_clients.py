"""Clients that misbehave on purpose, each a function that runs until it is told to end.

`loadtest.bench.misbehaving` measures what they cost others.
"""

from __future__ import annotations

import ctypes
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

PAUSE_S = 0.1  # between two requests of the clients that repeat them
VANISH_PAUSE_S = 0.5
LIMIT_S = 60.0
N_IDLE, N_SLOW = 1000, 80  # more slow bodies than the slots of four replicas
PROMPT = "Once upon a time"
SHORT = {"prompt": PROMPT, "max_tokens": 2}
STREAM = {"prompt": PROMPT, "max_tokens": 32, "stream": True}
# An answer for each slot, and megabytes of events, so that no buffer on the way holds them all.
LARGE = {"prompt": PROMPT, "max_tokens": 200, "n": 16, "logprobs": 20, "ignore_eos": True, "stream": True}
HTTP2_BEGIN = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")  # and an empty SETTINGS
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # a program for the kernel's packet filter: return 0 bytes
SO_ATTACH_FILTER = 26  # Linux


@dataclass
class Place:
    """The service's ports on this machine, and what happened to the requests of a misbehaving client."""

    grpc_port: int
    http_port: int
    ended: Event = field(default_factory=Event)
    outcomes: Counter[str] = field(default_factory=Counter)  # the status of each response, or "open" connections

    @contextmanager
    def connected(self, receive_buffer: int | None = None, port: int | None = None) -> Iterator[socket.socket]:
        with socket.socket() as connection:
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(LIMIT_S)
            connection.connect(("127.0.0.1", port or self.http_port))
            yield connection

    def count(self, response: bytes) -> None:
        self.outcomes[response[9:12].decode("ascii", "replace") or "nothing"] += 1


def vanish(connection: socket.socket) -> None:
    """Make this end as silent as a machine without power: it acknowledges nothing and answers no probe.

    The kernel drops all packets that arrive for this socket. Closing the socket still sends a FIN.
    """
    program = ctypes.create_string_buffer(DROP_ALL)
    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))


def half_closed(place: Place) -> None:
    """Ask for a stream and close the sending side at once."""
    while not place.ended.wait(PAUSE_S):
        with place.connected() as connection:
            connection.sendall(_request(STREAM))
            connection.shutdown(socket.SHUT_WR)
            place.count(_until_closed(connection))


def vanished(place: Place) -> None:
    """Vanish within a stream, again and again."""
    with ExitStack() as connections:
        while not place.ended.wait(VANISH_PAUSE_S):
            connection = connections.enter_context(place.connected())
            connection.sendall(_request(STREAM))
            place.count(connection.recv(4096))
            vanish(connection)


def stopped_reader(place: Place) -> None:
    """Read the beginning of a large stream of server-sent events, and then nothing."""
    with place.connected(receive_buffer=4096) as connection:
        connection.sendall(_request(LARGE))
        place.count(connection.recv(1024))
        place.ended.wait()


def idle(place: Place) -> None:
    """Open many connections, half of them for gRPC, and send no request."""
    with ExitStack() as connections:
        for number in range(N_IDLE):
            if place.ended.is_set():
                return
            port = place.grpc_port if number % 2 else place.http_port
            connection = connections.enter_context(place.connected(port=port))
            if number % 2:
                connection.sendall(HTTP2_BEGIN)
            place.outcomes["open"] += 1
        place.ended.wait()


def slow_bodies(place: Place) -> None:
    """Send the bodies of many requests at one byte per second."""
    with ExitStack() as stack:
        connections = [stack.enter_context(place.connected()) for _ in range(N_SLOW)]
        for connection in connections:
            connection.sendall(_head(f"content-length: {10**6}"))
            place.outcomes["open"] += 1
        while not place.ended.wait(1):
            for connection in connections:
                connection.sendall(b" ")


def http_1_0(place: Place) -> None:
    """Send requests as HTTP/1.0."""
    _repeat(place, _request(SHORT, version="1.0"))


def expects_continue(place: Place) -> None:
    """Wait for 100 Continue before each body."""
    body = _body(SHORT)
    while not place.ended.wait(PAUSE_S):
        with place.connected() as connection:
            connection.sendall(_head(f"content-length: {len(body)}", "expect: 100-continue", "connection: close"))
            place.count(connection.recv(1000))
            connection.sendall(body)
            place.count(_until_closed(connection))


def chunked(place: Place) -> None:
    """Send each byte of a body as a chunk of its own."""
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in _body(SHORT)) + b"0\r\n\r\n"
    _repeat(place, _head("transfer-encoding: chunked", "connection: close") + chunks)


CLIENTS: dict[str, Callable[[Place], None]] = {
    "half-closed streams": half_closed,
    "clients that vanish within a stream": vanished,
    "a reader of a large stream that stops": stopped_reader,
    f"{N_IDLE:,} idle connections": idle,
    f"{N_SLOW} bodies at one byte per second": slow_bodies,
    "HTTP/1.0": http_1_0,
    "Expect: 100-continue": expects_continue,
    "bodies in chunks of one byte": chunked,
}


def _repeat(place: Place, request: bytes) -> None:
    while not place.ended.wait(PAUSE_S):
        with place.connected() as connection:
            connection.sendall(request)
            place.count(_until_closed(connection))


def _body(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def _head(*lines: str, version: str = "1.1") -> bytes:
    first = [f"POST /v1/completions HTTP/{version}", "host: localhost", "content-type: application/json"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def _request(fields: dict[str, Any], version: str = "1.1") -> bytes:
    body = _body(fields)
    return _head(f"content-length: {len(body)}", "connection: close", version=version) + body


def _until_closed(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
    return data
