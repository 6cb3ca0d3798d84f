"""The training run in this process, without Ray: on a GPU if there is one.

    python -m train.alone [--config configs/train.yaml] [KEY=VALUE ...]

It reads what `train.run` reads, sees the same rows, and leaves the same record; `run.workers` and `run.threads` don't
count. Started again, it goes on from `<workdir>/runs/<name>/state.pt`. A run belongs to the command that began it.
"""

from __future__ import annotations

from typing import Any

import torch

from train.config import ConfigError, TrainConfig
from train.loop import train
from train.record import followed, recorded
from train.restore import restored_state
from train.run import STATE_FILE, has_checkpoints
from train.stage import load_tokenizer, load_tokens, run_stage


def run_alone(config: TrainConfig) -> None:
    """Run the stage to its end, or go on with it."""
    data, tokenizer = load_tokens(config), load_tokenizer(config)
    if has_checkpoints(config):
        raise ConfigError(f"{config.run_dir} is a run of `python -m train.run`: go on with that, or use another name")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    path = config.run_dir / STATE_FILE
    state = None
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
    elif config.run.restore:
        state = restored_state(config.run.restore, config, data)

    def save(values: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        torch.save(values, partial)
        partial.replace(path)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with recorded(config, state["step"] if state else 0) as log, followed(config):
        train(config, data, tokenizer, log, save, state, device)
    print(f"{path}: step {torch.load(path, weights_only=True, map_location='cpu')['step']}")


if __name__ == "__main__":
    run_stage(__doc__, run_alone)
