"""A batch job that was cut at any byte of its output ends as an unbroken job, and other files stay unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import pytest
from helpers.batch_jobs import lasting, mixed_lines, write_lines
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm.batch import job
from tinylm.batch.engine import BatchEngine, EngineSettings, LineAnswer
from tinylm.batch.output import Output
from tinylm.batch.processes import InOrder

LINES = mixed_lines(9, max_tokens=4)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> BatchEngine:
    return BatchEngine(EngineSettings(tiny_model_dir))


@pytest.fixture(scope="module")
def run(engine: BatchEngine, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], job.Progress]:
    """Return a function that runs the job on an output with some content. `run.output` is the file."""
    directory = tmp_path_factory.mktemp("job")
    source, output = write_lines(directory / "in.jsonl", LINES), directory / "out.jsonl"

    def answers(lines: Iterable[str], n_lines: int, on_ready: Callable[[], None]) -> Generator[LineAnswer, None, None]:
        waiting = list(lines)
        assert len(waiting) == n_lines
        yield from engine.answer(waiting)

    def run(content: bytes) -> job.Progress:
        output.write_bytes(content)
        return job.run(source, output, answers, lambda progress: None)

    run.output = output
    return run


@pytest.fixture(scope="module")
def whole(run, engine: BatchEngine) -> bytes:
    """The output of an unbroken job. Its answers are those that each line gets alone."""
    run(b"")
    content = run.output.read_bytes()
    alone = "".join(engine.answer([line])[0].text for line in LINES)
    assert lasting(content.decode()) == lasting(alone)
    return content


@given(share=st.floats(0, 1))
@example(share=0)
@example(share=1)
def test_a_job_cut_at_any_byte_ends_like_an_unbroken_job(run, whole: bytes, share: float) -> None:
    cut = whole[: round(share * len(whole))]
    kept = cut[: cut.rfind(b"\n") + 1]
    progress = run(cut)
    found = run.output.read_bytes()
    assert found.startswith(kept)
    assert lasting(found.decode()) == lasting(whole.decode())
    n_kept = kept.count(b"\n")
    assert (progress.n_lines, progress.n_kept, progress.n_answered) == (len(LINES), n_kept, len(LINES) - n_kept)
    assert progress.n_failed == sum(
        json.loads(line)["response"]["status_code"] != 200 for line in found.splitlines()[n_kept:]
    )


@given(st.data())
def test_a_file_of_other_content_is_refused_and_unchanged(run, whole: bytes, data: st.DataObject) -> None:
    lines = whole.splitlines(keepends=True)
    chosen = st.lists(st.sampled_from([*lines, b"\n", b"{}\n", b"notes"]), min_size=1, max_size=12).map(b"".join)
    content = data.draw(st.one_of(st.binary(min_size=2), chosen, st.permutations(lines).map(b"".join)))
    if whole.startswith(content):
        return
    with pytest.raises(FileExistsError, match=r"out\.jsonl, line \d+ is not (an answer to 'line|the end)"):
        run(content)
    assert run.output.read_bytes() == content


def test_an_output_with_more_answers_than_requests_is_refused(run, whole: bytes) -> None:
    with pytest.raises(FileExistsError, match="line 10 is not the end"):
        run(whole + b"{")


def test_only_one_job_writes_a_file(tmp_path: Path) -> None:
    with (
        Output(tmp_path / "new" / "out.jsonl", ["a"]),
        pytest.raises(FileExistsError, match="another process writes"),
    ):
        Output(tmp_path / "new" / "out.jsonl", ["a"])


def test_a_device_is_no_output() -> None:
    with pytest.raises(FileExistsError, match="/dev/null is not a regular file"):
        Output(Path("/dev/null"), ["a"])


@given(st.permutations(range(12)))
def test_answers_leave_in_the_order_of_the_lines(order: list[int]) -> None:
    """As early as possible: all answers before the first gap."""
    in_order, found = InOrder(), []
    for i, number in enumerate(order):
        found += in_order.add(number, number)
        arrived = set(order[: i + 1])
        assert found == list(range(next(n for n in range(13) if n not in arrived)))
        assert in_order.n_taken == len(found)
