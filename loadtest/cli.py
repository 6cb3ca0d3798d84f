"""The command line of the load test: parses, prints, and turns errors into one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from tinylm.terminal.output import PlainConsole, one_line_errors

NEEDED = {"hdrh": "hdrhistogram", "psutil": "psutil", "matplotlib": "matplotlib", "scipy": "scipy"}
INSTALL = "pip install -e '.[bench]'"

app = typer.Typer(
    help="Load on a running service, measured from outside like any user. `run` may be left out: "
    "python -m loadtest --concurrency 4. Figures are defined in docs/speed.md.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
ApiKey = Annotated[
    Optional[str],
    typer.Option(
        envvar="TINYLM_API_KEY", show_envvar=True, help="Sent as `authorization: Bearer KEY`, and in no result."
    ),
]
Output = Annotated[
    Optional[Path],
    typer.Option(
        "--output", "-o", metavar="FILE.json", help="Write the result as JSON, and that of runs as CSV beside it."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No live view and no table.")]


def main() -> None:
    """`python -m loadtest ...`: whatever is no subcommand belongs to `run`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped, as after Ctrl-C
    arguments = sys.argv[1:]
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    if not arguments or arguments[0] not in {*names, "-h", "--help"}:
        arguments = ["run", *arguments]
    app(arguments, prog_name="python -m loadtest")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Run a command of the load test: see `tinylm.terminal.output.one_line_errors`."""
    with one_line_errors(ValueError, RuntimeError):
        missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"the load test needs {', '.join(missing)}: {INSTALL}")
        yield


@app.command()
def run(
    server: Annotated[
        str,
        typer.Option(
            "--server",
            "-s",
            metavar="ADDRESS",
            help="HOST:PORT of the service, http://HOST:PORT of one with OpenAI's completions, "
            "engine:MODEL_DIRECTORY for no service at all.",
        ),
    ] = "localhost:9000",
    concurrency: Annotated[
        Optional[str], typer.Option(metavar="N,N,...", help="Closed loop: clients at once. Default 4.")
    ] = None,
    rate: Annotated[
        Optional[str], typer.Option(metavar="R,R,...", help="Open loop: requests a second, whatever comes back.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="Of an open loop: poisson or constant.")] = "poisson",
    stream: Annotated[bool, typer.Option("--stream", help="Ask GenerateStream instead of Generate.")] = False,
    duration: Annotated[float, typer.Option(help="Measured seconds of each run.")] = 60,
    requests: Annotated[Optional[int], typer.Option(help="End each run after so many instead.")] = None,
    warmup: Annotated[float, typer.Option(help="Seconds before, left out of every figure.")] = 5,
    max_tokens: Annotated[
        str, typer.Option("--max-tokens", "-n", metavar="N[:SHARE],...", help="Of each answer; a mix: 16:0.5,64:0.5.")
    ] = "64",
    prompts: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help='One a line: text, or {"prompt": ...} in a .jsonl.')
    ] = None,
    prompt_words: Annotated[
        Optional[str],
        typer.Option(metavar="N[:SHARE],...", help="Lengths of built-in prompts, all different. Default: 4 short."),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Do the whole sweep so many times, for `compare`.")] = 1,
    goodput: Annotated[
        Optional[str],
        typer.Option(metavar="LIMITS", help="Count requests within limits in ms: ttft<50,tpot<5,e2e<500."),
    ] = None,
    processes: Annotated[
        Optional[int], typer.Option(help="Of the load generator. Default: 1, and more while one is too busy.")
    ] = None,
    connections: Annotated[
        Optional[int], typer.Option(help="To the service. Default: one a client; 16 in an open loop.")
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(help="Open loop: requests beyond so many wait, and their waiting counts.")
    ] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds after which a call is DEADLINE_EXCEEDED.")] = 60,
    seed: Annotated[int, typer.Option(help="Of arrivals, mixes and answers.")] = 0,
    priority: Annotated[
        bool,
        typer.Option(help="Get a core before all other processes, as on a machine of its own, where it is permitted."),
    ] = True,
    api_key: ApiKey = None,
    ca: Annotated[Optional[Path], typer.Option(metavar="FILE", help="PEM certificates to trust: use TLS.")] = None,
    label: Annotated[Optional[str], typer.Option(help="What reports call this result.")] = None,
    replicas: Annotated[
        Optional[int], typer.Option(help="How many the service has, for reports. Default: those that answer.")
    ] = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask the service and measure: one run for each concurrency or rate."""
    with _one_line_errors():
        from loadtest import goodput as limits_of
        from loadtest import result as results
        from loadtest import table
        from loadtest.load import Load, Mix
        from loadtest.server import facts
        from loadtest.sweep import Sweep, carry_out
        from loadtest.workload import read_prompts

        if concurrency and rate:
            raise ValueError("--concurrency and --rate exclude each other: a loop is closed or open")
        if arrivals not in ("poisson", "constant"):
            raise ValueError(f"--arrivals is {arrivals!r}: it must be poisson or constant")
        if prompts and prompt_words:
            raise ValueError("--prompt-words is for built-in prompts: it can't be given with --prompts")
        if output:
            results.check_output(output, {"--prompts": prompts, "--ca": ca})
        for name, number in (("--repeat", repeat), ("--processes", processes), ("--replicas", replicas)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}: it must be at least 1")
        base: dict[str, Any] = {
            "server": server,
            "max_tokens": Mix.parse(max_tokens, "--max-tokens"),
            "stream": stream,
            "duration_s": duration,
            "requests": requests,
            "warmup_s": warmup,
            "prompts": read_prompts(prompts) if prompts else (),
            "prompt_words": Mix.parse(prompt_words, "--prompt-words") if prompt_words else None,
            "arrivals": arrivals,
            "connections": connections,
            "max_in_flight": max_in_flight,
            "timeout_s": timeout,
            "seed": seed,
            "priority": priority,
            "api_key": api_key,
            "ca": ca.read_bytes() if ca else None,
        }
        field = "rate_per_s" if rate else "concurrency"
        numbers = _numbers("--rate", rate, float) if rate else _numbers("--concurrency", concurrency or "4", int)
        loads = tuple(Load(**{**base, field: number}) for number in numbers)
        sweep = Sweep(loads, repeat, processes, limits_of.parse(goodput) if goodput else None)
        about = facts(loads[0])
        runs = carry_out(sweep, quiet or as_json)
        result = results.assemble(runs, label or (output.stem if output else server), replicas, about)
        _hand_over(result, lambda shown, console: table.show(shown["runs"], console), output, as_json, quiet)
        if not any(one["statuses"].get("OK") for one in runs):
            raise ValueError(f"no answer from {server}: {runs[0]['statuses'] or 'the run was too short'}")


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Results of `run` or `standard`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.html and the pictures.")] = Path("report"),
) -> None:
    """Draw results: histograms, percentile curves, throughput and p99 against load; PNGs and one HTML page."""
    with _one_line_errors():
        from loadtest import report as reporting
        from loadtest import result as results

        page = reporting.write([results.read(path) for path in files], out)
        typer.echo(page)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json")],
    after: Annotated[Path, typer.Argument(metavar="B.json")],
    as_json: Json = False,
) -> None:
    """Say what changed from A to B, and whether by more than repeated runs differ among themselves."""
    with _one_line_errors():
        from loadtest import compare as comparing
        from loadtest import result as results

        changes = comparing.compare(results.read(before), results.read(after))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=1))
        else:
            comparing.show(changes, before.name, after.name, PlainConsole())


@app.command()
def selftest(
    duration: Annotated[float, typer.Option(help="Seconds of each run.")] = 3,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the load generator itself on a stub service: its highest rates, and whether it finds known delays."""
    with _one_line_errors():
        from loadtest import selftest as testing
        from loadtest.result import check_output, own_command
        from tinylm.files import write_file

        if output:
            check_output(output, with_csv=False)
        if not 0.5 <= duration < float("inf"):
            raise ValueError(f"--duration is {duration}: it must be a finite number of at least 0.5")
        result = {"command": own_command(sys.argv[1:]), **testing.carry_out(duration, quiet or as_json)}
        if output:
            write_file(output, json.dumps(result, indent=1) + "\n")
        if as_json:
            typer.echo(json.dumps(result, indent=1))
        elif not quiet:
            testing.show(result, PlainConsole())
        if wrong := [check["name"] for check in result["checks"] if not check["passed"]]:
            raise RuntimeError(f"the load generator can't be trusted on this machine now: {', '.join(wrong)}")


@app.command()
def overload(
    server: Annotated[str, typer.Option("--server", "-s", help="HOST:PORT of a running service.")] = "localhost:9000",
    clients: Annotated[int, typer.Option(help="That the service just holds: slots and queue of all replicas.")] = 320,
    factor: Annotated[
        str, typer.Option(metavar="F,F,...", help="Of the rate reached so, to ask at.")
    ] = "1.1,1.25,1.5,2",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of each answer.")] = 64,
    duration: Annotated[float, typer.Option(help="Measured seconds of each run.")] = 15,
    warmup: Annotated[float, typer.Option(help="Seconds before each run.")] = 3,
    repeat: Annotated[int, typer.Option(help="Rounds.")] = 3,
    processes: Annotated[Optional[int], typer.Option(help="Of the load generator; by default as needed.")] = None,
    api_key: ApiKey = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask for more than a service can: how fast it goes on, and how soon it refuses the rest."""
    with _one_line_errors():
        from loadtest import overload as overloading
        from loadtest import result as results
        from loadtest.load import Load, Mix
        from loadtest.server import facts

        factors = _numbers("--factor", factor, float)
        if output:
            results.check_output(output)
        if min(factors) <= 1 or repeat < 1:
            raise ValueError(f"--factor is {factor} and --repeat {repeat}: they must be above 1 and at least 1")
        wanted = Mix((max_tokens,), (1.0,))
        full = Load(server, wanted, clients, duration_s=duration, warmup_s=warmup, api_key=api_key)
        about = facts(full)
        measured = overloading.measure(full, factors, repeat, processes, quiet or as_json)
        result = {**measured, **results.assemble(measured["runs"], "overload", None, about)}
        _hand_over(result, overloading.show, output, as_json, quiet)


@app.command()
def overhead(
    server: Annotated[str, typer.Option("--server", "-s", help="HOST:PORT of a running service.")] = "localhost:9000",
    model: Annotated[Path, typer.Option(help="What it serves: the directory, for the engine alone.")] = Path(
        "models/stories-8m"
    ),
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of each answer.")] = 64,
    duration: Annotated[float, typer.Option(help="Measured seconds of each run.")] = 1.5,
    warmup: Annotated[float, typer.Option(help="Seconds before each run.")] = 0.5,
    repeat: Annotated[int, typer.Option(help="Rounds: engine, service unary, service streamed.")] = 20,
    api_key: ApiKey = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What the service adds to its engine for a lone client, both asked by turns."""
    with _one_line_errors():
        from loadtest import overhead as adding
        from loadtest import result as results
        from loadtest.load import Load, Mix
        from loadtest.server import facts

        if repeat < 1:
            raise ValueError(f"--repeat is {repeat}: it must be at least 1")
        if output:
            results.check_output(output)
        wanted = Mix((max_tokens,), (1.0,))
        lone = Load(server, wanted, 1, duration_s=duration, warmup_s=warmup, api_key=api_key)
        about = facts(lone)
        measured = adding.measure(lone, model, repeat, quiet or as_json)
        result = {**measured, **results.assemble(measured["runs"], "overhead", None, about)}
        _hand_over(result, adding.show, output, as_json, quiet)


@app.command()
def standard(
    out: Annotated[Path, typer.Option(metavar="DIR", help="For the results; what is there already is kept.")] = Path(
        "docs/results/standard"
    ),
    only: Annotated[Optional[str], typer.Option(metavar="PART,...", help="Parts whose names begin so.")] = None,
    duration: Annotated[float, typer.Option(help="Measured seconds of each run.")] = 15,
    warmup: Annotated[float, typer.Option(help="Seconds before each run.")] = 3,
    repeat: Annotated[int, typer.Option(help="Rounds of each part.")] = 3,
    concurrency: Annotated[str, typer.Option(metavar="N,N,...", help="Clients at once.")] = "1,2,4,8,16,32",
    again: Annotated[bool, typer.Option("--again", help="Measure also what is there already.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Say what would be done and how long it takes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure the standard set, starting each service itself: both proxies, replicas, the bare engine, llama.cpp."""
    with _one_line_errors():
        from loadtest.standard import parts

        settings = parts.Settings(out, duration, warmup, repeat, tuple(_numbers("--concurrency", concurrency, int)))
        chosen = parts.choose(only)
        parts.show_plan(chosen, settings, again)
        if not list_only:
            parts.carry_out(chosen, settings, again, quiet)


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} is {text!r}: it must be {what} with commas between them") from None


def _hand_over(
    result: dict[str, Any],
    show: Callable[[dict[str, Any], Console], None],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a result of runs where it was asked for, and print it as JSON or as `show` does, or not at all."""
    from loadtest import result as results

    if output:
        results.write(output, result)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif not quiet:
        show(result, PlainConsole())
