"""The record of a run: `metrics.jsonl` with a JSON object per log line or validation, its curve, and a progress bar.

A killed run leaves lines of steps after its last checkpoint, and perhaps half a line. Reading skips both.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from tinylm.system.files import as_png, check_file, check_own, is_own_png, write_file
from tinylm.system.text_files import lines_of
from train.config import TrainConfig
from train.data.progress import progress

Line = dict[str, Any]


def read_metrics(path: Path, up_to_step: float = float("inf")) -> list[Line]:
    """Return the complete lines of the steps up to `up_to_step`, in their order; none when there is no such file."""
    lines = []
    for line in lines_of(path.read_text(encoding="utf-8")) if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the run was killed while it wrote this line
            continue
    return [line for line in lines if line["step"] <= up_to_step]


def metrics_text(lines: Iterable[Line]) -> str:
    """Return the content of a metrics file with these lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


@contextmanager
def recorded(config: TrainConfig, step: int) -> Iterator[Callable[[Line], None]]:
    """Yield a function that writes a line of a run that resumes after `step`; draw the curve after validations.

    Lines of later steps are removed first, because the run writes them again. Raises FileExistsError when the metrics
    or the curve in the run's directory do not belong to a run.
    """
    metrics, picture = config.metrics_path, config.metrics_path.with_name("curve.png")
    check_own(metrics, _is_of_a_run)
    if not metrics.exists():  # the curve of an older run does not name TinyLM
        check_own(picture, is_own_png)
    for path in (metrics, picture):
        check_file(path)
    write_file(metrics, metrics_text(read_metrics(metrics, step)))

    def log(line: Line) -> None:
        with metrics.open("a", encoding="utf-8") as file:
            file.write(metrics_text([line]))
        if "val_bpb" in line:
            write_file(picture, loss_curve(read_metrics(metrics)))

    try:
        yield log
    finally:
        write_file(picture, loss_curve(read_metrics(metrics)))


def _is_of_a_run(content: bytes) -> bool:
    """Return whether a run wrote this. A killed run may leave half a line and nothing else."""
    first, newline, _ = content.partition(b"\n")
    return not content or (first.startswith(b'{"step"') and (b'"tokens"' in first or not newline))


def loss_curve(lines: Sequence[Line]) -> bytes:
    """Draw training loss (nats per token) and bits per byte by collection against tokens seen; return the PNG."""
    from matplotlib.figure import Figure  # slow to import

    losses = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_bpb" in line]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["tokens"] / 1e6 for line in losses], [line["loss"] for line in losses], linewidth=0.8)
    left.set(xlabel="million tokens seen", ylabel="nats per token", title="training loss")
    for name in validations[-1]["val_bpb"] if validations else []:
        points = [(line["tokens"] / 1e6, line["val_bpb"][name]) for line in validations if name in line["val_bpb"]]
        right.plot(*zip(*points, strict=True), marker=".", label=f"{name} {points[-1][1]:.3f}")
    right.set(xlabel="million tokens seen", ylabel="bits per byte", title="held-out text, averaged weights")
    if validations:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: the lines leave no room
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return as_png(figure, 110)


@contextmanager
def followed(config: TrainConfig) -> Iterator[None]:
    """Show the progress of a run until the block ends. Any process may write the run's metrics file."""
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(config, done), daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(config: TrainConfig, done: threading.Event) -> None:
    with progress("steps") as bar:
        task = bar.add_task("training", total=config.steps)
        n_shown = 0
        is_over = False
        while not is_over:
            is_over = done.wait(1.0)
            lines = read_metrics(config.metrics_path)
            for line in lines[n_shown:]:
                _show(line, bar, task)
            n_shown = len(lines)


def _show(line: Line, bar: Progress, task: TaskID) -> None:
    """Print a validation above the bar; move the bar to a log line's step."""
    if "val_bpb" in line:
        scores = "  ".join(f"{name} {score:.3f}" for name, score in line["val_bpb"].items())
        bar.console.print(f"step {line['step']}: bits per byte {scores}")
        bar.console.print(f"  {line['sample']!r}")
    else:
        text = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,} tokens/s"
        bar.update(task, completed=line["step"], description=text)
