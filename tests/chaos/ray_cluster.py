"""A Ray cluster of several nodes on this machine. Each has its own loopback address, ports and processes.

    with RayCluster(directory) as cluster:
        worker = cluster.join()
        cluster.deploy(config)
        worker.kill()

Every process of a node has the node's mark in its environment, so that exactly these processes can be ended.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

import yaml
from helpers.marked import Mark

from loadtest.bench.services import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CPUS = 4  # that each node claims to have: each replica asks for one
WORKER_PORTS = 60
HEAD_IP = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's network address
START_LIMIT_S = 120
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_until(true: Callable[[], object], what: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.1)


class RayNode:
    """One `ray start --block` and all its processes."""

    def __init__(self, ip: str, arguments: list[str], grpc_port: int, http_port: int, log: Path) -> None:
        self.ip = ip
        self.address = f"127.0.0.1:{grpc_port}"  # of its gRPC proxy
        self._mark = Mark()
        metrics_port, stats_port, fallback_http, fallback_grpc = free_ports(4)
        environment = {
            **os.environ,
            **self._mark.environment,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_SERVE_WORKER_PROXY_GRPC_PORT": str(grpc_port),  # the head uses the config's ports
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http_port),
            # HAProxy binds these ports on all addresses, so the nodes need different ones.
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        environment.pop("RAY_ADDRESS", None)
        environment.pop("RAY_TMPDIR", None)
        manager, objects, agent, agent_grpc, runtime_env, metrics, *workers = free_ports(6 + WORKER_PORTS)
        command = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--node-ip-address={ip}"),
            *(f"--num-cpus={CPUS}", f"--object-store-memory={100 * 2**20}"),
            *(f"--node-manager-port={manager}", f"--object-manager-port={objects}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
            f"--worker-port-list={','.join(map(str, workers))}",
            *arguments,
        ]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """Kill all processes. Unlike a power failure, the kernel closes the connections."""
        self._mark.kill_all()
        self.process.wait(30)

    def stop(self) -> None:
        try:
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(30)
        finally:
            self.kill()


class RayCluster:
    """A head, and the nodes that `join`. All stop at the end of the `with` block."""

    def __init__(self, log_directory: Path) -> None:
        self._logs = log_directory
        self._nodes: list[RayNode] = []
        self.gcs_port, self.dashboard_port, client_port, self.grpc_port, self.http_port = free_ports(5)
        self._temporary = tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True)
        self._head_arguments = [
            *("--head", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}"),
            *(f"--ray-client-server-port={client_port}", f"--temp-dir={self._temporary.name}"),
        ]

    def __enter__(self) -> Self:
        try:
            self.head = self._start(HEAD_IP, self._head_arguments, self.grpc_port, self.http_port)
            wait_until(lambda: self._get("/api/version"), "the dashboard answers", START_LIMIT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.ExitStack() as last:  # stops everything, even if Ctrl-C interrupts it
            last.callback(self._temporary.cleanup)
            for node in self._nodes:
                last.callback(node.stop)

    def join(self) -> RayNode:
        """Start one more node, and wait until the head knows it."""
        grpc_port, http_port = free_ports(2)
        ip = f"127.0.0.{len(self._nodes) + 2}"
        node = self._start(ip, [f"--address={HEAD_IP}:{self.gcs_port}"], grpc_port, http_port)
        wait_until(lambda: ip in self.alive(), f"node {ip} has joined", START_LIMIT_S)
        return node

    def _start(self, ip: str, arguments: list[str], grpc_port: int, http_port: int) -> RayNode:
        node = RayNode(ip, arguments, grpc_port, http_port, self._logs / f"{len(self._nodes)}.log")
        self._nodes.append(node)
        return node

    def deploy(self, config: dict) -> None:
        """Run `serve deploy` with this cluster's ports. It returns before the deployment is complete."""
        config["grpc_options"]["port"], config["http_options"]["port"] = self.grpc_port, self.http_port
        path = self._logs / "serve.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(BIN / "serve"), "deploy", str(path), "--address", f"http://127.0.0.1:{self.dashboard_port}"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=START_LIMIT_S)

    def alive(self) -> set[str]:
        """Return the addresses of the nodes that the head considers alive."""
        answer = self._get("/api/v0/nodes?detail=true") or {}
        nodes = answer.get("data", {}).get("result", {}).get("result", [])
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    def replicas(self) -> list[str]:
        """Return the node address of each running replica."""
        applications = (self._get("/api/serve/applications/") or {}).get("applications", {})
        return [
            replica["node_ip"]
            for application in applications.values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]

    def healthy(self, replicas: int) -> bool:
        """Return whether application and proxies are healthy, and this number of replicas runs on living nodes."""
        answer = self._get("/api/serve/applications/") or {}
        applications = answer.get("applications", {})
        proxies = answer.get("proxies", {}).values()
        return (
            [application["status"] for application in applications.values()] == ["RUNNING"]
            and len(running := self.replicas()) == replicas
            and set(running) <= (alive := self.alive())
            and {proxy["node_ip"] for proxy in proxies} <= alive
            and all(proxy["status"] == "HEALTHY" for proxy in proxies)
        )

    def _get(self, path: str) -> dict | None:
        """Return an answer of the dashboard, or None without one."""
        try:
            with _LOOPBACK.open(f"http://127.0.0.1:{self.dashboard_port}{path}", timeout=5) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None
