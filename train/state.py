"""What a run saves to go on from: where the last of it is, the weights in it, whether it is of today's config and data.

`train.loop` makes it, `train.run` and `train.alone` keep it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from tinylm.config import ModelConfig
from train.config import ConfigError, TrainConfig
from train.data import TokenData
from train.stage import require

STATE_FILE = "state.pt"  # in one of Ray Train's checkpoints, or in the directory of a run without Ray


def load_state(path: Path) -> dict[str, Any]:
    """What a run saved in a file, on the CPU; raises ConfigError when it is damaged or something else."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(f"{path} is not what a run saved: {type(error).__name__}: {said}") from None
    if not isinstance(state, dict):
        raise ConfigError(f"{path} is not what a run saved: it holds {type(state).__name__}")
    return state


def has_checkpoints(config: TrainConfig) -> bool:
    """Whether Ray Train has saved states of the run, and they are still there."""
    return any(config.run_dir.glob(f"checkpoint_*/{STATE_FILE}"))


def last_state(config: TrainConfig) -> dict[str, Any]:
    """What the run saved last, with Ray or without; raises ConfigError when there is nothing."""
    require(config.run_dir, "train.run")
    if (alone := config.run_dir / STATE_FILE).exists():
        return load_state(alone)
    if not has_checkpoints(config):
        raise ConfigError(f"{config.run_dir} holds no checkpoint: run `python -m train.run` first")
    from ray.train import Result

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells those who resume what a reader needn't know
    try:
        checkpoint = Result.from_path(str(config.run_dir.resolve())).checkpoint
    except RuntimeError:  # Ray's word for a directory without a run in it
        checkpoint = None
    if checkpoint is None:
        raise ConfigError(f"{config.run_dir} holds no checkpoint: run `python -m train.run` first")
    with checkpoint.as_directory() as directory:
        return load_state(Path(directory) / STATE_FILE)


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The running average of the weights, float32 by name."""
    prefix = "module."
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in state["averaged"].items()
        if name.startswith(prefix)
    }


def check_state(state: dict[str, Any], config: TrainConfig, data: TokenData) -> None:
    """Raise ConfigError when a checkpoint is of another tokenizer, other text or another shape of the model."""
    for what, same in (
        ("with another tokenizer", state["tokenizer_sha256"] == data.tokenizer_sha256),
        ("on other text", state["text_sha256"] == data.text_sha256),
        ("with another model", ModelConfig(**state["config"]["model"]) == config.model_config_),
    ):
        if not same:
            raise ConfigError(f"the checkpoint was trained {what}: remove the run's directory to begin anew")


def check_continues(state: dict[str, Any], config: TrainConfig, data: TokenData) -> None:
    """Raise ConfigError when a run can't go on from a checkpoint: its next rows and steps would not be those after it.

    The learning rates, the schedule and dropout may change.
    """
    check_state(state, config, data)
    before = TrainConfig.model_validate(state["config"])
    for key, saved, value in (
        ("run.batch_rows", before.run.batch_rows, config.run.batch_rows),
        ("seed", before.seed, config.seed),
        ("prepare.collections, weight", before.weights, config.weights),
    ):
        if value != saved:
            raise ConfigError(f"{key} is {value!r}, but the checkpoint was trained with {saved!r}")
