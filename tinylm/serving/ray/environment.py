"""The environment of one service: variables for Ray, Serve and HAProxy, and a private directory for HAProxy's files.

Two services on one machine need different ports for the clients. Everything else that they would share, this module
keeps apart: HAProxy's files, the ports of all metrics and statistics, and the ports of the replicas and of Serve's
fallback proxies.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinylm.serving.ray.haproxy import (
    BINARY_VARIABLE,
    MAX_CONNECTIONS,
    MIN_CONNECTIONS,
    SLOTS_VARIABLE,
    allowed_connections,
    open_files,
)
from tinylm.system.files import can_create
from tinylm.system.proxies import without_proxy_for_loopback

# For Ray, unless the user's environment sets them: normal priority for workers (Ray's default is nice 15), no usage
# reports, and for a cluster of its own a dashboard that needs no token (it listens on loopback). Ray never forgets the
# metrics of a replica that has ended, so Serve's own histograms get 6 bounds instead of 19. TinyLM has its own ones.
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_REQUEST_LATENCY_BUCKETS_MS": "10,50,200,1000,5000,30000",
}
OWN_CLUSTER = {"RAY_AUTH_MODE": "disabled"}
HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin",  # short, see MAX_SOCKET_PATH
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}
# Of HAProxy, Ray's autoscaler and Ray's dashboard.
METRICS_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "AUTOSCALER_METRIC_PORT": 44217,
    "DASHBOARD_METRIC_PORT": 44227,
}
FALLBACK_PORTS = {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500, "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500}
REPLICA_PORTS = {"HTTP": 30_000, "GRPC": 40_000}  # the first of each kind
PORTS_OF_A_SERVICE, MAX_SERVICES = 100, 100
MAX_SOCKET_PATH = 107  # bytes, of Linux
# What Ray and HAProxy add to a temporary directory.
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
HAPROXY_SOCKET = f"/tinylm-12345678/{'0' * 56}/admin.1234567.tmp"  # a directory of the node, and a socket in it
MAX_HAPROXY_DIRECTORY = MAX_SOCKET_PATH - len(HAPROXY_SOCKET)
_PLAIN_PATH = re.compile(r"[\w/.,:@%+=~-]+")  # in the shell and in HAProxy's config


@contextmanager
def service_environment(
    grpc_port: int, slots: int, has_haproxy: bool, joins_cluster: bool = False
) -> Iterator[dict[str, str]]:
    """Yield the environment of a service on `grpc_port`. The variables that the user has set override ours.

    joins_cluster: Ray runs already. Raise ValueError for an environment in which the service could not start.
    """
    if not joins_cluster:
        check_python()
        check_ray_directory()
    if has_haproxy:
        check_open_files()
    with tempfile.TemporaryDirectory(
        prefix="tinylm-", dir=_haproxy_directory(), ignore_cleanup_errors=True
    ) as directory:
        own = {
            **RAY,
            SLOTS_VARIABLE: str(slots),
            **_metrics_ports(),
            **_fallback_ports(grpc_port),
            **_replica_ports(grpc_port),
        }
        if not joins_cluster:
            own |= OWN_CLUSTER
        own |= {variable: str(Path(directory, name)) for variable, name in HAPROXY_FILES.items()}
        own_haproxy = Path(sys.executable).with_name("tinylm-haproxy")
        if own_haproxy.is_file():
            own[BINARY_VARIABLE] = str(own_haproxy)
        yield {**own, **os.environ, **without_proxy_for_loopback(os.environ)}


def ray_directory() -> str:
    """Return the directory in which Ray makes its own, as Ray chooses it."""
    return os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"


def check_ray_directory() -> None:
    """Raise ValueError when Ray cannot create its directory, or when the paths of its sockets would be too long."""
    directory = ray_directory()
    if not can_create(Path(directory, "ray", "session")):
        raise ValueError(
            f"the temporary directory is {directory}, and this account cannot create {directory}/ray or write into it: "
            "set RAY_TMPDIR to another directory"
        )
    too_many = len(os.fsencode(directory + RAY_SOCKET)) - MAX_SOCKET_PATH
    if too_many > 0:
        raise ValueError(
            f"the temporary directory {directory} has {too_many} bytes too many for the paths of Ray's sockets: "
            "set RAY_TMPDIR to a shorter path"
        )


def check_python() -> None:
    """Raise ValueError when Ray could not start its workers: it gives this path to a shell without quotes."""
    if not _PLAIN_PATH.fullmatch(sys.executable):
        raise ValueError(
            f"Python is {sys.executable}: Ray cannot start it, because the path has spaces or special characters. "
            "Move TinyLM and its .venv to a path without them"
        )


def check_open_files() -> None:
    """Raise ValueError when HAProxy may not open enough files. Report on standard error when it gets fewer."""
    files = open_files()
    connections = allowed_connections(files)
    if connections < MIN_CONNECTIONS:
        raise ValueError(
            f"the limit of open files is {files}, which gives HAProxy {max(0, connections)} connections of the "
            f"{MIN_CONNECTIONS} that it needs: raise the hard limit (`ulimit -Hn`)"
        )
    if connections < MAX_CONNECTIONS:
        print(
            f"HAProxy accepts {connections} connections at once, because the limit of open files is {files}",
            file=sys.stderr,
        )


def _haproxy_directory() -> str:
    """Return where to make HAProxy's directory. Raise ValueError if there is no place for it."""
    candidates = dict.fromkeys((_temporary_directory(), ray_directory(), "/tmp"))
    for directory in candidates:
        is_short = len(os.fsencode(directory)) <= MAX_HAPROXY_DIRECTORY
        if is_short and _PLAIN_PATH.fullmatch(directory) and os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise ValueError(
        f"there is no directory for HAProxy's sockets: set TMPDIR to a directory that this account can write, with at "
        f"most {MAX_HAPROXY_DIRECTORY} bytes in its path and no spaces. Not usable: {', '.join(candidates)}"
    )


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise ValueError("this account can write no temporary directory: set TMPDIR to one that it can write") from None


def _metrics_ports() -> dict[str, str]:
    """Return ports for metrics and statistics: the usual ones, or free ones if another program has them."""
    return {variable: str(_free_port(usual)) for variable, usual in METRICS_PORTS.items()}


def _fallback_ports(grpc_port: int) -> dict[str, str]:
    """Return ports for Serve's fallback proxies, other ones for each of 100 neighbouring gRPC ports.

    HAProxy sends calls to the fallback proxy when no replica passes its checks. Two services can listen on the same
    port for gRPC, and the calls would then reach either of them, whatever the keys of the other one are.
    """
    return {variable: str(_free_port(first + grpc_port % MAX_SERVICES)) for variable, first in FALLBACK_PORTS.items()}


def _free_port(usual: int) -> int:
    for port in (usual, 0):
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as HAProxy does
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    return usual


def _replica_ports(grpc_port: int) -> dict[str, str]:
    """Return the range of the replicas' ports, another one for each of 100 neighbouring gRPC ports.

    In a common range, a replica could get the port of another service's replica that has just ended. That service's
    HAProxy would then send it calls.

    Serve uses the port of a replica that has ended again after the quarantine in the service's config. Its own value is
    an hour, because an old HAProxy with open streams could send calls to another application on that port. Here all
    ports of the range belong to one application. With an hour, no replica could start any more after 100 have ended
    within it.
    """
    offset = grpc_port % MAX_SERVICES * PORTS_OF_A_SERVICE
    ports = {}
    for kind, first in REPLICA_PORTS.items():
        ports[f"RAY_SERVE_DIRECT_INGRESS_MIN_{kind}_PORT"] = str(first + offset)
        ports[f"RAY_SERVE_DIRECT_INGRESS_MAX_{kind}_PORT"] = str(first + offset + PORTS_OF_A_SERVICE - 1)
    return ports
