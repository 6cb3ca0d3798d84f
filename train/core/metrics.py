"""The metrics file of a run: a line of JSON each log or validation, written while it trains.

A run that is killed leaves lines of steps after its last checkpoint, and perhaps one cut off in the middle: both are
left out here. What the lines hold is `train.core.loop`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinylm.system.files import write_file
from tinylm.system.text_files import lines_of


def read_metrics(path: Path, up_to_step: float = float("inf")) -> list[dict[str, Any]]:
    """The whole lines of the steps so far, in their order; none when there is no such file."""
    lines = []
    for line in lines_of(path.read_text(encoding="utf-8")) if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off as the run was killed
            continue
    return [values for values in lines if values["step"] <= up_to_step]


def metrics_text(lines: Iterable[dict[str, Any]]) -> str:
    """The file that holds these lines."""
    return "".join(json.dumps(values) + "\n" for values in lines)


def write_metrics(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace the file of a run by these lines."""
    write_file(path, metrics_text(lines))


def is_of_a_run(content: bytes) -> bool:
    """Return whether these are lines of `train.loop`. A run that was killed may leave half a line and nothing else."""
    first, newline, _ = content.partition(b"\n")
    return not content or (first.startswith(b'{"step"') and (b'"tokens"' in first or not newline))
