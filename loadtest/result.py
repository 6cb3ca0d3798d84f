"""Result files: JSON with everything, CSV with one row a run. A file is a sweep against one service."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.table import load_name
from tinylm.machine import describe

FORMAT = "tinylm-loadtest-2"
SECRET_OPTIONS = ("--api-key",)


def assemble(
    runs: list[dict], label: str, replicas: int | None, service: dict | None, series: str = ""
) -> dict[str, Any]:
    """A result as it is written.

    replicas: how many the service had, those seen if None. series: results of one series that differ in their number of
    replicas make one line of a picture.
    """
    seen = max((len(run["replicas"]) for run in runs), default=0)
    return {
        "format": FORMAT,
        "label": label,
        "series": series,
        "command": own_command(sys.argv[1:]),
        **describe(),
        "service": service,
        "replicas": replicas or seen,
        "runs": runs,
    }


def own_command(arguments: list[str]) -> str:
    """The command line, without its secrets."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        shown.append("***" if hide else f"{name}=***" if name in SECRET_OPTIONS and equals else argument)
        hide = argument in SECRET_OPTIONS
    return shlex.join(["python", "-m", "loadtest", *shown])


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON, and beside it a CSV of the same name; each is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(result, indent=1) + "\n")
    rows = [row(run) for run in result["runs"]]
    columns = list(dict.fromkeys(name for one in rows for name in one))
    temporary = path.with_suffix(".csv.part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path.with_suffix(".csv"))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file is none of ours, or of another format."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else None
        raise ValueError(f"{path} is no result of `python -m loadtest`: its format is {found!r}, it must be {FORMAT!r}")
    if not result["runs"]:
        raise ValueError(f"{path} holds no run")
    return result


def point(run: Mapping[str, Any]) -> str:
    """The load of a run, less what may differ between two services: runs of one point can be compared."""
    load = run["load"]
    how = load_name(run) + (f" {load['arrivals']}" if load["rate_per_s"] else "")
    kind = "stream" if load["stream"] else "unary"
    prompts = f", prompts {load['prompt_words']} words" if load["prompt_words"] else ""
    return f"{kind}, {how}, {load['max_tokens']} tokens{prompts}"


def row(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run in one flat row."""
    load = run["load"]
    flat: dict[str, Any] = {
        name: load[name]
        for name in ("server", "protocol", "stream", "concurrency", "rate_per_s", "arrivals", "max_tokens")
    }
    flat |= {"repeat": run["repeat"], "errors": run["requests"] - run["statuses"].get("OK", 0)}
    for name, value in run.items():
        if name in ("load", "histograms", "statuses", "replicas", "repeat"):
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items() if isinstance(inner, int | float | str)}
        else:
            flat[name] = value
    flat["statuses"] = " ".join(f"{status}:{count}" for status, count in run["statuses"].items())
    flat["replicas"] = len(run["replicas"])
    return flat
