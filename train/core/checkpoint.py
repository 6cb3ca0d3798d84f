"""What a run starts from: its last checkpoint, or a released model that it fine-tunes."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tinylm.weights import TENSORS, TOKENIZER, as_float32, load_model
from train.config import ConfigError, TrainConfig, require
from train.core.model import GPT
from train.data.tokens import TokenData, file_sha256

CHECKPOINT_FILE = "state.pt"  # in one of Ray Train's checkpoints, or in the directory of a run of `train.alone`


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step."""

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
        torch.save({**vars(self), "config": self.config.model_dump(mode="json")}, file)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU; raise ConfigError when the file holds something else."""
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
        for what, is_same in (
            ("with another tokenizer", self.tokenizer_sha256 == data.tokenizer_sha256),
            ("on other text", self.text_sha256 == data.text_sha256),
            ("with another model", self.config.shape == config.shape),
        ):
            if not is_same:
                raise ConfigError(f"the checkpoint was trained {what}: remove the run's directory to start again")

    def check_resumes(self, config: TrainConfig, data: TokenData) -> None:
        """Raise ConfigError when a run with this config and data would skip or repeat rows after the checkpoint.

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
    """Return the last checkpoint of `train.alone` or `train.run`; raise ConfigError when there is none."""
    require(config.run_dir, "train.run")
    if (alone := config.run_dir / CHECKPOINT_FILE).exists():
        return Checkpoint.load(alone)
    checkpoint = None
    if has_checkpoints(config):
        from ray.train import Result

        logging.getLogger("ray.train").setLevel(logging.WARNING)  # Ray tells how to resume a run
        with suppress(RuntimeError):  # Ray has no record of a run there
            checkpoint = Result.from_path(str(config.run_dir.resolve())).checkpoint
    if checkpoint is None:
        raise ConfigError(f"{config.run_dir} holds no checkpoint: run `python -m train.run` first")
    with checkpoint.as_directory() as directory:
        return Checkpoint.load(Path(directory) / CHECKPOINT_FILE)


def load_start(directory: Path, config: TrainConfig, data: TokenData) -> tuple[GPT, str]:
    """Return the released model that fine-tuning starts from, and its name with the sum of its weights.

    Raises ModelError when the directory holds no complete model, and ConfigError when its shape or its tokenizer
    differs from the config's.
    """
    shape, tensors = load_model(directory)
    if shape != config.shape:
        raise ConfigError(f"start_from: {directory} has another shape than the config: set model to {shape}")
    if file_sha256(directory / TOKENIZER) != data.tokenizer_sha256:
        raise ConfigError(
            f"start_from: the tokens were not made with the tokenizer of {directory}: "
            f"run `python -m train.tokenizer` and `python -m train.encode` again"
        )
    model = GPT(shape)
    model.load_state_dict({name: torch.from_numpy(as_float32(tensor).copy()) for name, tensor in tensors.items()})
    return model, f"{directory.resolve().name} (sha256 {file_sha256(directory / TENSORS)[:12]})"
