"""Run a batch job: answer the lines of a file that have no answer yet, and append the answers to the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tinylm.batch.engine import LineAnswer
from tinylm.batch.lines import read_ids, request_lines
from tinylm.batch.output import Output

# (lines, number of lines, on_ready) -> the answer to each line, in the order of the lines
Answers = Callable[[Iterable[str], int, Callable[[], None]], Generator[LineAnswer, None, None]]


@dataclass(slots=True)
class Progress:
    """What a job has done. All but the first two fields count only this run."""

    n_lines: int  # of the input
    n_kept: int  # answers of an earlier run
    n_answered: int = 0
    n_failed: int = 0  # answers that are an error
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # since an engine was ready

    @property
    def tokens_per_s(self) -> float:
        """Return the speed, with the tokens of prompts."""
        return (self.prompt_tokens + self.completion_tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def run(source: Path, target: Path, answers: Answers, show: Callable[[Progress], None]) -> Progress:
    """Answer the lines of `source` into `target`, and return what was done.

    answers: calls its `on_ready` when it begins to generate. show: called at the beginning and after each answer.
    Raise OSError, and ValueError for an unreadable line, before anything is generated.
    """
    custom_ids = read_ids(source)
    with Output(target, custom_ids) as output:
        progress = Progress(len(custom_ids), output.n_kept)
        show(progress)
        if progress.n_kept == progress.n_lines:
            return progress
        ready_at = time.monotonic()

        def on_ready() -> None:
            nonlocal ready_at
            ready_at = time.monotonic()

        lines = islice(request_lines(source), output.n_kept, None)
        with closing(answers(lines, progress.n_lines - progress.n_kept, on_ready)) as found:
            for answer in found:
                output.write(answer.text)
                progress.n_answered += 1
                progress.n_failed += answer.failed
                progress.prompt_tokens += answer.prompt_tokens
                progress.completion_tokens += answer.completion_tokens
                progress.seconds = time.monotonic() - ready_at
                show(progress)
    return progress
