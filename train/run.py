"""The training run under Ray Train: workers, checkpoints, resuming, metrics, the curve.

    python -m train.run [--config configs/train.yaml] [KEY=VALUE ...]

Started again after being killed, at any moment, it goes on from the last checkpoint in `<workdir>/runs/<name>`; give
`run.tokens=...` more to go on further. Without a checkpoint, `run.restore=models/...` goes on from a model that the run
released. Writes `metrics.jsonl` (one line a log or validation) and `curve.png` there.
The loop itself is `train.loop`, the rows are `train.data`.
"""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from train.config import ConfigError, TrainConfig
from train.curve import draw_curve
from train.loop import check_continues, check_fits, total_steps
from train.metrics import METRICS_FILE, metrics_text, read_metrics, truncate_metrics
from train.restore import restored_state
from train.stage import load_tokenizer, load_tokens, progress, run_stage, start_ray

STATE_FILE = "state.pt"
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

    from train.loop import train

    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.run.threads)
    tokenizer, data = load_tokenizer(config), load_tokens(config)
    state = None
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as directory:
            state = torch.load(Path(directory) / STATE_FILE, weights_only=True)
    elif config.run.restore:
        state = restored_state(config.run.restore, config, data)
    leader = ray.train.get_context().get_world_rank() == 0
    metrics, picture = config.metrics_path, config.metrics_path.with_name("curve.png")
    if leader:
        if config.run.restore and not metrics.exists():
            metrics.write_text(metrics_text(read_metrics(config.run.restore / METRICS_FILE)), encoding="utf-8")
        truncate_metrics(metrics, state["step"] if state else 0)

    def log(values: dict[str, Any]) -> None:
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if "val_bpb" in values:
            draw_curve(read_metrics(metrics), picture)

    def save(values: dict[str, Any]) -> None:
        if not leader:
            ray.train.report({"step": values["step"]})
            return
        with tempfile.TemporaryDirectory() as directory:
            torch.save(values, Path(directory) / STATE_FILE)
            ray.train.report({"step": values["step"]}, checkpoint=ray.train.Checkpoint.from_directory(directory))

    try:
        train(config, data, tokenizer, log, save, state)
    finally:
        if leader and metrics.exists():
            draw_curve(read_metrics(metrics), picture)


def _follow(path: Path, config: TrainConfig, done: threading.Event) -> None:
    """Show the run's progress from its metrics file until it is over; each validation is a line of its own."""
    steps = total_steps(config.run, config.model_config_)
    with progress("steps") as bar:
        task = bar.add_task("training", total=steps)
        position = 0
        while True:
            over = done.wait(1.0)
            if path.exists():
                position = min(position, path.stat().st_size)
                with path.open(encoding="utf-8") as file:
                    file.seek(position)
                    lines = file.readlines()
                    position = file.tell()
                for line in lines:
                    try:
                        values = json.loads(line)
                    except ValueError:
                        continue
                    if "val_bpb" in values:
                        scores = "  ".join(f"{name} {score:.3f}" for name, score in values["val_bpb"].items())
                        bar.console.print(f"step {values['step']}: bits per byte {scores}", markup=False)
                        bar.console.print(f"  {values['sample']!r}", markup=False)
                    else:
                        text = f"loss {values['loss']:.3f}, {values['tokens_per_s']:,} tokens/s"
                        bar.update(task, completed=values["step"], description=text)
            if over:
                return


def run(config: TrainConfig) -> None:
    """Run the stage to its end, or go on with it."""
    data = load_tokens(config)
    load_tokenizer(config)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = config.resolved()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # Errors of the settings belong here, not in a worker that Ray would start again.
    check_fits(config, data, config.run.workers)
    if config.run.restore:
        check_continues(restored_state(config.run.restore, config, data), config, data)
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
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.run.keep_checkpoints),
        ),
    )
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(config.metrics_path, config, done), daemon=True)
    follower.start()
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        cause = next(iter(causes.values()), error)
        cause = getattr(cause, "_base_exc", cause)  # without the worker's traceback
        raise ConfigError(f"training failed: {cause}") from error
    finally:
        done.set()
        follower.join()
    print(
        f"{result.checkpoint.path if result.checkpoint else config.run_dir}: step {(result.metrics or {}).get('step')}"
    )


def _cpus_a_worker(config: TrainConfig) -> float:
    """What to reserve of Ray's CPUs: the threads asked for, but never so many that the run could not be placed."""
    import ray

    available = ray.cluster_resources().get("CPU", 1.0)
    return max(0.1, min(float(config.run.threads), (available - 0.5) / config.run.workers))


if __name__ == "__main__":
    run_stage(__doc__, run)
