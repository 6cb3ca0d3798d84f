"""The training run in this process, without Ray: on a GPU if there is one.

    python -m train.alone [--config configs/train.yaml] [KEY=VALUE ...]

It reads what `train.run` reads, sees the same rows, and leaves the same record; what `run` says of workers and threads
doesn't count. Started again, it goes on from `<workdir>/runs/<name>/state.pt`. A run belongs to the
command that began it.
"""

from __future__ import annotations

from typing import Any

import torch

from train.config import ConfigError, TrainConfig
from train.loop import check_fits, total_steps, train
from train.record import followed, recorded
from train.stage import load_tokenizer, load_tokens, run_stage
from train.state import STATE_FILE, check_continues, has_checkpoints, load_state


def run_alone(config: TrainConfig) -> None:
    """Run the stage to its end, or go on with it."""
    data, tokenizer = load_tokens(config), load_tokenizer(config)
    if has_checkpoints(config):
        raise ConfigError(f"{config.run_dir} is a run of `python -m train.run`: go on with that, or use another name")
    path = config.run_dir / STATE_FILE
    state = load_state(path) if path.exists() else None
    check_fits(config, data, 1)
    if state is not None:
        check_continues(state, config, data)
    config.run_dir.mkdir(parents=True, exist_ok=True)

    def save(values: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        torch.save(values, partial)
        partial.replace(path)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun_at = state["step"] if state else 0
    with recorded(config, begun_at) as log, followed(config):
        try:
            train(config, data, tokenizer, log, save, state, device)
        except torch.OutOfMemoryError:
            raise ConfigError(f"run.micro_rows is {config.run.micro_rows}: too many for the GPU's memory") from None
    print(f"{path}: step {max(begun_at, total_steps(config.run, config.model_config_))}")


if __name__ == "__main__":
    run_stage(__doc__, run_alone)
