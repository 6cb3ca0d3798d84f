"""The Makefile's targets keep the files and directories of the user."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the Makefile and files of a user."""
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "notes.egg-info").mkdir()
    (tmp_path / "notes.egg-info" / "notes").write_text("mine")
    return tmp_path


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=directory, capture_output=True, text=True, check=False)


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["server.pem", "ca.pem"])
def test_an_existing_certificate_is_kept(checkout: Path, name: str) -> None:
    (checkout / "tls").mkdir()
    (checkout / "tls" / name).write_text("mine")
    before = contents(checkout)
    done = make(checkout, "certificate")
    assert f"tls/{name} exists" in done.stderr
    assert done.returncode != 0
    assert contents(checkout) == before


def test_other_files_beside_the_certificate_are_kept(checkout: Path) -> None:
    (checkout / "tls").mkdir()
    (checkout / "tls" / "key.pem").write_text("mine")
    assert make(checkout, "certificate").returncode == 0
    made = contents(checkout / "tls")
    assert made.pop("key.pem") == "mine"
    assert "PRIVATE KEY" in made["server.pem"]
    assert "PRIVATE KEY" not in made["ca.pem"]
    assert (checkout / "tls" / "server.pem").stat().st_mode & 0o777 == 0o600
    assert (checkout / "tls" / "ca.pem").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("target", ["clean", ".venv/bin/python"])
def test_a_venv_directory_of_other_content_is_kept(checkout: Path, target: str) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "notes").write_text("mine")
    before = contents(checkout)
    assert ".venv is not a virtual environment" in make(checkout, target).stderr
    assert contents(checkout) == before


@pytest.mark.parametrize("target", ["clean", "docs"])
def test_a_site_that_mkdocs_did_not_build_is_kept(checkout: Path, target: str) -> None:
    (checkout / "site").mkdir()
    (checkout / "site" / "index.html").write_text("mine")
    before = contents(checkout)
    done = make(checkout, target, "--old-file=.venv/development")
    assert "site was not built by make docs" in done.stderr
    assert contents(checkout) == before


def test_clean_removes_only_generated_files(checkout: Path) -> None:
    before = contents(checkout)
    for name in (
        ".venv/pyvenv.cfg",
        ".venv/lib/x.py",
        ".clients/llm/installed",
        "site/index.html",
        "tinylm.egg-info/PKG-INFO",
        ".ruff_cache/x",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text('<meta name="generator" content="mkdocs-1">')
    assert make(checkout, "clean").returncode == 0
    assert contents(checkout) == before
