"""The measured server: its own description, its processes on this machine, and the CPU time that they use."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil

from loadtest.load import Load
from tinylm.client import CHANNEL_OPTIONS, call_metadata
from tinylm.engine.async_engine import THREAD_NAME
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

FACTS_LIMIT_S = 10.0
REPLACED_S = 1.0
RAY_DAEMONS = ("raylet", "gcs_server")


def facts(load: Load) -> dict[str, Any] | None:
    """Return the fields of GetModelInfo, or None if the server does not have that method.

    Raises ValueError if no service answers at the address.
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


class CpuMeter:
    """The cores that the processes of a server use within the measured time."""

    def __init__(self, server: str) -> None:
        self._processes, self._unknown = find(server)
        self._seen: list[tuple[float, dict[tuple[int, str], float]]] = []  # at the begin, at the end

    def look(self, begin: float, end: float) -> None:
        """Look at the clocks at the begin and the end of the measured time, in seconds of `time.monotonic()`.

        Call this often. If `end` is infinite, the measured time ends with `finish`.
        """
        now = time.monotonic()
        if (not self._seen and begin <= now < end) or (len(self._seen) == 1 and now >= end):
            self._seen.append((now, self._cpu_s()))

    def finish(self) -> dict[str, Any]:
        """Return the cores, in total and by role, or None and the reason why they are unknown."""
        if self._unknown or not self._seen:
            return {"cores": None, "unknown": self._unknown or "the run was over before it was looked at"}
        if len(self._seen) == 1:
            self._seen.append((time.monotonic(), self._cpu_s()))
        (begin, before), (end, after) = self._seen
        roles: dict[str, float] = defaultdict(float)
        for key, used in after.items():
            if key in before:
                roles[key[1]] += (used - before[key]) / (end - begin)
        by_role = {role: round(cores, 3) for role, cores in sorted(roles.items())}
        return {"cores": round(sum(by_role.values()), 3), "by_role": by_role}

    def _cpu_s(self) -> dict[tuple[int, str], float]:
        """Return the CPU seconds of each process so far by (pid, role).

        The roles are replicas, proxy, server, and ray (the rest). "engines" are the threads of replicas that step their
        engines. On Linux, "replicas" is without them.
        """
        used: dict[tuple[int, str], float] = {}
        for process in self._processes:
            with suppress(psutil.Error):  # the process ended, and its time is lost
                times, its_role = process.cpu_times(), role(process)
                total = times.user + times.system
                if its_role == "replicas":
                    used[process.pid, "engines"] = _engine_s(process)
                    total -= used[process.pid, "engines"]
                used[process.pid, its_role] = total
        return used


def _engine_s(process: psutil.Process) -> float:
    """Return the CPU seconds of the thread that steps the engine, 0 if no thread has its name."""
    for thread in process.threads():
        with suppress(OSError):  # the thread ended, or this is not Linux
            if Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip() == THREAD_NAME:
                return thread.user_time + thread.system_time
    return 0.0


def find(server: str) -> tuple[list[psutil.Process], str | None]:
    """Return the processes that listen on the address with their children, and of Ray the whole session.

    The second value says why the list is empty.
    """
    if server.startswith("engine:"):
        return [], "the engine runs in the load generator's own processes"
    split = urlsplit(server if "//" in server else f"//{server}")
    host, port = split.hostname or "", split.port or 0
    if not _is_local(host):
        return [], f"{host} is another machine"
    listening = _listening(port)
    if not listening:  # Ray's proxy replaces itself when it learns of replicas, and does not listen for a moment
        time.sleep(REPLACED_S)
        listening = _listening(port)
    if not listening:
        return [], f"no process that this user may look at listens on port {port}"
    found = {member.pid: member for process in listening for member in _family(process)}
    return list(found.values()), None


def _is_local(host: str) -> bool:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {address.address.partition("%")[0] for group in psutil.net_if_addrs().values() for address in group}
    return any(address.startswith("127.") or address in own for address in addresses)


def _listening(port: int) -> list[psutil.Process]:
    """Return the processes that listen on the port, as far as this user may look at them."""
    listening = []
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
            with suppress(psutil.NoSuchProcess):  # it ended
                listening.append(psutil.Process(each.pid))
    return listening


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


def role(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    if "ServeReplica" in title:
        return "replicas"
    if "haproxy" in process.name() or "ProxyActor" in title:
        return "proxy"
    if process.name() in RAY_DAEMONS or "ray" in title.partition(" ")[0] or "/ray/" in title:
        return "ray"
    return "server"
