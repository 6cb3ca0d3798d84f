"""`tinylm batch` as a user runs it: in several processes, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.batch_jobs import lasting, line_of, mixed_lines, write_lines
from helpers.client import wait_until
from helpers.marked import Mark
from helpers.terminal import TINYLM, shown_on_terminal

LIMIT_S = 180  # the first processes may compile the kernels
N_KILLED = 1500  # lines of a job that is killed: seconds of work, so that it cannot end first


@pytest.fixture
def small(tiny_model_dir: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_model_dir))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [TINYLM, "batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def summary(*arguments: object) -> dict:
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_answers_do_not_depend_on_the_number_of_processes(tmp_path: Path, small: tuple[str, ...]) -> None:
    lines = mixed_lines(150)
    source = write_lines(tmp_path / "in.jsonl", lines)
    outputs = []
    for workers in (1, 3):
        output = tmp_path / f"{workers}.jsonl"
        done = summary(source, output, *small, "--workers", workers)
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["custom_id"] for line in found] == [json.loads(line)["custom_id"] for line in lines]
        usages = [line["response"]["body"].get("usage") for line in found]
        n_tokens = sum(usage["completion_tokens"] for usage in usages if usage)
        assert (done["n_answered"], done["n_failed"], done["completion_tokens"]) == (150, usages.count(None), n_tokens)
        outputs.append(lasting(output.read_text()))
    assert outputs[0] == outputs[1]
    again = run(source, output, *small)
    assert again.stdout.startswith("0 answers after 150 of an earlier run")


@pytest.mark.parametrize("victim", ["job", "job with Ctrl-C", "engine"])
def test_a_killed_job_resumes_without_gaps_or_repeats(tmp_path: Path, small: tuple[str, ...], victim: str) -> None:
    lines = [line_of(f"line {i}", prompt="The dog", max_tokens=50, ignore_eos=True, seed=i) for i in range(N_KILLED)]
    source, output, mark = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", Mark()
    command = [TINYLM, "batch", str(source), str(output), *small, "--workers", "2"]
    with subprocess.Popen(command, env={**os.environ, **mark.environment}, stderr=subprocess.PIPE) as process:
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") > 5, LIMIT_S)
        if victim == "engine":
            mark.signal(signal.SIGKILL, [pid for pid in mark.processes() if pid != process.pid])
        else:
            process.send_signal(signal.SIGKILL if victim == "job" else signal.SIGINT)
        _, messages = process.communicate(timeout=LIMIT_S)
    wait_until(lambda: not mark.processes(), LIMIT_S)
    expected = {"job": -signal.SIGKILL, "job with Ctrl-C": 130, "engine": 1}
    assert process.returncode == expected[victim]
    assert (b"ended with status -9: the same command resumes" in messages) == (victim == "engine")
    left = output.read_bytes()
    kept = left[: left.rfind(b"\n") + 1]
    assert 5 < kept.count(b"\n") < N_KILLED
    done = summary(source, output, *small)
    assert (done["n_kept"], done["n_answered"]) == (kept.count(b"\n"), N_KILLED - kept.count(b"\n"))
    found = output.read_bytes()
    assert found.startswith(kept)
    assert [json.loads(line)["custom_id"] for line in found.splitlines()] == [f"line {i}" for i in range(N_KILLED)]


def test_a_terminal_shows_progress(tmp_path: Path, small: tuple[str, ...]) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(8))
    shown = shown_on_terminal([TINYLM, "batch", str(source), str(tmp_path / "out.jsonl"), *small])
    assert b"8 answers, 1 of them errors in" in b" ".join(shown.split())
    assert "━".encode() in shown


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (line_of("a"), ("--model", "nowhere"), "nowhere"),
        (line_of("a"), ("--kernels", "cuda"), "kernels is 'cuda'"),
        ("{", (), "in.jsonl, line 1 is not JSON"),
        (None, (), "in.jsonl"),
    ],
)
def test_an_error_is_one_line(tmp_path: Path, content: str | None, options: tuple[str, ...], message: str) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    done = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_an_empty_input_has_an_empty_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    assert summary(tmp_path / "in.jsonl", tmp_path / "out.jsonl")["n_lines"] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_job_imports_neither_ray_nor_the_service() -> None:
    code = (
        "import sys, tinylm.cli, tinylm.batch.job, tinylm.batch.processes, tinylm.batch.progress\n"
        "print([name for name in ('ray', 'grpc', 'fastapi', 'starlette', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
