"""The comparison of the service with that of another revision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench import service_revisions
from loadtest.bench.service_revisions import summary

ROOT = Path(__file__).resolve().parents[3]


def measured(rate: float, **cpu_ms: float) -> dict[str, Any]:
    return {"requests_per_s": rate, "p50_ms": 2 * rate, "p99_ms": 3 * rate, "cpu_ms": cpu_ms}


def test_ratios_are_medians_of_pairs() -> None:
    """A slow moment of the machine affects both measurements of a pair. The ratio of the medians would be 1."""
    rates = [(1.0, 2.0), (2.0, 1.0), (10.0, 20.0), (3.0, 3.0), (1.0, 3.0)]
    rows = summary([{"old": measured(old), "new": measured(new)} for old, new in rates])
    assert rows["requests_per_s"] == {"old": 2.0, "new": 3.0, "ratio": 2.0}


def test_each_revision_has_its_own_parts() -> None:
    rows = summary([{"old": measured(1, replicas=5.0), "new": measured(1, engines=3.0, replicas=2.0)}])
    assert (rows["cpu_ms_old"], rows["cpu_ms_new"]) == ({"replicas": 5.0}, {"engines": 3.0, "replicas": 2.0})


def test_an_unknown_revision_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        service_revisions.main("no-such-revision", None, 1, 1.0)
    assert "git has no worktree of no-such-revision" in capsys.readouterr().err


@pytest.mark.chaos
def test_the_command_compares_a_revision_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    service_revisions.main("HEAD", tmp_path / "result.json", 1, 3.0)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["requests_per_s"]["ratio"] == pytest.approx(1, rel=0.5)
    assert {"engines", "proxy", "ray", "replicas"} <= set(result["cpu_ms_new"])
