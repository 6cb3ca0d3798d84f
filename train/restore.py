"""A released model as a checkpoint of its run, for going on when the run's own checkpoints are gone.

Steps, tokens, time, seed, optimizer and text are those of its `evaluation.json`, the weights those that it was released
with, so in int8. The optimizers begin anew. Everything that a checkpoint is held against, `train.state` checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch.optim.swa_utils import AveragedModel

from tinylm.weights import TOKENIZER
from train.config import ConfigError, Phase, TrainConfig
from train.data import TokenData
from train.files import file_sha256
from train.loop import make_optimizers, total_steps
from train.model import released_model


class Record(BaseModel):
    """What `evaluation.json` says of the run that a model is from."""

    step: int
    tokens_seen: int
    tokens_by_collection: dict[str, int]
    training_wall_s: float
    training_machine: str
    seed: int
    optimizer: str
    phases: list[Phase] | None = None  # a model of an earlier TinyLM doesn't say
    text_sha256: str
    taught_by: dict[str, str] = {}  # names of models by the sha256 of the file with their weights
    told_by: dict[str, str] = {}  # the same of those that told stories
    averaged_with: dict[str, str] = {}  # and of those whose weights are in these


def read_record(directory: Path, key: str) -> Record:
    """Raises ConfigError, naming the setting `key`, when a model has none."""
    path = directory / "evaluation.json"
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: {path} is not the record of a run: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise ConfigError(f"{key}: {path} is not the record of a run: {where}: {first['msg']}") from None


def restored_state(directory: Path, config: TrainConfig, data: TokenData) -> dict[str, Any]:
    """What `train.loop` saved, as far as `directory` knows it: a model of `train.export`.

    Raises ModelError when it is damaged, and ConfigError when it has another tokenizer, another shape, no record of its
    run, or has come to the run's end.
    """
    model = released_model(directory)
    if (shape := model.config) != config.model_config_:
        raise ConfigError(f"run.restore: {directory} is a model of another shape than the config's")
    if file_sha256(directory / TOKENIZER) != data.tokenizer_sha256:
        raise ConfigError(
            f"run.restore: the tokens were not made with {directory / TOKENIZER}: "
            f"copy it to {config.tokenizer_path} and run `python -m train.encode` again"
        )
    record = read_record(directory, "run.restore")
    step, tokens = record.step, record.tokens_seen
    if tokens != step * config.run.batch_rows * shape.context:
        raise ConfigError(
            f"run.batch_rows is {config.run.batch_rows}, but {directory} saw its {tokens:,} tokens in {step:,} steps"
        )
    if step >= total_steps(config.run, shape):
        raise ConfigError(
            f"run.tokens is {config.run.tokens:,}, but {directory} has seen {tokens:,} already: give more to go on"
        )
    settings = config.model_dump(mode="json")
    settings["seed"], settings["run"]["optimizer"] = record.seed, record.optimizer
    if record.phases is not None:
        settings["run"]["phases"] = [phase.model_dump(mode="json") for phase in record.phases]
    averaged = AveragedModel(model)
    averaged.n_averaged.fill_(step)
    return {
        "step": step,
        "begun_at": step,
        "wall_s": record.training_wall_s,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in make_optimizers(model, config.run)],
        "machine": record.training_machine,
        "taught_by": record.taught_by,
        "told_by": record.told_by,
        "averaged_with": record.averaged_with,
        "tokenizer_sha256": data.tokenizer_sha256,
        "text_sha256": record.text_sha256,
        "tokens_by_collection": {name: record.tokens_by_collection.get(name, 0) for name in data.mixture.names},
        "config": settings,
    }
