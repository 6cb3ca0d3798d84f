"""The files that `--output`, `--out` and `--plot` may replace. Commands refuse other files before they measure."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loadtest.bench.peers.__main__ import main as peers
from loadtest.cli import app
from loadtest.results import html_report, result_file

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Return a result with one run and without histograms, because drawing them takes long."""
    found = result_file.read(RESULTS / "standard" / "engine-unary.json")
    return {**found, "runs": [{**found["runs"][0], "histograms": {}}]}


def refused(*arguments: object) -> str:
    """Run a command that must fail before it calls the service, which does not exist. Return its output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 1
    return done.output


@pytest.mark.parametrize("command", ["run", "selftest"])
@pytest.mark.parametrize("name", ["res.csv", "res.CSV", "x.html", "rate.0.5"])
def test_output_must_be_a_json_file(tmp_path: Path, command: str, name: str) -> None:
    """The CSV would replace `res.csv`, and rate.0.5 and rate.0.7 would have the same CSV."""
    said = refused(command, "--output", tmp_path / name)
    assert "--output is" in said
    assert "must end in .json" in said
    assert not list(tmp_path.iterdir())


def test_output_must_not_replace_the_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text("Once\n")
    (tmp_path / "link.json").symlink_to(prompts)
    for name in ("prompts.json", "link.json"):
        assert "which --prompts reads" in refused("run", "--prompts", prompts, "-o", tmp_path / name)
    assert prompts.read_text() == "Once\n"


def test_output_must_not_replace_a_foreign_csv(tmp_path: Path) -> None:
    (tmp_path / "res.csv").write_text("name,age\n")
    assert "res.csv exists and TinyLM did not write it" in refused("run", "-o", tmp_path / "res.json")
    assert (tmp_path / "res.csv").read_text() == "name,age\n"


def test_a_result_is_replaced_with_its_csv(tmp_path: Path, measured: dict[str, Any]) -> None:
    for label in ("old", "new"):
        result_file.check_output(tmp_path / "res.json")
        result_file.write(tmp_path / "res.json", {**measured, "label": label})
    assert json.loads((tmp_path / "res.json").read_text())["label"] == "new"
    assert len(list(csv.DictReader((tmp_path / "res.csv").open()))) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_device_gets_only_the_json(tmp_path: Path, measured: dict[str, Any]) -> None:
    os.mkfifo(tmp_path / "res")
    reader = os.open(tmp_path / "res", os.O_RDONLY | os.O_NONBLOCK)
    result_file.check_output(tmp_path / "res")
    result_file.write(tmp_path / "res", {**measured, "runs": []})
    assert json.loads(os.read(reader, 1 << 16))["runs"] == []
    os.close(reader)
    (tmp_path / "null").symlink_to("/dev/null")
    result_file.write(tmp_path / "null", measured)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "res"]


def test_a_csv_that_links_to_the_json_is_not_written(tmp_path: Path, measured: dict[str, Any]) -> None:
    (tmp_path / "res.csv").symlink_to("res.json")
    with pytest.raises(FileExistsError):
        result_file.write(tmp_path / "res.json", measured)
    assert json.loads((tmp_path / "res.json").read_text()) == measured


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("report.html", Path.mkdir),
        ("report.html", lambda path: path.symlink_to("gone")),
        ("load-unary.png", Path.touch),
        ("load-unary.png", os.mkfifo),
    ],
)
def test_a_report_replaces_no_other_file(
    tmp_path: Path, measured: dict[str, Any], name: str, kind: Callable[[Path], None]
) -> None:
    kind(tmp_path / name)
    before = (tmp_path / name).lstat().st_ino
    with pytest.raises(FileExistsError, match=name):
        html_report.write([measured], tmp_path)
    assert [(path.name, path.lstat().st_ino) for path in tmp_path.iterdir()] == [(name, before)]


def test_a_report_replaces_an_older_report(tmp_path: Path, measured: dict[str, Any]) -> None:
    for label in ("old", "new"):
        html_report.write([{**measured, "label": label}], tmp_path)
    assert "<h2>new</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "res.png", "--plot", "res.png"], "--out and --plot are both"),
        (["--out", "res.json", "--plot", "res.json"], "must end in .png"),
        (["--out", "res.json"], "res.png exists and TinyLM did not write it"),
        (["--out", "."], "is a directory"),
    ],
)
def test_peers_refuses_to_lose_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "res.png").write_bytes(b"mine")
    command = typer.Typer()
    command.command()(peers)
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
