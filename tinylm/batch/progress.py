"""The progress bar of a batch job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tinylm.batch.job import Progress
from tinylm.terminal.output import PlainConsole


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows progress on standard error, if that is a terminal."""
    console = PlainConsole(stderr=True)
    with Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # otherwise it prints an empty line
    ) as bar:
        task = bar.add_task("loading the model")

        def show(progress: Progress) -> None:
            speed = f"answers · {progress.tokens_per_s:,.0f} tokens/s" if progress.n_answered else "loading the model"
            done = progress.n_kept + progress.n_answered
            bar.update(task, total=progress.n_lines, completed=done, description=speed)

        yield show
