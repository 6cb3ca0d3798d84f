"""The rules that `tinylm-haproxy` adds, in a real HAProxy before a real gRPC server that has only so much room."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import grpc
import psutil
import pytest

from loadtest.standard.services import free_ports
from tinylm.client import CHANNEL_OPTIONS
from tinylm.serving import haproxy
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, TinyLMStub, add_TinyLMServicer_to_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray brings HAProxy on Linux alone")
ROOM = 3
GIVE_UP_S = 30
WORDS = "three requests are running, the limit: 100 % full"
CONFIG = """\
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend grpc_frontend
    bind 127.0.0.1:{port} proto h2
    default_backend grpc-tinylm
backend grpc_fallback_backend
    http-request deny
backend grpc-tinylm
    mode http
    server one 127.0.0.1:{behind} proto h2
"""


@dataclass
class Replica(TinyLMServicer):
    """Holds calls until they may go, and refuses those for which there is no room, as the engine does."""

    may_go: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    n_held: int = 0
    n_refused: int = 0

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
        return pb.TokenizeResponse()


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
def stub(replica: Replica, tmp_path: Path) -> Iterator[TinyLMStub]:
    """Asks the replica through HAProxy, started as Ray starts it."""
    server = grpc.server(ThreadPoolExecutor(ROOM + 10))
    add_TinyLMServicer_to_server(replica, server)
    behind = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (port,) = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port, behind=behind))
    command = [str(Path(sys.executable).with_name("tinylm-haproxy")), "-db", "-f", str(config)]
    process = subprocess.Popen(command, env={**os.environ, haproxy.BINARY_VARIABLE: command[0]})
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            stub = TinyLMStub(channel)
            stub.Tokenize(pb.TokenizeRequest(), wait_for_ready=True, timeout=GIVE_UP_S)
            assert psutil.Process(process.pid).name() == "haproxy"  # itself, with the process id that Ray knows
            yield stub
    finally:
        replica.may_go.set()
        process.terminate()
        process.wait()
        server.stop(0)


def ask(stub: TinyLMStub) -> grpc.Future:
    return stub.Generate.future(pb.GenerateRequest(), timeout=GIVE_UP_S)


def refused(call: grpc.Future) -> bool:
    """Whether it was, in the replica's words, whoever said them."""
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


def test_what_a_replica_refused_is_refused_before_it_for_a_while(replica: Replica, stub: TinyLMStub) -> None:
    held = [ask(stub) for _ in range(ROOM)]
    wait_until(lambda: replica.n_held == ROOM)
    began = time.monotonic()
    assert refused(ask(stub))
    assert replica.n_refused == 1
    n_asked = 1
    while time.monotonic() - began < 3 * haproxy.REMEMBERED_MS / 1000:
        assert refused(ask(stub))
        n_asked += 1
    assert 2 <= replica.n_refused <= 4 < n_asked  # each time that it had forgotten, it asked
    stub.Tokenize(pb.TokenizeRequest())  # what needs no room is let through
    replica.may_go.set()
    assert [call.result().text for call in held] == ["done"] * ROOM
    assert ask(stub).result().text == "done"  # at once: there are fewer than were too many


def test_a_refusal_for_another_reason_says_nothing_about_room(replica: Replica, stub: TinyLMStub) -> None:
    with pytest.raises(grpc.RpcError, match="another reason"):
        stub.Tokenize(pb.TokenizeRequest(text="too long, say"))
    held = [ask(stub) for _ in range(ROOM)]
    wait_until(lambda: replica.n_held == ROOM)
    replica.may_go.set()
    assert [call.result().text for call in held] == ["done"] * ROOM


def test_only_backends_of_grpc_applications_are_changed() -> None:
    before, after = CONFIG, haproxy.with_admission(CONFIG)
    assert after.split("backend grpc-tinylm\n")[0] == before.split("backend grpc-tinylm\n")[0]
    assert set(before.splitlines()) < set(after.splitlines())
    assert haproxy.with_admission("global\nbackend http-tinylm\n") == "global\nbackend http-tinylm\n"
