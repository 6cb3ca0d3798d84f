"""`make certificate` and `make tls` for tests, in front of a service that listens already."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtest.bench.services import free_ports

BIN = str(Path(sys.executable).parent)
START_LIMIT_S = 30


@dataclass(frozen=True)
class Front:
    """A running HAProxy, and the authority by which its clients trust it."""

    port: int
    certificate: Path
    make: psutil.Process  # that started it

    @property
    def master(self) -> psutil.Process:
        """The process that starts the others anew when it is told to; HAProxy names it before them."""
        (master,) = self.make.children()
        return master

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def ca(self) -> Path:
        return self.certificate.with_name("ca.pem")


def make_certificate(directory: Path) -> Path:
    certificate = directory / "server.pem"
    subprocess.run(["make", "--silent", "certificate", f"TLS_CERT={certificate}"], check=True)
    return certificate


def tls_command(certificate: Path) -> list[str]:
    """`make tls` with the packages of this interpreter."""
    return ["make", "--old-file=.venv/serving", "tls", f"BIN={BIN}", f"TLS_CERT={certificate}"]


@contextmanager
def tls_front(certificate: Path, grpc_port: int, http_port: int) -> Iterator[Front]:
    """In front of these ports of loopback, once it has found them healthy or not."""
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        "TLS_BIND": f"127.0.0.1:{port}",
        "TLS_BACKEND": f"127.0.0.1:{grpc_port}",
        "TLS_BACKEND_HEALTH_PORT": str(http_port),
    }
    process = subprocess.Popen(
        tls_command(certificate), env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not _listens(port):
            assert process.poll() is None, "HAProxy ended before it listened"
            assert time.monotonic() < deadline, "HAProxy doesn't listen"
            time.sleep(0.02)
        time.sleep(0.5)  # two of its health checks
        yield Front(port, certificate, psutil.Process(process.pid))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(START_LIMIT_S)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
