"""What a shell completes after `tinylm`'s options. How it asks is Typer's business (`tinylm --install-completion`)."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tinylm.kernels import KernelName, Precision


def kernels(incomplete: str) -> list[str]:
    return [name for name in get_args(KernelName) if name.startswith(incomplete)]


def precisions(incomplete: str) -> list[str]:
    return [name for name in get_args(Precision) if name.startswith(incomplete)]


def model_directories(incomplete: str) -> list[str]:
    """Model directories under what has been typed, and the directories on the way to others; `models/*` at first."""
    begun = Path(incomplete)
    parent = begun if incomplete.endswith("/") else begun.parent
    places = [Path("models"), Path()] if not incomplete else [parent]
    found = []
    for directory in (d for place in places if place.is_dir() for d in sorted(place.iterdir())):
        if not directory.is_dir() or directory.name.startswith(".") or not str(directory).startswith(incomplete):
            continue
        if (directory / "config.json").exists():
            found.append(str(directory))
        elif incomplete:
            found.append(f"{directory}/")
    return found
