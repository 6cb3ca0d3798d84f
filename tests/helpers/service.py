"""Start a service as a user does, with a committed config on free ports, and ask Serve about its state."""

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
import yaml

from helpers.marked import Mark
from helpers.places import Place
from loadtest.bench.services import with_own_ports
from tinylm.client import Client, ServiceError
from tinylm.serving.ray.dashboard import deploy

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300
PLAIN_PATH = "/usr/bin:/bin"
REPLICAS = 4
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Service:
    """A running service. `mark` finds its processes."""

    config: Path
    grpc_port: int
    http_port: int
    mark: Mark
    log_file: Path
    ray_tmpdir: Path
    ray_token: str | None = None

    @property
    def address(self) -> str:
        return f"localhost:{self.grpc_port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def dashboard(self) -> str:
        """Return the dashboard's URL. After a restart, it is the new one."""
        return re.findall(r"dashboard:\s+(http://[^/\s]+)", self.log)[-1]

    def replicas(self) -> dict[str, int]:
        """Return name and process of each replica that Serve calls running, or nothing if Serve does not answer."""
        return {replica["replica_id"]: replica["pid"] for replica in self._deployment().get("replicas", [])
                if replica["state"] == "RUNNING"}  # fmt: skip

    def is_healthy(self, without: Collection[int] = ()) -> bool:
        """Return whether all replicas run and answer through the proxy, and no process of `without` is left."""
        replicas = self.replicas()
        if len(replicas) != REPLICAS or set(replicas.values()) & set(without):
            return False
        if set(self.mark.processes()) & set(without):
            return False
        at_once = 10 * REPLICAS  # single calls could all go to the same idle replica
        with Client(self.address, timeout_s=1, retries=0) as client, ThreadPoolExecutor(at_once) as pool:
            try:
                seen = {info.replica for info in pool.map(lambda _: client.info(), range(at_once))}
            except ServiceError:
                return False
        return seen == set(replicas)

    def wait_until_healthy(
        self, limit_s: float, without: Collection[int] = (), successors: Callable[[], Collection[int]] | None = None
    ) -> float:
        """Return the seconds that it took. Raise AssertionError after the limit.

        successors: returns the processes that must replace those of `without`. Processes that the old ones started,
        such as the HAProxy of a manager that was killed, can still answer for a moment.
        """
        began_at = time.perf_counter()
        while not ((successors is None or set(successors()) - set(without)) and self.is_healthy(without)):
            waited_s = time.perf_counter() - began_at
            assert waited_s < limit_s, f"not healthy within {limit_s:.0f} s: {self.replicas()}"
            time.sleep(0.1)
        return time.perf_counter() - began_at

    def log_lines(self) -> list[dict]:
        """Return the log of the replicas that run now."""
        lines = []
        for pid in self.replicas().values():
            for path in {file.path for file in psutil.Process(pid).open_files() if "/replica_tinylm" in file.path}:
                lines += [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return lines

    def call_lines(self) -> list[dict]:
        """Return the log lines of calls, with `request_id`, `method`, `status` and more."""
        return [line for line in self.log_lines() if "status" in line and "total_ms" in line]

    @property
    def url(self) -> str:
        return f"http://localhost:{self.http_port}"

    def deploy(self, config: Path) -> None:
        """Deploy a config as `serve deploy` does, and return before the deployment is complete."""
        deploy(self.dashboard, {"RAY_AUTH_MODE": "disabled"}, yaml.safe_load(config.read_text(encoding="utf-8")))

    def status(self) -> str:
        return self._application().get("status", "unknown")

    def _application(self) -> dict:
        request = urllib.request.Request(f"{self.dashboard}/api/serve/applications/")
        if self.ray_token is not None:
            request.add_header("authorization", f"Bearer {self.ray_token}")
        try:
            with _LOOPBACK.open(request, timeout=5) as response:
                return json.load(response)["applications"]["tinylm"]
        except (OSError, ValueError, KeyError):
            return {}

    def _deployment(self) -> dict:
        return self._application().get("deployments", {}).get("TinyLM", {})


@contextmanager
def running_service(config: Path, directory: Path, in_place: bool = False, **environment: str) -> Iterator[Service]:
    """Serve the config during the `with` block, and write the log to the directory.

    in_place: serve it in a `Place`, where only Ray's temporary directory can be written.
    """
    config, grpc_port, http_port = with_own_ports(config, directory)
    with (
        tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as ray_directory,
        (directory / "log").open("w") as out,
    ):
        token = environment.get("RAY_AUTH_TOKEN")
        service = Service(config, grpc_port, http_port, Mark(), directory / "log", Path(ray_directory), token)
        command = [sys.executable, "-m", "tinylm.cli", "serve", "--config", str(config), "--wait-s", str(START_LIMIT_S)]
        if in_place:
            command = Place(Path(ray_directory)).command(*command)
        own = {"RAY_TMPDIR": ray_directory, "PYTHONUNBUFFERED": "1", "PATH": PLAIN_PATH}
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **service.mark.environment, **own, **environment},
        )
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
