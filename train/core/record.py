"""What a run leaves for people while it trains: `metrics.jsonl`, its curve, and a progress bar that follows it.

The lines are `train.core.loop`'s, and who runs the loop is `train.run`'s and `train.alone`'s business.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tinylm.system.files import check_file, check_own, is_own_png
from train.config import TrainConfig
from train.core.curve import draw_curve
from train.core.metrics import is_of_a_run, metrics_text, read_metrics, write_metrics
from train.core.schedule import total_steps
from train.stage import progress


@contextmanager
def recorded(config: TrainConfig, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield the function that writes a line of a run that resumes after `step`; draw the curve after validations.

    Lines of later steps are removed first, since the run writes them again. Raises FileExistsError when the metrics or
    the curve in the run's directory are not those of a run.
    """
    metrics, picture = config.metrics_path, config.metrics_path.with_name("curve.png")
    check_own(metrics, is_of_a_run)
    if not metrics.exists():  # the curves of older runs do not name their maker
        check_own(picture, is_own_png)
    for path in (metrics, picture):
        check_file(path)
    write_metrics(metrics, read_metrics(metrics, step))

    def log(values: dict[str, Any]) -> None:
        with metrics.open("a", encoding="utf-8") as file:
            file.write(metrics_text([values]))
        if "val_bpb" in values:
            draw_curve(read_metrics(metrics), picture)

    try:
        yield log
    finally:
        draw_curve(read_metrics(metrics), picture)


@contextmanager
def followed(config: TrainConfig) -> Iterator[None]:
    """Shows the progress of a run from its metrics file, whichever process writes it, until the block is left."""
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(config, done), daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(config: TrainConfig, done: threading.Event) -> None:
    """Each validation is a line of its own."""
    path, steps = config.metrics_path, total_steps(config.run, config.shape)
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
                        bar.console.print(f"step {values['step']}: bits per byte {scores}")
                        bar.console.print(f"  {values['sample']!r}")
                    else:
                        text = f"loss {values['loss']:.3f}, {values['tokens_per_s']:,} tokens/s"
                        bar.update(task, completed=values["step"], description=text)
            if over:
                return
