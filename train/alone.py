"""Train in this process, without Ray: on a GPU if there is one.

    python -m train.alone [--config configs/train.yaml] [KEY=VALUE ...]

It reads the same files as `train.run`, trains on the same rows, and writes the same metrics. It ignores `run.workers`
and `run.threads`. The same command resumes a run from `<workdir>/runs/<name>/state.pt`. `train.run` cannot resume it.
"""

from __future__ import annotations

import io

import torch

from tinylm.system.files import write_file
from tinylm.terminal.output import say
from train.config import ConfigError, TrainConfig, run_stage
from train.core.checkpoint import CHECKPOINT_FILE, Checkpoint, has_checkpoints
from train.core.loop import check_fits, train
from train.core.record import followed, recorded
from train.data.tokens import load_tokenizer, load_tokens


def run_alone(config: TrainConfig) -> None:
    """Start the run, or resume it, and train to its end."""
    data, tokenizer = load_tokens(config), load_tokenizer(config)
    if has_checkpoints(config):
        raise ConfigError(
            f"{config.run_dir} is a run of `python -m train.run`: resume it with that command, or use another name"
        )
    path = config.run_dir / CHECKPOINT_FILE
    before = Checkpoint.load(path) if path.exists() else None
    check_fits(config, data, world=1)
    if before is not None:
        before.check_resumes(config, data)
    config.run_dir.mkdir(parents=True, exist_ok=True)

    def save(checkpoint: Checkpoint) -> None:
        buffer = io.BytesIO()
        checkpoint.save(buffer)
        write_file(path, buffer.getbuffer())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    first_step = before.step if before else 0
    with recorded(config, first_step) as log, followed(config):
        try:
            train(config, data, tokenizer, log, save, before, device)
        except torch.OutOfMemoryError:
            raise ConfigError(f"run.micro_rows is {config.run.micro_rows}: too many for the GPU's memory") from None
    say(f"{path}: step {max(first_step, config.steps)}")


if __name__ == "__main__":
    run_stage(__doc__, run_alone)
