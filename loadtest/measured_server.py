"""The measured server: what it says of itself, its processes on this machine, and the CPU time that they use."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil

from loadtest.load import Load
from tinylm.client import CHANNEL_OPTIONS, call_metadata
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

FACTS_LIMIT_S = 10.0
REPLACED_S = 1.0
RAY_DAEMONS = ("raylet", "gcs_server")


def facts(load: Load) -> dict[str, Any] | None:
    """Return the fields of GetModelInfo, or None if the server does not have that method.

    Raises ValueError if nothing answers at the address, so that no sweep begins in vain.
    """
    if load.protocol != "grpc":
        return None
    metadata, options = call_metadata(load.api_key), list(CHANNEL_OPTIONS)
    if load.ca is None:
        channel = grpc.insecure_channel(load.server, options)
    else:
        channel = grpc.secure_channel(load.server, grpc.ssl_channel_credentials(load.ca), options)
    with channel:
        try:
            info = TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata, timeout=FACTS_LIMIT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return None
            reason = f"{error.code().name}: {error.details()}"
            raise ValueError(f"no TinyLM service answers at {load.server}: {reason}") from None
    return {field.name: getattr(info, field.name) for field in info.DESCRIPTOR.fields}


@dataclass(frozen=True)
class ServerProcesses:
    """The processes behind an address. `unknown` says why there are none."""

    processes: list[psutil.Process] = field(default_factory=list)
    unknown: str | None = None

    def cpu_s(self) -> dict[tuple[int, str], float]:
        """Return the CPU seconds of each process so far by (pid, role): replicas, proxy, server, or ray (the rest)."""
        used: dict[tuple[int, str], float] = {}
        for process in self.processes:
            with suppress(psutil.Error):  # the process ended, and its time is lost
                times = process.cpu_times()
                used[process.pid, _role(process)] = times.user + times.system
        return used


class CpuMeter:
    """The cores that the processes of a server use within the measured time."""

    def __init__(self, server: str) -> None:
        self._server = find(server)
        self._first: tuple[float, dict[tuple[int, str], float]] | None = None
        self._last: tuple[float, dict[tuple[int, str], float]] | None = None

    def look(self, begin: float, end: float) -> None:
        """Look at the clocks at the begin and the end of the measured time, in seconds of `time.monotonic()`.

        Call this often. If `end` is infinite, the measured time ends with `finish`.
        """
        now = time.monotonic()
        if now < begin or self._server.unknown:
            return
        if self._first is None and now < end:
            self._first = now, self._server.cpu_s()
        elif self._first and self._last is None and now >= end:
            self._last = now, self._server.cpu_s()

    def finish(self) -> dict[str, Any]:
        """Return the cores, in total and by role, or None and the reason why they are unknown."""
        if self._server.unknown or self._first is None:
            return {"cores": None, "unknown": self._server.unknown or "the run was over before it was looked at"}
        (begin, before), (end, after) = self._first, self._last or (time.monotonic(), self._server.cpu_s())
        roles: dict[str, float] = defaultdict(float)
        for key, used in after.items():
            if key in before:
                roles[key[1]] += (used - before[key]) / (end - begin)
        by_role = {role: round(cores, 3) for role, cores in sorted(roles.items())}
        return {"cores": round(sum(by_role.values()), 3), "by_role": by_role}


def find(server: str) -> ServerProcesses:
    """Return the processes that listen on the address with their children, and of Ray the whole session."""
    if server.startswith("engine:"):
        return ServerProcesses(unknown="the engine runs in the load generator's own processes")
    split = urlsplit(server if "//" in server else f"//{server}")
    host, port = split.hostname or "", split.port or 0
    if not _is_local(host):
        return ServerProcesses(unknown=f"{host} is another machine")
    listening = _listening(port)
    if not listening:  # Ray's proxy replaces itself when it learns of replicas, and does not listen for a moment
        time.sleep(REPLACED_S)
        listening = _listening(port)
    if not listening:
        return ServerProcesses(unknown=f"no process that this user may look at listens on port {port}")
    found = {member.pid: member for process in listening for member in _family(process)}
    return ServerProcesses(list(found.values()))


def _is_local(host: str) -> bool:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {address.address.partition("%")[0] for group in psutil.net_if_addrs().values() for address in group}
    return any(address.startswith("127.") or address in own for address in addresses)


def _listening(port: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _listens(process, port)]


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _family(process: psutil.Process) -> list[psutil.Process]:
    """Return the process with its descendants, or those of the raylet above it with the daemons of its session."""
    try:
        root = next((p for p in process.parents() if p.name() == "raylet"), process)
        family = [root, *root.children(recursive=True)]
        if root is not process and (session := root.parent()):
            family += [p for p in session.children() if p.name() in RAY_DAEMONS]
        return [*family, process]
    except psutil.Error:
        return [process]


def _role(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    if "ServeReplica" in title:
        return "replicas"
    if "haproxy" in process.name() or "ProxyActor" in title:
        return "proxy"
    if process.name() in RAY_DAEMONS or "ray" in title.partition(" ")[0] or "/ray/" in title:
        return "ray"
    return "server"
