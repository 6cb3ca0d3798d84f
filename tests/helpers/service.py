"""A service of the tests' own: a committed config on free ports, started as a user does, and what Serve says of it."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.marked import Mark
from loadtest.bench.services import with_own_ports
from tinylm.client import Client, ServiceError

START_LIMIT_S = 150
PLAIN_PATH = "/usr/bin:/bin"
REPLICAS = 4
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Service:
    """A running service. Its processes are those of `mark`."""

    config: Path
    grpc_port: int
    http_port: int
    mark: Mark
    log_file: Path

    @property
    def address(self) -> str:
        return f"localhost:{self.grpc_port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def dashboard(self) -> str:
        """Where the dashboard is, after a restart the new one."""
        return re.findall(r"dashboard:\s+(http://[^/\s]+)", self.log)[-1]

    def replicas(self) -> dict[str, int]:
        """Name -> process of the replicas that Serve says are running; empty while it says nothing."""
        return {replica["replica_id"]: replica["pid"] for replica in self._deployment().get("replicas", [])
                if replica["state"] == "RUNNING"}  # fmt: skip

    def is_healthy(self, without: Collection[int] = ()) -> bool:
        """All replicas run, each of them answers, and the proxy too; none of them is a process of `without`."""
        replicas = self.replicas()
        if len(replicas) != REPLICAS or set(replicas.values()) & set(without):
            return False
        if set(self.mark.processes()) & set(without):
            return False
        at_once = 10 * REPLICAS  # one after the other, all would go to a replica that has nothing else to do
        with Client(self.address, timeout_s=1, retries=0) as client, ThreadPoolExecutor(at_once) as pool:
            try:
                seen = {info.replica for info in pool.map(lambda _: client.info(), range(at_once))}
            except ServiceError:
                return False
        return seen == set(replicas)

    def wait_until_healthy(
        self, limit_s: float, without: Collection[int] = (), successors: Callable[[], Collection[int]] | None = None
    ) -> float:
        """Seconds that it took; AssertionError after the limit.

        successors: processes in the place of those that it must be healthy `without`. What they leave behind, such as
        the HAProxy of a manager that died, may answer for a moment more.
        """
        began_at = time.perf_counter()
        while not ((successors is None or set(successors()) - set(without)) and self.is_healthy(without)):
            waited_s = time.perf_counter() - began_at
            assert waited_s < limit_s, f"not healthy within {limit_s:.0f} s: {self.replicas()}"
            time.sleep(0.1)
        return time.perf_counter() - began_at

    def call_lines(self) -> list[dict]:
        """What the replicas that run now have written down of their calls, as `request_id`, `method`, `status`, ..."""
        lines = []
        for pid in self.replicas().values():
            for path in {file.path for file in psutil.Process(pid).open_files() if "/replica_tinylm" in file.path}:
                lines += [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "status" in line and "total_ms" in line]

    @property
    def url(self) -> str:
        return f"http://localhost:{self.http_port}"

    def status(self) -> str:
        return self._application().get("status", "unknown")

    def _application(self) -> dict:
        try:
            with _LOOPBACK.open(f"{self.dashboard}/api/serve/applications/", timeout=5) as response:
                return json.load(response)["applications"]["tinylm"]
        except (OSError, ValueError, KeyError):
            return {}

    def _deployment(self) -> dict:
        return self._application().get("deployments", {}).get("TinyLM", {})


@contextmanager
def running_service(config: Path, directory: Path) -> Iterator[Service]:
    """The config, served from the start of `with` to its end; its log is in the directory."""
    config, grpc_port, http_port = with_own_ports(config, directory)
    service = Service(config, grpc_port, http_port, Mark(), directory / "log")
    with (
        tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as ray_directory,
        service.log_file.open("w") as out,
    ):
        command = [sys.executable, "-m", "tinylm.cli", "serve", "--config", str(config), "--wait-s", str(START_LIMIT_S)]
        environment = {
            **os.environ,
            **service.mark.environment,
            "RAY_TMPDIR": ray_directory,
            "PYTHONUNBUFFERED": "1",
            "PATH": PLAIN_PATH,
        }
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            while "TinyLM is ready" not in service.log:
                assert process.poll() is None, f"the service ended before it was ready:\n{service.log}"
                time.sleep(0.2)
            yield service
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                service.mark.kill_all()
