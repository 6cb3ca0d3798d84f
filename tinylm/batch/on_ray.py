"""Answer the lines of a batch job with Ray Data: a pool of actors, each with one engine, on a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from tinylm.batch.engine import BatchEngine, EngineSettings, LineAnswer
from tinylm.kernels.blas import run_limited

LINES_PER_TASK = 128  # an actor answers them together; their answers arrive together


def answers(
    lines: Iterable[str], n_lines: int, on_ready: Callable[[], None], settings: EngineSettings, n_workers: int | None
) -> Generator[LineAnswer, None, None]:
    """Yield the answer to each line, in the order of the lines.

    The lines go to the cluster of RAY_ADDRESS, or to a Ray that starts and ends here. Its nodes need TinyLM and the
    model directory at the same path. n_workers: the most actors; None means one for each core of the cluster.
    on_ready: called before the actors start. Raise ValueError if one of them fails.
    """
    with_own_ray = not ray.is_initialized()
    if with_own_ray:
        _start()
    try:
        most = n_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        n_tasks = max(min(most, n_lines), math.ceil(n_lines / LINES_PER_TASK))
        on_ready()
        yield from _answers(list(lines), n_tasks, replace(settings, model=settings.model.resolve()), most)
    except RayError as error:
        raise ValueError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if with_own_ray:
            ray.shutdown()


def _start() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a Ray on this machine."""
    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address, **quiet)
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default is nice 15
        ray.init("local", include_dashboard=False, **quiet)


def _answers(lines: list[str], n_tasks: int, settings: EngineSettings, most: int) -> Iterator[LineAnswer]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the job shows one
    context.print_on_execution_start = False
    tables: Iterable[Any] = (
        ray.data.from_items([{"line": line} for line in lines], override_num_blocks=n_tasks)
        .map_batches(
            _Answerer,
            fn_constructor_args=[settings],
            batch_size=None,  # all lines of a task
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(most, n_tasks)),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    )
    for table in tables:
        for row in table.to_pylist():
            yield LineAnswer(**row)


class _Answerer:
    """Answers the lines of tasks in an actor."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = BatchEngine(settings)

    def __call__(self, table: Any) -> Any:
        """table: pyarrow's, with a column of lines. Return a table with a column for each field of LineAnswer."""
        answers = run_limited(1, partial(self._engine.answer, table["line"].to_pylist()))
        return pa.Table.from_pylist([asdict(answer) for answer in answers])
