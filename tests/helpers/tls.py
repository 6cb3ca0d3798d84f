"""`make certificate`, and `make tls` in front of a running service."""

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
    """A running HAProxy, and the certificate authority for its clients."""

    port: int
    certificate: Path
    make: psutil.Process  # the process of `make tls`

    @property
    def master(self) -> psutil.Process:
        """Return HAProxy's master process, which restarts its workers on SIGUSR2."""
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
    """Return the command `make tls` with this interpreter's packages."""
    return ["make", "--old-file=.venv/serving", "tls", f"BIN={BIN}", f"TLS_CERT={certificate}"]


@contextmanager
def tls_front(certificate: Path, grpc_port: int, http_port: int) -> Iterator[Front]:
    """Run HAProxy in front of these ports on loopback. It has checked their health when the block begins."""
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
            assert time.monotonic() < deadline, "HAProxy does not listen"
            time.sleep(0.02)
        time.sleep(0.5)  # two of its health checks
        yield Front(port, certificate, psutil.Process(process.pid))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(START_LIMIT_S)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
