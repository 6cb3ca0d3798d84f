"""The checkpoint of a run: all that resuming it needs, and the checks against the config and the data of today."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from train.config import ConfigError, TrainConfig
from train.data.tokens import TokenData
from train.stage import require

CHECKPOINT_FILE = "state.pt"  # in one of Ray Train's checkpoints, or in the directory of a run of `train.alone`


@dataclass(frozen=True)
class Checkpoint:
    """A run after a step."""

    step: int
    wall_s: float  # training time so far
    machine: str  # where it trained; several are joined by ", then "
    started_from: str  # name of the released model that it fine-tunes, or ""
    model: dict[str, Tensor]
    averaged: dict[str, Tensor]  # as torch.optim.swa_utils.AveragedModel stores it
    optimizers: list[dict[str, Any]]  # state dicts
    tokens_by_collection: dict[str, int]  # trained on so far
    tokenizer_sha256: str
    text_sha256: str
    config: TrainConfig

    def save(self, file: Path | BinaryIO) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        torch.save({**values, "config": self.config.model_dump(mode="json")}, file)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU; raises ConfigError when the file holds something else."""
        try:
            values = torch.load(path, weights_only=True, map_location="cpu")
            return cls(**{**values, "config": TrainConfig.model_validate(values["config"])})
        except (EOFError, KeyError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
            reason = str(error).split("\n")[0]
            raise ConfigError(f"{path} is not a checkpoint of this version: {type(error).__name__}: {reason}") from None

    def weights(self) -> dict[str, np.ndarray]:
        """Return the running average of the weights, float32 by name."""
        prefix = "module."
        return {
            name.removeprefix(prefix): tensor.float().numpy()
            for name, tensor in self.averaged.items()
            if name.startswith(prefix)
        }

    def check_same_data(self, config: TrainConfig, data: TokenData) -> None:
        """Raise ConfigError when the checkpoint belongs to another tokenizer, other text or another shape."""
        for what, same in (
            ("with another tokenizer", self.tokenizer_sha256 == data.tokenizer_sha256),
            ("on other text", self.text_sha256 == data.text_sha256),
            ("with another model", self.config.shape == config.shape),
        ):
            if not same:
                raise ConfigError(f"the checkpoint was trained {what}: remove the run's directory to start again")

    def check_resumes(self, config: TrainConfig, data: TokenData) -> None:
        """Raise ConfigError when a run with this config and data would not see the rows that follow the checkpoint's.

        Learning rates, schedule and dropout may change.
        """
        self.check_same_data(config, data)
        before = self.config
        for key, saved, value in (
            ("run.batch_rows", before.run.batch_rows, config.run.batch_rows),
            ("seed", before.seed, config.seed),
            ("prepare.collections, weight", before.weights, config.weights),
        ):
            if value != saved:
                raise ConfigError(f"{key} is {value!r}, but the checkpoint was trained with {saved!r}")


def has_checkpoints(config: TrainConfig) -> bool:
    """Return whether the run's directory holds checkpoints of Ray Train."""
    return any(config.run_dir.glob(f"checkpoint_*/{CHECKPOINT_FILE}"))


def last_checkpoint(config: TrainConfig) -> Checkpoint:
    """Return the last checkpoint of `train.alone` or `train.run`; raises ConfigError when there is none."""
    require(config.run_dir, "train.run")
    if (alone := config.run_dir / CHECKPOINT_FILE).exists():
        return Checkpoint.load(alone)
    none = ConfigError(f"{config.run_dir} holds no checkpoint: run `python -m train.run` first")
    if not has_checkpoints(config):
        raise none
    from ray.train import Result

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # Ray writes notes for those who resume a run
    try:
        checkpoint = Result.from_path(str(config.run_dir.resolve())).checkpoint
    except RuntimeError:  # the directory holds no run
        checkpoint = None
    if checkpoint is None:
        raise none
    with checkpoint.as_directory() as directory:
        return Checkpoint.load(Path(directory) / CHECKPOINT_FILE)
