"""Disturb the service under load: fill its queues, change the number of replicas and a key, and kill a replica.

Each period has these steps, each at a given part of its time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import yaml

from loadtest.bench.mixed_hour import memory
from loadtest.bench.mixed_hour.calls import ENDLESS, LIMIT_S, OPTIONS, Caller
from loadtest.bench.mixed_hour.load import Account, Load
from loadtest.bench.services import RayService
from tinylm.client import RETRIED
from tinylm.serving.keys import LOOK_AGAIN_S, make_key
from tinylm.serving.ray import dashboard
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

T = TypeVar("T")
REPLICAS, MORE_REPLICAS = 4, 5
BURST_CALLS, BURST_CONNECTIONS = 500, 5  # 400 calls fill slots and queues of five replicas
REFUSED_BEFORE_CANCEL = 20  # calls of a burst that are refused before the others are cancelled
SETTLE_LIMIT_S = 300.0
STREAMS_OF_A_KILL = 64  # all slots of four replicas
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # of the dashboard of a cluster that `tinylm serve` starts
GONE = {code.name for code in RETRIED}  # how a stream may end whose replica is killed
LIMIT_OF_CALLS_S = 2.0  # a call that is not a generation takes less


class Disturbances:
    """Runs the steps in a thread, from the beginning to the end of the `with` block."""

    def __init__(self, service: RayService, caller: Caller, load: Load, key_file: Path, period_s: float) -> None:
        self.events: list[dict[str, Any]] = []
        self._service, self._caller, self._load, self._key_file = service, caller, load, key_file
        self._own_keys = key_file.read_text(encoding="utf-8")
        self._config = yaml.safe_load(service.config.read_text(encoding="utf-8"))
        self._url = dashboard_url(service)
        self._period_s, self._stopped = period_s, threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Disturbances:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        steps: list[tuple[float, str, Callable[[], object]]] = [
            (0.10, "a burst", self._burst),
            (0.20, f"{MORE_REPLICAS} replicas", lambda: self._deploy(MORE_REPLICAS)),
            (0.45, "another key", self._change_keys),
            (0.50, f"{REPLICAS} replicas", lambda: self._deploy(REPLICAS)),
            (0.75, "a replica is killed", self._kill_newest),
        ]
        period = 0
        while True:
            for part, what, step in steps:
                due = self._began + (period + part) * self._period_s
                if self._stopped.wait(max(0.0, due - time.monotonic())):
                    return
                began = time.monotonic()
                event: dict[str, Any] = {"second": round(began - self._began, 1), "what": what}
                try:
                    event["found"] = step()
                except Exception as error:
                    event["error"] = f"{type(error).__name__}: {error}"
                    self._load.count(f"event: {what}", "unexpected")
                event["took_s"] = round(time.monotonic() - began, 1)
                self.events.append(event)
            period += 1

    def _burst(self) -> dict[str, int]:
        """Ask for more answers than the service can hold. After some refusals, cancel what is open."""
        request = pb.GenerateRequest(prompt="la la la la la la", max_tokens=240, temperature=0)
        channels = [grpc.insecure_channel(self._caller.address, options=OPTIONS) for _ in range(BURST_CONNECTIONS)]
        began = time.monotonic()
        self._load.windows.bursts.append((began, began + LIMIT_S))
        calls = [
            TinyLMStub(channels[i % BURST_CONNECTIONS]).Generate.future(
                request, metadata=self._caller.metadata, timeout=LIMIT_S
            )
            for i in range(BURST_CALLS)
        ]
        while time.monotonic() < began + LIMIT_S and not all(call.done() for call in calls):
            if sum(call.done() and call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED for call in calls) >= (
                REFUSED_BEFORE_CANCEL
            ):
                break
            time.sleep(0.05)
        for call in calls:
            call.cancel()
        counts = Counter(call.code().name for call in calls)
        for channel in channels:
            channel.close()
        self._load.windows.bursts[-1] = (began, time.monotonic())
        accounts: dict[str, Account] = {"OK": "ok", "RESOURCE_EXHAUSTED": "queue full", "CANCELLED": "cancelled"}
        for code, n in counts.items():
            self._load.count("gRPC: a burst", accounts.get(code, "unexpected"), n)
        return dict(counts)

    def _deploy(self, replicas: int) -> dict[str, int]:
        (application,) = self._config["applications"]
        (deployment,) = application["deployments"]
        deployment["num_replicas"] = replicas
        _patiently(lambda: dashboard.deploy(self._url, self._service.environment | NO_TOKEN, self._config))
        self._wait_for(replicas)
        return {"replicas": len(self.replicas())}

    def _change_keys(self) -> None:
        """Replace the temporary key in the file. From then on, calls with the old one are refused."""
        key, line = make_key("temporary")
        old, self._caller.temporary_key = self._caller.temporary_key, None
        self._stopped.wait(LIMIT_OF_CALLS_S)
        new = self._key_file.with_suffix(".new")
        new.write_text(f"{self._own_keys}{line}\n", encoding="utf-8")
        new.replace(self._key_file)
        self._stopped.wait(LOOK_AGAIN_S + LIMIT_OF_CALLS_S)
        self._caller.temporary_key = key
        self._caller.revoked_key = old or self._caller.revoked_key

    def _kill_newest(self) -> dict[str, Any]:
        """Kill the newest replica, so that the others live long, while all replicas answer streams.

        Return how these streams ended: those of the killed replica with a status, the others as usual.
        """
        own = {pid for pid, _ in memory.processes(self._service.environment)}
        victim = max(own & set(self.replicas()), key=memory.started_at)
        request = pb.GenerateRequest(prompt=ENDLESS, max_tokens=120, temperature=0)
        with grpc.insecure_channel(self._caller.address, options=OPTIONS) as channel:
            stub = TinyLMStub(channel)
            streams = [
                stub.GenerateStream(request, metadata=self._caller.metadata, timeout=LIMIT_S)
                for _ in range(STREAMS_OF_A_KILL)
            ]
            statuses = [_first_message(stream) for stream in streams]
            self._load.windows.kills.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)
            statuses = [
                _end(stream) if status == "OK" else status for stream, status in zip(streams, statuses, strict=True)
            ]
        for status in statuses:
            account: Account = "ok" if status == "OK" else "ended by a kill" if status in GONE else "unexpected"
            self._load.count("gRPC: a stream during a kill", account)
        self._wait_for(REPLICAS, without=victim)
        return {"pid": victim, "streams": dict(Counter(statuses))}

    def _wait_for(self, replicas: int, without: int | None = None) -> None:
        deadline = time.monotonic() + SETTLE_LIMIT_S
        while len(found := self.replicas()) != replicas or without in found:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} replicas, not {replicas}, after {SETTLE_LIMIT_S:.0f} s")
            time.sleep(0.5)

    def replicas(self) -> list[int]:
        """Return the process of each replica, as Serve reports it. One that starts or stops has no process here."""
        applications = _patiently(lambda: dashboard.applications(self._url, self._service.environment | NO_TOKEN))
        found = [
            replica
            for application in applications
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]
        if any(replica["state"] != "RUNNING" for replica in found):
            return []
        return [replica["pid"] for replica in found]


def dashboard_url(service: RayService) -> str:
    """Return the URL of Ray's dashboard, from the service's output."""
    line = next(line for line in service.log.read_text(encoding="utf-8").splitlines() if "dashboard:  " in line)
    return line.split()[-1].removesuffix("/#/serve")


def exporters(directory: Path) -> list[str]:
    """Return HOST:PORT of each exporter of metrics, from the file that Ray writes for Prometheus."""
    file = directory / "ray" / "prom_metrics_service_discovery.json"
    return [target for group in yaml.safe_load(file.read_text(encoding="utf-8")) for target in group["targets"]]


def _patiently(ask: Callable[[], T]) -> T:
    """Return what the dashboard answers. Ask again when it is slow: it has a low priority when all cores are in use."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while True:
        try:
            return ask()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _first_message(stream: Any) -> str:
    """Read the first message of a stream. Return the name of gRPC's status, OK while the stream continues."""
    try:
        next(stream)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _end(stream: Any) -> str:
    """Read a stream to its end. Return the name of gRPC's status."""
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
