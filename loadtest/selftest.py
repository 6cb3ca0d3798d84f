"""What the load generator can measure on this machine: its highest rates, and whether it finds delays that are known.

The stub service shares the machine with the generator, so the rates are what both can do together: a lower bound of
what the generator can do against a service elsewhere.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loadtest import stub_server, sweep
from loadtest.load import Load, Mix
from loadtest.table import ms
from tinylm.machine import describe

CLIENTS = (1, 8, 32, 128)
TOKENS = 64
TOKENS_A_MESSAGE = 8  # of a stream: no more than a busy TinyLM puts into one
DELAYS_MS = Mix((10, 40, 160), (0.7, 0.25, 0.05))
OVERHEAD_MS = 25.0  # the most that client, stub and a busy machine may add to a known delay
FREEZE_S = 1.0


def carry_out(duration_s: float, quiet: bool) -> dict[str, Any]:
    """All of it; each check has a name, what was found, and whether it passed."""
    rates = {kind: _rates(duration_s, stream, quiet) for kind, stream in (("unary", False), ("stream", True))}
    checks = [_known_delays(duration_s, quiet), *_stall(duration_s, quiet)]
    return {**describe(), "rates": rates, "checks": checks}


def _rates(duration_s: float, stream: bool, quiet: bool) -> list[dict]:
    """Runs against a stub that answers at once."""
    with stub_server.running("--tokens-a-message", str(TOKENS_A_MESSAGE)) as server:
        one = Mix((TOKENS,), (1,))
        loads = [Load(server, one, n, stream=stream, duration_s=duration_s, warmup_s=0.5) for n in CLIENTS]
        return sweep.carry_out(sweep.Sweep(tuple(loads)), quiet)


def _known_delays(duration_s: float, quiet: bool) -> dict[str, Any]:
    """Delays of three sizes: percentiles must lie at the size that their share says, and little above."""
    with stub_server.running("--delay-ms", str(DELAYS_MS)) as server:
        load = Load(server, Mix((1,), (1,)), rate_per_s=100, duration_s=max(duration_s, 5), warmup_s=0.5)
        (run,) = sweep.carry_out(sweep.Sweep((load,)), quiet)
    found = {name: run["latency_ms"][name] for name in ("p50", "p90", "p99")}
    expected = dict(zip(found, DELAYS_MS.values, strict=True))
    passed = all(delay <= found[name] < delay + OVERHEAD_MS for name, delay in expected.items())
    return {"name": "known delays", "expected_ms": expected, "found_ms": found, "passed": passed}


def _stall(duration_s: float, quiet: bool) -> list[dict[str, Any]]:
    """A service stands still for a second while one request may be open at a time, as with a client that waits.

    The others wait to be sent. Counted from when they were intended, the stall shows in a quarter of them or so;
    counted from when they were sent, in one: the coordinated omission of naive clients.
    """
    duration_s = max(duration_s, 4)
    with stub_server.running("--freeze-after-s", "2", "--freeze-s", str(FREEZE_S)) as server:
        one = Mix((1,), (1,))
        load = Load(
            server, one, rate_per_s=100, arrivals="constant", duration_s=duration_s, warmup_s=0, max_in_flight=1
        )
        (run,) = sweep.carry_out(sweep.Sweep((load,)), quiet)
    # Those intended within the second waited for half of it on average.
    expected = FREEZE_S / duration_s * FREEZE_S / 2 * 1000
    found, naive = run["latency_ms"], run["latency_from_send_ms"]
    return [
        {
            "name": "a stall of a second, as requests were intended",
            "expected_ms": {"mean": round(expected, 1)},
            "found_ms": {name: found[name] for name in ("mean", "p99", "max")},
            "passed": 0.7 * expected < found["mean"] < 1.5 * expected + OVERHEAD_MS,
        },
        {
            "name": "the same requests, as they were sent",
            "expected_ms": {"p90": 0},
            "found_ms": {name: naive[name] for name in ("mean", "p90", "max")},
            "passed": naive["p90"] < OVERHEAD_MS,
        },
    ]


def _messages_per_s(run: dict[str, Any]) -> float:
    return run["tokens_per_s"] / run["messages"]["tokens_a_message"]


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="a stub that answers at once", title_justify="left")
    for number, column in enumerate(
        ("", "clients", "requests/s", "messages/s", "p50 ms", "p99 ms", "processes", "client cores", "stub cores")
    ):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for kind, runs in result["rates"].items():
        for run in runs:
            messages = f"{_messages_per_s(run):,.0f}" if kind == "stream" else "-"
            latency = [ms(run["latency_ms"], name) for name in ("p50", "p99")]
            cores = [f"{run['client']['cores']:.2f}", f"{run['server']['cores'] or 0:.2f}"]
            figures = [str(run["load"]["concurrency"]), f"{run['requests_per_s']:,.0f}", messages, *latency]
            table.add_row(kind, *figures, str(run["client"]["processes"]), *cores)
    console.print(table)
    for kind, runs in result["rates"].items():
        best = max(runs, key=lambda run: run["requests_per_s"])
        figure = f"{best['requests_per_s']:,.0f} requests/s"
        if kind == "stream":
            figure += f", {_messages_per_s(best):,.0f} messages/s"
        console.print(f"highest rate, {kind}: {figure} with {best['load']['concurrency']} clients")
    for check in result["checks"]:
        verdict, style = ("passed", "green") if check["passed"] else ("failed", "red")
        told = f"{check['name']}: {verdict}; expected {check['expected_ms']} ms, found {check['found_ms']}"
        console.print(told, style=style)
