"""configs/haproxy.cfg, run by `make tls` with a certificate from `make certificate`, in front of a small gRPC server.

The server shows what arrives at it. `test_service` runs HAProxy in front of the real service.
"""

import http.server
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from helpers.client import ANSWER, Scripted, scripted_server
from helpers.tls import Front, make_certificate, tls_command, tls_front

from loadtest.bench.services import free_ports
from tinylm.client import METADATA, Client, ServiceError
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

WAIT_S = 30
CONNECTION_STREAMS = 100  # the limit in configs/haproxy.cfg


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.02)


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers /-/healthz as Ray's proxy does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/-/healthz" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def backend() -> Iterator[tuple[Scripted, int, int]]:
    """The server, its gRPC port and its HTTP port."""
    with scripted_server() as (server, port), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as health:
        threading.Thread(target=health.serve_forever).start()
        yield server, port, health.server_address[1]
        health.shutdown()


@pytest.fixture(scope="module")
def front(backend: tuple[Scripted, int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    _, grpc_port, http_port = backend
    with tls_front(make_certificate(tmp_path_factory.mktemp("tls")), grpc_port, http_port) as front:
        yield front


@pytest.fixture
def server(backend: tuple[Scripted, int, int]) -> Iterator[Scripted]:
    """The server. Its endless streams end with the test."""
    server, *_ = backend
    server.released.clear()
    server.most_streams = server.cancelled = 0
    yield server
    server.released.set()
    wait_until(lambda: server.open_streams == 0, "every stream has ended")


@pytest.fixture
def channel(front: Front) -> Iterator[grpc.Channel]:
    with secure_channel(front) as channel:
        yield channel


def secure_channel(front: Front) -> grpc.Channel:
    """Return a channel with its own connection."""
    credentials = grpc.ssl_channel_credentials(front.ca.read_bytes())
    return grpc.secure_channel(front.address, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


def endless(channel: grpc.Channel, count: int) -> list[grpc.RpcContext]:
    request = pb.GenerateRequest(prompt="endless")
    return [TinyLMStub(channel).GenerateStream(request, metadata=METADATA) for _ in range(count)]


def test_the_command_line_uses_tls(front: Front) -> None:
    command = [sys.executable, "-m", "tinylm.cli", "generate", "Once", "--server", front.address]
    result = subprocess.run([*command, "--ca", str(front.ca)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "Once" + "".join(ANSWER)
    refused = subprocess.run([*command, "--tls"], capture_output=True, text=True, check=False)  # it is self-signed
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: UNAVAILABLE")  # after a line of gRPC's log


def test_metadata_reaches_the_service(channel: grpc.Channel, server: Scripted) -> None:
    TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), metadata=(*METADATA, ("authorization", "Bearer abc")))
    assert (server.metadata["authorization"], server.metadata["application"]) == ("Bearer abc", "tinylm")


def test_a_wrong_authority_is_refused(front: Front, tmp_path: Path) -> None:
    other = make_certificate(tmp_path).with_name("ca.pem")
    for tls in (other, True, False):
        with Client(front.address, tls=tls, retries=0) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
            client.info()


def test_a_renewed_certificate_takes_effect_without_a_pause(
    backend: tuple[Scripted, int, int], server: Scripted, tmp_path: Path
) -> None:
    with tls_front(make_certificate(tmp_path), *backend[1:]) as front, secure_channel(front) as before:
        (stream,) = endless(before, 1)
        next(stream)
        for name in ("server.pem", "ca.pem"):  # `make certificate` replaces neither
            (tmp_path / name).unlink()
        make_certificate(tmp_path)
        front.master.send_signal(signal.SIGUSR2)

        def trusted() -> bool:
            with Client(front.address, tls=front.ca, retries=0) as client:
                try:
                    return bool(client.info().name)
                except ServiceError:  # HAProxy still has the old certificate
                    return False

        wait_until(trusted, "the new certificate")
        next(stream)
        server.released.set()
        assert [message.finish_reason for message in stream][-1] == pb.FINISH_REASON_LENGTH
    assert server.cancelled == 0


def test_an_unreadable_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Client(tls=tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty.*no PEM certificate"):
        Client(tls=tmp_path / "empty")


@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated")
@pytest.mark.parametrize(("version", "accepted"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_only_http2_over_tls_1_2_or_newer_is_accepted(front: Front, version: str, accepted: bool) -> None:
    context = ssl.create_default_context(cafile=front.ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # the client accepts any version
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with socket.create_connection(("localhost", front.port)) as plain:
        if not accepted:
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):  # from HAProxy
                context.wrap_socket(plain, server_hostname="localhost")
            return
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            assert secure.selected_alpn_protocol() == "h2"


@pytest.mark.parametrize("way", ["cancels", "disconnects"])
def test_a_client_that_leaves_ends_its_streams(front: Front, server: Scripted, way: str) -> None:
    with secure_channel(front) as channel:
        streams = endless(channel, 10)
        wait_until(lambda: server.open_streams == 10, "ten streams are open")
        assert all(next(stream).text for stream in streams)
        if way == "cancels":
            for stream in streams:
                stream.cancel()
            wait_until(lambda: server.open_streams == 0, "the server has ended the streams")
    wait_until(lambda: server.open_streams == 0, "the server has ended the streams")


def test_streams_above_a_connection_s_limit_wait(front: Front, server: Scripted) -> None:
    with secure_channel(front) as first, secure_channel(front) as second:
        streams = endless(first, CONNECTION_STREAMS + 20)
        wait_until(lambda: server.open_streams == CONNECTION_STREAMS, "one connection is full")
        streams += endless(second, CONNECTION_STREAMS)
        wait_until(lambda: server.open_streams == 2 * CONNECTION_STREAMS, "both connections are full")
        assert server.most_streams == 2 * CONNECTION_STREAMS  # 20 streams wait
        server.released.set()
        with ThreadPoolExecutor(32) as pool:
            last_messages = list(pool.map(lambda stream: list(stream)[-1], streams))
    assert {message.finish_reason for message in last_messages} == {pb.FINISH_REASON_LENGTH}


def test_only_a_request_that_is_too_large_is_refused(channel: grpc.Channel) -> None:
    stub = TinyLMStub(channel)
    for size in (1000, 64 * 1024, 99_000):
        assert stub.Tokenize(pb.TokenizeRequest(text="a" * size), metadata=METADATA).tokens
    for size in (100_001, 3_000_000):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tokenize(pb.TokenizeRequest(text="a" * size), metadata=METADATA)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100000 bytes" in caught.value.details()


def test_only_public_methods_pass(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "unknown method"  # HAProxy's message, not gRPC's


def test_one_client_cannot_take_every_connection(front: Front) -> None:
    context = ssl.create_default_context(cafile=front.ca)
    sockets: list[ssl.SSLSocket] = []

    def connects() -> bool:
        try:  # HAProxy resets a connection above the limit, during `connect` or the TLS handshake
            plain = socket.create_connection(("127.0.0.1", front.port))
        except OSError:
            return False
        try:
            sockets.append(context.wrap_socket(plain, server_hostname="localhost"))
        except OSError:
            plain.close()
            return False
        return True

    with Client(front.address, tls=front.ca, retries=0) as client:
        client.info()  # opens a connection
        try:
            assert sum(connects() for _ in range(120)) < 100
            assert client.info().name
        finally:
            for secure in sockets:
                secure.close()
    wait_until(lambda: connects() and sockets.pop().close() is None, "connections are free again")


def test_a_service_that_is_down_is_unavailable_at_once(front: Front) -> None:
    with (
        tls_front(front.certificate, *free_ports(2)) as down,
        Client(down.address, tls=down.ca, retries=0) as client,
        pytest.raises(ServiceError, match=r"UNAVAILABLE.*503"),
    ):
        client.info()


def test_a_missing_certificate_is_an_error_that_helps(tmp_path: Path) -> None:
    result = subprocess.run(tls_command(tmp_path / "none.pem"), capture_output=True, text=True, check=False)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert str(tmp_path / "none.pem") in line
    assert "make certificate" in line
