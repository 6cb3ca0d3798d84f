"""The comparison of steps with and without AMX tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.bench import tiles
from tinylm import bench
from tinylm.kernels.numba import amx


def test_the_command_compares_both_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without AMX, the command says that there is nothing to compare."""
    monkeypatch.setattr(bench, "TEXT_TOKENS", 100)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    out = tmp_path / "tiles.json"
    if not amx.permitted():
        with pytest.raises(SystemExit):
            tiles.main(out, "1,6", "8", 2)
        assert "this CPU has no AMX tiles" in capsys.readouterr().err
        return
    tiles.main(out, "1,6", "8", 2)
    result = json.loads(out.read_text())
    assert list(result["cases"]) == ["decode 1", "decode 6", "prompt of 8"]
    for case, row in result["cases"].items():
        assert all(len(times) == 2 and min(times) > 0 for times in result["rounds_ms"][case].values())
        assert row["vectors_ms"] / row["tiles_ms"] == pytest.approx(row["ratio"], rel=0.5)
    assert amx.fewest_tokens() == amx.FEWEST_TOKENS == tiles.FORMS["tiles"]
