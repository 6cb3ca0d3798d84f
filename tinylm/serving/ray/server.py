"""One run of Ray Serve's command `serve run`, and all the processes that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tinylm.client import CHANNEL_OPTIONS, METADATA
from tinylm.serving.ray.dashboard import TokenRefused, applications, deploy
from tinylm.system.text_files import read_text

HEAD_PROCESSES = {"gcs_server", "raylet"}  # Ray cannot run without these
LOOK_AGAIN_S = 0.3
GRACEFUL_SHUTDOWN_S = 20.0  # Serve's default of graceful_shutdown_timeout_s
DRAIN_MARGIN_S = 10.0  # for Serve itself, above the longest graceful_shutdown_timeout_s
STOP_LIMIT_S = 60.0
_ANSI_CODES = re.compile(r"\x1b\[[0-9;]*m")


class Server:
    """A running `serve run`."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.dashboard: str | None = None  # its URL, once Ray has printed it
        self._environment = environment
        # A session of its own: Ctrl-C reaches only this process, which then stops the server.
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._started: dict[int, psutil.Process] = {}  # the processes of the session, by pid
        self._head: list[psutil.Process] = []
        threading.Thread(target=self._forward_stderr, daemon=True).start()

    def _forward_stderr(self) -> None:
        """Copy the server's standard error to our own, and take the dashboard's URL from it."""
        for line in self.process.stderr or ():
            with suppress(OSError):  # if our standard error is closed, `serve run` must still not block
                sys.stderr.write(line)
            if match := re.search(r"dashboard at (http://[\w.:\[\]-]+)", _ANSI_CODES.sub("", line)):
                self.dashboard = match[1]

    def wait_until_ready(self, address: str, wait_s: float) -> bool:
        """Wait until all replicas run and one answers. Return False if the server ends first.

        Raise ValueError when Serve cannot start the application, when Ray's dashboard refuses our token, or after
        `wait_s`.
        """
        deadline = time.monotonic() + wait_s
        state = "starting"
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while self.process.poll() is None:
                if time.monotonic() > deadline:
                    raise ValueError(f"the service was not ready on {address} within {wait_s:.0f} s: it is {state}")
                state, message = self._application_status() or ("starting", "")
                if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise ValueError(f"Ray Serve could not start the application: {message}")
                if state == "RUNNING":
                    try:
                        health.Check(health_pb2.HealthCheckRequest(), metadata=METADATA, timeout=5)
                        return True
                    except grpc.RpcError as error:
                        state = f"RUNNING, but the ingress returns {error.code().name}"
                time.sleep(LOOK_AGAIN_S)
        return False

    def wait_until_broken(self) -> None:
        """Return when a process of Ray's head, or `serve run` itself, has ended."""
        self._look()
        self._head = [process for process in self._started.values() if _name(process) in HEAD_PROCESSES]
        while self.process.poll() is None and all(_lives(process) for process in self._head):
            time.sleep(LOOK_AGAIN_S)
            self._look()

    def drain(self, config: Path) -> None:
        """Remove the application: Serve then accepts no new requests, and finishes the running ones."""
        if self.process.poll() is not None or self.dashboard is None:
            return
        values = yaml.safe_load(read_text(config))
        try:
            deploy(self.dashboard, self._environment, {**values, "applications": []})
        except (OSError, ValueError) as error:  # for example, Ray's head has ended
            print(f"could not finish the running requests: {error}", file=sys.stderr, flush=True)
            return
        deadline = time.monotonic() + drain_limit_s(values)
        while time.monotonic() < deadline and self._application_status() is not None:
            time.sleep(LOOK_AGAIN_S)

    def stop(self) -> None:
        """Interrupt the server, so that Ray stops its processes, and kill all that remain."""
        self._look()
        if self.process.poll() is None and all(_lives(process) for process in self._head):
            self.process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + STOP_LIMIT_S
            while self.process.poll() is None and time.monotonic() < deadline:
                self._look()  # it can still start processes
                time.sleep(LOOK_AGAIN_S)
        for process in self._started.values():
            with suppress(psutil.Error):
                process.kill()  # psutil checks that the pid still belongs to this process
        self.process.kill()
        self.process.wait()

    def _look(self) -> None:
        """Record new processes of the session, also those whose parent has ended."""
        if self.process.poll() is not None:
            return
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                if pid not in self._started and pid != self.process.pid and os.getsid(pid) == self.process.pid:
                    self._started[pid] = psutil.Process(pid)

    def _application_status(self) -> tuple[str, str] | None:
        """Return the application's status and message from Serve's REST API, None if there is no application."""
        if self.dashboard is None:
            return None
        try:
            found = applications(self.dashboard, self._environment)
        except TokenRefused:
            raise
        except (OSError, ValueError):
            return None
        return next(((application["status"], application["message"]) for application in found), None)


def drain_limit_s(config: Mapping[str, Any]) -> float:
    """Return how long the running requests may take to end: a little longer than Serve itself waits for them."""
    deployments = [d for application in config.get("applications") or () for d in application.get("deployments") or ()]
    limits = [float(d.get("graceful_shutdown_timeout_s", GRACEFUL_SHUTDOWN_S)) for d in deployments]
    return max(limits, default=GRACEFUL_SHUTDOWN_S) + DRAIN_MARGIN_S


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
