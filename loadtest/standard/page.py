"""docs/speed.md from the results of the standard set: `python -m loadtest.standard.page`.

Every figure on the page is computed here from the committed results; a test makes the page again and compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from loadtest import result
from loadtest.selftest import TOKENS_A_MESSAGE
from loadtest.workload import SHORT_PROMPTS

RESULTS, PAGE = Path("docs/results"), Path("docs/speed.md")
CORES = 2  # of the machine that the committed results are of
ORIGINAL = {"requests_per_s": 4.21, "p99_ms": 979}  # what the C++ project reports of itself at 4 clients
SERVICES = {"haproxy": "HAProxy mode", "python-proxy": "Python proxy"}
PEERS = {
    "haproxy": "TinyLM, Ray Serve in HAProxy mode, 4 replicas",
    "bare-4": "the same engine behind grpc.aio alone, 4 processes",
    "bare-1": "the same, 1 process",
    "llama": "llama-cpp-python's server",
}


class Part:
    """A part's runs in one mode, by number of clients."""

    def __init__(self, directory: Path, name: str, mode: str) -> None:
        self.result = result.read(directory / f"{name}-{mode}.json")
        self._runs: dict[int, list[dict[str, Any]]] = {}
        for run in self.result["runs"]:
            self._runs.setdefault(run["load"]["concurrency"], []).append(run)

    @property
    def clients(self) -> list[int]:
        return sorted(self._runs)

    def mean(self, clients: int, *keys: str) -> float:
        """Of a figure of the runs, such as ("latency_ms", "p50")."""
        return fmean(_at(run, keys) for run in self._runs[clients])

    def worst(self, clients: int, *keys: str) -> float:
        return max(_at(run, keys) for run in self._runs[clients])

    def cpu_ms(self, clients: int, role: str) -> float:
        """CPU time of the server's processes of a role, for one answer."""
        return 1000 * self.mean(clients, "server", "by_role", role) / self.mean(clients, "requests_per_s")


def _at(run: Mapping[str, Any], keys: Iterable[str]) -> float:
    found: Any = run
    for key in keys:
        found = found[key]
    return float(found)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(directory: Path = RESULTS / "standard") -> str:
    """The page as Markdown."""
    parts = {
        (name, mode): Part(directory, name, mode)
        for name in (*SERVICES, *PEERS, "engine", "engine-4", "replicas-1", "replicas-2", "replicas-3")
        for mode in ("unary", "stream")
    }
    first = parts["haproxy", "unary"]
    run = first.result["runs"][0]
    selftest = json.loads((RESULTS / "selftest.json").read_text(encoding="utf-8"))
    rounds = len(first.result["runs"]) // len(first.clients)
    return f"""# How fast the service is

64-token answers to {len(SHORT_PROMPTS)} short prompts by turns ({run["prompt_tokens_a_request"]:.0f} tokens on average,
which slots mostly hold already: this is decoding, not reading), so many clients that each ask again as soon as they
have their answer. Service, load generator and all else share the {CORES} cores of one machine
({first.result["machine"]["processor"]}); the generator is scheduled before the service
([why](loadtest.md#can-it-be-trusted)). Figures are means of {rounds} rounds of {run["load"]["duration_s"]:.0f} s,
after {run["load"]["warmup_s"]:.0f} s of warm-up, which differ by up to {_spread(parts):.0%} in requests/s; p99 is
the worse of the rounds'.
`make bench` measures it again ([the load test](loadtest.md) says how), and makes this page from
[its results](results/standard) by `python -m loadtest.standard.page`.

## What clients get

{_services(parts)}

The C++ project that this began as reports {ORIGINAL["requests_per_s"]} requests/s and a p99 of {ORIGINAL["p99_ms"]} ms
of itself, with 4 replicas, 4 clients and answers of 64 tokens, on a machine of its own.

![requests and p99 against clients](results/standard/report/load-unary.png)

## Beside others

Requests/s, unary:

{_peers(parts)}

The bare server leaves it to the kernel which of its processes gets a connection, by chance: with few clients some
stand idle, so its row of 4 processes shows that luck below 16 clients. llama-cpp-python's server computes the same
shape with random 8-bit weights, one request at a time, and keeps one core busy with it: a run has some ten answers,
so read its row as "about 2". Most of that is not llama.cpp's engine, which by itself makes {_llama():,.0f} tokens/s
([the engine](engine.md)); its own server, which batches, was not measured.

## How much of the engine arrives

Tokens/s of the service over those of the engine called in the load generator's own processes, without a server:

{_shares(parts)}

A step of eight takes hardly longer than one of four, so an engine in two processes is faster than in four, which take
turns on the cores. The service has four replicas because four were asked for, and HAProxy gives calls to two of them
while these have slots ([why](service.md#more-replicas-than-cores)): it is measured against both.

One client, p50: {_overhead(RESULTS)}

## Where it bends

{_replicas(parts)}

- **1 to 2 clients**: double. The second request goes to another replica on the other core.
- **2 to 32**: the cores are full. What more there is comes from larger batches: two replicas go from one sequence to
  sixteen each, and a step of 8 takes less than twice as long as one of 1 ([the engine](engine.md)). Latency grows as
  steps do.
- **1 to 2 replicas**: the second core.
- **2 to 4 replicas** change little more than rounds differ, at up to 32 clients, whom the slots of two can hold:
  the others are in reserve. More clients than that reach all four.
- **The Python proxy** spreads calls over all four, and takes a share of the cores that grows with their number.

## Beyond two cores: an estimate

{_capacity(parts)}

## The load generator itself

{_selftest(selftest, parts)}
"""


def _services(parts: Mapping[tuple[str, str], Part]) -> str:
    head = ["", "clients", "requests/s", "tokens/s", "p50 ms", "p99 ms", "first token p50 ms", "per token ms"]
    rows = []
    for name, label in SERVICES.items():
        for mode in ("unary", "stream"):
            part = parts[name, mode]
            for clients in part.clients:
                row = [f"{label}, {mode}", str(clients), f"{part.mean(clients, 'requests_per_s'):.1f}"]
                row += [f"{part.mean(clients, 'tokens_per_s'):,.0f}", f"{part.mean(clients, 'latency_ms', 'p50'):.1f}"]
                row.append(f"{part.worst(clients, 'latency_ms', 'p99'):.0f}")
                streamed = mode == "stream"
                row.append(f"{part.mean(clients, 'ttft_ms', 'p50'):.1f}" if streamed else "")
                row.append(f"{part.mean(clients, 'tpot_ms', 'p50'):.2f}" if streamed else "")
                rows.append(row)
    return table(head, rows)


def _peers(parts: Mapping[tuple[str, str], Part]) -> str:
    clients = parts["haproxy", "unary"].clients
    rows = [
        [label, *(f"{parts[name, 'unary'].mean(n, 'requests_per_s'):.1f}" for n in clients)]
        for name, label in PEERS.items()
    ]
    return table(["clients", *map(str, clients)], rows)


def _llama() -> float:
    """Tokens/s of CPU time of llama.cpp's engine at batch 1, with 8-bit weights."""
    peers = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["peers"]
    return float(peers["llama.cpp-q8_0"]["cases"]["decode 1"]["tokens_per_cpu_s"])


def _shares(parts: Mapping[tuple[str, str], Part]) -> str:
    rows = []
    for name, label in (("haproxy", "4 replicas"), ("replicas-2", "2 replicas")):
        for mode in ("unary", "stream"):
            row = [f"{label}, {mode}"]
            for clients in (16, 32):
                served = parts[name, mode].mean(clients, "tokens_per_s")
                row.append(f"{served:,.0f}")
                for engine in ("engine", "engine-4"):
                    row.append(f"{served / parts[engine, mode].mean(clients, 'tokens_per_s'):.0%}")
            rows.append(row)
    head = [""]
    for clients in (16, 32):
        head += [f"{clients} clients, tokens/s", "of 2 processes", "of 4 processes"]
    return table(head, rows)


def _overhead(directory: Path) -> str:
    found = result.read(directory / "overhead.json")
    return (
        f"{found['service_p50_ms']:.1f} ms whole, {found['overhead_p50_ms']:.1f} ms more than the engine's own (the "
        f"median of the differences in rounds that ask both by turns; the engine's is {found['engine_p50_ms']:.1f}); "
        "a stream's first token after "
        f"{found['first_token_p50_ms']:.1f} ms ([overhead.json](results/overhead.json))."
    )


def _replicas(parts: Mapping[tuple[str, str], Part]) -> str:
    names = ["replicas-1", "replicas-2", "replicas-3", "haproxy"]
    rows = [
        [f"{clients} clients, {mode}", *(f"{parts[name, mode].mean(clients, 'tokens_per_s'):,.0f}" for name in names)]
        for mode in ("unary", "stream")
        for clients in (16, 32)
    ]
    return table(["tokens/s with replicas:", "1", "2", "3", "4"], rows)


def _capacity(parts: Mapping[tuple[str, str], Part]) -> str:
    part, clients = parts["haproxy", "unary"], 32
    replica, proxy = part.cpu_ms(clients, "replicas"), part.cpu_ms(clients, "proxy")
    ray = part.mean(clients, "server", "by_role", "ray")
    a_node = (CORES - ray) * 1000 / (replica + proxy)
    rows = [[f"{n}", *(f"{_two_digits(n * a_node * tokens):,.0f}" for tokens in (1, 64))] for n in (1, 10, 100)]
    a_proxy = 1000 / proxy
    return f"""At {clients} clients an answer costs {replica:.1f} ms of a replica's CPU and {proxy:.2f} ms of HAProxy's;
Ray itself takes {ray:.2f} of a core on the head, whatever the load. Nodes like this one, all of whose cores are the
service's, would then carry

{table(["nodes", "requests/s", "tokens/s"], rows)}

if nothing else became scarce. What does first is the one HAProxy of `proxy_location: HeadOnly`, on one thread: at
some {_two_digits(a_proxy):,.0f} requests/s, that is {a_proxy / a_node:.0f} nodes. Beyond, each node needs its own
([several machines](cluster.md)) and something in front that spreads clients over them. This is an estimate: no such
cluster was measured."""


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _spread(parts: Mapping[tuple[str, str], Part]) -> float:
    """How far the rounds of a service are apart at most, in requests/s, as a share of the lower one."""
    rates = [
        [run["requests_per_s"] for run in part.result["runs"] if run["load"]["concurrency"] == clients]
        for (name, _), part in parts.items()
        if name in SERVICES or name.startswith("replicas")
        for clients in part.clients
    ]
    return max(max(of) / min(of) - 1 for of in rates)


def _selftest(selftest: Mapping[str, Any], parts: Mapping[tuple[str, str], Part]) -> str:
    rows = []
    for mode in ("unary", "stream"):
        served = max(
            parts["haproxy", mode].mean(clients, "requests_per_s") for clients in parts["haproxy", mode].clients
        )
        stub = max(run["requests_per_s"] for run in selftest["rates"][mode])
        rows.append([mode, f"{stub:,.0f}", f"{served:.0f}", f"{stub / served:.1f}"])
    checks = "; ".join(check["name"] for check in selftest["checks"] if check["passed"])
    return f"""Against a stub that computes nothing and streams {TOKENS_A_MESSAGE} tokens a message, which shares the
two cores with the generator:

{table(["requests/s", "stub", "service at best", "times"], rows)}

What it found right of a server whose delays are known: {checks} ([selftest.json](results/selftest.json))."""


def main() -> None:
    argparse.ArgumentParser(prog="python -m loadtest.standard.page", description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
