"""A released model as a checkpoint of its run, for going on when the run's own checkpoints are gone.

Steps, tokens and time are those of its `evaluation.json`, the weights those that it was released with, so in int8. The
optimizers begin anew. Everything that a checkpoint is held against, `train.loop` checks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from tinylm.weights import as_float32, load_model
from train.config import ConfigError, TrainConfig
from train.data import TokenData
from train.loop import make_optimizers, total_steps
from train.model import GPT
from train.stage import file_sha256


def restored_state(directory: Path, config: TrainConfig, data: TokenData) -> dict[str, Any]:
    """What `train.loop` saved, as far as `directory` knows it: a model of `train.export`.

    Raises ModelError when it is damaged, and ConfigError when it has another tokenizer, another shape, no record of its
    run, or has come to the run's end.
    """
    shape, tensors = load_model(directory)
    if shape != config.model_config_:
        raise ConfigError(f"run.restore: {directory} is a model of another shape than the config's")
    if file_sha256(directory / "tokenizer.model") != data.tokenizer_sha256:
        raise ConfigError(
            f"run.restore: the tokens were not made with {directory / 'tokenizer.model'}: "
            f"copy it to {config.tokenizer_path} and run `python -m train.encode` again"
        )
    path = directory / "evaluation.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        step, tokens, wall_s, machine, seen = (
            record[key]
            for key in ("step", "tokens_seen", "training_wall_s", "training_machine", "tokens_by_collection")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"run.restore: {path} is not the record of a run: {error!r}") from None
    if tokens != step * config.run.batch_rows * shape.context:
        raise ConfigError(
            f"run.batch_rows is {config.run.batch_rows}, but {directory} saw its {tokens:,} tokens in {step:,} steps"
        )
    if step >= total_steps(config.run, shape):
        raise ConfigError(
            f"run.tokens is {config.run.tokens:,}, but {directory} has seen {tokens:,} already: give more to go on"
        )
    model = GPT(shape)
    model.load_state_dict({name: torch.from_numpy(as_float32(tensor).copy()) for name, tensor in tensors.items()})
    return {
        "step": step,
        "begun_at": step,
        "wall_s": wall_s,
        "model": model.state_dict(),
        "averaged": AveragedModel(model).state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in make_optimizers(model, config.run)],
        "machine": machine,
        "tokenizer_sha256": data.tokenizer_sha256,
        "text_sha256": data.text_sha256,
        "tokens_by_collection": {name: seen.get(name, 0) for name in data.mixture.names},
        "config": config.model_dump(mode="json"),
    }
