"""What the training commands share around their work: arguments, one-line errors, a progress bar."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import ConfigError, TrainConfig, command_line, load_config


def run_stage(description: str | None, stage: Callable[[TrainConfig], Any]) -> None:
    """Parse the command line, run the stage, and turn what the user can mend into one line and exit status 1."""
    arguments = command_line(description).parse_args()
    try:
        stage(load_config(arguments.config, arguments.overrides))
    except (ConfigError, ModelError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def require(path: Path, made_by: str) -> None:
    """Raise ConfigError, naming the command that makes it, when a stage's input is not there."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `python -m {made_by}` first")


def replace_directory(new: Path, place: Path) -> None:
    """Put `new` where `place` is: two renames, and only then is the old removed."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the work directory; raises ConfigError when it is missing or damaged."""
    require(config.tokenizer_path, "train.tokenizer")
    try:
        return Tokenizer(config.tokenizer_path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def start_ray(env_vars: dict[str, str] | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, else start one of this machine's own: never one found by chance."""
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": env_vars or {}})


def progress(unit: str) -> Progress:
    """A progress bar on standard error: description, bar, count of units, time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
