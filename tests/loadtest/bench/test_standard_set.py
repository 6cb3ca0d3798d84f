"""The standard set resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from loadtest.bench import standard
from loadtest.options import names_that_begin
from loadtest.stub_server import running


def test_measured_parts_are_kept(tmp_path: Path) -> None:
    part = standard.Part("engine", "a stub", running)
    settings = standard.Settings(tmp_path, duration_s=0.3, warmup_s=0, repeats=2, concurrency=(1,))
    standard.measure([part], settings, again=False, quiet=True)
    (tmp_path / "engine-stream.json").unlink()
    before = (tmp_path / "engine-unary.json").read_bytes()
    standard.measure([part], settings, again=False, quiet=True)
    assert (tmp_path / "engine-unary.json").read_bytes() == before
    assert [run["repeat"] for run in json.loads((tmp_path / "engine-stream.json").read_text())["runs"]] == [0, 1]
    assert (tmp_path / "load-unary.png").exists()
    assert standard.to_do(part, settings, again=False) == []
    assert standard.to_do(part, dataclasses.replace(settings, repeats=1), again=False) == [False, True]
    assert standard.to_do(part, settings, again=True) == [False, True]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="--only names 'nothing'"):
        names_that_begin("--only", "nothing", ["haproxy", "bare-1"])
    assert names_that_begin("--only", "ha", ["haproxy", "bare-1"]) == ["haproxy"]
