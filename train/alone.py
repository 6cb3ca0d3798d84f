"""The training run in this process, without Ray: on a GPU if there is one.

    python -m train.alone [--config configs/train.yaml] [KEY=VALUE ...]

It reads what `train.run` reads, sees the same rows, and leaves the same record; what `run` says of workers and threads
doesn't count. Started again, it goes on from `<workdir>/runs/<name>/state.pt`. A run belongs to the
command that began it.
"""

from __future__ import annotations

import io

import torch

from tinylm.system.files import write_file
from tinylm.terminal.output import say
from train.config import ConfigError, TrainConfig
from train.core.checkpoint import CHECKPOINT_FILE, Checkpoint, has_checkpoints
from train.core.loop import check_fits, train
from train.core.record import followed, recorded
from train.core.schedule import total_steps
from train.stage import load_tokenizer, load_tokens, run_stage


def run_alone(config: TrainConfig) -> None:
    """Run the stage to its end, or go on with it."""
    data, tokenizer = load_tokens(config), load_tokenizer(config)
    if has_checkpoints(config):
        raise ConfigError(f"{config.run_dir} is a run of `python -m train.run`: go on with that, or use another name")
    path = config.run_dir / CHECKPOINT_FILE
    before = Checkpoint.load(path) if path.exists() else None
    check_fits(config, data, 1)
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
    say(f"{path}: step {max(first_step, total_steps(config.run, config.shape))}")


if __name__ == "__main__":
    run_stage(__doc__, run_alone)
