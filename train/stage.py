"""What the training commands share: arguments, one-line errors, their inputs, Ray, a progress bar."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tinylm.terminal.output import PlainConsole, one_line_errors, printable
from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import ConfigError, TrainConfig, load_config
from train.data.tokens import TokenData
from train.files import file_sha256


def run_stage(description: str | None, stage: Callable[[TrainConfig], Any]) -> None:
    """Parse the command line and run the stage. Print an error that the user can correct as one line."""
    with one_line_errors(ConfigError, ModelError):
        arguments = command_line(description).parse_args()
        stage(load_config(arguments.config, arguments.overrides))


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every stage has: `--config FILE` and `KEY=VALUE ...`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train.yaml"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a setting, as in run.tokens=2e6")
    return parser


def require(path: Path, made_by: str) -> None:
    """Raise ConfigError that names the command to run when a stage's input is missing."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `python -m {made_by}` first")


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """Return the tokenizer of the work directory; raises ConfigError when it is missing or damaged."""
    require(config.tokenizer_path, "train.tokenizer")
    try:
        return Tokenizer(config.tokenizer_path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_tokens(config: TrainConfig) -> TokenData:
    """Return the tokens of the work directory.

    Raises ConfigError when they are missing, or were not made from the tokenizer and the text that are there.
    """
    require(config.index_path, "train.encode")
    data = TokenData.load(config.tokens_dir, config.shape.context, config.seed, config.weights)
    for what, expected, path in (
        ("with another tokenizer", data.tokenizer_sha256, config.tokenizer_path),
        ("from other text", data.text_sha256, config.manifest_path),
    ):
        if path.exists() and file_sha256(path) != expected:
            raise ConfigError(f"{config.tokens_dir} was made {what}: run `python -m train.encode` again")
    return data


def start_ray(env_vars: dict[str, str] | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine."""
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": env_vars or {}})


class _Description(TextColumn):
    """The description of a task, which may hold the name of a collection."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description))


def progress(unit: str) -> Progress:
    """Return a progress bar on standard error."""
    return Progress(
        _Description(""),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=PlainConsole(stderr=True),
    )
