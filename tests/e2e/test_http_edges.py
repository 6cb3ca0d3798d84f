"""Unusual clients over HTTP: old, slow, impatient, half-closed, and such that stop to read. No other client suffers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
from helpers.service import Service
from openai import DefaultHttpxClient

from tinylm.serving.http.requests import MAX_BODY_BYTES
from tinylm.serving.live import KEPT_S

LIMIT_S = 60
PROMPT = "Once upon a time"
FIELDS = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
N_SLOW = 80  # the slots of four replicas are 64
LARGE = {"n": 16, "max_tokens": 200, "ignore_eos": True, "logprobs": 20}  # an answer for each slot, and MB of events
TYPE = "content-type: application/json"


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    return shared_service


@pytest.fixture
def text(service: Service, http: DefaultHttpxClient) -> str:
    """The answer to FIELDS."""
    return http.post(f"{service.url}/v1/completions", json=FIELDS).json()["choices"][0]["text"]


@contextmanager
def connected(service: Service, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(LIMIT_S)
        connection.connect(("127.0.0.1", service.http_port))
        yield connection


def head(*fields: str, version: str = "1.1") -> bytes:
    lines = [f"POST /v1/completions HTTP/{version}", "host: localhost", TYPE, *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def until_closed(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def body_of(response: bytes, status: int = 200) -> bytes:
    """Return the body of a response that is not chunked, and check its status."""
    top, _, body = response.partition(b"\r\n\r\n")
    assert int(top.split()[1]) == status, response[:1000]
    assert b"transfer-encoding" not in top.lower()
    return body


def text_of(response: bytes) -> str:
    return json.loads(body_of(response))["choices"][0]["text"]


def body(**fields: object) -> bytes:
    return json.dumps({**FIELDS, **fields}).encode()


def is_served(service: Service, http: DefaultHttpxClient, text: str) -> bool:
    return http.post(f"{service.url}/v1/completions", json=FIELDS).json()["choices"][0]["text"] == text


def test_http_1_0_gets_whole_answers(service: Service, text: str) -> None:
    with connected(service) as connection:
        connection.sendall(head(f"content-length: {len(body())}", version="1.0") + body())
        assert text_of(until_closed(connection)) == text


def test_a_client_that_waits_for_100_continue_is_told_to_send(service: Service, text: str) -> None:
    length = f"content-length: {len(body())}"
    with connected(service) as connection:
        connection.sendall(head(length, "expect: 100-continue", "connection: close"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body())
        assert text_of(until_closed(connection)) == text
    with connected(service) as connection:  # such a client may send at once, too
        connection.sendall(head(length, "expect: 100-continue", "connection: close") + body())
        *_, response = until_closed(connection).rpartition(b"HTTP/1.1 200")
        assert text_of(b"HTTP/1.1 200" + response) == text


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x" % len(data) + extension + b"\r\n" + data + b"\r\n"


def test_a_body_in_chunks_is_read(service: Service, text: str) -> None:
    sent = body()
    parts = [chunk(sent[:1]), chunk(sent[1:5], b";name=value"), chunk(sent[5:]), b"0\r\nx-trailer: ignored\r\n\r\n"]
    with connected(service) as connection:
        connection.sendall(head("transfer-encoding: chunked", "connection: close"))
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        assert text_of(until_closed(connection)) == text


def test_chunks_beyond_the_limit_are_refused(service: Service, http: DefaultHttpxClient, text: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            yield b" " * 65536

    response = http.post(f"{service.url}/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]
    assert is_served(service, http, text)


def test_slow_bodies_take_no_slots(service: Service, http: DefaultHttpxClient, text: str) -> None:
    """More of them than slots in all replicas send one byte per second, until another client has its answer."""
    served = Event()
    sent = body() + b" " * LIMIT_S

    def send_slowly(number: int) -> str:
        with connected(service) as connection:
            connection.sendall(head(f"content-length: {len(sent)}", "connection: close") + sent[:-LIMIT_S])
            n_left = LIMIT_S
            while n_left > 1 and not served.wait(1):
                connection.sendall(b" ")
                n_left -= 1
            connection.sendall(b" " * n_left)
            return text_of(until_closed(connection))

    with ThreadPoolExecutor(N_SLOW) as pool:
        slow = [pool.submit(send_slowly, number) for number in range(N_SLOW)]
        assert is_served(service, http, text)
        assert not any(future.done() for future in slow)
        served.set()
        assert {future.result() for future in slow} == {text}


def test_a_half_closed_client_has_left_or_gets_its_answer(
    service: Service, http: DefaultHttpxClient, text: str
) -> None:
    """A server cannot tell it from a client that has gone. It must get either all or nothing."""
    for stream in (False, True):
        sent = body(stream=stream)
        with connected(service) as connection:
            connection.sendall(head(f"content-length: {len(sent)}", "connection: close") + sent)
            connection.shutdown(socket.SHUT_WR)
            response = until_closed(connection)
        if response.startswith(b"HTTP/1.1 200"):
            assert b"data: [DONE]" in response if stream else text_of(response) == text
        else:
            assert response == b"" or response.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert is_served(service, http, text)


def test_a_reader_that_stops_holds_no_slot(service: Service, http: DefaultHttpxClient, text: str) -> None:
    with connected(service, receive_buffer=4096) as connection:
        received = stalled(service, connection, http)
        assert is_served(service, http, text)
        received += until_closed(connection)
    assert received.count(b'"finish_reason":"length"') == LARGE["n"]
    assert b"data: [DONE]" in received


def test_a_reader_that_stops_and_leaves_ends_its_call(service: Service, http: DefaultHttpxClient) -> None:
    before = len(answers(service))
    with connected(service, receive_buffer=4096) as connection:
        stalled(service, connection, http)
    deadline = time.monotonic() + LIMIT_S
    while len(lines := answers(service)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert lines[-1]["status"] in ("CANCELLED", "OK")  # OK, if all buffers on the way could take the answers


def stalled(service: Service, connection: socket.socket, http: DefaultHttpxClient) -> bytes:
    """Ask for a stream, read its beginning, stop until no request holds a slot, and return what was read."""
    sent = body(stream=True, **LARGE)
    connection.sendall(head(f"content-length: {len(sent)}", "connection: close") + sent)
    received = connection.recv(1024)
    assert received.startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + LIMIT_S
    while any(replica["running"] for replica in http.get(f"{service.url}/live").json()["replicas"]):
        assert time.monotonic() < deadline
        time.sleep(KEPT_S)
    return received


def answers(service: Service) -> list[dict]:
    """Return the log lines of completions that the engine accepted."""
    lines = [line for line in service.call_lines() if line["method"] == "POST /v1/completions"]
    return [line for line in lines if line.get("finish_reason")]
