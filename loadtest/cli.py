"""The command line of the load generator. A command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loadtest import options
from loadtest.options import ApiKey, Duration, Json, MaxTokens, Output, Processes, Quiet, Server, Warmup, command_errors
from tinylm.terminal.output import PlainConsole

if TYPE_CHECKING:
    from loadtest.load import Load

app = typer.Typer(
    help="Load on a running service, measured from outside like any user. `run` may be left out: "
    "python -m loadtest --concurrency 4. docs/speed.md defines the figures.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run `python -m loadtest ...`. Arguments that begin with no subcommand belong to `run`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the processes that it started, as Ctrl-C does
    arguments = sys.argv[1:]
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    if not arguments or arguments[0] not in {*names, "-h", "--help"}:
        arguments = ["run", *arguments]
    app(arguments, prog_name="python -m loadtest")


@app.command()
def run(
    server: Annotated[
        str,
        typer.Option(
            "--server",
            "-s",
            metavar="ADDRESS",
            help="HOST:PORT of a service, http://HOST:PORT of one with OpenAI's completions, "
            "engine:MODEL_DIRECTORY for the engine without a service.",
        ),
    ] = "localhost:9000",
    concurrency: Annotated[
        Optional[str], typer.Option(metavar="N,N,...", help="Closed loop: number of clients. Default 4.")
    ] = None,
    rate: Annotated[
        Optional[str], typer.Option(metavar="R,R,...", help="Open loop: requests a second, without waiting.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="Open loop: poisson or constant.")] = "poisson",
    stream: Annotated[bool, typer.Option("--stream", help="Call GenerateStream instead of Generate.")] = False,
    duration: Duration = 60,
    requests: Annotated[Optional[int], typer.Option(help="End each run after this number of requests.")] = None,
    warmup: Warmup = 5,
    max_tokens: Annotated[
        str,
        typer.Option("--max-tokens", "-n", metavar="N[:SHARE],...", help="Tokens of each answer, as in 16:0.5,64:0.5."),
    ] = "64",
    prompts: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help='One a line: text, or {"prompt": ...} in a .jsonl.')
    ] = None,
    prompt_words: Annotated[
        Optional[str],
        typer.Option(metavar="N[:SHARE],...", help="Lengths of random built-in prompts. Default: 4 short prompts."),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Repeat all runs this number of times, for `compare`.")] = 1,
    goodput: Annotated[
        Optional[str],
        typer.Option(metavar="LIMITS", help="Count requests within limits in ms: ttft<50,tpot<5,e2e<500."),
    ] = None,
    processes: Processes = None,
    connections: Annotated[
        Optional[int], typer.Option(help="Connections to the service. Default: one a client, 16 in an open loop.")
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(help="Open loop: requests beyond this number wait, and their waiting counts.")
    ] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds after which a call is DEADLINE_EXCEEDED.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, mixes and answers.")] = 0,
    priority: Annotated[
        bool, typer.Option(help="Schedule the load generator before other processes, where that is permitted.")
    ] = True,
    api_key: ApiKey = None,
    ca: Annotated[Optional[Path], typer.Option(metavar="FILE", help="PEM certificates to trust. Uses TLS.")] = None,
    label: Annotated[Optional[str], typer.Option(help="Name of this result in reports.")] = None,
    replicas: Annotated[
        Optional[int], typer.Option(help="Replicas of the service, for reports. Default: those that answer.")
    ] = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask the service and measure: one run for each concurrency or rate."""
    with command_errors():
        from loadtest.load import Mix
        from loadtest.measured_server import facts
        from loadtest.results import goodput as limits
        from loadtest.results import result_file, table
        from loadtest.sweep import Sweep, carry_out

        if arrivals not in ("poisson", "constant"):
            raise ValueError(f"--arrivals is {arrivals!r}: it must be poisson or constant")
        if output:
            result_file.check_output(output, {"--prompts": prompts, "--ca": ca})
        options.require_at_least(1, repeat=repeat, processes=processes, replicas=replicas)
        settings = {
            "server": server,
            "max_tokens": Mix.parse(max_tokens, "--max-tokens"),
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
        loads = _loads(settings, concurrency, rate)
        sweep = Sweep(loads, repeat, processes, limits.parse(goodput) if goodput else None)
        service = facts(loads[0])
        runs = carry_out(sweep, quiet or as_json)
        name = label or (output.stem if output else server)
        _hand_over(result_file.assemble(runs, name, service, replicas), table.show_result, output, as_json, quiet)
        if not any(one["statuses"].get("OK") for one in runs):
            raise ValueError(f"no answer from {server}: {runs[0]['statuses'] or 'the run was too short'}")


def _prompts(prompts: Path | None, prompt_words: str | None) -> dict[str, Any]:
    """Return the settings of a load that decide its prompts."""
    from loadtest.generator.workload import read_prompts
    from loadtest.load import Mix

    if prompts and prompt_words:
        raise ValueError("--prompt-words is for built-in prompts: give either --prompts or --prompt-words")
    words = Mix.parse(prompt_words, "--prompt-words") if prompt_words else None
    return {"prompts": read_prompts(prompts) if prompts else (), "prompt_words": words}


def _loads(settings: Mapping[str, Any], concurrency: str | None, rate: str | None) -> tuple[Load, ...]:
    """Return a load for each concurrency or rate."""
    from loadtest.load import Load

    if concurrency and rate:
        raise ValueError("--concurrency and --rate exclude each other: a loop is closed or open")
    if rate:
        return tuple(Load(**settings, rate_per_s=number) for number in options.decimals("--rate", rate))
    numbers = options.integers("--concurrency", concurrency or "4")
    return tuple(Load(**settings, concurrency=number) for number in numbers)


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
    """Say what changed from A to B, and whether by more than repeated runs differ."""
    with command_errors():
        from loadtest.results import compare as comparison
        from loadtest.results import result_file

        changes = comparison.compare(result_file.read(before), result_file.read(after))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=1))
        else:
            comparison.show(changes, before.name, after.name, PlainConsole())


@app.command()
def selftest(
    duration: Duration = 3,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the load generator on a stub service: its highest rates, and whether it finds known delays."""
    with command_errors():
        from loadtest.results import result_file
        from loadtest.scenarios import selftest as scenario

        if output:
            result_file.check_output(output, with_csv=False)
        options.require_at_least(0.5, duration=duration)
        command = result_file.own_command(sys.argv[1:])
        result = {"command": command, **scenario.measure(duration, quiet or as_json)}
        options.hand_over(result, result_file.write_json, scenario.show, output, as_json, quiet)
        if wrong := [check["name"] for check in result["checks"] if not check["passed"]]:
            raise RuntimeError(f"do not trust the load generator on this machine now: {', '.join(wrong)}")


@app.command()
def overload(
    server: Server = "localhost:9000",
    clients: Annotated[int, typer.Option(help="As many as fill the slots and queues of all replicas.")] = 320,
    factor: Annotated[
        str, typer.Option(metavar="F,F,...", help="Ask at these multiples of the rate that the clients reached.")
    ] = "1.1,1.25,1.5,2",
    max_tokens: MaxTokens = 64,
    duration: Duration = 15,
    warmup: Warmup = 3,
    repeat: Annotated[int, typer.Option(help="Rounds.")] = 3,
    processes: Processes = None,
    api_key: ApiKey = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask for more than a service can do: how much it still answers, and how soon it refuses the rest."""
    with command_errors():
        from loadtest.load import Load, Mix
        from loadtest.scenarios import overload as scenario

        factors = options.decimals("--factor", factor)
        if not all(1 < number < float("inf") for number in factors):
            raise ValueError(f"--factor is {factor!r}: every number must be above 1 and finite")
        options.require_at_least(1, repeat=repeat, processes=processes)
        tokens = Mix((max_tokens,), (1.0,))
        full = Load(server, tokens, clients, duration_s=duration, warmup_s=warmup, api_key=api_key)

        def measure() -> dict[str, Any]:
            return scenario.measure(full, factors, repeat, processes, quiet or as_json)

        _run_scenario("overload", full, measure, scenario.show, output, as_json, quiet)


@app.command()
def overhead(
    server: Server = "localhost:9000",
    model: Annotated[Path, typer.Option(help="The directory of the model that the service has.")] = Path(
        "models/stories-8m"
    ),
    max_tokens: MaxTokens = 64,
    duration: Duration = 1.5,
    warmup: Warmup = 0.5,
    repeat: Annotated[int, typer.Option(help="Rounds: engine, service unary, service streamed.")] = 20,
    api_key: ApiKey = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a service adds to its engine for a single client. Rounds alternate between both."""
    with command_errors():
        from loadtest.load import Load, Mix
        from loadtest.scenarios import overhead as scenario

        options.require_at_least(1, repeat=repeat)
        tokens = Mix((max_tokens,), (1.0,))
        single = Load(server, tokens, 1, duration_s=duration, warmup_s=warmup, api_key=api_key)

        def measure() -> dict[str, Any]:
            return scenario.measure(single, model, repeat, quiet or as_json)

        _run_scenario("overhead", single, measure, scenario.show, output, as_json, quiet)


def _run_scenario(
    label: str,
    load: Load,
    measure: Callable[[], dict[str, Any]],
    show: Callable[[Mapping[str, Any], PlainConsole], None],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the output and the service, measure, and hand over a result with the runs of the scenario."""
    from loadtest.measured_server import facts
    from loadtest.results import result_file

    if output:
        result_file.check_output(output)
    service = facts(load)
    measured = measure()
    result = {**measured, **result_file.assemble(measured["runs"], label, service)}
    _hand_over(result, show, output, as_json, quiet)


def _hand_over(
    result: Mapping[str, Any],
    show: Callable[[Mapping[str, Any], PlainConsole], None],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from loadtest.results import result_file

    options.hand_over(result, result_file.write, show, output, as_json, quiet)
