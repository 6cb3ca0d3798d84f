"""Closed-loop load on a running service: so many clients, each asking again as soon as it has its answer.

    python -m loadtest [--server localhost:9000] [--concurrency 4] [--duration 60] [--output FILE.json]

Measures from outside, over gRPC like any user; what a client waits for is in the latency, retries are never made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loadtest.closed_loop import Load, run_load
from loadtest.machine import describe
from loadtest.report import summarize


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:9000", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=4, help="clients at once; default: %(default)s")
    parser.add_argument("--duration", type=float, default=60, help="measured seconds; default: %(default)s")
    parser.add_argument("--warmup", type=float, default=5, help="seconds before them, left out; default: %(default)s")
    parser.add_argument("-n", "--max-tokens", type=int, default=64, help="of each answer; default: %(default)s")
    parser.add_argument("--stream", action="store_true", help="ask GenerateStream instead of Generate")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON too")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    arguments = parser.parse_args()
    for name, least in (("concurrency", 1), ("duration", 0.1), ("warmup", 0), ("max_tokens", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be at least {least}")
    return arguments


async def measure(load: Load) -> dict:
    """Run the load behind a progress bar; the result with the machine and the command that gave it."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("load", total=load.warmup_s + load.duration_s)

        def show(elapsed_s: float, answers: int) -> None:
            bar.update(task, completed=elapsed_s, description=f"{answers} answers")

        answers = await run_load(load, show)
    return {"command": "python -m loadtest " + " ".join(sys.argv[1:]), **describe(), **summarize(load, answers)}


def print_table(result: dict) -> None:
    load = result["load"]
    table = Table("figure", "value", title=f"{load['concurrency']} clients, {load['duration_s']:g} s")
    table.add_row("requests/s", f"{result['requests_per_s']:.2f}")
    table.add_row("output tokens/s", f"{result['tokens_per_s']:.0f}")
    table.add_row("tokens an answer", f"{result['tokens_an_answer']:.1f}")
    for name, value in result["latency_ms"].items():
        table.add_row(f"latency {name}", f"{value:.0f} ms")
    for name, value in (result["first_token_ms"] or {}).items():
        table.add_row(f"first token {name}", f"{value:.0f} ms")
    table.add_row("statuses", ", ".join(f"{status} {count}" for status, count in result["statuses"].items()))
    table.add_row("replicas", ", ".join(f"{name} {count}" for name, count in result["replicas"].items()))
    Console().print(table)


def main() -> None:
    arguments = parse()
    load = Load(
        server=arguments.server,
        concurrency=arguments.concurrency,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
        max_tokens=arguments.max_tokens,
        stream=arguments.stream,
    )
    try:
        result = asyncio.run(measure(load))
    except KeyboardInterrupt:
        sys.exit(130)
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        print_table(result)
    if not result["statuses"].get("OK"):
        sys.exit(f"error: no answer from {arguments.server}: {result['statuses']}")


if __name__ == "__main__":
    main()
