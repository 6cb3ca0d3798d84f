"""Train with Ray Train: workers, checkpoints, resuming, metrics and the loss curve.

    python -m train.run [--config configs/train.yaml] [KEY=VALUE ...]

The same command resumes a killed run from its last checkpoint in `<workdir>/runs/<name>`. A larger `run.tokens`
continues a finished run. The directory also holds `metrics.jsonl` (one line per log or validation) and `curve.png`.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tinylm.terminal.output import say
from train.config import ConfigError, TrainConfig, run_stage
from train.core.checkpoint import CHECKPOINT_FILE, Checkpoint, has_checkpoints, last_checkpoint, load_start
from train.core.loop import check_fits, train
from train.core.record import followed, recorded
from train.data.tokens import TokenData, load_tokenizer, load_tokens

MAX_FAILURES = 3  # of workers, before the run fails
KEPT_CHECKPOINTS = 2
RAY_RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints
# By default glibc returns freed memory to the kernel and requests it again at every step. On machines where the kernel
# is slow to provide pages, that takes longer than the arithmetic.
KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "33554432000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}


def run(config: TrainConfig) -> None:
    """Start the run, or resume it, and train to its end."""
    data = load_tokens(config)
    load_tokenizer(config)
    import ray
    from ray.train import TrainingFailedError

    config = config.with_absolute_paths()
    _check_can_start(config, data)
    if not ray.is_initialized():
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, runtime_env={"env_vars": KEEP_FREED_MEMORY}
        )
    try:
        with followed(config):
            result = _trainer(config).fit()
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        cause = next(iter(causes.values()), error)
        cause = getattr(cause, "_base_exc", cause)  # without the worker's traceback
        raise ConfigError(f"training failed: {cause}") from error
    say(f"{result.checkpoint.path if result.checkpoint else config.run_dir}: step {(result.metrics or {}).get('step')}")


def _check_can_start(config: TrainConfig, data: TokenData) -> None:
    """Raise ConfigError for wrong settings before Ray starts: Ray would restart a worker that raises it."""
    if (config.run_dir / CHECKPOINT_FILE).exists():
        raise ConfigError(
            f"{config.run_dir} is a run of `python -m train.alone`: resume it with that command, or use another name"
        )
    check_fits(config, data, config.run.workers)
    if (config.run_dir / RAY_RECORD).exists():
        if not has_checkpoints(config):
            raise ConfigError(f"the checkpoints of {config.run_dir} are missing: remove that directory to start again")
        last_checkpoint(config).check_resumes(config, data)
    elif config.start_from:
        load_start(config.start_from, config, data)
    config.run_dir.mkdir(parents=True, exist_ok=True)


def _trainer(config: TrainConfig) -> Any:
    """Return Ray's trainer. It reserves the threads that the config asks for, or what the cluster has."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus = (ray.cluster_resources().get("CPU", 1.0) - 0.5) / config.run.workers
    cpus = max(0.1, min(float(config.run.threads), cpus))
    return TorchTrainer(
        _worker,
        train_loop_config=config.model_dump(mode="json"),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=config.run.workers, use_gpu=False, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.run_dir.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """Train in a Ray Train worker."""
    import ray.train
    import torch

    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.run.threads)
    tokenizer, data = load_tokenizer(config), load_tokens(config)
    before = None
    if stored := ray.train.get_checkpoint():
        with stored.as_directory() as directory:
            before = Checkpoint.load(Path(directory) / CHECKPOINT_FILE)
    is_first = ray.train.get_context().get_world_rank() == 0

    def save(checkpoint: Checkpoint) -> None:
        if not is_first:
            ray.train.report({"step": checkpoint.step})
            return
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save(Path(directory) / CHECKPOINT_FILE)
            ray.train.report({"step": checkpoint.step}, checkpoint=ray.train.Checkpoint.from_directory(directory))

    first_step = before.step if before else 0
    with recorded(config, first_step) if is_first else nullcontext(print) as log:  # other ranks do not log
        train(config, data, tokenizer, log, save, before)


if __name__ == "__main__":
    run_stage(__doc__, run)
