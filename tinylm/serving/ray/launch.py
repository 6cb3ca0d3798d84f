"""`tinylm serve`: start Ray Serve with the right environment and config, report when it is ready, and restart it.

It restarts everything when Ray's head ends. On Ctrl-C it first finishes the running requests. Ray Serve itself replaces
replicas and proxies that end. This module does not import Ray, so that the command starts quickly.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from tinylm.serving.ray.dashboard import check_token
from tinylm.serving.ray.environment import ray_directory, service_environment
from tinylm.serving.ray.haproxy import find_binary
from tinylm.serving.ray.server import Server
from tinylm.system.paths import CONFIGS
from tinylm.system.text_files import read_text

CLUSTER_LIMIT_S = 5.0  # time to connect to Ray's head
MAX_RESTARTS, RESTARTS_WITHIN_S = 3, 600.0
DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT = 9000, 8000  # Serve's own
DEFAULT_SLOTS = 16  # the same as in AppArgs, whose module imports Ray


def launch(config: Path | None, wait_s: float) -> int:
    """Serve until interrupted, and return the exit status. Raise ValueError when the service cannot start."""
    if not wait_s > 0:  # also refuses NaN
        raise ValueError(f"--wait-s must be a number of seconds above 0, got {wait_s}")
    config = config or pick_config()
    if not config.is_file():
        raise ValueError(f"config is {config}: the file does not exist")
    read = read_config(config)
    for port in (read.grpc_port, read.http_port):
        with suppress(OSError), socket.create_connection((read.host.strip("[]"), port), timeout=1):
            raise ValueError(f"port {port} is in use: stop the other program, or change the port in {config}")
    joins_cluster = check_cluster()
    check_token(os.environ, joins_cluster)
    address, url = f"{read.host}:{read.grpc_port}", f"http://{read.host}:{read.http_port}"
    serve = shutil.which("serve", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if serve is None:
        raise ValueError("Ray Serve's command `serve` is not installed: pip install 'ray[serve]'")
    # Set handlers even if the shell ignores these signals. The child process then starts with the default handlers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with service_environment(read.grpc_port, read.slots, read.has_haproxy, joins_cluster) as environment:
        return _serve(config, [serve, "run", str(config)], environment, address, url, wait_s)


def _serve(config: Path, command: list[str], environment: dict[str, str], address: str, url: str, wait_s: float) -> int:
    """Start the service, again if Ray ends, until it is interrupted. Return the exit status."""
    restarts: list[float] = []
    while True:
        server = Server(command, environment)
        try:
            if not server.wait_until_ready(address, wait_s):
                return server.process.wait()
            print(
                f"\nTinyLM is ready: gRPC on {address}, HTTP on {url} ({config})\n"
                f"  try it:     {_own_command()} generate 'Once upon a time' --server {address}\n"
                f"  web page:   {url}/\n"
                f"  dashboard:  {server.dashboard}/#/serve\n"
                f"  stop:       Ctrl-C (finishes running requests; twice: at once)\n",
                flush=True,
            )
            server.wait_until_broken()
        except KeyboardInterrupt:
            print("stopping: running requests are finished first", file=sys.stderr, flush=True)
            with suppress(KeyboardInterrupt):
                server.drain(config)
            return 0
        finally:
            server.stop()
        now = time.monotonic()
        restarts = [moment for moment in restarts if now - moment < RESTARTS_WITHIN_S] + [now]
        if len(restarts) > MAX_RESTARTS:
            raise ValueError(f"Ray ended {len(restarts)} times within {RESTARTS_WITHIN_S / 60:.0f} minutes: giving up")
        print("Ray has ended: starting the service again", file=sys.stderr, flush=True)


def pick_config(system: str = sys.platform) -> Path:
    """Return the config for this system: with HAProxy on Linux, where Ray brings the binary.

    Otherwise print one line on standard error that says why the service uses the Python proxy.
    """
    try:
        if system != "linux":
            raise FileNotFoundError(f"Ray Serve has HAProxy only for Linux, and this system is {system}")
        find_binary()
        return CONFIGS / "serve.yaml"
    except FileNotFoundError as error:
        config = CONFIGS / "serve-python-proxy.yaml"
        print(f"using the Python proxy ({config}), which is slower than HAProxy: {error}", file=sys.stderr, flush=True)
        return config


class ReadConfig(NamedTuple):
    """What this command needs of a Serve config."""

    host: str  # that a client on this machine uses in an address
    grpc_port: int
    http_port: int
    slots: int  # of a replica
    has_haproxy: bool


def read_config(config: Path) -> ReadConfig:
    """Read a Serve config. Raise ValueError if it is not one."""
    try:
        values = yaml.safe_load(read_text(config))
        grpc_options, http_options = values.get("grpc_options") or {}, values.get("http_options") or {}
        host = str(http_options.get("host") or "127.0.0.1")
        if host in ("0.0.0.0", "::", "127.0.0.1"):
            host = "localhost"
        slots = [(a.get("args") or {}).get("slots", DEFAULT_SLOTS) for a in values.get("applications") or ()]
        variables = ((values.get("controller_options") or {}).get("runtime_env") or {}).get("env_vars") or {}
        return ReadConfig(
            host=f"[{host}]" if ":" in host else host,
            grpc_port=int(grpc_options.get("port", DEFAULT_GRPC_PORT)),
            http_port=int(http_options.get("port", DEFAULT_HTTP_PORT)),
            slots=int(slots[0]) if slots else 0,
            has_haproxy=variables.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
        )
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{config} is not a Serve config: {error}") from None


def check_cluster() -> bool:
    """Return whether Ray joins a running cluster. Raise ValueError when the cluster's head does not answer.

    Ray joins the cluster that RAY_ADDRESS names, or that an earlier `ray start` has recorded in a file. Ray itself
    would wait for a missing head for minutes.
    """
    named_by, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        record = Path(ray_directory(), "ray", "ray_current_cluster")
        named_by, address = str(record), record.read_text(encoding="utf-8").strip() if record.is_file() else ""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "://" in address:  # no cluster, "local", or Ray Client
        return address not in ("", "local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_LIMIT_S).close()
    except OSError as error:
        what_to_do = "unset it" if named_by == "RAY_ADDRESS" else "run `ray stop`, which removes it"
        raise ValueError(
            f"Ray's head at {address}, which {named_by} names, does not answer ({error}): {what_to_do}"
        ) from None
    return True


def _own_command() -> str:
    """Return `tinylm`, or its path from this directory if the shell would not find it."""
    tinylm = Path(sys.executable).with_name("tinylm")
    return "tinylm" if shutil.which("tinylm") == str(tinylm) else os.path.relpath(tinylm)
