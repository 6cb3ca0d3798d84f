"""What the command lines of the load test and of its benchmarks share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tinylm.terminal.output import PlainConsole, one_line_errors

PACKAGES = {"hdrhistogram": "hdrh", **{name: name for name in ("psutil", "matplotlib", "scipy", "jinja2", "aiohttp")}}
INSTALL = "pip install -e '.[bench]'"

Server = Annotated[str, typer.Option("--server", "-s", metavar="ADDRESS", help="HOST:PORT of a running service.")]
ApiKey = Annotated[
    Optional[str],
    typer.Option(
        envvar="TINYLM_API_KEY", show_envvar=True, help="Sent as `authorization: Bearer KEY`; no result contains it."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of each answer.")]
Duration = Annotated[float, typer.Option(help="Measured seconds of each run.")]
Warmup = Annotated[float, typer.Option(help="Seconds before the measured time of each run.")]
Processes = Annotated[
    Optional[int], typer.Option(help="Processes of the load generator. Default: 1, and more if one is too busy.")
]
Output = Annotated[
    Optional[Path],
    typer.Option(
        "--output", "-o", metavar="FILE.json", help="Write the result as JSON, and that of runs as CSV beside it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no live view and no table.")]


@contextmanager
def command_errors() -> Iterator[None]:
    """Run a command: see `tinylm.terminal.output.one_line_errors`. Raises ValueError if packages are missing."""
    with one_line_errors(ValueError, RuntimeError):
        missing = [package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"the load test needs {', '.join(missing)}: {INSTALL}")
        yield


def integers(option: str, text: str) -> list[int]:
    """Return the whole numbers of `1,2,4`. Raises ValueError that names the option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: it must be whole numbers separated by commas") from None


def decimals(option: str, text: str) -> list[float]:
    """Return the numbers of `1.1,2`. Raises ValueError that names the option."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: it must be numbers separated by commas") from None


def require_at_least(least: float, **options: float | None) -> None:
    """Raise ValueError if one of the options is given and below the limit, infinite or not a number."""
    for name, value in options.items():
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name} is {value}: it must be at least {least} and finite")


def hand_over(
    result: Mapping[str, Any],
    write: Callable[[Path, Mapping[str, Any]], None],
    show: Callable[[Mapping[str, Any], PlainConsole], None],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a result to `--output`, and print it as JSON or as `show` does, unless `--quiet` forbids it."""
    if output:
        write(output, result)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif not quiet:
        show(result, PlainConsole())
