"""The values that a shell completes after the options of `tinylm`. Typer talks to the shell."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tinylm.kernels import KernelName, Precision


def kernels(incomplete: str) -> list[str]:
    return [name for name in get_args(KernelName) if name.startswith(incomplete)]


def precisions(incomplete: str) -> list[str]:
    return [name for name in get_args(Precision) if name.startswith(incomplete)]


def model_directories(incomplete: str) -> list[str]:
    """Return the model directories and other directories that begin with `incomplete`.

    Without any text, return the model directories in `models` and in the current directory.
    """
    places = [Path(f"{incomplete}x").parent] if incomplete else [Path("models"), Path()]
    found = []
    for place in places:
        for directory in sorted(place.glob("[!.]*/")):
            if (directory / "config.json").exists():
                found.append(str(directory))
            elif incomplete:
                found.append(f"{directory}/")
    return [name for name in found if name.startswith(incomplete)]
