"""configs/haproxy.cfg, run by `make tls` with a certificate by `make certificate`, in front of a small gRPC service.

The service behind it is a bare grpc.aio server, which shows what reaches it; test_service.py has the real one.
"""

import asyncio
import http.server
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from helpers.tls import Front, make_certificate, tls_command, tls_front

from loadtest.bench.services import free_ports
from tinylm import LLM, SamplingParams
from tinylm.client import METADATA, Client, ServiceError
from tinylm.client.wire import FINISH_REASONS, params_from_request
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, TinyLMStub, add_TinyLMServicer_to_server

WAIT_S = 30
CONNECTION_STREAMS = 100  # as configs/haproxy.cfg has it
GREEDY = SamplingParams(max_tokens=16, temperature=0)


def wait_until(true, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.02)


@dataclass
class Backend(TinyLMServicer):
    """Answers by the library; a stream with the prompt "hold" goes on until `released` or cancelled."""

    llm: LLM
    released: threading.Event = field(default_factory=threading.Event)
    metadata: dict[str, str] = field(default_factory=dict)
    open_streams: int = 0
    most_streams: int = 0
    cancelled: int = 0

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(tokens=[pb.Token(id=len(request.text))])

    async def GetModelInfo(self, request: object, context: grpc.aio.ServicerContext) -> pb.GetModelInfoResponse:
        self.metadata = dict(context.invocation_metadata())
        return pb.GetModelInfoResponse(name="behind TLS")

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        answer = self.llm.generate(request.prompt, params_from_request(request))[0]
        return pb.GenerateResponse(text=answer.text, finish_reason=FINISH_REASONS[answer.finish_reason])

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        if request.prompt != "hold":
            for piece in self.llm.stream(request.prompt, params_from_request(request)):
                yield pb.GenerateStreamResponse(text=piece)
        else:
            self.open_streams += 1
            self.most_streams = max(self.most_streams, self.open_streams)
            try:
                while not self.released.is_set():
                    yield pb.GenerateStreamResponse(text=".")
                    await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.open_streams -= 1
        yield pb.GenerateStreamResponse(finish_reason=pb.FINISH_REASON_STOP)


class Healthy(http.server.BaseHTTPRequestHandler):
    """What Ray's proxy answers to /-/healthz."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/-/healthz" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def backend(stories: LLM) -> Iterator[tuple[Backend, int, int]]:
    """The service with its gRPC and its HTTP port."""
    service = Backend(stories)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        add_TinyLMServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT_S)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as health:
        threading.Thread(target=health.serve_forever).start()
        yield service, port, health.server_address[1]
        health.shutdown()
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(WAIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def front(backend: tuple[Backend, int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    _, grpc_port, http_port = backend
    with tls_front(make_certificate(tmp_path_factory.mktemp("tls")), grpc_port, http_port) as front:
        yield front


@pytest.fixture
def client(front: Front) -> Iterator[Client]:
    with Client(front.address, tls=front.ca, retries=0) as client:
        yield client


@pytest.fixture
def channel(front: Front) -> Iterator[grpc.Channel]:
    with secure_channel(front) as channel:
        yield channel


def secure_channel(front: Front) -> grpc.Channel:
    """A connection of its own."""
    credentials = grpc.ssl_channel_credentials(front.ca.read_bytes())
    return grpc.secure_channel(front.address, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


@pytest.fixture
def held(backend: tuple[Backend, int, int]) -> Iterator[Backend]:
    """The service, in which streams with the prompt "hold" stay open until they are released."""
    service, *_ = backend
    service.released.clear()
    service.most_streams = service.cancelled = 0
    yield service
    service.released.set()
    wait_until(lambda: service.open_streams == 0, "every stream has ended")


def hold(channel: grpc.Channel, count: int) -> list[grpc.RpcContext]:
    request = pb.GenerateRequest(prompt="hold")
    return [TinyLMStub(channel).GenerateStream(request, metadata=METADATA) for _ in range(count)]


def test_answers_whole_and_streamed_are_the_library_s(client: Client, stories: LLM) -> None:
    expected = stories.generate("Once upon a time", GREEDY)[0].text
    assert client.generate("Once upon a time", GREEDY).text == expected
    assert "".join(client.stream("Once upon a time", GREEDY)) == expected


def test_the_command_line_asks_over_tls(front: Front, stories: LLM) -> None:
    command = [sys.executable, "-m", "tinylm.cli", "generate", "Once", "-n", "8", "-t", "0", "--server", front.address]
    result = subprocess.run([*command, "--ca", str(front.ca)], capture_output=True, text=True, check=True)
    expected = stories.generate("Once", SamplingParams(max_tokens=8, temperature=0))[0].text
    assert result.stdout.strip() == "Once" + expected
    refused = subprocess.run([*command, "--tls"], capture_output=True, text=True, check=False)  # it is self-signed
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: UNAVAILABLE")  # gRPC logs a line of its own before it


def test_metadata_reaches_the_service(channel: grpc.Channel, backend: tuple[Backend, int, int]) -> None:
    TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), metadata=(*METADATA, ("authorization", "Bearer abc")))
    assert backend[0].metadata["authorization"] == "Bearer abc"
    assert backend[0].metadata["application"] == "tinylm"


def test_another_authority_and_no_authority_are_refused(front: Front, tmp_path: Path) -> None:
    other = make_certificate(tmp_path).with_name("ca.pem")
    for tls in (other, True, False):
        with Client(front.address, tls=tls, retries=0) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
            client.info()


def test_a_renewed_certificate_is_taken_up_without_a_pause(backend: tuple[Backend, int, int], tmp_path: Path) -> None:
    service, grpc_port, http_port = backend
    service.released.clear()
    service.cancelled = 0
    with tls_front(make_certificate(tmp_path), grpc_port, http_port) as front, secure_channel(front) as before:
        (stream,) = hold(before, 1)
        next(stream)
        for name in ("server.pem", "ca.pem"):  # `make certificate` replaces neither
            (tmp_path / name).unlink()
        make_certificate(tmp_path)
        front.master.send_signal(signal.SIGUSR2)

        def trusted() -> bool:
            with Client(front.address, tls=front.ca, retries=0) as client:
                try:
                    return client.info().name == "behind TLS"
                except ServiceError:  # of the old one's authority
                    return False

        wait_until(trusted, "the new certificate")
        next(stream)
        service.released.set()
        assert [message.finish_reason for message in stream][-1] == pb.FINISH_REASON_STOP  # on the old one, to its end
    assert service.cancelled == 0


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Client(tls=tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty.*no PEM certificate"):
        Client(tls=tmp_path / "empty")


@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("version", "accepted"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)], ids=lambda value: str(value)
)
def test_http2_over_tls_1_2_or_newer_alone(front: Front, version: str, accepted: bool) -> None:
    context = ssl.create_default_context(cafile=front.ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # so that this side would take any version
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with socket.create_connection(("localhost", front.port)) as plain:
        if not accepted:
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):  # the other side's word
                context.wrap_socket(plain, server_hostname="localhost")
            return
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            assert secure.selected_alpn_protocol() == "h2"


def test_a_cancelled_stream_ends_in_the_service(channel: grpc.Channel, held: Backend) -> None:
    streams = hold(channel, 10)
    wait_until(lambda: held.open_streams == 10, "ten streams are open")
    for stream in streams:
        stream.cancel()
    wait_until(lambda: held.cancelled == 10, "the service saw ten cancellations")


def test_a_client_that_vanishes_ends_its_streams_in_the_service(front: Front, held: Backend) -> None:
    with secure_channel(front) as channel:
        streams = hold(channel, 10)
        wait_until(lambda: held.open_streams == 10, "ten streams are open")
        assert all(next(stream).text for stream in streams)
    wait_until(lambda: held.cancelled == 10, "the service saw ten cancellations")


def test_more_streams_than_a_connection_carries_wait_and_none_fails(front: Front, held: Backend) -> None:
    """HAProxy takes 100 at once from one connection; gRPC holds the rest back. Two connections carry 200."""
    with secure_channel(front) as first, secure_channel(front) as second:
        streams = hold(first, CONNECTION_STREAMS + 20)
        wait_until(lambda: held.open_streams == CONNECTION_STREAMS, "one connection is full")
        streams += hold(second, CONNECTION_STREAMS)
        wait_until(lambda: held.open_streams == 2 * CONNECTION_STREAMS, "both connections are full")
        assert held.most_streams == 2 * CONNECTION_STREAMS  # the 20 still wait
        held.released.set()
        with ThreadPoolExecutor(32) as pool:
            lasts = list(pool.map(lambda stream: list(stream)[-1], streams))
    assert [last.finish_reason for last in lasts] == [pb.FINISH_REASON_STOP] * len(streams)


def test_a_request_too_large_is_refused_and_the_largest_that_can_be_right_is_not(channel: grpc.Channel) -> None:
    stub = TinyLMStub(channel)
    for size in (1000, 20_000, 64 * 1024, 99_000):
        assert stub.Tokenize(pb.TokenizeRequest(text="a" * size), metadata=METADATA).tokens[0].id == size
    for size in (100_001, 3_000_000):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tokenize(pb.TokenizeRequest(text="a" * size), metadata=METADATA)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100000 bytes" in caught.value.details()


def test_only_the_methods_that_are_meant_for_clients_pass(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "unknown method"  # HAProxy's word: the service has another


def test_one_client_cannot_take_every_connection(front: Front, client: Client) -> None:
    context = ssl.create_default_context(cafile=front.ca)

    def connects() -> bool:
        try:  # HAProxy resets what is too much, which may be noticed while it is being connected
            plain = socket.create_connection(("127.0.0.1", front.port))
        except OSError:
            return False
        try:
            sockets.append(context.wrap_socket(plain, server_hostname="localhost"))
        except OSError:
            plain.close()
            return False
        return True

    client.info()  # has its connection
    sockets: list[ssl.SSLSocket] = []
    try:
        assert sum(connects() for _ in range(120)) < 100
        assert client.info().name == "behind TLS"
    finally:
        for secure in sockets:
            secure.close()
    wait_until(lambda: connects() and sockets.pop().close() is None, "connections are free again")


def test_a_service_that_is_down_is_unavailable_at_once(front: Front) -> None:
    nobody = free_ports(2)
    with (
        tls_front(front.certificate, *nobody) as down,
        Client(down.address, tls=down.ca, retries=0) as client,
        pytest.raises(ServiceError, match=r"UNAVAILABLE.*503"),
    ):
        client.info()


def test_a_missing_certificate_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(tls_command(tmp_path / "none.pem"), capture_output=True, text=True, check=False)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert str(tmp_path / "none.pem") in line
    assert "make certificate" in line


def test_the_certificate_s_key_is_for_its_owner_alone(front: Front) -> None:
    assert front.certificate.stat().st_mode & 0o077 == 0
    assert b"PRIVATE KEY" not in front.ca.read_bytes()
    assert {path.name for path in front.certificate.parent.iterdir()} == {"server.pem", "ca.pem"}
