"""The tables of docs/speed.md, from the results of the standard set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from loadtest.bench.markdown import table
from loadtest.results import result_file

CORES = 2  # of the machine that the committed results are of
SERVICES = {"haproxy": "HAProxy mode", "python-proxy": "Python proxy"}
PEERS = {
    "haproxy": "TinyLM, Ray Serve in HAProxy mode, 4 replicas",
    "bare-4": "the same engine behind grpc.aio alone, 4 processes",
    "bare-1": "the same, 1 process",
    "llama": "llama-cpp-python's server",
}
REPLICAS = ("replicas-1", "replicas-2", "replicas-3", "haproxy")  # 1 to 4 of them
MODES = ("unary", "stream")
MANY_CLIENTS = (16, 32)
SHOWN_CLIENTS = (1, 4, 16, 32)  # of the largest table


class PartResult:
    """The result of one part of the standard set in one mode: its runs by number of clients."""

    def __init__(self, directory: Path, name: str, mode: str) -> None:
        self.result = result_file.read(directory / f"{name}-{mode}.json")
        self._runs: dict[int, list[dict[str, Any]]] = {}
        for run in self.result["runs"]:
            self._runs.setdefault(run["load"]["concurrency"], []).append(run)

    @property
    def clients(self) -> list[int]:
        return sorted(self._runs)

    def values(self, clients: int, *keys: str) -> list[float]:
        """Return a figure of each run, such as ("latency_ms", "p50")."""
        return [_at(run, keys) for run in self._runs[clients]]

    def mean(self, clients: int, *keys: str) -> float:
        return fmean(self.values(clients, *keys))

    def worst(self, clients: int, *keys: str) -> float:
        return max(self.values(clients, *keys))

    def cpu_ms(self, clients: int, role: str) -> float:
        """Return the CPU time that the server's processes of a role take for one answer."""
        return 1000 * self.mean(clients, "server", "by_role", role) / self.mean(clients, "requests_per_s")


Parts = Mapping[tuple[str, str], PartResult]  # (part, mode) -> result


def _at(run: Mapping[str, Any], keys: Iterable[str]) -> float:
    found: Any = run
    for key in keys:
        found = found[key]
    return float(found)


def blocks(results: Path) -> dict[str, str]:
    """Return the blocks of docs/speed.md by name."""
    names = (*SERVICES, *PEERS, "engine", "engine-4", *REPLICAS)
    parts = {(name, mode): PartResult(results / "standard", name, mode) for name in names for mode in MODES}
    return {
        "conditions": _conditions(parts),
        "services": _services(parts),
        "peers": _peers(parts),
        "engine": _engine(parts),
        "one-client": _one_client(result_file.read(results / "overhead.json")),
        "replicas": _replicas(parts),
        "cpu": _cpu(parts),
        "selftest": _selftest(json.loads((results / "selftest.json").read_text(encoding="utf-8")), parts),
    }


def _conditions(parts: Parts) -> str:
    """Where and how the committed results were measured."""
    measured = parts["haproxy", "unary"]
    run = measured.result["runs"][0]
    load, rounds = run["load"], len(measured.result["runs"]) // len(measured.clients)
    rows = [
        ["machine", f"{measured.result['machine']['processor']}, {CORES} cores"],
        ["prompt tokens on average", f"{run['prompt_tokens_a_request']:.0f}"],
        [
            "rounds",
            f"{rounds} of {load['duration_s']:.0f} s, each after {load['warmup_s']:.0f} s of warm-up",
        ],
        ["greatest difference of requests/s between rounds", f"{_spread(parts):.0%}"],
    ]
    return table(["", ""], rows)


def _services(parts: Parts) -> str:
    head = ["", "clients", "requests/s", "tokens/s", "p50 ms", "p99 ms", "first token p50 ms", "per token ms"]
    rows = []
    for name, mode in (("haproxy", "unary"), ("haproxy", "stream"), ("python-proxy", "unary")):
        label, part = SERVICES[name], parts[name, mode]
        for clients in SHOWN_CLIENTS:
            row = [f"{label}, {mode}", str(clients), f"{part.mean(clients, 'requests_per_s'):.1f}"]
            row += [f"{part.mean(clients, 'tokens_per_s'):,.0f}", f"{part.mean(clients, 'latency_ms', 'p50'):.1f}"]
            row.append(f"{part.worst(clients, 'latency_ms', 'p99'):.0f}")
            streamed = mode == "stream"
            row.append(f"{part.mean(clients, 'ttft_ms', 'p50'):.1f}" if streamed else "")
            row.append(f"{part.mean(clients, 'tpot_ms', 'p50'):.2f}" if streamed else "")
            rows.append(row)
    return table(head, rows)


def _peers(parts: Parts) -> str:
    clients = parts["haproxy", "unary"].clients
    rows = [
        [label, *(f"{parts[name, 'unary'].mean(n, 'requests_per_s'):.1f}" for n in clients)]
        for name, label in PEERS.items()
    ]
    return table(["clients", *map(str, clients)], rows)


def _engine(parts: Parts) -> str:
    """Tokens/s of the service as a share of those of the engine without a server."""
    rows = []
    for name, label in (("haproxy", "4 replicas"), ("replicas-2", "2 replicas")):
        for mode in MODES:
            row = [f"{label}, {mode}"]
            for clients in MANY_CLIENTS:
                served = parts[name, mode].mean(clients, "tokens_per_s")
                row.append(f"{served:,.0f}")
                for engine in ("engine", "engine-4"):
                    row.append(f"{served / parts[engine, mode].mean(clients, 'tokens_per_s'):.0%}")
            rows.append(row)
    head = [""]
    for clients in MANY_CLIENTS:
        head += [f"{clients} clients, tokens/s", "of 2 processes", "of 4 processes"]
    return table(head, rows)


def _one_client(overhead: Mapping[str, Any]) -> str:
    names = {
        "engine alone": "engine_p50_ms",
        "service": "service_p50_ms",
        "difference (median of rounds)": "overhead_p50_ms",
        "first token of a stream": "first_token_p50_ms",
    }
    return table(["one client, p50", "ms"], [[label, f"{overhead[key]:.1f}"] for label, key in names.items()])


def _replicas(parts: Parts) -> str:
    rows = [
        [f"{clients} clients, {mode}"]
        + [f"{parts[name, mode].mean(clients, 'tokens_per_s'):,.0f}" for name in REPLICAS]
        for mode in MODES
        for clients in MANY_CLIENTS
    ]
    return table(["tokens/s with replicas:", "1", "2", "3", "4"], rows)


def _cpu(parts: Parts) -> str:
    """What an answer costs, and how many nodes one HAProxy serves."""
    replica, proxy, ray = _costs(parts)
    rows = [
        ["CPU time of a replica for an answer", f"{replica:.1f} ms"],
        ["CPU time of HAProxy for an answer", f"{proxy:.2f} ms"],
        ["cores that Ray itself takes on the head", f"{ray:.2f}"],
        ["requests/s of a node that does nothing else", f"{_two_digits(_node_rate(parts)):,.0f}"],
        ["requests/s of one HAProxy on one thread", f"{_two_digits(1000 / proxy):,.0f}"],
        ["nodes that one HAProxy can feed", f"{1000 / proxy / _node_rate(parts):.0f}"],
    ]
    return table(["at 32 clients", ""], rows)


def _costs(parts: Parts) -> tuple[float, float, float]:
    """Return an answer's CPU time in a replica and in HAProxy, in ms, and the cores that Ray itself takes."""
    part = parts["haproxy", "unary"]
    return part.cpu_ms(32, "replicas"), part.cpu_ms(32, "proxy"), part.mean(32, "server", "by_role", "ray")


def _node_rate(parts: Parts) -> float:
    """Return the requests/s of a node whose cores all belong to the service."""
    replica, proxy, ray = _costs(parts)
    return (CORES - ray) * 1000 / (replica + proxy)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _spread(parts: Parts) -> float:
    """Return the greatest difference between the rounds of a service in requests/s, as a share of the lower one."""
    rates = [
        part.values(clients, "requests_per_s")
        for (name, _), part in parts.items()
        if name in (*SERVICES, *REPLICAS)
        for clients in part.clients
    ]
    return max(max(rounds) / min(rounds) - 1 for rounds in rates)


def _selftest(selftest: Mapping[str, Any], parts: Parts) -> str:
    """The highest rates against a stub that computes nothing, beside those of the service."""
    rows = []
    for mode in MODES:
        part = parts["haproxy", mode]
        served = max(part.mean(clients, "requests_per_s") for clients in part.clients)
        stub = max(run["requests_per_s"] for run in selftest["rates"][mode])
        rows.append([mode, f"{stub:,.0f}", f"{served:.0f}", f"{stub / served:.1f}"])
    return table(["requests/s", "stub", "service at best", "times"], rows)
