"""The tables of docs/speed.md, from the results of the standard set and of the self-test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loadtest.bench.markdown import table
from loadtest.results import result_file

CORES = 2  # of the machine that the committed results are of
SERVERS = {
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
    """The result of one part of the standard set in one mode, such as "haproxy-unary"."""

    def __init__(self, directory: Path, name: str) -> None:
        self.result = result_file.read(directory / f"{name}.json")
        self.clients = sorted({run["load"]["concurrency"] for run in self.result["runs"]})

    def values(self, clients: int, *keys: str) -> list[float]:
        """Return a figure, such as ("latency_ms", "p50"), of each run with this number of clients."""
        runs = [run for run in self.result["runs"] if run["load"]["concurrency"] == clients]
        return [result_file.figure_of(run, *keys) for run in runs]

    def mean(self, clients: int, *keys: str) -> float:
        return fmean(self.values(clients, *keys))

    def best_rate(self) -> float:
        """Return the requests/s at the best number of clients."""
        return max(self.mean(clients, "requests_per_s") for clients in self.clients)

    def spread(self) -> float:
        """Return the greatest difference of requests/s between rounds, as a share of the lower one."""
        rounds = [self.values(clients, "requests_per_s") for clients in self.clients]
        return max(max(rates) / min(rates) - 1 for rates in rounds)


def blocks(results: Path) -> dict[str, str]:
    """Return the blocks of docs/speed.md by name."""
    names = (*SERVERS, *REPLICAS, "python-proxy", "engine", "engine-4")
    parts = {f"{name}-{mode}": PartResult(results / "standard", f"{name}-{mode}") for name in names for mode in MODES}
    selftest = json.loads((results / "selftest.json").read_text(encoding="utf-8"))
    return {
        "conditions": table(["", ""], _conditions(parts)),
        "services": _services(parts),
        "peers": _peers(parts),
        "engine": _engine(parts),
        "one-client": table(["one client, p50", "ms"], _one_client(parts)),
        "replicas": _replicas(parts),
        "selftest": _selftest(selftest, parts),
    }


Parts = dict[str, PartResult]
Rows = list[Sequence[str]]


def _conditions(parts: Parts) -> Rows:
    """Return where and how the committed results were measured."""
    measured = parts["haproxy-unary"]
    run = measured.result["runs"][0]
    load, rounds = run["load"], len(measured.result["runs"]) // len(measured.clients)
    of_services = [part for name, part in parts.items() if name.startswith(("haproxy", "python-proxy", "replicas"))]
    return [
        ("machine", f"{measured.result['machine']['processor']}, {CORES} cores"),
        ("prompt tokens on average", f"{run['prompt_tokens_a_request']:.0f}"),
        ("rounds", f"{rounds} of {load['duration_s']:.0f} s, each after {load['warmup_s']:.0f} s of warm-up"),
        ("greatest difference of requests/s between rounds", f"{max(part.spread() for part in of_services):.0%}"),
    ]


def _services(parts: Parts) -> str:
    head = ["", "clients", "requests/s", "tokens/s", "p50 ms", "p99 ms", "first token p50 ms", "per token ms"]
    rows = []
    for name, label in (
        ("haproxy-unary", "HAProxy mode, unary"),
        ("haproxy-stream", "HAProxy mode, stream"),
        ("python-proxy-unary", "Python proxy, unary"),
    ):
        part = parts[name]
        for clients in SHOWN_CLIENTS:
            row = [label, str(clients), f"{part.mean(clients, 'requests_per_s'):.1f}"]
            row += [f"{part.mean(clients, 'tokens_per_s'):,.0f}", f"{part.mean(clients, 'latency_ms', 'p50'):.1f}"]
            row.append(f"{max(part.values(clients, 'latency_ms', 'p99')):.0f}")
            if name.endswith("stream"):
                row += [f"{part.mean(clients, 'ttft_ms', 'p50'):.1f}", f"{part.mean(clients, 'tpot_ms', 'p50'):.2f}"]
            else:
                row += ["", ""]
            rows.append(row)
    return table(head, rows)


def _peers(parts: Parts) -> str:
    clients = parts["haproxy-unary"].clients
    rows = [
        [label, *(f"{parts[f'{name}-unary'].mean(n, 'requests_per_s'):.1f}" for n in clients)]
        for name, label in SERVERS.items()
    ]
    return table(["clients", *map(str, clients)], rows)


def _engine(parts: Parts) -> str:
    """Return tokens/s of the service, and their share of those of the engine without a server."""
    head = [""]
    for clients in MANY_CLIENTS:
        head += [f"{clients} clients, tokens/s", "of 2 processes", "of 4 processes"]
    rows = []
    for name, label in (("haproxy", "4 replicas"), ("replicas-2", "2 replicas")):
        for mode in MODES:
            row = [f"{label}, {mode}"]
            for clients in MANY_CLIENTS:
                served = parts[f"{name}-{mode}"].mean(clients, "tokens_per_s")
                row.append(f"{served:,.0f}")
                for engine in ("engine", "engine-4"):
                    row.append(f"{served / parts[f'{engine}-{mode}'].mean(clients, 'tokens_per_s'):.0%}")
            rows.append(row)
    return table(head, rows)


def _one_client(parts: Parts) -> Rows:
    engine, service = (parts[f"{name}-unary"].mean(1, "latency_ms", "p50") for name in ("engine", "haproxy"))
    return [
        ("engine alone", f"{engine:.1f}"),
        ("service", f"{service:.1f}"),
        ("difference", f"{service - engine:.1f}"),
        ("first token of a stream", f"{parts['haproxy-stream'].mean(1, 'ttft_ms', 'p50'):.1f}"),
    ]


def _replicas(parts: Parts) -> str:
    rows = [
        [
            f"{clients} clients, {mode}",
            *(f"{parts[f'{name}-{mode}'].mean(clients, 'tokens_per_s'):,.0f}" for name in REPLICAS),
        ]
        for mode in MODES
        for clients in MANY_CLIENTS
    ]
    return table(["tokens/s with replicas:", "1", "2", "3", "4"], rows)


def _selftest(selftest: dict[str, Any], parts: Parts) -> str:
    """Return the highest rates against a stub that computes nothing, beside those of the service."""
    rows = []
    for mode in MODES:
        served = parts[f"haproxy-{mode}"].best_rate()
        stub = max(run["requests_per_s"] for run in selftest["rates"][mode])
        rows.append([mode, f"{stub:,.0f}", f"{served:.0f}", f"{stub / served:.1f}"])
    return table(["requests/s", "stub", "service at best", "times"], rows)
