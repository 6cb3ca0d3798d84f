"""The training run under Ray Train: workers, checkpoints, resuming, metrics, the curve.

    python -m train.run [--config configs/train.yaml] [KEY=VALUE ...]

Started again after being killed, at any moment, it goes on from the last checkpoint in `<workdir>/runs/<name>`; give
`run.tokens=...` more to go on further. Writes `metrics.jsonl` (one line a log or validation) and `curve.png` there.
The loop itself is `train.core.loop`, the rows are `train.data`.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tinylm.terminal.output import say
from train.config import ConfigError, TrainConfig
from train.core.checkpoint import CHECKPOINT_FILE, Checkpoint, has_checkpoints, last_checkpoint
from train.core.loop import check_fits
from train.core.record import followed, recorded
from train.core.start_from import load_start
from train.stage import load_tokenizer, load_tokens, run_stage, start_ray

MAX_FAILURES = 3  # of workers, before the run fails
KEPT_CHECKPOINTS = 2
RAY_RECORD = "checkpoint_manager_snapshot.json"  # where Ray Train keeps which checkpoints there are
# glibc gives freed memory back to the kernel and takes it anew at every step, unless told otherwise: on machines where
# fresh pages are slow to come, that takes longer than the arithmetic.
KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "33554432000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import torch

    from train.core.loop import train

    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.run.threads)
    tokenizer, data = load_tokenizer(config), load_tokens(config)
    before = None
    if stored := ray.train.get_checkpoint():
        with stored.as_directory() as directory:
            before = Checkpoint.load(Path(directory) / CHECKPOINT_FILE)
    leader = ray.train.get_context().get_world_rank() == 0

    def save(checkpoint: Checkpoint) -> None:
        if not leader:
            ray.train.report({"step": checkpoint.step})
            return
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save(Path(directory) / CHECKPOINT_FILE)
            ray.train.report({"step": checkpoint.step}, checkpoint=ray.train.Checkpoint.from_directory(directory))

    first_step = before.step if before else 0
    with recorded(config, first_step) if leader else nullcontext(print) as log:  # only the leader's loop logs
        train(config, data, tokenizer, log, save, before)


def run(config: TrainConfig) -> None:
    """Run the stage to its end, or go on with it."""
    data = load_tokens(config)
    load_tokenizer(config)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = config.resolved()
    if (config.run_dir / CHECKPOINT_FILE).exists():
        raise ConfigError(f"{config.run_dir} is a run of `python -m train.alone`: go on with that, or use another name")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # Errors of the settings belong here, not in a worker that Ray would start again.
    check_fits(config, data, config.run.workers)
    if (config.run_dir / RAY_RECORD).exists():
        if not has_checkpoints(config):
            raise ConfigError(f"the checkpoints of {config.run_dir} are gone: remove that directory to begin anew")
        last_checkpoint(config).check_resumes(config, data)
    elif config.start_from:
        load_start(config.start_from, config, data)
    start_ray(env_vars=KEEP_FREED_MEMORY)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config.model_dump(mode="json"),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.run.workers, use_gpu=False, resources_per_worker={"CPU": _cpus_a_worker(config)}
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.runs_dir),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )
    try:
        with followed(config):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        cause = next(iter(causes.values()), error)
        cause = getattr(cause, "_base_exc", cause)  # without the worker's traceback
        raise ConfigError(f"training failed: {cause}") from error
    say(f"{result.checkpoint.path if result.checkpoint else config.run_dir}: step {(result.metrics or {}).get('step')}")


def _cpus_a_worker(config: TrainConfig) -> float:
    """What to reserve of Ray's CPUs: the threads asked for, but never so many that the run could not be placed."""
    import ray

    available = ray.cluster_resources().get("CPU", 1.0)
    return max(0.1, min(float(config.run.threads), (available - 0.5) / config.run.workers))


if __name__ == "__main__":
    run_stage(__doc__, run)
