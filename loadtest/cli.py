"""The command line of the load generator. Commands import lazily, so that --help is quick."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadtest import options
from loadtest.options import Duration, Json, Output, Quiet, command_errors
from tinylm.terminal.output import PlainConsole

if TYPE_CHECKING:
    from loadtest.sweep import Sweep

app = typer.Typer(
    help="Load test of a running service. `run` is the default command: "
    "python -m loadtest --concurrency 4. docs/speed.md defines the figures.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run `python -m loadtest ...`. Arguments that do not begin with a subcommand belong to `run`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the processes that it started, as Ctrl-C does
    arguments = sys.argv[1:]
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    if not arguments or arguments[0] not in {*names, "-h", "--help"}:
        arguments = ["run", *arguments]
    app(arguments, prog_name="python -m loadtest")


@app.command()
def run(
    server: options.Server = "localhost:9000",
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    arrivals: options.Arrivals = "poisson",
    stream: options.Stream = False,
    duration: Duration = 60,
    requests: options.Requests = None,
    warmup: options.Warmup = 5,
    max_tokens: options.MaxTokens = "64",
    ignore_eos: options.IgnoreEos = False,
    prompts: options.Prompts = None,
    prompt_words: options.PromptWords = None,
    repeat: options.Repeat = 1,
    goodput: options.Goodput = None,
    processes: options.Processes = None,
    connections: options.Connections = None,
    max_in_flight: options.MaxInFlight = 4096,
    timeout: options.Timeout = 60,
    seed: options.Seed = 0,
    priority: options.Priority = True,
    api_key: options.ApiKey = None,
    ca: options.Certificates = None,
    label: options.Label = None,
    replicas: options.Replicas = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send requests to a service and measure the answers: one run for each concurrency or rate."""
    with command_errors():
        from loadtest.load import Mix
        from loadtest.results import result_file

        if output:
            result_file.check_output(output, {"--prompts": prompts, "--ca": ca})
        options.require_at_least(1, repeat=repeat, processes=processes, replicas=replicas)
        settings = {
            "server": server,
            "max_tokens": Mix.parse(max_tokens, "--max-tokens"),
            "ignore_eos": ignore_eos,
            "stream": stream,
            "duration_s": duration,
            "requests": requests,
            "warmup_s": warmup,
            "arrivals": arrivals,
            "connections": connections,
            "max_in_flight": max_in_flight,
            "timeout_s": timeout,
            "seed": seed,
            "priority": priority,
            "api_key": api_key,
            "ca": ca.read_bytes() if ca else None,
            **_prompts(prompts, prompt_words),
        }
        sweep = _sweep(settings, concurrency, rate, repeat, processes, goodput)
        result = _measure(sweep, label or (output.stem if output else server), replicas, quiet or as_json)
        _deliver(result, result_file.write, _show_runs, output, as_json, quiet)
        if not any(one["statuses"].get("OK") for one in result["runs"]):
            raise ValueError(f"no answer from {server}: {result['runs'][0]['statuses'] or 'the run was too short'}")


def _prompts(prompts: Path | None, prompt_words: str | None) -> dict[str, Any]:
    """Return the settings of a load that decide its prompts."""
    from loadtest.generator.workload import read_prompts
    from loadtest.load import Mix

    if prompts and prompt_words:
        raise ValueError("--prompt-words is for built-in prompts: give either --prompts or --prompt-words")
    words = Mix.parse(prompt_words, "--prompt-words") if prompt_words else None
    return {"prompts": read_prompts(prompts) if prompts else (), "prompt_words": words}


def _sweep(
    settings: Mapping[str, Any],
    concurrency: str | None,
    rate: str | None,
    repeat: int,
    processes: int | None,
    goodput: str | None,
) -> Sweep:
    """Return a sweep with one load for each concurrency or rate."""
    from loadtest.load import Load
    from loadtest.results.goodput import parse
    from loadtest.sweep import Sweep

    if concurrency and rate:
        raise ValueError("--concurrency and --rate exclude each other: a loop is closed or open")
    if rate:
        loads = [Load(**settings, rate_per_s=number) for number in options.decimals("--rate", rate)]
    else:
        numbers = options.integers("--concurrency", concurrency or "4")
        loads = [Load(**settings, concurrency=number) for number in numbers]
    return Sweep(tuple(loads), repeat, processes, parse(goodput) if goodput else None)


def _measure(sweep: Sweep, label: str, replicas: int | None, quiet: bool) -> dict[str, Any]:
    """Make the runs. Return the content of the result file."""
    from loadtest.measured_server import facts
    from loadtest.results.result_file import assemble
    from loadtest.sweep import run_sweep

    service = facts(sweep.loads[0])
    return assemble(run_sweep(sweep, quiet), label, service, replicas)


def _show_runs(result: Mapping[str, Any], console: PlainConsole) -> None:
    from loadtest.results import table

    table.show(result["runs"], console)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Results of `run`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.html and the pictures.")] = Path("report"),
) -> None:
    """Draw results: one HTML page and its pictures of histograms, percentiles, throughput and p99 against load."""
    with command_errors():
        from loadtest.results import html_report, result_file

        typer.echo(html_report.write([result_file.read(path) for path in files], out))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json")],
    after: Annotated[Path, typer.Argument(metavar="B.json")],
    as_json: Json = False,
) -> None:
    """Compare two results: show which figures changed, and which by more than repeated runs differ."""
    with command_errors():
        from loadtest.results import compare as comparison
        from loadtest.results import result_file

        changes = comparison.compare(result_file.read(before), result_file.read(after))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=1))
        else:
            comparison.show(changes, before.name, after.name, PlainConsole())


@app.command()
def selftest(duration: Duration = 3, output: Output = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Measure the load generator on a stub service: its highest rates, and whether it finds known delays."""
    with command_errors():
        from loadtest import selftest as checks
        from loadtest.results import result_file

        if output:
            result_file.check_output(output, with_csv=False)
        options.require_at_least(0.5, duration=duration)
        result = {"command": result_file.own_command(sys.argv[1:]), **checks.measure(duration, quiet or as_json)}
        _deliver(result, result_file.write_json, checks.show, output, as_json, quiet)
        if wrong := [check["name"] for check in result["checks"] if not check["passed"]]:
            raise RuntimeError(f"do not trust the load generator on this machine now: {', '.join(wrong)}")


def _deliver(
    result: Mapping[str, Any],
    write: Callable[[Path, Mapping[str, Any]], None],
    show: Callable[[Mapping[str, Any], PlainConsole], None],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a result to `--output`, if it is given. Print it as JSON or, without `--quiet`, as a table."""
    if output:
        write(output, result)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif not quiet:
        show(result, PlainConsole())
