"""The comparison of the engine with that of another revision."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from loadtest.bench import revisions
from loadtest.bench.revisions import FORMS, Worker, summary
from tinylm.kernels.numba import describe

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.chaos
def test_the_command_compares_a_revision_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "leaner-step.json"
    form = describe().removeprefix("numba, ")
    if form not in FORMS:
        pytest.skip("the command does not know the form of the kernels of this CPU")
    revisions.main("HEAD", out, "1,6", "8", 2, 60, form)
    result = json.loads(out.read_text())["forms"][form]
    assert list(result["cases"]) == ["decode 1", "decode 6", "prompt of 8"]
    assert result["texts"] == result["equal_texts"] == 60
    for row in result["cases"].values():
        assert row["old_ms"] / row["new_ms"] == pytest.approx(row["ratio"], rel=0.5)
        assert 0 < row["of_peak"] < 1
    assert "60 of 60 texts are equal" in capsys.readouterr().out
    trees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert "/revision " not in trees, "the worktree of the other revision is still there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-revision",), "git has no worktree of no-such-revision"),
        (("HEAD", None, "1", "8", 1, 1, "x"), "--forms"),
    ],
)
def test_an_impossible_comparison_is_refused_in_one_line(
    arguments: tuple, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    defaults = (None, "1", "8", 1, 1, "avx2")
    with pytest.raises(SystemExit):
        revisions.main(*arguments, *defaults[len(arguments) - 1 :])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_ratios_are_medians_of_pairs() -> None:
    """Pairs measured in the same round share its noise. The ratio of the medians would be 5."""
    case = {"old": [1.0, 5.0, 30.0], "new": [1.0, 1.0, 10.0], "of_peak": [0.4, 0.9, 0.5]}
    row = summary({"decode 1": case})["decode 1"]
    assert row == {"old_ms": 5.0, "new_ms": 1.0, "ratio": 3.0, "of_peak": 0.5}


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tinylm.py").write_text("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="ended before it answered"):
        Worker(tmp_path, ())
