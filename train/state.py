"""What a run saves to go on from: its file, the weights in it, whether it is of the config and data of today.

`train.loop` makes it, `train.run` and `train.alone` keep it, `train.restore` makes up one from a released model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinylm.config import ModelConfig
from train.config import ConfigError, TrainConfig
from train.data import TokenData

STATE_FILE = "state.pt"  # in one of Ray Train's checkpoints, or in the directory of a run without Ray


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

    The learning rates, the schedule, dropout, the teachers and the mixture from here on may change.
    """
    check_state(state, config, data)
    if "begun_at" not in state:
        raise ConfigError("the checkpoint is of an earlier TinyLM, with other rows: remove the run's directory")
    before = state["config"]
    for key, saved, value in (
        ("run.optimizer", before["run"]["optimizer"], config.run.optimizer),
        ("run.batch_rows", before["run"]["batch_rows"], config.run.batch_rows),
        ("seed", before["seed"], config.seed),
    ):
        if value != saved:
            raise ConfigError(f"{key} is {value!r}, but the checkpoint was trained with {saved!r}")
    rows = state["step"] * config.run.batch_rows
    tokens = rows * config.model_config_.context
    if _seen(state["tokens_by_collection"]) != _seen(data.mixture.tokens(rows)) or _lengths(before, tokens) != _lengths(
        config.model_dump(mode="json"), tokens
    ):
        raise ConfigError(
            f"run.phases and the collections' weights are not the mixture that the checkpoint saw in its "
            f"{tokens:,} tokens: change it from there on, by one more phase"
        )


def _seen(tokens: dict[str, int]) -> dict[str, int]:
    """Without the collections of which nothing was seen: one more may have come since."""
    return {name: n for name, n in tokens.items() if n}


def _lengths(config: dict[str, Any], tokens: int) -> dict[int, dict]:
    """What the phases that begin within so many tokens say of documents' lengths, by where they begin."""
    begun = [phase for phase in config["run"].get("phases", []) if phase["from_tokens"] < tokens]
    return {phase["from_tokens"]: lengths for phase in begun if (lengths := phase.get("lengths"))}
