"""Result files: JSON with everything, and CSV with one row per run. A file holds one sweep of one service."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.results.table import load_name
from tinylm.system.files import check_file, check_own, write_file
from tinylm.system.machine import describe

FORMAT_PREFIX = "tinylm-loadtest-"
FORMAT = FORMAT_PREFIX + "2"
SECRET_OPTION = "--api-key"
FIRST_COLUMNS = ("server", "protocol", "stream", "concurrency", "rate_per_s", "arrivals", "max_tokens")  # of the CSV


def assemble(
    runs: list[dict[str, Any]], label: str, service: dict[str, Any] | None, replicas: int | None = None
) -> dict[str, Any]:
    """Return the content of a result file.

    service: its answer to GetModelInfo. replicas: their number; None: count those that answered.
    """
    seen = max((len(run["replicas"]) for run in runs), default=0)
    return {
        "format": FORMAT,
        "label": label,
        "command": own_command(sys.argv[1:]),
        **describe(),
        "service": service,
        "replicas": replicas or seen,
        "runs": runs,
    }


def own_command(arguments: list[str]) -> str:
    """Return the command line without its secrets."""
    shown = ["python", "-m", "loadtest"]
    for i, argument in enumerate(arguments):
        if i and arguments[i - 1] == SECRET_OPTION:
            argument = "***"
        elif argument.startswith(f"{SECRET_OPTION}="):
            argument = f"{SECRET_OPTION}=***"
        shown.append(argument)
    return shlex.join(shown)


def check_output(path: Path, inputs: Mapping[str, Path | None] | None = None, with_csv: bool = True) -> None:
    """Raise ValueError or OSError if a result cannot be written to `--output`. Call it before measuring.

    inputs: the files that the command reads and must not overwrite, by option.
    """
    check_file(path)
    for option, read_from in (inputs or {}).items():
        if read_from and path.exists() and path.samefile(read_from):
            raise ValueError(f"--output is {path}, which {option} reads: choose another name")
    if not _is_special(path):
        if path.suffix != ".json":
            raise ValueError(f"--output is {path}: the name must end in .json, for example {path.with_suffix('.json')}")
        if with_csv:
            _check_csv(path.with_suffix(".csv"))


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON, and a CSV of the same name beside it. A device or a FIFO gets only the JSON."""
    write_json(path, result)
    if _is_special(path):
        return
    _check_csv(path.with_suffix(".csv"))
    rows = [row(run) for run in result["runs"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for one in rows for name in one)))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path.with_suffix(".csv"), text.getvalue())


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(result, indent=1) + "\n")


def check_own_result(path: Path) -> None:
    """Raise OSError if something other than a result is at `path` or at its CSV, or if they cannot be written."""
    check_own(path, lambda content: FORMAT_PREFIX.encode() in content)
    check_file(path)
    _check_csv(path.with_suffix(".csv"))


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _check_csv(path: Path) -> None:
    """Raise OSError if something is at `path` that is not the CSV of a result, or if it cannot be written."""
    check_own(path, lambda content: content.startswith(",".join(FIRST_COLUMNS).encode()))
    check_file(path)


def read(path: Path) -> dict[str, Any]:
    """Return the result in a file. Raises ValueError if the file is not a result of this format."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else None
        raise ValueError(
            f"{path} is not a result of `python -m loadtest`: its format is {found!r}, it must be {FORMAT!r}"
        )
    if not result["runs"]:
        raise ValueError(f"{path} contains no run")
    return result


def point(run: Mapping[str, Any]) -> str:
    """Return a text that is the same for runs with the same load. `compare` compares those runs."""
    load = run["load"]
    how = load_name(run) + (f" {load['arrivals']}" if load["rate_per_s"] else "")
    kind = "stream" if load["stream"] else "unary"
    prompts = f", prompts {load['prompt_words']} words" if load["prompt_words"] else ""
    return f"{kind}, {how}, {load['max_tokens']} tokens{prompts}"


def figure_of(run: Mapping[str, Any], *keys: str) -> Any:
    """Return a figure of a run, such as ("latency_ms", "p50"), or None if the run does not have it."""
    value: Any = run
    for key in keys:
        value = (value or {}).get(key)
    return value


def row(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as a row of the CSV."""
    flat: dict[str, Any] = {name: run["load"][name] for name in FIRST_COLUMNS}
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
